"""Spectra: the spectral norm of a matrix, from passes over its rows, and the number of its dead output units."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from paramend.evidence.measures import widened
from paramend.evidence.streams import CHUNK, Desk, Stream
from paramend.leaves.specs import Array

# The relative error of the singular value, and the most passes made to reach it.
TOLERANCE = 1e-6
PASSES = 300
_HELD = 1 << 23  # a matrix of so many elements is kept in float64, not read again in every pass


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Properties of a leaf as a matrix."""

    spectral_norm: float | None  # the greatest singular value; None if it holds NaN or inf
    units: int  # the number of output units
    dead: int  # how many of them have only weights of 0


def spectrum(stream: Stream, *, out_first: bool) -> Spectrum:
    """The spectrum of a leaf with two or more axes, as a matrix of output units by inputs. Output units are the first
    axis or, if not `out_first`, the last; all others are flattened into one."""
    shape = stream.spec.shape
    matrix = _Matrix(stream, shape[0] if out_first else math.prod(shape[:-1]))
    alive, finite = matrix.survey(rows=out_first)
    norm = _greatest(matrix) if finite else None
    return Spectrum(norm, alive.size, int(alive.size - np.count_nonzero(alive)))


class _Matrix:
    """The rows of a matrix in blocks of float64 or complex128."""

    def __init__(self, stream: Stream, rows: int) -> None:
        self.stream, self.rows = stream, rows
        self.columns = stream.size // rows if rows else 0
        # Copies, because a block of float64 is the desk's own buffer.
        self._held = [block.copy() for block in self._blocks()] if stream.size <= _HELD else None

    def blocks(self) -> Iterator[Array]:
        return iter(self._held) if self._held is not None else self._blocks()

    def _blocks(self) -> Iterator[Array]:
        step = max(CHUNK // max(self.columns * self.stream.width, 1), 1)
        with Desk() as desk:
            for start in range(0, self.rows if self.columns else 0, step):
                stop = min(start + step, self.rows)
                found = widened(self.stream.piece(desk, 0, start * self.columns, stop * self.columns))
                assert found is not None
                yield found.reshape(stop - start, self.columns)

    def survey(self, *, rows: bool) -> tuple[Array, bool]:
        """Which rows, or columns, have values other than 0; and whether all values are finite."""
        alive, finite = [np.zeros(0 if rows else self.columns, bool)], True
        for block in self.blocks():
            nonzero = (block != 0).any(axis=1 if rows else 0)
            alive = [*alive, nonzero] if rows else [alive[0] | nonzero]
            finite &= bool(np.isfinite(block).all())
        return np.concatenate(alive), finite

    def squared(self, vector: Array) -> Array:
        """Aᴴ A v, in one pass."""
        found = np.zeros_like(vector)
        for block in self.blocks():
            found += block.conj().T @ (block @ vector)
        return found


def _greatest(matrix: _Matrix) -> float | None:
    """The greatest singular value, by Lanczos iteration on AᴴA with reorthogonalization (Golub & Van Loan, 10.1)."""
    if not matrix.rows or not matrix.columns:
        return 0.0
    dtype = np.complex128 if matrix.stream.spec.kind == "complex" else np.float64
    start = np.random.default_rng(0).standard_normal(matrix.columns).astype(dtype)
    basis = [start / np.linalg.norm(start)]
    alphas: list[float] = []
    betas: list[float] = []
    value = 0.0
    with np.errstate(all="ignore"):
        for _ in range(min(PASSES, matrix.columns)):
            new = matrix.squared(basis[-1])
            alphas.append(float(np.vdot(basis[-1], new).real))
            known = np.stack(basis)
            for _ in range(2):  # twice is enough
                new -= known.T @ (known.conj() @ new)
            betas.append(float(np.linalg.norm(new)))
            if not math.isfinite(alphas[-1]) or not math.isfinite(betas[-1]):
                return None  # squares beyond float64
            values, vectors = np.linalg.eigh(np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1))
            value = max(float(values[-1]), 0.0)
            if betas[-1] * abs(vectors[-1, -1]) <= TOLERANCE * value:
                break
            basis.append(new / betas[-1])
    return math.sqrt(value)
