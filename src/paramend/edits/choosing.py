"""Which leaves a selector means where a quantised weight is one, which what it is stored in may name."""

from collections.abc import Sequence
from typing import cast

from paramend.edits.weights import Weights, weighed
from paramend.errors import NoMatch
from paramend.leaves.leaves import Editable
from paramend.selectors.renames import Keys, Rename, keys
from paramend.selectors.selector import SelectorLike, resolve, resolve_paths


def chosen(selector: SelectorLike, leaves: Editable) -> list[int]:
    """The leaves that a selector means, which may name what a quantised weight is stored in; `NoMatch` for none."""
    try:
        return list(resolve(selector, leaves))
    except NoMatch:
        groups = leaves.groups if isinstance(leaves, Weights) else {}
        owner = {number: payload for payload, group in groups.items() for number in group.numbers}
        try:
            numbers = list(resolve(selector, cast(Weights, leaves).stored)) if owner else []
        except NoMatch:
            numbers = []
        if owner.keys().isdisjoint(numbers):
            raise
        return leaves.index.ordered({owner.get(number, number) for number in numbers})


def members(selector: SelectorLike, leaves: Editable) -> Sequence[int]:
    """The stored leaves that a selector means, one for each path: all of a quantised weight; `NoMatch` for none."""
    seen = weighed(leaves)
    try:
        numbers = resolve_paths(selector, seen)
    except NoMatch:
        return resolve_paths(selector, leaves)
    if not isinstance(seen, Weights):
        return numbers
    return leaves.index.ordered({each for number in numbers for each in seen.members(number)})


def carried(leaves: Editable, rule: Rename) -> dict[int, Keys]:
    """The new paths of stored leaves by a rule for those that are seen, in the form of `structure.moves`."""
    seen = weighed(leaves)
    found: dict[int, Keys] = {number: keys(path) for number, path in rule.over(leaves.index).items()}
    if isinstance(seen, Weights):
        for number, path in rule.over(seen.index).items():
            found |= seen.carried(number, keys(path))
    return found
