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
from paramend.checkpoints.assemble import Pick, assemble
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.checkpoints.gathering import ties_of
from paramend.deltas.checksums import bytes_of, hasher
from paramend.deltas.manifest import FileChange, LeafRow, by_name
from paramend.deltas.payload import Patched, itemsize_of, whole_of
from paramend.edits.damage import Damage
from paramend.edits.memory import Memory, editable
from paramend.edits.plan import call
from paramend.edits.structure import enter, relocate
from paramend.errors import BadCheckpoint, UnexpectedChange, Unsupported
from paramend.evidence.pairing import Name, named
from paramend.evidence.streams import stream_of
from paramend.formats.jsontext import CONFIG
from paramend.formats.shards import Shards
from paramend.grafting.parts import native, nested
from paramend.leaves.leaves import Editable, labels_of
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Stored
from paramend.leaves.specs import Spec
from paramend.reports import wording
from paramend.reports.progress import Meter, Progress

if TYPE_CHECKING:
    from paramend.deltas.delta import Delta

# A row, and the leaf of the base that it is for; None if it adds one.
Task = tuple[LeafRow, int | None]


class Base:
    """What a delta is applied to: is it its base, or its outcome?"""

    def __init__(self, delta: "Delta", leaves: Editable, progress: Progress | None) -> None:
        self.delta, self.leaves = delta, leaves
        self.numbers = named(leaves)
        self.before, self.after = (by_name(delta.rows, side) for side in ("was", "path"))
        self.meter = Meter(progress, sum(map(leaves.nbytes, self.numbers.values())))
        self._turn = threading.Lock()

    def tasks(self) -> list[Task]:
        """What is to be done; nothing if it was done."""
        as_base, as_result = self._fits(self.before), self._fits(self.after)
        if not as_base and not as_result:
            raise self._other(self._names())
        rows = self.before if as_base else self.after
        tasks: list[Task] = [(row, self.numbers[name]) for name, row in rows.items()]
        with ThreadPoolExecutor(2, thread_name_prefix="paramend") as pool:
            sums = list(pool.map(self._sums, tasks))
        pairs = list(zip(tasks, sums, strict=True))
        done = [found == row.result and self._is(number, row.spec) for (row, number), (found, _) in pairs]
        if as_result and all(done):
            return []
        left, wrong = list[tuple[Task, str]](), dict[str, str]()
        for ((row, number), (found, made)), there in zip(pairs, done, strict=True):
            is_base = made == row.result if self.delta.slime else found == row.base and self._is(number, row.before)
            is_done = there and row.kind == "changed"
            if not as_base or not (is_base or is_done):
                wrong[self.delta.called(row)] = "its bytes differ"
            left += [((row, number), made)] if row.kind != "kept" and not is_done else []
        if wrong:
            raise self._other(wrong)
        added: list[Task] = [(row, None) for row in self.delta.rows if row.was is None]
        left += [(task, self._sums(task)[1]) for task in added]
        for (row, _), made in left:
            if made not in ("", row.result):
                raise BadCheckpoint(f"{self.delta.called(row)}: the delta does not make what it says")
        return [task for task, _ in left]

    def _fits(self, rows: Mapping[Name, LeafRow]) -> bool:
        """Whether the leaves have the names of these rows, which are all for a delta that is not of slime."""
        names = self.numbers.keys()
        return rows.keys() <= names if self.delta.slime else rows.keys() == names

    def _is(self, number: int | None, spec: Spec | None) -> bool:
        return number is not None and spec in (None, self.leaves.spec(number))

    def _sums(self, task: Task) -> tuple[str, str]:
        """The checksum that a leaf has, and the one that it would have; "" where there is none, or nothing changes."""
        row, number = task
        old, new = hasher(self.delta.checksum), hasher(self.delta.checksum)
        for whole in whole_of(self.delta, row).contents() if row.whole else ():
            new.update(whole)
        if number is None:
            return "", new.hexdigest()
        nbytes, itemsize = self.leaves.nbytes(number), itemsize_of(self.leaves.spec(number))
        changes = self.delta.payload.changes(row.held, nbytes, itemsize) if row.held and not row.whole else None
        stream = stream_of(self.leaves, number)
        with self._turn if stream.source is not None else nullcontext():  # a decompressor serves one reader
            for start, piece in bytes_of(stream):
                old.update(piece.data)
                self.meter.advance(len(piece))
                if changes is not None:
                    changed = piece.copy()
                    changes.put(changed, start)
                    new.update(changed.data)
        return old.hexdigest(), new.hexdigest() if row.held else ""

    @property
    def rows(self) -> dict[int, LeafRow]:
        return {self.numbers[name]: row for name, row in self.before.items()}

    def untied(self) -> set[int]:
        """The leaves with several paths that get other values under each."""
        found: dict[int, set[tuple[str, Any]]] = {}
        for number, row in self.rows.items():
            if number in self.leaves.ties:
                found.setdefault(self.leaves.ties[number], set()).add((row.result, row.spec))
        return {n for n, one in self.leaves.ties.items() if len(found.get(one, ())) > 1}

    def _names(self) -> dict[str, str]:
        more = [] if self.delta.slime else [n for name, n in self.numbers.items() if name not in self.before]
        absent = {self.delta.called(row): "there is none" for n, row in self.before.items() if n not in self.numbers}
        return absent | {self.leaves.index.path(number): "it is not in the base" for number in more}

    def _other(self, changes: Mapping[str, str]) -> UnexpectedChange:
        lines = [f"  {path}: {why}" for path, why in list(changes.items())[:20]]
        lines += [f"  and {len(changes) - 20:,} more"] if len(changes) > 20 else []
        path = str(getattr(self.leaves, "path", "")) or "the tree"
        count = wording.plural(len(changes), "leaf", "leaves")
        said = f"{path} is not the base of the delta, nor its outcome: {count}"
        return UnexpectedChange("\n".join([said, *lines]), changes=changes, hint="apply it to what it was made from")


