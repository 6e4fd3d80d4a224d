"""What to say when a selector matches nothing: what was meant, where it can be guessed, and what there is."""

from paramend.errors import NoMatch, OutOfRange
from paramend.leaves.leaves import Index
from paramend.reports import wording
from paramend.selectors.grammar import AnyPieces, Piece, Positions
from paramend.selectors.patterns import Pattern, parse


def count_of(index: Index) -> str:
    """How many leaves there are, in words."""
    return wording.plural(len(index.numbers), "leaf", "leaves")


def nothing(text: str, pattern: Pattern, index: Index) -> NoMatch:
    """The error for a selector that matches nothing, with up to three that do."""
    if not index.numbers:
        return NoMatch(f"{quoted(text)} matches nothing: the tree holds no arrays")
    separator = separator_in(text, index)
    atoms = [atom for segment in pattern.segments if isinstance(segment, Piece) for atom in segment.atoms]
    indexed = any(isinstance(atom, Positions) for atom in atoms)
    if indexed or pattern.reach(index.names)[1]:
        whole = Pattern((*pattern.segments, AnyPieces()))
        try:
            below = len(whole.find(index.names))
        except OutOfRange as error:
            return out_of_range(text, error, index)
        if below:
            near = whole.write(separator)
            return NoMatch(
                f"{quoted(text)} names a subtree of {wording.plural(below, 'leaf', 'leaves')}, not a leaf",
                hint=f"write {quoted(near)}",
                near=[near],
            )
    from paramend.selectors.dialects import advice  # needed only for errors
    from paramend.selectors.misses import nearest

    better = advice(text, index)
    if better:
        return NoMatch(f"{quoted(text)} matches none of {count_of(index)}", hint=f"did you mean {better}?")
    found = nearest(pattern, index.names)
    offers = [near.write(separator) for near, _ in found]
    if found:
        others = f", or {' or '.join(map(quoted, offers[1:]))}" if offers[1:] else ""
        hint = f"did you mean {quoted(offers[0])} ({wording.plural(found[0][1], 'leaf', 'leaves')}){others}?"
    else:
        hint = examples(index)
    return NoMatch(f"{quoted(text)} matches none of {count_of(index)}", hint=hint, near=offers)


def absent(text: str, index: Index, why: str, path: str) -> NoMatch:
    """The error for a selector of a leaf that is known to stand under another path."""
    return NoMatch(
        f"{quoted(text)} matches none of {count_of(index)}: {why}",
        hint=f"{quoted(path)} is the weight of both, and an edit of it changes both",
        near=[path],
    )


def out_of_range(text: str, error: OutOfRange, index: Index) -> OutOfRange:
    """The error for a missing position, with the nearest positions that exist."""
    offers: list[str] = []
    near: OutOfRange | None = error
    while near is not None:  # a selector may hold several positions
        pattern = parse(near.near[0])
        try:
            offers = [pattern.write(separator_in(text, index))] if pattern.find(index.names) else []
            near = None
        except OutOfRange as further:
            near = further
    message = error.args[0].partition("\n")[0]
    hint = f"{error.hint}: {', '.join(map(quoted, offers))}" if offers else error.hint
    return OutOfRange(f"{quoted(text)}: {message}", hint=hint, near=offers)


def examples(index: Index) -> str:
    """Examples of what can be selected, for a hint."""
    if not index.numbers:
        return "the tree holds no arrays"
    shown = ", ".join(quoted(index.path(number)) for number in index.numbers[:3])
    more = len(index.numbers) - 3
    return f"this tree has {shown}{f', and {more:,} more' if more > 0 else ''}"


def quoted(text: str) -> str:
    """Text in quotes, as Python reads it; in double quotes if that needs no escapes.

    >>> print(quoted("**/kernel"), quoted('"a/b"/c'))
    "**/kernel" '"a/b"/c'
    """
    written = repr(text)
    return f'"{written[1:-1]}"' if '"' not in text else written


def separator_in(text: str, index: Index) -> str:
    """The separator that the text uses, or else that of the tree."""
    used = [char for char in "/." if char in text]
    return used[0] if len(used) == 1 else index.separator
