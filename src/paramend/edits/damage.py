"""Damage: how many values of a leaf an edit could not hold, counted while it runs."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from paramend.arrays import losses
from paramend.arrays.lowrank import LowRank
from paramend.arrays.registry import backend, backend_of, to_numpy
from paramend.edits.arguments import Args
from paramend.edits.runs import native
from paramend.leaves.origins.origin import Origin
from paramend.leaves.specs import Array, dtype_name
from paramend.reports import wording

# (values before, values after, arguments) → how many overflow, how many are lost.
Losses = Callable[[Array, Array, Args], tuple[int, int]]


@dataclass(slots=True)
class Damage:
    """How many values of one leaf edits changed because its dtype cannot hold them."""

    overflowed: int = 0  # finite ones that became inf, NaN or another number
    lost: int = 0  # those that became zero, or lost their fraction, in a cast

    def clear(self) -> None:
        self.overflowed = self.lost = 0

    def add(self, found: tuple[int, int]) -> None:
        """Count what one edit of some values did."""
        self.overflowed += found[0]
        self.lost += found[1]

    def __str__(self) -> str:
        overflowed = f"{self.overflowed:,} overflow" if self.overflowed else ""
        return ", ".join(filter(None, (overflowed, f"{self.lost:,} lost" if self.lost else "")))


def of_cast(before: Array, after: Array, args: Args) -> tuple[int, int]:
    """What a cast did."""
    return losses.damage(before, dtype_name(args["dtype"]))


def of_sum(before: Array, after: Array, args: Args) -> tuple[int, int]:
    """What an addition did."""
    if isinstance(args["value"], LowRank):
        return of_shift(before, after, args)
    return losses.overflow("add", before, _operand(args, before), after), 0


def of_product(before: Array, after: Array, args: Args) -> tuple[int, int]:
    """What a multiplication did."""
    return losses.overflow("multiply", before, _operand(args, before), after), 0


def of_shift(before: Array, after: Array, args: Args) -> tuple[int, int]:
    """What was done by adding finite numbers."""
    return losses.overflow("add", before, np.zeros((), before.dtype), after), 0


def _operand(args: Args, before: Array) -> Array:
    value = args["value"]
    return to_numpy(value.read() if isinstance(value, Origin) else value).astype(before.dtype)


def of_call(call: Any, before: Any, after: Any) -> tuple[int, int]:
    """What a call did to a leaf; nothing is known of traced arrays. Values on an accelerator are fetched only where an
    overflow is likely: after a cast, and in narrow dtypes."""
    op, library = call.op, backend(before)
    spec = library.spec(before)
    if op.losses is None or not spec.size or spec.kind == "other" or library.refusal(before):
        return 0, 0
    wide = spec.kind in ("float", "complex") and spec.dtype not in _NARROW
    if op.name == "cast":
        if losses.holds(dtype_name(call.args["dtype"]), spec.dtype):
            return 0, 0
    elif (wide and not library.local(before)) or any(
        backend_of(type(v)) is not None and not _is_known(v) for v in call.args.values()
    ):
        return 0, 0
    if call.index is not None and not _is_known(before):  # nothing is added to what is traced
        return 0, 0
    found = Damage()
    for old, new, args in (_by_part if library.parted(before) else _whole)(call, before, after):
        values = losses.on_host(old), losses.on_host(new)
        if all(isinstance(each, np.ndarray | np.generic) for each in values):
            found.add(op.losses(*map(np.asarray, values), args))
    return found.overflowed, found.lost


# The values that a call changes, before and after it, with its arguments.
_Pieces = Iterator[tuple[Any, Any, Args]]


def _whole(call: Any, before: Any, after: Any) -> _Pieces:
    if call.index is not None:
        before, after = (backend(each).get(each, call.index) for each in (before, after))
    yield before, after, call.args


def _by_part(call: Any, before: Any, after: Any) -> _Pieces:
    """Those of each part that this process holds; the operand and the slice are cut as the leaf is."""
    library, value = backend(before), call.args.get("value")
    zero = library.zeros(before)
    arrays = [before, after]
    if backend_of(type(value)) is not None or isinstance(value, Origin):
        value = native(library, value)
        spread = library.add(zero, value) if call.index is None else library.put(zero, call.index, "set", value)
        arrays.append(spread)
    if call.index is not None:
        arrays.append(library.put(zero, call.index, "set", 1))
    for parts in zip(*map(library.parts, arrays), strict=True):
        old, new, *rest = (losses.on_host(each) for _, each in parts)
        if call.index is not None:
            inside = rest.pop() != 0
            old, new, *rest = (each[inside] for each in (old, new, *rest))
        yield old, new, call.args | {"value": rest[0]} if rest else call.args


_NARROW = ("float16", *(f"float{rest}" for rest in ("8_e4m3fn", "8_e5m2", "8_e4m3fnuz", "8_e5m2fnuz")))


def _is_known(value: Any) -> bool:
    library = backend_of(type(value))
    parts = [] if library is None else library.parts(value)
    return all(isinstance(losses.on_host(part), np.ndarray | np.generic) for _, part in parts)


def said(rows: Iterable[tuple[str, Damage]]) -> str:
    """What was overflowed and lost in which leaves, as a sentence; "" if nothing.

    >>> said([("w", Damage(2, 1)), ("b", Damage(0, 3)), ("c", Damage())])
    '2 values overflow (w), 4 are lost (w, b)'
    """
    parts: list[str] = []
    named = list(rows)
    for field, one, many in (("overflowed", "overflows", "overflow"), ("lost", "is lost", "are lost")):
        hit = [(path, getattr(damage, field)) for path, damage in named if getattr(damage, field)]
        count = sum(number for _, number in hit)
        if count:
            what = f"{count:,}" if parts else wording.plural(count, "value")
            parts.append(f"{what} {one if count == 1 else many} ({wording.listing([path for path, _ in hit], 4)})")
    return ", ".join(parts)
