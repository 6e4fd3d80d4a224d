"""Applying: the outcome of a delta, made of its base, whose checksums are compared first."""

import hashlib
import json
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from paramend.anatomy.documents import Change, Document
from paramend.arrays.initializers import NOWHERE
from paramend.checkpoints.assemble import assemble
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.checkpoints.gathering import ties_of
from paramend.deltas.checksums import hasher
from paramend.deltas.comparing import checksum_of
from paramend.deltas.patched import Patched
from paramend.deltas.payload import itemsize_of
from paramend.deltas.rows import FileRow, Keys, LeafRow, by_name
from paramend.edits.damage import Damage
from paramend.edits.memory import Memory, editable
from paramend.edits.plan import call
from paramend.edits.structure import enter, relocate
from paramend.errors import BadCheckpoint, UnexpectedChange, Unsupported
from paramend.evidence.pairing import named
from paramend.evidence.streams import stream_of
from paramend.formats.jsontext import CONFIG
from paramend.formats.shards import Shards
from paramend.grafting.inserting import native, nested
from paramend.leaves.leaves import Editable, labels_of
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Stored, Zeros
from paramend.reports import wording
from paramend.reports.progress import Meter, Progress

if TYPE_CHECKING:
    from paramend.deltas.delta import Delta

# A row, and the leaf of the base that it is for; None if it adds one.
Task = tuple[LeafRow, int | None]


def applied(delta: "Delta", tree: Any, progress: Progress | None) -> Any:
    """The outcome of a delta; the tree itself if it is that already. `UnexpectedChange` if it is neither that nor the
    base."""
    leaves = editable(tree, raw=True)
    base = _Base(delta, leaves, progress)
    tasks = base.tasks()
    if isinstance(leaves, Checkpoint):
        documents = _documents(delta, leaves)
        if not tasks and not documents:
            return tree
        texts = {document.name: document for document in (*leaves.texts, *documents)}
        made = leaves.planned(replace(leaves.plan, texts=tuple(texts.values())))
        return (_checkpoint(base, made, tasks) if tasks else made).as_stored(cast(Checkpoint, tree).raw)
    return _in_memory(base, cast(Memory, leaves), tasks) if tasks else tree


def origin_of(delta: "Delta", leaves: Editable, task: Task) -> Origin:
    """Where the new values of a leaf come from."""
    row, number = task
    if row.whole or number is None:
        made = whole_of(delta, row)
        return made.whole if isinstance(made.whole, Stored) else made
    whole = leaves.expression(number)
    if whole.spec.dtype.startswith("key<"):
        raise Unsupported(f"{delta.called(row)} holds typed PRNG keys, which a delta cannot change")
    return Patched(whole, delta.payload.changes(row.held, whole.nbytes, itemsize_of(whole.spec)))


def whole_of(delta: "Delta", row: LeafRow) -> Patched:
    """A leaf that a delta holds whole."""
    assert row.spec is not None
    found = delta.payload.whole(row.held) or Zeros(row.spec)
    if found.spec != row.spec:
        raise BadCheckpoint(f"{delta.called(row)}: the delta says {row.spec} and holds {found.spec}")
    return Patched(found, delta.payload.changes(row.held, row.nbytes, itemsize_of(row.spec)))


