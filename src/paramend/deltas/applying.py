"""Applying: the outcome of a delta, made of its base, whose checksums are compared first."""

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from paramend.anatomy.documents import Change, Document
from paramend.arrays.initializers import NOWHERE
from paramend.checkpoints.assemble import Pick, assemble
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.checkpoints.gathering import ties_of
from paramend.deltas.base import Base, Task
from paramend.deltas.patched import Patched, whole_of
from paramend.deltas.payload import itemsize_of
from paramend.deltas.rows import FileChange, LeafRow
from paramend.edits.damage import Damage
from paramend.edits.memory import Memory, editable
from paramend.edits.plan import call
from paramend.edits.structure import enter, relocate
from paramend.errors import UnexpectedChange, Unsupported
from paramend.formats.jsontext import CONFIG
from paramend.formats.shards import Shards
from paramend.grafting.parts import native, nested
from paramend.leaves.leaves import Editable, labels_of
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Stored
from paramend.reports import wording
from paramend.reports.progress import Progress

if TYPE_CHECKING:
    from paramend.deltas.delta import Delta


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
    """What a delta makes of its base.

    Attributes:
        origins: the new values of leaves of the base.
        gone: leaves that are deleted.
        moved: leaves that get other paths, and these, in the form of `renames.keys`.
        added: the values of new leaves.
        untied: leaves with several paths that get other values under each.
    """

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
        """The outcome as a tree like the base."""
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
        """The checkpoint of all leaves of the outcome, in its order."""
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
        raise UnexpectedChange(
            f"{file} is not that of the base of the delta, nor of its outcome", changes={row.name: "its bytes differ"}
        )
    content = delta.payload.bytes(f"file/{row.name}")
    assert content is not None
    text = content.tobytes() if row.result else b""
    sizes = (json.dumps(wording.size(len(each))) for each in (before or b"", text))
    shown = None if row.name == CONFIG else (Change(row.name, "content", *sizes),)
    return Document(file, before or b"", text, shown=shown)
