"""Growth in depth on disk: the new checkpoint consists of references to the old one until it is saved."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paramend.anatomy.layers import renamed
from paramend.anatomy.sections import CONFIG, beside, parsed, written
from paramend.checkpoints.assemble import Pick, assemble
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.errors import Unsupported
from paramend.formats.gathered import Gathered
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
    """A checkpoint with the layers of another in a given order, and the report; nothing is written.

    Raises:
        BadCheckpoint: `config.json` is damaged.
    """
    if isinstance(layers, Sliced):
        raise Unsupported(
            "stacked layers of a checkpoint can be deepened only in memory",
            hint="tree, report = pm.deepen(pm.load(path), ...); pm.save(tree, out)",
        )
    config, file = _config(checkpoint)
    work = DepthPlan(checkpoint, layers, order, identity, lambda where: config, given)
    picks, ties = _picks(checkpoint, work)
    texts: dict[str, bytes] = {}
    if work.config is not None and file is not None:
        if Path(checkpoint.path).is_dir():
            texts[CONFIG] = written(work.config)
        else:
            work.said = [f"{file} is not changed; open {file.parent}/, the directory, to include it"]
    texts |= _beside(checkpoint, work)
    new = assemble(checkpoint, picks, texts=texts, ties=ties)
    for run in work.runs:
        if run.blocks:
            new.index.mark(run.parent, run.blocks[0] + len(work.order) - work.order.of)
    calls, report = work.finished(new)
    return (new.edited(calls) if calls else new), report


def _config(checkpoint: Checkpoint) -> tuple[Mapping[str, Any] | None, Path | None]:
    """The configuration beside the weights, and its file."""
    file = beside(Path(checkpoint.path))
    text = _text(checkpoint, file)
    return (None, None) if text is None else (parsed(text, file), file)


def _text(checkpoint: Checkpoint, file: Path) -> bytes | None:
    """The text of a file beside the weights, as it is now to be written."""
    source: Any = checkpoint.source
    text: bytes | None = source.texts.get(file.name) if isinstance(source, Gathered) else None
    return file.read_bytes() if text is None and file.is_file() else text


def _beside(checkpoint: Checkpoint, work: DepthPlan) -> dict[str, bytes]:
    """The new texts of other files in which single layers are named or numbered."""
    texts: dict[str, bytes] = {}
    folder = Path(checkpoint.path)
    for name in _BESIDE if folder.is_dir() else ():
        text = _text(checkpoint, folder / name)
        if text is None:
            continue
        new = old = parsed(text, folder / name)
        for move in work.moves:
            new = renamed(new, move)
        if new != old:
            texts[name] = written(new)
            work.said.append(f"{name}: names and numbers of layers follow")
    return texts


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
