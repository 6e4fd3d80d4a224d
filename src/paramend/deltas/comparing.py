"""Comparing: two models read once, side by side, and what is different as a delta."""

import hashlib
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from paramend.checkpoints.checkpoint import Checkpoint, open as open_checkpoint
from paramend.checkpoints.report import read_by
from paramend.deltas.checksums import Checksum, both, bytes_of, hasher
from paramend.deltas.delta import Delta
from paramend.deltas.manifest import BESIDE, FileChange, LeafRow, name_of
from paramend.deltas.payload import Table, itemsize_of
from paramend.disk.permissions import access_of_paths
from paramend.edits.memory import editable
from paramend.errors import BadArgument, Unsupported
from paramend.evidence.comparisons import Comparer, same_bytes
from paramend.evidence.moves import moves
from paramend.evidence.pairing import named
from paramend.evidence.streams import Stream, stream_of
from paramend.formats.shards import Shards
from paramend.leaves.leaves import Editable, keys_of
from paramend.leaves.outlines import Outlined
from paramend.leaves.specs import AnyTree, Array, Spec
from paramend.reports import wording
from paramend.reports.progress import Meter, Progress
from paramend.rewriting.provenance import FILE as RECORD
from paramend.rewriting.sidecars import sidecars

Encoding = Literal["overwrite", "xor"]


def delta(
    before: AnyTree,
    after: AnyTree,
    *,
    encoding: Encoding = "overwrite",
    checksum: Checksum = "sha256",
    progress: Progress | None = None,
) -> Delta:
    """What is different in a model that was made of another: `delta.apply(before)` is `after`, bit for bit.

    Either side is a tree, a checkpoint from `pm.open`, or the path of one; quantised weights are compared as they are
    stored. Files are read once, in bounded memory. The new values are in a temporary file until the delta is saved.

    Args:
        before: the base.
        after: the outcome.
        encoding: "overwrite" holds new values; "xor" what old and new bytes differ in, which compresses better.
        checksum: of leaves: "sha256", or one that slime has, for `save(slime=True)`: "xxh3-128", "blake3", "adler32".
        progress: called with an `Event` as bytes are compared.

    Returns:
        A `Delta`: its `rows`, `.save(directory)`, `.apply(tree)`, and `.then(later)`; `pm.Delta.load(directory)`.

    Raises:
        Unsupported: the values of a leaf are not available.
        CannotRead: a path does not exist.

    >>> found = delta({"w": np.zeros(1000), "b": np.ones(1)}, {"w": np.eye(1, 1000)[0], "b": np.ones(1)})
    >>> print(found)
    1 changed, 1 kept: 1 element, 12 B
    <BLANKLINE>
    changed: 1 leaf
      w  float64[1000]  1 of 1,000
    """
    if encoding not in ("overwrite", "xor"):
        raise BadArgument(f"encoding={encoding!r} is none", hint='encoding="overwrite" or encoding="xor"')
    hasher(checksum)  # for its error
    with ExitStack() as stack:

        def opened(side: AnyTree) -> AnyTree:
            return stack.enter_context(open_checkpoint(side)) if isinstance(side, str | os.PathLike) else side

        old, new = (editable(opened(side), raw=True) for side in (before, after))
        table = stack.enter_context(closing(Table()))
        pool = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="paramend"))
        meter = Meter(progress, sum(side.nbytes(n) for side in (old, new) for n in side.index.numbers))
        comparing = _Comparing(old, new, table, pool, checksum, encoding == "xor", meter)
        rows, files = tuple(comparing.rows()), tuple(comparing.files())
        said, payload = (*comparing.said, *_unheld(old, new)), table.finish(xor=comparing.xor)
        access = access_of_paths([*read_by(old), *read_by(new)])
        return Delta(rows, files, checksum, comparing.xor, new.index.separator, said, payload, access=access)


