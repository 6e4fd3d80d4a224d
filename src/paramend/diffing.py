"""What differs between two trees, leaf by leaf and bit by bit."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from paramend import _text
from paramend.arrays.registry import to_numpy
from paramend.errors import UnexpectedChange
from paramend.leaves import Editable, Leaves
from paramend.memory import Memory
from paramend.selectors import resolve

Array = np.ndarray[Any, Any]


def verify(before: Any, after: Any, *, only: Any = None) -> list[str]:
    """The paths of the leaves that changed, all of them allowed to.

    Leaves are compared bit by bit: NaN equals itself, -0.0 differs from +0.0. Paths are compared piece by piece, so
    that a module can be held against its state dict or against the file that it came from.

    Args:
        before: any tree, or a checkpoint as `pm.open` gives it.
        after: likewise.
        only: a selector over `before`; leaves that it chooses may change. Without it, nothing may.

    Raises:
        UnexpectedChange: other leaves changed, came or went; each is named, with how far it moved.
        NoMatch: `only` chooses nothing.

    >>> old = {"kernel": np.ones(2), "bias": np.zeros(2)}
    >>> verify(old, {**old, "bias": np.ones(2)}, only="bias")
    ['bias']
    >>> verify(old, {**old, "bias": np.ones(2)})
    Traceback (most recent call last):
    paramend.errors.UnexpectedChange: 1 leaf changed that must not
      bias: 2 of 2 values, by at most 1
    """
    old, new = _leaves(before), _leaves(after)
    chosen = () if only is None else resolve(only, old)
    allowed = {old.index.pieces(twin) for number in chosen for twin in old.twins(number)}
    found = _changes(old, new)
    names = {tree.index.pieces(n): tree.index.path(n) for tree in (new, old) for n in tree.index.numbers}
    unexpected = {names[pieces]: what for pieces, what in found.items() if pieces not in allowed}
    if unexpected:
        lines = [f"  {path}: {what}" for path, what in list(unexpected.items())[:20]]
        lines += [f"  and {len(unexpected) - 20:,} more"] if len(unexpected) > 20 else []
        count = _text.plural(len(unexpected), "leaf", "leaves")
        raise UnexpectedChange("\n".join([f"{count} changed that must not", *lines]), changes=unexpected)
    return [names[pieces] for pieces in found]


def _leaves(tree: Any) -> Editable:
    return tree if isinstance(tree, Editable) else Memory(tree)


def _changes(old: Leaves, new: Leaves) -> Mapping[tuple[str, ...], str]:
    """What happened, by path, in the order of the old tree; what is new comes last."""
    before = {old.index.pieces(number): number for number in old.index.numbers}
    after = {new.index.pieces(number): number for number in new.index.numbers}
    found: dict[tuple[str, ...], str] = {}
    for pieces, number in before.items():
        if pieces not in after:
            found[pieces] = "gone"
            continue
        what = _change(old, number, new, after[pieces])
        if what:
            found[pieces] = what
    return found | {pieces: "new" for pieces in after if pieces not in before}


def _change(old: Leaves, number: int, new: Leaves, other: int) -> str:
    before, after = old.spec(number), new.spec(other)
    if before != after:
        return f"{before} became {after}"
    x, y = old.read(number), new.read(other)
    if x is y:
        return ""
    a, b = to_numpy(x), to_numpy(y)
    if _bits(a).tobytes() == _bits(b).tobytes():
        return ""
    return how_far(a, b)


def _bits(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def how_far(a: Array, b: Array) -> str:
    """How many values differ bit by bit, and by how much at most.

    >>> how_far(np.array([1.0, 2.0]), np.array([1.0, 2.5]))
    '1 of 2 values, by at most 0.5'
    """
    width = a.dtype.itemsize
    differ = (_bits(a).reshape(-1, width) != _bits(b).reshape(-1, width)).any(axis=1)
    count = f"{int(differ.sum()):,} of {differ.size:,} values"
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):
        try:
            gaps = np.abs(b.reshape(-1)[differ].astype(wide) - a.reshape(-1)[differ].astype(wide))
        except (TypeError, ValueError):  # values without distance
            return count
    finite = gaps[np.isfinite(gaps)]
    return f"{count}, by at most {finite.max():.6g}" if finite.size else f"{count}, to or from NaN or inf"
