"""What a selector finds in two trees: a leaf that only one of them has may be named, in any part of the selector."""

from paramend.errors import BadArgument, NoMatch, ParamendError
from paramend.leaves.leaves import Leaves
from paramend.selectors.messages import count_of
from paramend.selectors.selector import Both, Rest, Selector, SelectorLike, Union, Where, resolve, sel


def chosen(selector: SelectorLike, old: Leaves, new: Leaves) -> tuple[set[int], set[int]]:
    """The leaves that a selector finds on either side, by their first numbers."""
    missing: tuple[list[ParamendError | None], list[ParamendError | None]] = ([], [])
    first, second = (_found(sel(selector), leaves, errors) for leaves, errors in zip((old, new), missing, strict=True))
    for one, other in zip(*missing, strict=True):
        if one is not None and other is not None:
            raise one
    if not first and not second:
        raise NoMatch(f"{selector!r} matches none of {count_of(old.index)}, nor of {count_of(new.index)}")
    return first, second


def _found(selector: Selector, leaves: Leaves, errors: list[ParamendError | None]) -> set[int]:
    """The leaves found in one tree. Each part without others adds to `errors` why it finds nothing, or None."""
    match selector:
        case Union():
            return set().union(*(_found(part, leaves, errors) for part in selector.parts))
        case Both():
            return _found(selector.left, leaves, errors) & _found(selector.right, leaves, errors)
        case Rest():
            every = {leaves.ties.get(number, number) for number in leaves.index.numbers}
            return every - _found(selector.part, leaves, errors)
        case Where():
            return {n for n in _found(selector.part, leaves, errors) if selector.fits(leaves.spec(n))}
    try:
        numbers, error = resolve(selector, leaves), None
    except (NoMatch, BadArgument) as caught:  # a tree of bools may fit only one side
        numbers, error = (), caught
    errors.append(error)
    return {leaves.ties.get(number, number) for number in numbers}
