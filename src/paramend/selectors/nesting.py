"""Nesting: the key that each piece of a new path belongs to.

A piece that is kept or replaced stays in its container. Removing a piece leaves the others where they are. An added
piece joins the key beside it where keys are names of several pieces, as in a state dict or in Haiku; elsewhere it opens
a new container.
"""

from collections.abc import Sequence
from typing import NamedTuple

from paramend.leaves.leaves import Index
from paramend.leaves.paths import Label, Names, Part, number_of, text_of

# The costs of turning one path into another. Keeping a piece is free; removing a container costs most.
_REPLACED = _ADDED = _OUT_OF_A_NAME = 2
_CONTAINER = 3


class PathStep(NamedTuple):
    """One piece of a new path."""

    text: str  # the piece, or a whole key if the target quotes it
    before: str | None = None  # the separator that joins it to the key before; None if it opens a key
    depth: int | None = None  # the depth in the old path of the container that its key was in; None if it was in none


class Word(NamedTuple):
    """A piece of a new path without a key yet."""

    text: str  # the piece, or a whole key
    origin: int | None = None  # the place in the old path of the piece that it is or replaces; None if it is added
    whole: bool = False  # whether it is a whole key


class Tables:
    """The separators that join the pieces of keys in each container of a tree of names."""

    def __init__(self, index: Index) -> None:
        self._root, self._torch = index.names, index.separator == "."
        self._known: dict[int, str] = {}

    def joints(self, path: Sequence[Label]) -> list[str]:
        """For each piece of a path, the separator that joins another to its key; "" if it would open a container."""
        found: list[str] = []
        names = self._root
        for label in path:
            found.append(self._joint(names) if opens(label) else found[-1])
            names = names[label]
        for at in range(len(path) - 1, 0, -1):
            label = path[at]
            if isinstance(label, Part) and label.before:
                found[at] = found[at - 1] = label.before
        return found

    def _joint(self, names: Names) -> str:
        if id(names) not in self._known:
            self._known[id(names)] = self._look(names)
        return self._known[id(names)]

    def _look(self, names: Names) -> str:
        for label, below in names.items():
            if not closes(label):
                return next(part.before for part in below if isinstance(part, Part))
        # Torch keeps the leaves of a model by name in one dict, even if each name happens to be a single piece.
        leaves = self._torch and all(type(child) is int for child in names.values())
        numbered = names is not self._root and all(number_of(text_of(label)) is not None for label in names)
        return "." if leaves and not numbered else ""


def opens(label: Label) -> bool:
    """Whether a key begins with this label."""
    return isinstance(label, str) or not label.before


def closes(label: Label) -> bool:
    """Whether a key ends with this label."""
    return isinstance(label, str) or label.closes


def depths(path: Sequence[Label]) -> list[int]:
    """For each label of a path, the depth of the container that its key is in.

    >>> depths([Part("mlp", "", False), Part("linear", "/", True), "w"])
    [0, 0, 1]
    """
    found: list[int] = []
    for label in path:
        found.append((found[-1] if found else -1) + opens(label))
    return found


def pair(path: Sequence[Label], joints: Sequence[str], run: range, new: Sequence[str]) -> list[int | None]:
    """For each new piece, the place in a run of old ones of the one that it is or replaces; None if it is added. Among
    the cheapest pairings, the one whose pairs are rightmost."""
    old = [text_of(path[at]) for at in run]
    if len(old) == len(new) and (len(new) < 2 or old == new):
        return list(run)
    removed = [_OUT_OF_A_NAME if joints[at] else _CONTAINER for at in run]
    costs = [[0] * (len(new) + 1) for _ in range(len(old) + 1)]
    ways = [[-1] * (len(new) + 1) for _ in range(len(old) + 1)]
    for i in range(len(old) + 1):
        for j in range(len(new) + 1):
            choices = []
            if i and j:
                choices.append((costs[i - 1][j - 1] + _REPLACED * (old[i - 1] != new[j - 1]), 0))
            if i:
                choices.append((costs[i - 1][j] + removed[i - 1], 1))
            if j:
                choices.append((costs[i][j - 1] + _ADDED, 2))
            if choices:
                costs[i][j], ways[i][j] = min(choices)
    found: list[int | None] = [None] * len(new)
    i, j = len(old), len(new)
    while i or j:
        way = ways[i][j]
        i, j = i - (way != 2), j - (way != 1)
        if way == 0:
            found[j] = run[i]
    return found


def nest(words: Sequence[Word], path: Sequence[Label], joints: Sequence[str]) -> list[PathStep]:
    """The steps of a new path: each piece in its key. `joints` are those of the old path."""
    depth = depths(path)
    anchors = [_anchor(words, at, joints) for at in range(len(words))]
    steps: list[PathStep] = []
    for at, (word, anchor) in enumerate(zip(words, anchors, strict=True)):
        before = None
        if at and anchor is not None and not word.whole and not words[at - 1].whole:
            left = anchors[at - 1]
            if left is not None and depth[left] == depth[anchor]:
                label = None if word.origin is None else path[word.origin]
                before = (label.before if isinstance(label, Part) else "") or joints[anchor]
        steps.append(PathStep(word.text, before, None if anchor is None else depth[anchor]))
    return steps


def _anchor(words: Sequence[Word], at: int, joints: Sequence[str]) -> int | None:
    """The place in the old path whose key a piece joins: its own, or that of a name beside it."""
    if words[at].origin is not None or words[at].whole:
        return words[at].origin
    for beside in (words[at + 1 :], words[:at][::-1]):
        near = next((word for word in beside if word.origin is not None or word.whole), None)
        if near is not None and not near.whole and near.origin is not None and joints[near.origin]:
            return near.origin
    return None
