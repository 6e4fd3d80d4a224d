"""Applying: the outcome of a delta, made of its base, whose checksums are compared first."""

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from paramend.anatomy.documents import Change, Document
from paramend.arrays.initializers import NOWHERE
from paramend.checkpoints.assemble import assemble
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.checkpoints.gathering import ties_of
from paramend.deltas.base import Base, Task
from paramend.deltas.patched import Patched, whole_of
from paramend.deltas.payload import itemsize_of
from paramend.deltas.rows import FileRow, Keys
from paramend.edits.damage import Damage
from paramend.edits.memory import Memory, editable
from paramend.edits.plan import call
from paramend.edits.structure import enter, relocate
from paramend.errors import UnexpectedChange, Unsupported
from paramend.formats.jsontext import CONFIG
from paramend.formats.shards import Shards
from paramend.grafting.inserting import native, nested
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


def _checkpoint(base: Base, leaves: Checkpoint, tasks: list[Task]) -> Checkpoint:
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


def _in_memory(base: Base, leaves: Memory, tasks: list[Task]) -> Any:
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
    base: Base, leaves: Editable, tasks: list[Task]
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