def applied(delta: "Delta", tree: Any, progress: Progress | None) -> Any:
    """The outcome of a delta; the tree itself if it is that already. `UnexpectedChange` if it is neither that nor the
    base."""
    leaves = editable(tree, raw=True)
    base = Base(delta, leaves, progress)
    tasks = base.tasks()
    if not isinstance(leaves, Checkpoint):
        return _Outcome(base, leaves, tasks).tree() if tasks else tree
    documents = _documents(delta, leaves)
    if not tasks and not documents:
        return tree
    texts = {document.name: document for document in (*leaves.texts, *documents)}
    leaves = leaves.planned(replace(leaves.plan, texts=tuple(texts.values())))
    return (_Outcome(base, leaves, tasks).checkpoint() if tasks else leaves).as_stored(tree.raw)


class _Outcome:
    """What a delta makes of its base: leaves get new values (`origins`), go, get other paths (`moved`, in the form of
    `renames.keys`), are added, or get other values under each of their paths (`untied`)."""

    def __init__(self, base: Base, leaves: Editable, tasks: list[Task]) -> None:
        self.base, self.leaves = base, leaves
        known = [(row, number) for row, number in tasks if number is not None]
        self.origins = {n: self._changed(row, n) for row, n in known if row.kind in ("changed", "respecified")}
        self.gone = [number for row, number in known if row.path is None]
        self.moved = {n: [(key, None) for key in row.path] for row, n in known if row.path not in (None, row.was)}
        self.added = {row.path or (): _stored(whole_of(base.delta, row)) for row, number in tasks if number is None}
        self.untied = base.untied()

    def _changed(self, row: LeafRow, number: int) -> Origin:
        delta = self.base.delta
        if row.whole:
            return _stored(whole_of(delta, row))
        old = self.leaves.expression(number)
        if old.spec.dtype.startswith("key<"):
            raise Unsupported(f"{delta.called(row)} holds typed PRNG keys, which a delta cannot change")
        return Patched(old, delta.payload.changes(row.held, old.nbytes, itemsize_of(old.spec)))

    def tree(self) -> Any:
        leaves = cast(Memory, self.leaves)
        for number in self.untied & self.origins.keys():
            path = leaves.index.path(number)
            raise Unsupported(f"{path} has several paths in this tree, and the delta has a value for each of them")
        arrays = {number: leaves.as_given(origin.read(), number) for number, origin in self.origins.items()}
        tree = leaves.with_leaves(arrays) if arrays else leaves.root
        tree = relocate(Memory(tree), self.moved, self.gone) if self.gone or self.moved else tree
        new = [(nested(leaves, keys), native(leaves, origin.read())) for keys, origin in self.added.items()]
        return enter(Memory(tree), new) if new else tree

    def checkpoint(self) -> Checkpoint:
        """The outcome as a checkpoint, of which nothing is read before it is saved."""
        made = self._edited()
        if not (self.untied or self.added or self.gone or self.moved):
            return made
        if not self.untied and not self.added and made.format != "safetensors":  # it holds more than leaves
            made = made.deleted(self.gone) if self.gone else made
            return made.relocated(self.moved) if self.moved else made
        return self._assembled(made)

    def _edited(self) -> Checkpoint:
        leaves = cast(Checkpoint, self.leaves)
        rows = {row.source: row for row in leaves.plan.rows}
        for number in self.origins.keys() - self.untied:
            row, origin = rows[number], self.origins[number]
            edit = call("set", {"value": origin})
            rows[number] = row.with_calls((*row.calls, edit), (*row.places, NOWHERE), origin.spec, Damage())
        return leaves.planned(replace(leaves.plan, rows=tuple(rows.values())))

    def _assembled(self, made: Checkpoint) -> Checkpoint:
        numbers = {row: number for number, row in self.base.rows.items()}
        places: dict[int, list[int]] = {}
        picks: list[Pick] = []
        for row in self.base.after.values():
            number, keys = numbers.get(row), row.path or ()
            if number is None:
                picks.append((labels_of(keys), self.added[keys]))
                continue
            places |= {number: [len(picks)]} if number not in self.untied else {}
            path = labels_of(keys) if number in self.moved else made.index.paths[number]
            alone = self.origins.get(number) if number in self.untied else None
            picks.append((path, alone or (made, number)))
        return assemble(made, picks, ties=ties_of(made.ties, places))


def _stored(made: Patched) -> Origin:
    """The leaf of a delta itself, where it holds that as it is."""
    return made.whole if isinstance(made.whole, Stored) else made


def _documents(delta: "Delta", leaves: Checkpoint) -> list[Document]:
    """The files beside the weights that change; of a checkpoint that is one file, none."""
    if not isinstance(leaves.source, Shards):
        return []
    return list(filter(None, (_document(delta, leaves.source, row) for row in delta.files)))


def _document(delta: "Delta", source: Shards, row: FileChange) -> Document | None:
    file = source.folder / row.name
    before = file.read_bytes() if file.exists() else None
    found = "" if before is None else hashlib.sha256(before).hexdigest()
    if found == row.result:
        return None
    if found != row.base:
        told = f"{file} is not that of the base of the delta, nor of its outcome"
        raise UnexpectedChange(told, changes={row.name: "its bytes differ"})
    content = delta.payload.bytes(f"file/{row.name}")
    assert content is not None
    text = content.tobytes() if row.result else b""
    sizes = (json.dumps(wording.size(len(each))) for each in (before or b"", text))
    shown = None if row.name == CONFIG else (Change(row.name, "content", *sizes),)
    return Document(file, before or b"", text, shown=shown)
