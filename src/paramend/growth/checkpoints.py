"""Growth in depth on disk: the new checkpoint consists of references to the old one until it is saved."""

from collections.abc import Iterator, Mapping
from typing import Any

from paramend.anatomy.documents import Document, document_of
from paramend.anatomy.layers import renamed
from paramend.checkpoints.assemble import Pick, assemble
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.disk.urls import path_of
from paramend.errors import Unsupported
from paramend.growth import numbered
from paramend.growth.numbered import Layers
from paramend.growth.planning import DepthPlan
from paramend.growth.report import DeepenReport
from paramend.leaves.leaves import tied
from paramend.selectors.selector import Selector, Sliced

# Files beside the configuration in which single layers are named or numbered.
_BESIDE = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "adapter_config.json")


def deepened(
    checkpoint: Checkpoint,
    layers: str | Selector | None,
    order: Any,
    identity: Any,
    given: Mapping[str, Any] | None = None,
) -> tuple[Checkpoint, DeepenReport]:
    """A checkpoint with the layers of another in a given order, and the report; nothing is written."""
    if isinstance(layers, Sliced):
        why = "stacked layers of a checkpoint can be deepened only in memory"
        raise Unsupported(why, hint="tree, report = pm.deepen(pm.load(path), ...); pm.save(tree, out)")
    document = document_of(checkpoint)
    config = None if document is None else document.values
    work = DepthPlan(checkpoint, layers, order, identity, lambda where: config, given)
    picks, ties = _picks(checkpoint, work)
    texts: list[Document] = []
    if work.config is not None and document is not None:
        if skipped := document.skipped(checkpoint.path):
            work.said = [skipped]
        else:
            texts.append(document.holding(work.config))
    texts += _beside(checkpoint, work)
    new = assemble(checkpoint, picks, texts=texts, ties=ties)
    for run in work.runs:
        if run.blocks:
            new.index.mark(run.parent, run.blocks[0] + len(work.order) - work.order.of)
    calls, report = work.finished(new)
    return (new.edited(calls) if calls else new), report


def _beside(checkpoint: Checkpoint, work: DepthPlan) -> Iterator[Document]:
    """Other files in which single layers are named or numbered, changed."""
    for name in _BESIDE if path_of(checkpoint.path).is_dir() else ():
        document = document_of(checkpoint, name)
        if document is None:
            continue
        new = old = document.values
        for move in work.moves:
            new = renamed(new, move)
        if new != old:
            work.said.append(f"{name}: names and numbers of layers follow")
            yield document.holding(new)


def _picks(checkpoint: Checkpoint, work: DepthPlan) -> tuple[list[Pick], dict[int, int]]:
    """The path and origin of each leaf of the new checkpoint, and its ties: those within a layer, and of layers with
    the rest of the model, are kept."""
    index, order = checkpoint.index, work.order
    places: dict[int, tuple[Layers, int]] = {}
    for number in index.numbers:
        found = numbered.place_in(work.runs, index.pieces(number))
        if found is not None:
            places[number] = found
    picks: list[Pick] = []
    units: list[Any] = []  # equal for leaves of the result that are tied
    done: set[int] = set()
    shared = numbered.shared(checkpoint, work.runs)
    for number in index.numbers:
        if number not in places:
            picks.append((index.paths[number], (checkpoint, number)))
            units.append(checkpoint.ties.get(number, number))
            continue
        run = places[number][0]
        if id(run) in done:
            continue
        done.add(id(run))
        mine = [n for n in index.numbers if n in places and places[n][0] is run]
        moved = [(new, target, n) for n in mine for new, target in run.moved(places[n][1], order)]
        if work.config is not None:
            moved = [each for each in moved if not _is_stray(checkpoint, work, run, *each[1:])]
        for new, target, n in sorted(moved, key=lambda entry: entry[0]):
            picks.append((numbered.renumbered(index.paths[n], len(run.parent), run.piece(new)), (checkpoint, n)))
            first = checkpoint.ties.get(n, n)
            copied = target is not None and order.kept.get(order.sources[target]) != target and first not in shared
            units.append((first, target) if copied else first)
    return picks, tied(dict(enumerate(units))) if checkpoint.ties else {}


def _is_stray(checkpoint: Checkpoint, work: DepthPlan, run: Layers, target: int | None, number: int) -> bool:
    """Whether a leaf of the first layer has no place in a copy of it."""
    if target is None:
        return False
    start, source = len(run.before), work.order.sources[target]
    path = checkpoint.index.pieces(number)[len(run.parent) + 1 :]
    return work.moves[work.runs.index(run)].stray(path, start + source, start + target)
