"""What NNX tells by its Variables: filters made of selectors, and what a model moves itself."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from paramend.errors import Unsupported
from paramend.leaves.paths import labels, text_of
from paramend.reports.wording import described
from paramend.selectors.selector import resolve, sel
from paramend.trees.tree import Tree

_MOVING = (nnx.BatchStat, nnx.RngState, nnx.Cache, nnx.Intermediate, nnx.Perturbation)


def nnx_filter(model: Any, selector: Any) -> Callable[[tuple[Any, ...], Any], bool]:
    """A filter that is true for the selected Variables of this model."""
    if not isinstance(model, nnx.Module | nnx.State):
        raise Unsupported(
            f"nnx_filter takes an NNX module or State, and this is {described(model)}",
            hint='for other trees take a mask: pm.at(params, "**/Dense_0/**").mask()',
        )
    tree = Tree(model)
    chosen = resolve(selector, tree)
    # NNX names a shared Variable by one of its paths, and may choose any of them.
    paths = frozenset(tree.index.pieces(twin) for number in chosen for twin in tree.twins(number))

    def is_chosen(path: tuple[Any, ...], value: Any) -> bool:
        return tuple(text_of(label) for key in path for label in labels(key)) in paths

    is_chosen.__qualname__ = is_chosen.__name__ = f"nnx_filter({sel(selector)!r})"
    return is_chosen


def moves_itself(boxes: Mapping[int, Any]) -> set[int]:
    """The numbers of Variables that a model moves itself: where some are parameters, all others."""
    params = {number for number, box in boxes.items() if isinstance(box, nnx.Param)}
    if params:
        return boxes.keys() - params
    return {number for number, box in boxes.items() if isinstance(box, _MOVING)}
