"""Steps that add leaves up, such as the two biases of a recurrent layer, and that turn axes round."""

from typing import Any

from paramend.edits import hands
from paramend.edits.arguments import shown
from paramend.edits.moves import axis_of
from paramend.errors import BadArgument
from paramend.mapping.bundles import Bundle, Data, abreast, over


def check_groups(groups: Any) -> None:
    """Raise if groups are not lists of places, each place in one."""
    lists = isinstance(groups, list | tuple) and all(isinstance(group, list | tuple) and group for group in groups)
    if not lists or not groups or sorted(n for group in groups for n in group) != list(range(sum(map(len, groups)))):
        raise BadArgument(f"sum: groups cannot be {shown(groups)}", hint="places of the leaves: [[0, 2], [1, 3]]")


def added(bundle: Bundle, args: Data, count: int) -> Bundle:
    """The sum of each group of leaves."""
    groups = args.get("groups", [list(range(len(bundle)))])
    if sum(map(len, groups)) + len(args.get("zero", ())) != len(bundle):
        raise BadArgument(f"sum: groups {groups} are not those of {len(bundle)} leaves")
    return [
        {key: hands.add(parts) for key, parts in abreast("sum", [bundle[place] for place in group]).items()}
        for group in groups
    ]


def check_zero(bundle: Bundle, args: Data) -> None:
    """Raise if a leaf that no sum takes is not zero."""
    for x in (x for place in args.get("zero", ()) for x in bundle[place].values()):
        if not hands.is_zero(x):
            raise BadArgument(
                f"a part of it, {hands.spec_of(x)}, must be zero, because the other side has no place for it",
                hint="a model with a place for it",
            )


def spread(bundle: Bundle, args: Data, count: int) -> Bundle:
    """Each leaf as the first of its group, and zeros as the others."""
    groups, zero = args.get("groups", [list(range(count))]), args.get("zero", [])
    if len(groups) != len(bundle):
        raise BadArgument(f"spread: groups {groups} are not those of {len(bundle)} leaves")
    firsts = {group[0]: family for group, family in zip(groups, bundle, strict=True)}
    like = {place: family for group, family in zip(groups, bundle, strict=True) for place in group}
    like |= dict.fromkeys(zero, bundle[0])
    return [firsts.get(place) or {key: hands.zeros(x) for key, x in like[place].items()} for place in range(len(like))]


def flipped(bundle: Bundle, args: Data, count: int) -> Bundle:
    """The places along some axes in reverse."""

    def changed(x: Any) -> Any:
        spec = hands.spec_of(x)
        for axis in (axis_of(spec, each) for each in args["axes"]):
            x = hands.take(x, range(spec.shape[axis] - 1, -1, -1), axis)
        return x

    return over(bundle, changed)