class _Base:
    """What a delta is applied to: is it its base, or its outcome?"""

    def __init__(self, delta: "Delta", leaves: Editable, progress: Progress | None) -> None:
        self.delta, self.leaves = delta, leaves
        self.numbers = named(leaves)
        self.before, self.after = (by_name(delta.rows, side) for side in ("was", "path"))
        self.meter = Meter(progress, sum(map(leaves.nbytes, self.numbers.values())))
        self._turn = threading.Lock()

    def tasks(self) -> list[Task]:
        """What is to be done; nothing if it was done."""
        slime = self.delta.slime
        as_base = (
            all(name in self.numbers for name in self.before) if slime else self.numbers.keys() == self.before.keys()
        )
        as_result = not slime and self.numbers.keys() == self.after.keys()
        rows = self.before if as_base else self.after
        if not as_base and not as_result:
            raise self._other(self._names())
        found = [self.numbers[name] for name in rows]
        with ThreadPoolExecutor(2, thread_name_prefix="paramend") as pool:
            sums = dict(zip(rows, pool.map(self._sum, found), strict=True))
        if as_result and all(self._is_result(name, sums[name]) for name in rows):
            return []
        wrong = [row for name, row in rows.items() if not (as_base and self._fits(name, row, sums[name]))]
        if wrong:
            raise self._other({self.delta.called(row): "its bytes differ" for row in wrong})
        tasks: list[Task] = [
            (row, self.numbers[name])
            for name, row in rows.items()
            if row.kind != "kept" and not (row.kind == "changed" and sums[name] == row.result)
        ]
        return tasks + [(row, None) for row in self.delta.rows if row.was is None]

    @property
    def rows(self) -> dict[int, LeafRow]:
        """The rows by the leaves of the base that they are for."""
        return {self.numbers[name]: row for name, row in self.before.items()}

    def differs(self) -> set[int]:
        """The leaves with several paths that get other values under each."""
        found: dict[int, set[tuple[str, Any]]] = {}
        for number, row in self.rows.items():
            if number in self.leaves.ties:
                found.setdefault(self.leaves.ties[number], set()).add((row.result, row.spec))
        return {n for n, one in self.leaves.ties.items() if len(found.get(one, ())) > 1}

    def _fits(self, name: Any, row: LeafRow, found: str) -> bool:
        """Whether a leaf is that of the base, or of the outcome where only values change."""
        if not self.delta.slime and self.leaves.spec(self.numbers[name]) != row.before:
            return False
        if found == row.base or (found == row.result and row.kind == "changed"):
            return True
        return self.delta.slime and self._made(row, self.numbers[name]) == row.result

    def _is_result(self, name: Any, found: str) -> bool:
        row = self.after[name]
        return found == row.result and self.leaves.spec(self.numbers[name]) == row.spec

    def _sum(self, number: int) -> str:
        stream = stream_of(self.leaves, number)
        with self._turn if stream.source is not None else nullcontext():  # a decompressor serves one reader
            return checksum_of(stream, self.delta.checksum, self.meter)

    def _made(self, row: LeafRow, number: int) -> str:
        """The checksum that a leaf would have."""
        origin, digest = origin_of(self.delta, self.leaves, (row, number)), hasher(self.delta.checksum)
        assert isinstance(origin, Patched)
        for piece in origin.contents():
            digest.update(piece)
        return digest.hexdigest()

    def _names(self) -> dict[str, str]:
        index = self.leaves.index
        absent = {self.delta.called(row): "there is none" for n, row in self.before.items() if n not in self.numbers}
        more = (
            {}
            if self.delta.slime
            else {
                index.path(number): "it is not in the base"
                for n, number in self.numbers.items()
                if n not in self.before
            }
        )
        return absent | more

    def _other(self, changes: Mapping[str, str]) -> UnexpectedChange:
        lines = [f"  {path}: {why}" for path, why in list(changes.items())[:20]]
        lines += [f"  and {len(changes) - 20:,} more"] if len(changes) > 20 else []
        path = str(getattr(self.leaves, "path", "")) or "the tree"
        count = wording.plural(len(changes), "leaf", "leaves")
        said = f"{path} is not the base of the delta, nor its outcome: {count}"
        return UnexpectedChange("\n".join([said, *lines]), changes=changes, hint="apply it to what it was made from")


