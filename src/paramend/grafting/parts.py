"""Parts: some leaves of a model, taken out as a model of their own."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar, cast

from paramend.anatomy.documents import document_of
from paramend.anatomy.parts import part_config
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.edits.choosing import members
from paramend.edits.memory import Memory, editable
from paramend.edits.quantized import check_renamed, check_whole
from paramend.edits.structure import enter, relocate
from paramend.errors import Unsupported
from paramend.formats.jsontext import CONFIG
from paramend.grafting.inserting import Path, check_free, moved_by, moved_report, new_paths
from paramend.leaves.leaves import labels_of, plain
from paramend.leaves.paths import text_of
from paramend.mapping.report import LayoutReport
from paramend.selectors.selector import SelectorLike
from paramend.trees.lookup import is_torch_module

T = TypeVar("T")


def part(model: T, selector: SelectorLike, *, rename: Mapping[str, str] | None = None) -> tuple[T, LayoutReport]:
    """Some leaves of a model as a model of their own: the text model of a vision-language model, a tower, a head.

    Where exactly the text model, or another one that has its own part of `config.json`, is taken out of a checkpoint,
    that part becomes the configuration, with the class in `architectures`; a head that was tied stays so. The report
    of a save says what could not be derived. The files beside the weights go along.

    Args:
        model: a tree, or a checkpoint opened by `pm.open`: then the result is one, and nothing is read before its
            `.save(out)`.
        selector: the leaves.
        rename: path in the model → path in the result, with the wildcards of the first: `{"language_model.**": "**"}`.
            The first that matches a leaf counts; the others keep their paths.

    Returns:
        A tree like the model with these leaves alone, which are the same objects. Of a module, whose class determines
        what it holds, nested dicts of them; of a torch module a state dict. And a report, whose `rows` are the leaves
        that were taken and whose `kept` those that were left out.

    Raises:
        NoMatch: the selector matches nothing.
        Quantized: a part of a quantised weight would be taken without the rest.
        RenameClash: two leaves would have one path; the message lists them all.

    >>> part({"lm": {"a": np.ones(1), "b": np.zeros(1)}, "vision": np.ones(2)}, "lm.**", rename={"lm.**": "**"})[0]
    {'a': array([1.]), 'b': array([0.])}
    """
    host = editable(model)
    numbers = members(selector, host)
    check_whole(host, numbers, "be taken out")
    moved = moved_by(host, numbers, rename or {})
    paths = new_paths(host, numbers, moved)
    check_free(host, paths, [], host.index.separator, 'rename={"old.**": "new.**"}, with paths that are free')
    check_renamed(host, lambda: moved)
    taken = set(numbers)
    gone = [number for number in host.index.numbers if number not in taken]
    left = [host.index.path(number) for number in gone]
    report = moved_report("part", host.index.separator, host, paths, left, ("taken", "left out"))
    if isinstance(host, Checkpoint):
        made = _configured(host, host.planned(host.plan.without(gone)).relocated(moved), paths)
        return cast(T, made), report
    tree = cast(Memory, host)
    try:
        return cast(T, relocate(tree, moved, gone)), report
    except Unsupported:
        joined = is_torch_module(tree.root)
        entries = [((plain(labels_of(path), "."),) if joined else path, tree.values[n]) for n, path in paths.items()]
        return cast(T, enter(Memory({}), entries)), report


def _configured(old: Checkpoint, new: Checkpoint, paths: Mapping[int, Path]) -> Checkpoint:
    """The checkpoint with the configuration of the part, if what was taken is one."""
    document = document_of(new)
    if document is None or len(old) == len(new):
        return new
    pieces = {number: old.index.pieces(number) for number in old.index.numbers}
    renamed = {number: tuple(map(text_of, labels_of(path))) for number, path in paths.items()}
    found = part_config(document.values, pieces, renamed)
    if found is None:
        said = [f"{CONFIG} stays that of the whole model: what was taken is not exactly one of its parts"]
    else:
        name, config, told = found
        said = [f"{CONFIG}: {line}" for line in told]
        document = document.inner(name).holding(config)
    return new.planned(new.plan.beside(replace(document, said=tuple(said))))
