"""Random values that depend only on a seed and a path, never on the order in which leaves are visited."""

from __future__ import annotations  # numpy.random is slow to import, and annotations would import it

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paramend.errors import BadArgument, SpecMismatch
from paramend.leaves.specs import Array, Spec
from paramend.reports import wording


@dataclass(frozen=True, slots=True)
class Site:
    """The place of an edit: what random and layout-aware edits need besides the array."""

    # The path piece by piece; a state dict's `fc.weight` and a module's fc → weight are the same.
    pieces: tuple[str, ...]
    out_first: bool = False  # whether kernels are (out, in, ...) as in torch, or (..., in, out) as in JAX
    # The random numbers of a leaf that is edited in consecutive chunks; None: it is edited whole.
    stream: np.random.Generator | None = None

    @property
    def number(self) -> int:
        """A 256-bit digest of the path."""
        import hashlib  # loads OpenSSL, which most programs do not need

        return int.from_bytes(hashlib.sha256("/".join(self.pieces).encode()).digest(), "little")


NOWHERE = Site(())

# One row per initializer: scale, fan, and the distribution. Names of JAX follow JAX, which truncates normals at two
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
# Values per draw: those that a truncated normal rejects are drawn again before the next block.
_BLOCK = 1 << 18


def generator(seed: int, place: Site) -> np.random.Generator:
    """The stream of random numbers of one path under one seed."""
    if place.stream is not None:
        return place.stream
    if seed < 0:
        raise BadArgument(f"seed={seed} is negative", hint="seed=0 or more, or a JAX PRNG key")
    words = [place.number >> (32 * i) & 0xFFFFFFFF for i in range(8)]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *words])))


def normal(rng: np.random.Generator, shape: Sequence[int], dtype: str) -> Array:
    """Standard normal values, float64 for float64 leaves and float32 for all others. Drawing a shape at once or in
    consecutive pieces yields the same numbers."""
    return rng.standard_normal(tuple(shape), dtype=np.float64 if dtype == "float64" else np.float32)


def check_initializer(name: str, spec: Spec) -> None:
    """Raise for unknown names, and for leaves without fans."""
    if name not in INITIALIZERS:
        near = wording.closest(name, INITIALIZERS)
        raise BadArgument(
            f"{name!r} is not an initializer: {', '.join(INITIALIZERS)}",
            hint=f'"{near[0] if near else "lecun_normal"}"',
        )
    if spec.ndim < 2:
        raise SpecMismatch(
            f"{name} needs at least 2 axes to tell inputs from outputs, and this leaf is {spec}",
            hint="select kernels only: pm.sel(...).where(ndim=2); for biases use .zero() or .fill(value)",
        )


def initialize(name: str, rng: np.random.Generator, spec: Spec, *, out_first: bool) -> Array:
    """Fresh values for a kernel, float32 (float64 for float64 leaves)."""
    return Draws(name, rng, spec, out_first=out_first).next(spec.size).reshape(spec.shape)


class Draws:
    """Fresh values for a kernel in C order, any number at a time. They are drawn in blocks, so that only a block is in
    memory; the values do not depend on the numbers requested."""

    def __init__(self, name: str, rng: np.random.Generator, spec: Spec, *, out_first: bool) -> None:
        scale, fan, self._distribution = INITIALIZERS[name]
        shape = spec.shape
        if out_first:
            receptive = math.prod(shape[2:])
            fan_in, fan_out = shape[1] * receptive, shape[0] * receptive
        else:
            receptive = math.prod(shape[:-2])
            fan_in, fan_out = shape[-2] * receptive, shape[-1] * receptive
        self._variance = scale / max(1.0, fan_in if fan == "in" else (fan_in + fan_out) / 2)
        self._dtype = np.dtype(np.float64 if spec.dtype == "float64" else np.float32)
        self._rng, self._left = rng, spec.size
        self._block = np.empty(0, self._dtype)

    def next(self, count: int) -> Array:
        out = np.empty(count, self._dtype)
        at = 0
        while at < count:
            if not self._block.size:
                self._block = self._draw(min(self._left, _BLOCK))
                self._left -= self._block.size
            part = self._block[: count - at]
            out[at : at + part.size] = part
            self._block = self._block[part.size :]
            at += part.size
        return out

    def _draw(self, count: int) -> Array:
        rng, dtype = self._rng, self._dtype.name
        if self._distribution == "uniform":
            limit = math.sqrt(3 * self._variance)
            return rng.uniform(-limit, limit, count).astype(self._dtype)
        values = normal(rng, (count,), dtype)
        if self._distribution == "truncated":
            outside = np.abs(values) > 2
            while outside.any():
                values[outside] = normal(rng, (int(outside.sum()),), dtype)
                outside = np.abs(values) > 2
            values /= _TRUNCATED_STD
        return (values * math.sqrt(self._variance)).astype(self._dtype)
