"""Which quantised weights a selector means, of a model as its weights."""

from collections.abc import Iterable
from functools import partial

from paramend.anatomy.quantization import stated
from paramend.edits.choosing import chosen
from paramend.edits.weights import Weights, weighed
from paramend.errors import NoMatch
from paramend.leaves.groups import Group, groups_of
from paramend.leaves.leaves import Editable
from paramend.leaves.paths import write_path
from paramend.leaves.rules import Codec
from paramend.leaves.weights import labels_of, weight_of
from paramend.reports import wording
from paramend.selectors.selector import SelectorLike, sel


def whole(leaves: Editable, rule: Codec | None = None) -> Weights:
    """A model as its weights, also if none is quantised or it was opened raw."""
    found = weighed(leaves.as_stored(False), rule=rule)
    return found if isinstance(found, Weights) else Weights(leaves, (), rule=rule)


def selected(weights: Weights, selector: SelectorLike) -> list[int]:
    """The numbers of the quantised weights that a selector means, in order, with those that are tied to them."""
    selector = sel(selector)
    numbers = chosen(selector, weights)
    twins = {twin for number in numbers for twin in weights.twins(number)}
    says = partial(stated, weights.quantization)
    for group in groups_of(weights.stored, twins):
        if group.numbers[0] not in weights.groups:
            weight_of(weights.stored, group, weights.stored.expression, says)
    found = twins & weights.groups.keys()
    if not found:
        near = [weights.index.path(number) for number in weights.groups][:1]
        raise NoMatch(
            f"{selector!r} names {wording.plural(len(twins), 'leaf', 'leaves')}, none of which is quantised",
            hint=f'"{near[0]}"' if near else "",
        )
    return weights.index.ordered(found)


def named(leaves: Editable, groups: Iterable[Group]) -> dict[str, str]:
    """Path → scheme of some weights."""
    return {_path(leaves, group): group.scheme.name for group in groups}


def _path(leaves: Editable, group: Group) -> str:
    if group.payload is None:
        return leaves.index.path(group.numbers[0])
    return write_path(labels_of(leaves, group), leaves.index.separator)
