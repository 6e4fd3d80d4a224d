"""Limits on what is read from files, and how names from files appear in messages."""

from collections.abc import Iterable
from itertools import accumulate
from operator import mul

# Names of more pieces are refused: a walk down one must not use up the interpreter's stack.
MAX_PIECES = 200
# Arrays of more axes are refused: libraries have at most 64, and messages print shapes.
MAX_AXES = 256
U64 = 2**64


def most_elements(shape: Iterable[int]) -> int:
    """The number of elements of a shape, at least of its first axes: beside a length of 0 the others may be huge."""
    return max(accumulate(shape, mul), default=1)


def is_deep(name: str) -> bool:
    """Whether a name has too many pieces."""
    return name.count("/") + name.count(".") >= MAX_PIECES


def is_within(path: str) -> bool:
    """Whether a path, with "/" between folders, stays within its folder on every system."""
    return all(piece not in ("", ".", "..") for piece in path.split("/")) and "\\" not in path and "\0" not in path


def shown(text: str) -> str:
    """A name from a file in a message: no control characters, no hundred megabytes."""
    return repr(text) if len(text) <= 120 else f"{text[:100]!r}... ({len(text):,} characters)"
