"""Quantised weights become floats, each one leaf, and the configuration beside them follows."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from paramend.anatomy import quantization
from paramend.anatomy.counts import retyped
from paramend.anatomy.documents import document_of
from paramend.anatomy.quantization import FILES
from paramend.edits.memory import editable
from paramend.edits.own import Own, floats as float_of
from paramend.edits.plan import call
from paramend.errors import Unsupported
from paramend.formats.jsontext import CONFIG
from paramend.leaves.groups import Group
from paramend.leaves.leaves import Editable, Group as Regroup, keys_of
from paramend.leaves.origins.origin import Origin
from paramend.leaves.paths import Label
from paramend.leaves.schemes import WEIGHTS
from paramend.leaves.weights import Weight, labels_of

# Name of a file beside the weights, what it holds → what it holds then; None if nothing.
Change = Callable[[str, dict[str, Any]], dict[str, Any] | None]


def floated(
    stored: Editable, weights: Mapping[int, Weight | Own], kept: Sequence[Group], dtypes: Mapping[int, str]
) -> tuple[Any, tuple[str, ...]]:
    """A tree or a checkpoint with some weights as floats, and what is to be said of the files beside it. Weights and
    their dtypes ("" for that of the library) come by the numbers of payloads; `kept` are the groups that stay.

    Raises:
        Unsupported: a configuration cannot say which modules are quantised then.
    """
    _check_modules(stored, weights, kept)
    made: dict[tuple[int, ...], list[Any]] = {}  # tied ones are made once

    def make(number: int, given: Sequence[Any]) -> list[Any]:
        weight, dtype = weights[number], dtypes[number]
        wide = "float32" if _is_half(weight, dtype) else dtype
        if isinstance(given[0], Origin):
            return [float_of(weight, given, wide)]
        one = tuple(stored.ties.get(each, each) for each in weight.group.numbers)
        if one not in made:
            made[one] = [float_of(weight, given, wide)]
        return made[one]

    groups = [
        Regroup(weight.group.numbers, (keys(labels_of(stored, weight.group)),), partial(make, number))
        for number, weight in weights.items()
    ]
    halves = {weight.path for number, weight in weights.items() if _is_half(weight, dtypes[number])}
    gone = [each for weight in weights.values() for each in weight.group.numbers]
    change = partial(
        _configured,
        modules(stored, weights),
        floats(stored, [*gone, *(number for group in kept for number in group.numbers)]),
        bool(kept),
        _dtypes(stored, {*gone}, weights, dtypes),
    )
    return followed(_halved(stored.regrouped(groups), halves), change)


def _dtypes(
    stored: Editable, gone: Collection[int], weights: Mapping[int, Weight | Own], dtypes: Mapping[int, str]
) -> tuple[list[str], list[str]]:
    """The dtypes of the leaves, before and after; "" for codes."""
    others = [stored.spec(number).dtype for number in stored.index.numbers if number not in gone]
    return [*others, *[""] * len(weights)], [*others, *dtypes.values()] if all(dtypes.values()) else []


def _is_half(weight: Weight | Own, dtype: str) -> bool:
    """Whether a weight becomes float16, which ends at 65,504: the edit that casts to it counts what it cannot hold."""
    return (dtype or weight.spec.dtype) == "float16"


def _halved(tree: Any, paths: Collection[str]) -> Any:
    """A tree with some leaves in float16."""
    leaves, half = editable(tree), call("cast", {"dtype": "float16"})
    index, ties = leaves.index, leaves.ties
    numbers = [number for number in index.numbers if index.path(number) in paths and ties.get(number, number) == number]
    return leaves.edited(dict.fromkeys(numbers, half)) if numbers else tree


def _check_modules(stored: Editable, chosen: Iterable[int], kept: Sequence[Group]) -> None:
    """Raise if a configuration could not say what a module is then: it says of a whole one whether it is quantised."""
    both = sorted({*modules(stored, chosen)} & {*modules(stored, (group.numbers[0] for group in kept))})
    if both and getattr(stored, "quantization", None):
        raise Unsupported(
            f"{both[0]} would be quantised in part, which no configuration can say of a module", hint=f'"{both[0]}.*"'
        )


def _configured(
    gone: list[str],
    floats: list[str],
    left: bool,
    dtypes: tuple[list[str], list[str]],
    file: str,
    values: Mapping[str, Any],
) -> dict[str, Any] | None:
    """What a file beside the weights holds then; None if nothing."""
    new = quantization.dequantised(file, values, gone, floats, left=left)
    return new if new is None or file != CONFIG or not dtypes[1] else retyped(new, *dtypes)[0]


def modules(leaves: Editable, numbers: Iterable[int]) -> list[str]:
    """The modules that hold some leaves, each once, as configurations name them."""
    return list(dict.fromkeys(".".join(leaves.index.pieces(number)[:-1]) for number in numbers))


def floats(leaves: Editable, without: Iterable[int]) -> list[str]:
    """The modules with a matrix of floats that is not quantised."""
    gone = {*without}
    some = (n for n in leaves.index.numbers if n not in gone and leaves.index.pieces(n)[-1] in WEIGHTS)
    return modules(leaves, (n for n in some if leaves.spec(n).kind == "float" and leaves.spec(n).ndim > 1))


def keys(path: tuple[Label, ...]) -> list[tuple[str, int | None]]:
    """A path in the form of `renames.keys`, whose containers are those of a leaf that it comes in the place of."""
    return [(key, depth) for depth, key in enumerate(keys_of(path))]


def renamed(tree: Any, moved: Mapping[str, str]) -> Any:
    """A tree; of a checkpoint, with a configuration that names modules as they are called then, which `moved` says."""
    return followed(tree, partial(quantization.renamed, moved=moved))[0]


def followed(tree: Any, change: Change) -> tuple[Any, tuple[str, ...]]:
    """A tree; of a checkpoint, with other files beside its weights, and what is to be said of them."""
    said: list[str] = []
    for name, _ in FILES:
        document = document_of(tree, name)
        if document is not None and document.text:
            values = change(name, document.values)
            new = replace(document, text=b"") if values is None else document.holding(values)
            if new.text != document.text:
                tree = tree.planned(tree.plan.beside(new))
                said += [f"{name} goes"] if values is None else [f"{name}: {each}" for each in new.changes]
    return tree, tuple(said)
