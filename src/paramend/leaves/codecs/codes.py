"""Codes: the numbers that the codes of a scheme stand for, and the code that is nearest to a number."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from paramend.leaves.specs import Array, numpy_dtype

# The values of nf4 and fp4 of bitsandbytes, by code. That library computes with these and not with the stored map.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
_BYTES = ("int8", "uint8")
# Dtypes in which every code has its opposite; those with "uz" have no -0.
_SIGNED = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3")
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, eq=False, slots=True)
class Codes:
    """What codes stand for."""

    name: str  # a dtype of one byte, "e2m1", "nf4", "fp4", or the first and the last integer, as "-8..7"
    values: Array  # code → value, float32

    def __reduce__(self) -> tuple[object, ...]:
        return codes_of, (self.name,)

    @property
    def low(self) -> float:
        """The least finite value."""
        return float(self.values[np.isfinite(self.values)].min())

    @property
    def high(self) -> float:
        """The greatest finite value."""
        return float(self.values[np.isfinite(self.values)].max())

    @property
    def limit(self) -> float:
        """What the greatest magnitude is for: the greatest value, or for integers half of their range."""
        return (self.high - self.low) / 2

    @property
    def sign(self) -> int:
        """The bit by which the opposite of each code differs; 0 if there is no such bit."""
        return 8 if self.name in ("e2m1", "fp4") else 0x80 if self.name in _SIGNED else 0

    def decode(self, codes: Array) -> Array:
        """The values of codes of one byte each, float32."""
        every = "clip" if len(self.values) == 256 else "raise"  # what is not checked is faster
        return np.asarray(np.take(self.values, codes.view(np.uint8), mode=every))  # type: ignore[call-overload]

    def nearest(self, values: Array) -> Array:
        """The codes of the nearest values; of two, the even one; for those beyond the ends, the last ones."""
        inside = np.clip(values, self.low, self.high)
        if self.name.startswith("float"):
            rounded: Array = inside.astype(numpy_dtype(self.name)).view(np.uint8)
            return rounded
        if ".." in self.name or self.name in _BYTES:
            whole: Array = np.rint(inside)
            return (
                whole.astype(self.name).view(np.uint8) if self.name in _BYTES else (whole - self.low).astype(np.uint8)
            )
        order, edges = _edges(self.name)
        found: Array = order[np.searchsorted(edges, inside, "right")]
        return found


@cache
def codes_of(name: str) -> Codes:
    """Codes by name.

    >>> codes_of("-2..1").values.tolist(), codes_of("float8_e4m3fn").limit
    ([-2.0, -1.0, 0.0, 1.0], 448.0)
    >>> codes_of("e2m1").nearest(np.array([0.25, 0.75, -9, 0.7, -0.1])).tolist()
    [0, 2, 15, 1, 0]
    """
    if name == "nf4":
        values = np.array(_NF4, np.float32)
    elif name in ("fp4", "e2m1"):
        half = np.array(_FP4 if name == "fp4" else _E2M1, np.float32)
        values = np.concatenate([half, -half if name == "e2m1" else 0 - half])  # there is no -0 in bitsandbytes
    elif ".." in name:
        low, high = map(int, name.split(".."))
        values = np.arange(low, high + 1, dtype=np.float32)
    else:
        values = np.arange(256, dtype=np.uint8).view(numpy_dtype(name)).astype(np.float32)
    values.setflags(write=False)
    return Codes(name, values)


@cache
def _edges(name: str) -> tuple[Array, Array]:
    """The codes by value, and from which value on the next one is nearer."""
    values = codes_of(name).values
    value, order = np.unique(values + np.float32(0), return_index=True)  # -0 is 0
    middle = (value[1:] + value[:-1]) / 2
    return order.astype(np.uint8), np.where(order[:-1] % 2, middle, np.nextafter(middle, np.float32(np.inf)))
