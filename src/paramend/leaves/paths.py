"""Names of leaves: how keys split into pieces, and how they are written so that they parse back.

A leaf's real path is a sequence of keys (dict keys, list positions, attribute names). Selectors see it piece by
piece: the Haiku key `mlp/~/linear_0` is three pieces, the state dict name `fc.weight` is two. `/`
and `.` are the same separator.

A **label** is one step in a tree of names. A key that is a single piece has its text as label; a piece of a longer
key is a `Part`, which remembers the separator before it and whether the key ends there.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from paramend.leaves.names import Alone

SPECIAL = frozenset('*{}[]<>,"\\/.')

_split = re.compile(r"([/.])").split
_plain = re.compile(r"[^*{}\[\]<>,\"\\/.]+").fullmatch


class Part(NamedTuple):
    """One piece of a key: its text, the separator before it ("" if it begins the key), whether it ends the key.
    `serial` distinguishes two keys with the same text, such as list position 0 and key "0"."""

    text: str
    before: str
    closes: bool
    serial: int = 0


class Joined(Alone, str):
    """A key that a separator, `before`, joins to the key above it: they were one name in a table that was nested. It is
    text like any other, and outlives edits and `jax.tree.map`; a pickle of it is plain text.

    >>> key = Joined("weight", ".")
    >>> key == "weight", key.before
    (True, '.')
    """

    __slots__ = ("before",)
    before: str

    def __new__(cls, text: str, before: str) -> "Joined":
        made = super().__new__(cls, text)
        made.before = before
        return made

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


Label = str | Part

# A tree of names: label → subtree, or → the number of a leaf.
Names = dict[Label, Any]


def labels(key: object) -> tuple[Label, ...]:
    """The labels of one key, in order.

    A key with separators at an end or next to each other cannot be split into pieces: it stays whole.

    >>> labels("kernel"), labels(3)
    (('kernel',), ('3',))
    >>> [part.text for part in labels("mlp/~/linear_0")]
    ['mlp', '~', 'linear_0']
    >>> labels("a//b")
    ('a//b',)
    >>> [part.text for part in labels(("params", "kernel"))]
    ['params', 'kernel']
    """
    if type(key) is tuple and key and all(type(each) is str and each for each in key):
        text = "/".join(key)  # of a flattened dict
    else:
        text = key if isinstance(key, str) else str(key)
    if "/" not in text and "." not in text:
        return (text,)
    pieces = _split(text)
    names, seps = pieces[::2], ["", *pieces[1::2]]
    if not all(names):
        return (text,)
    last = len(names) - 1
    return tuple(Part(name, sep, i == last) for i, (name, sep) in enumerate(zip(names, seps, strict=True)))


def text_of(label: Label) -> str:
    """The text that a selector compares with a label."""
    return label if isinstance(label, str) else label.text


def write_piece(text: str) -> str:
    """A piece as a selector that matches exactly this piece.

    >>> write_piece("kernel"), write_piece("a*b"), write_piece("a//b")
    ('kernel', 'a\\\\*b', '"a//b"')
    """
    if _plain(text):
        return text
    if not text or "/" in text or "." in text:
        return in_quotes(text)
    return escaped(text)


def escaped(text: str) -> str:
    """Text within a piece of a selector."""
    return "".join("\\" + char if char in SPECIAL else char for char in text)


def in_quotes(text: str) -> str:
    """A key of several pieces, or of none, in a selector."""
    inner = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{inner}"'


def write_path(path: Iterable[Label], separator: str = "/") -> str:
    """A path as text: keys joined by `separator`, separators inside keys as they are. The text is a selector for the
    leaf.

    >>> write_path([*labels("mlp/~/linear_0"), *labels("w")])
    'mlp/~/linear_0/w'
    >>> write_path([*labels("layers"), *labels(0), *labels("weight")], ".")
    'layers.0.weight'
    """
    out: list[str] = []
    for label in path:
        if out:
            out.append(separator if isinstance(label, str) or not label.before else label.before)
        out.append(write_piece(text_of(label)))
    return "".join(out)


def common(paths: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """The pieces with which all of some paths begin.

    >>> common([("a", "b", "w"), ("a", "c", "w")])
    ('a',)
    """
    same = takewhile(lambda pieces: len(set(pieces)) == 1, zip(*paths, strict=False))
    return tuple(pieces[0] for pieces in same)


def number_of(text: str) -> int | None:
    """The key as a number, if it is at most 18 plain digits; else None.

    >>> number_of("10"), number_of("-1"), number_of("x1")
    (10, None, None)
    """
    return int(text) if text.isdigit() and text.isascii() and len(text) <= 18 else None


def natural(text: str) -> str:
    """A sort key in which numbers inside names count as numbers.

    >>> sorted(["Dense_10", "Dense_9"], key=natural)
    ['Dense_9', 'Dense_10']
    """
    # The number with more digits is larger; a number sorts before letters that continue a word, and after words.
    key = _digits(_number_key, text)
    return f"\U0010ffff{key}" if text[:1] in _DIGITS else key


_digits = re.compile("[0-9]+").sub
_DIGITS = frozenset("0123456789")


def _number_key(found: re.Match[str]) -> str:
    number = found[0].lstrip("0")
    return f"\0{chr(min(len(number), 0x10FFFF))}{number}"


def renamed(path: tuple[Label, ...], name: str) -> tuple[Label, ...]:
    """The path of a leaf under another name beside it."""
    last = path[-1]
    return (*path[:-1], last._replace(text=name) if isinstance(last, Part) else name) if text_of(last) != name else path