@dataclass
class _Comparing:
    old: Editable
    new: Editable
    table: Table
    pool: ThreadPoolExecutor
    checksum: str
    xor: bool
    meter: Meter
    said: list[str] = field(default_factory=list)
    known: dict[tuple[int | None, int | None], tuple[str, str, int, str]] = field(default_factory=dict)

    def rows(self) -> Iterator[LeafRow]:
        there, here = named(self.old), named(self.new)
        pairs = {number: there.get(name) for name, number in here.items()}
        gone = [number for name, number in there.items() if name not in here]
        come = [number for number, a in pairs.items() if a is None]
        moved = moves(self.old, gone, self.new, come, Comparer(Meter(None, 0)))
        pairs |= {b: a for a, b in moved.items()}
        yield from (self._row(a, b) for b, a in pairs.items())
        yield from (self._row(a, None) for a in gone if a not in moved)

    def _row(self, a: int | None, b: int | None) -> LeafRow:
        was, before = (None, None) if a is None else (keys_of(self.old.index.paths[a]), self.old.spec(a))
        path, spec = (None, None) if b is None else (keys_of(self.new.index.paths[b]), self.new.spec(b))
        one = None if a is None else self.old.ties.get(a, a), None if b is None else self.new.ties.get(b, b)
        if one not in self.known:  # of a leaf with several paths, the new values are held once
            self.known[one] = self._compared(a, b, name_of(path or was or (), self.new.index.separator))
        base, result, changed, held = self.known[one]
        nbytes = self.new.nbytes(b) if held and b is not None else 0
        return LeafRow(path, was, spec, before, base, result, changed, held, nbytes)

    def _compared(self, a: int | None, b: int | None, name: str) -> tuple[str, str, int, str]:
        """The checksums of two leaves, how many elements differ, and the name that these are held under, or ""."""
        old = None if a is None else stream_of(self.old, a)
        new = None if b is None else stream_of(self.new, b)
        if old is not None and new is not None and old.spec == new.spec:
            return self._changes(old, new, name)
        base = "" if old is None else self._whole(old, "")
        return (base, "", 0, "") if new is None else (base, self._whole(new, name), new.spec.size, name)

    def _whole(self, stream: Stream, name: str) -> str:
        """The checksum of a leaf, which goes into the table if it has a name there."""
        digest = hasher(self.checksum)

        def pieces() -> Iterator[memoryview]:
            for _, piece in bytes_of(stream):
                digest.update(piece.data)
                self.meter.advance(len(piece))
                yield piece.data

        if name:
            self.table.whole(name, stream.spec, pieces())
        else:
            deque(pieces(), maxlen=0)
        return digest.hexdigest()

    def _changes(self, old: Stream, new: Stream, name: str) -> tuple[str, str, int, str]:
        """What `_compared` says of two leaves of one spec, whose new elements go into the table."""
        if old.size != new.size:
            raise Unsupported(f"{name} cannot be compared: its values, {new.spec}, are packed on one side")
        base, changed, width = hasher(self.checksum), 0, itemsize_of(new.spec)
        result = None  # until a byte differs, the two are one
        for start, one, two in both(old, new):
            self.meter.advance(len(one) + len(two), name)
            same = same_bytes(one, two)
            result = result or (None if same else base.copy())
            second = None if result is None else self.pool.submit(result.update, two.data)
            base.update(one.data)
            if not same:
                values = two ^ one if self.xor else two
                changed += self.table.window(name, start, values, _differ(one, two, width), new.spec.dtype)
            if second is not None:
                second.result()
        return base.hexdigest(), (result or base).hexdigest(), changed, name if changed else ""

    def files(self) -> Iterator[FileChange]:
        """The files beside the weights of two directories that differ, whose new content goes into the table."""
        old, new = _beside(self.old), _beside(self.new)
        if old is None or new is None:
            return
        for name in sorted({*old, *new}):
            before, after = (side[name].read_bytes() if name in side else None for side in (old, new))
            if before != after and not BESIDE.fullmatch(name):
                self.said.append(f"not in the delta: {name}, which differs")
            elif before != after:
                self.table.add(f"file/{name}", Spec((len(after or b""),), "uint8"), [after or b""])
                yield FileChange(name, _sha256(before), _sha256(after), len(after or b""))


def _differ(one: Array, two: Array, width: int) -> Array:
    """Which elements differ, bit by bit."""
    one, two = (side.view(f"u{min(width, 8)}") for side in (one, two))
    differ = np.not_equal(one, two)
    return np.asarray(differ.reshape(-1, 2).any(1) if width == 16 else differ)


def _beside(leaves: Editable) -> dict[str, Path] | None:
    """The files beside the weights by name; None for a tree, or a checkpoint that is one file."""
    source = leaves.source if isinstance(leaves, Checkpoint) else None
    if not isinstance(source, Shards):
        return None
    names = (file.name for file in sidecars(source)[0] if "/" not in file.name and file.name != RECORD)
    return {name: source.folder / name for name in names}


def _sha256(data: bytes | None) -> str:
    return "" if data is None else hashlib.sha256(data).hexdigest()


def _unheld(old: Editable, new: Editable) -> Iterator[str]:
    """What else differs in two checkpoints of one format: a delta does not hold it."""
    one, two = (leaves.source if isinstance(leaves, Checkpoint) else None for leaves in (old, new))
    if one is None or two is None or one.format != two.format:
        return
    with np.printoptions(threshold=sys.maxsize):  # GGUF has arrays there
        sides = [{key: repr(value) for key, value in source.metadata.items()} for source in (one, two)]
    metadata = sorted(key for key in {**sides[0], **sides[1]} if sides[0].get(key) != sides[1].get(key))
    if metadata:
        yield f"not in the delta: the metadata of the file: {wording.listing(list(map(str, metadata)), 4)}"
    if isinstance(one, Outlined) and isinstance(two, Outlined):
        old_ones, new_ones = ({keys: repr(value) for keys, value in each.outline().others} for each in (one, two))
        others = [keys for keys in {**old_ones, **new_ones} if old_ones.get(keys) != new_ones.get(keys)]
        if others:
            shown = wording.listing(["/".join(map(str, keys)) for keys in others], 4)
            yield f"not in the delta: {wording.plural(len(others), 'entry', 'entries')} without an array: {shown}"
