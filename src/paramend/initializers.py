"""Random values that depend on a seed and a path only, never on the order in which leaves are visited."""

from __future__ import annotations  # numpy.random is slow to import, and annotations would open it

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paramend import _text
from paramend.errors import BadArgument, SpecMismatch
from paramend.specs import Spec

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """Where an edit happens: what random and layout-aware edits need to know besides the array.

    Attributes:
        pieces: the path piece by piece; a state dict's `fc.weight` and a module's fc → weight are the same.
        out_first: whether kernels are (out, in, ...) as in torch, or (..., in, out) as in JAX.
        stream: the random numbers of a leaf that is edited in chunks, one after the other; None: it is edited whole.
    """

    pieces: tuple[str, ...]
    out_first: bool = False
    stream: np.random.Generator | None = None

    @property
    def number(self) -> int:
        """256 bits that stand for the path."""
        import hashlib  # opens OpenSSL, which most programs do not need

        return int.from_bytes(hashlib.sha256("/".join(self.pieces).encode()).digest(), "little")


NOWHERE = Place(())

# One row an initializer: scale, fan, and the distribution. Names of JAX follow JAX, which truncates normals at two
# standard deviations; names of torch follow torch, which does not. LeCun et al. 1998, Glorot & Bengio 2010,
# He et al. 2015.
INITIALIZERS: dict[str, tuple[float, str, str]] = {
    "lecun_normal": (1.0, "in", "truncated"),
    "lecun_uniform": (1.0, "in", "uniform"),
    "he_normal": (2.0, "in", "truncated"),
    "he_uniform": (2.0, "in", "uniform"),
    "kaiming_normal": (2.0, "in", "normal"),
    "kaiming_uniform": (2.0, "in", "uniform"),
    "glorot_normal": (1.0, "average", "truncated"),
    "glorot_uniform": (1.0, "average", "uniform"),
    "xavier_normal": (1.0, "average", "normal"),
    "xavier_uniform": (1.0, "average", "uniform"),
}
# The standard deviation of a standard normal cut off at -2 and 2.
_TRUNCATED_STD = 0.87962566103423978


def generator(seed: int, place: Place) -> np.random.Generator:
    """The stream of random numbers of one path under one seed."""
    if place.stream is not None:
        return place.stream
    if seed < 0:
        raise BadArgument(f"seed={seed} is negative", hint="seed=0 or more, or a JAX PRNG key")
    words = [place.number >> (32 * i) & 0xFFFFFFFF for i in range(8)]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *words])))


def normal(rng: np.random.Generator, shape: Sequence[int], dtype: str) -> Array:
    """Standard normal values, float64 for float64 leaves and float32 for all others.

    Drawing a shape at once or in pieces, one after the other, gives the same numbers.
    """
    return rng.standard_normal(tuple(shape), dtype=np.float64 if dtype == "float64" else np.float32)


def check_initializer(name: str, spec: Spec) -> None:
    """Refuses unknown names, and leaves that have no fans."""
    if name not in INITIALIZERS:
        near = _text.closest(name, INITIALIZERS)
        raise BadArgument(
            f"{name!r} is no initializer: {', '.join(INITIALIZERS)}",
            hint=f'"{near[0] if near else "lecun_normal"}"',
        )
    if spec.ndim < 2:
        raise SpecMismatch(
            f"{name} needs at least 2 axes to tell inputs from outputs, and this leaf is {spec}",
            hint="select kernels only: pm.sel(...).where(ndim=2); for biases use .zero() or .fill(value)",
        )


def initialize(name: str, rng: np.random.Generator, spec: Spec, *, out_first: bool) -> Array:
    """Fresh values for a kernel, float32 (float64 for float64 leaves)."""
    scale, fan, distribution = INITIALIZERS[name]
    shape = spec.shape
    if out_first:
        receptive = math.prod(shape[2:])
        fan_in, fan_out = shape[1] * receptive, shape[0] * receptive
    else:
        receptive = math.prod(shape[:-2])
        fan_in, fan_out = shape[-2] * receptive, shape[-1] * receptive
    variance = scale / max(1.0, fan_in if fan == "in" else (fan_in + fan_out) / 2)
    if distribution == "uniform":
        limit = math.sqrt(3 * variance)
        return rng.uniform(-limit, limit, shape).astype(np.float64 if spec.dtype == "float64" else np.float32)
    values = normal(rng, shape, spec.dtype)
    if distribution == "truncated":
        outside = np.abs(values) > 2
        while outside.any():
            values[outside] = normal(rng, (int(outside.sum()),), spec.dtype)
            outside = np.abs(values) > 2
        values /= _TRUNCATED_STD
    return (values * math.sqrt(variance)).astype(values.dtype)