def _checkpoint(base: _Base, leaves: Checkpoint, tasks: list[Task]) -> Checkpoint:
    """The outcome as a checkpoint, of which nothing is read before it is saved."""
    origins, gone, moved, added = _parted(base, leaves, tasks)
    untied = base.differs()
    rows = {row.source: row for row in leaves.plan.rows}
    for number, origin in origins.items():
        if number not in untied:
            row, edit = rows[number], call("set", {"value": origin})
            rows[number] = row.with_calls((*row.calls, edit), (*row.places, NOWHERE), origin.spec, Damage())
    made = leaves.planned(replace(leaves.plan, rows=tuple(rows.values())))
    if not untied and not added and leaves.format != "safetensors":
        made = made.deleted(gone) if gone else made
        return made.relocated(moved) if moved else made
    if not (untied or added or gone or moved):
        return made
    numbers = {row: number for number, row in base.rows.items()}
    places: dict[int, list[int]] = {}
    picks: list[Any] = []
    for row in base.after.values():  # in the order of the outcome
        number, keys = numbers.get(row), row.path or ()
        if number is None:
            picks.append((labels_of(keys), added[keys]))
            continue
        if number not in untied:
            places[number] = [len(picks)]
        path = labels_of(keys) if number in moved else leaves.index.paths[number]
        picks.append((path, origins.get(number, (made, number)) if number in untied else (made, number)))
    return assemble(made, picks, ties=ties_of(leaves.ties, places))


def _in_memory(base: _Base, leaves: Memory, tasks: list[Task]) -> Any:
    """The outcome as a tree like the base."""
    origins, gone, moved, added = _parted(base, leaves, tasks)
    for number in base.differs() & origins.keys():
        path = leaves.index.path(number)
        raise Unsupported(f"{path} has several paths in this tree, and the delta has a value for each of them")
    arrays = {number: leaves.as_given(origin.read(), number) for number, origin in origins.items()}
    tree = leaves.with_leaves(arrays) if arrays else leaves.root
    tree = relocate(Memory(tree), moved, gone) if gone or moved else tree
    new = [(nested(leaves, keys), native(leaves, origin.read())) for keys, origin in added.items()]
    return enter(Memory(tree), new) if new else tree


def _parted(
    base: _Base, leaves: Editable, tasks: list[Task]
) -> tuple[dict[int, Origin], list[int], dict[int, list[tuple[str, None]]], dict[Keys, Origin]]:
    """The new values of leaves, those that go, the new paths of those that move, and those that come."""
    origins, gone, moved, added = (
        dict[int, Origin](),
        list[int](),
        dict[int, list[tuple[str, None]]](),
        dict[Keys, Origin](),
    )
    for row, number in tasks:
        if number is None:
            added[row.path or ()] = origin_of(base.delta, leaves, (row, None))
            continue
        if row.path is None:
            gone.append(number)
        elif row.path != row.was:
            moved[number] = [(key, None) for key in row.path]
        if row.kind in ("changed", "respecified"):
            origins[number] = origin_of(base.delta, leaves, (row, number))
    return origins, gone, moved, added


def _documents(delta: "Delta", leaves: Checkpoint) -> list[Document]:
    """The files beside the weights that change; of a checkpoint that is one file, none."""
    if not isinstance(leaves.source, Shards):
        return []
    return list(filter(None, (_document(delta, leaves.source, row) for row in delta.files)))


def _document(delta: "Delta", source: Shards, row: FileRow) -> Document | None:
    file = source.folder / row.name
    before = file.read_bytes() if file.exists() else None
    found = "" if before is None else hashlib.sha256(before).hexdigest()
    if found == row.result:
        return None
    if found != row.base:
        raise UnexpectedChange(
            f"{file} is not that of the base of the delta, nor of its outcome", changes={row.name: "its bytes differ"}
        )
    content = delta.payload.bytes(f"file/{row.name}")
    assert content is not None
    text = content.tobytes() if row.result else b""
    sizes = (json.dumps(wording.size(len(each))) for each in (before or b"", text))
    shown = None if row.name == CONFIG else (Change(row.name, "content", *sizes),)
    return Document(file, before or b"", text, shown=shown)
