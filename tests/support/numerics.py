"""How near two computations of the same numbers are, on every processor."""

import os
from pathlib import Path

import ml_dtypes
import numpy as np

SAFETY = 4

# A file that gets a line for each comparison, for `tests/portable.py`: the share of its bound it used, and the test.
MARGINS = os.environ.get("PORTABLE_MARGINS")


def bound(*dtypes, terms, scale=1.0, safety=SAFETY):
    """How far apart two results of the coarsest of the dtypes may be; see `assert_close`."""
    eps = max((float(ml_dtypes.finfo(np.dtype(dtype)).eps) for dtype in dtypes), default=0.0)
    return safety * terms * eps * float(scale)


def assert_close(found, wanted, *, terms, scale=None, dtype=None, safety=SAFETY):
    """Assert that two ways to compute the same numbers agree, whatever the processor, compiler or library.

    An operation rounds: its result is off by at most eps/2 of its size, where eps is the distance from 1 to the next
    number of the dtype. `terms` operations in a row, on numbers no larger than `scale`, are off by at most
    terms × eps/2 × scale, to first order; so is a sum of `terms` products, in whatever order they are added and with or
    without fused multiply-add (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). Two computations
    are off on either side, so they differ by at most terms × eps × scale. `safety` covers what vectorized exp, tanh,
    sin, sqrt and division add, which are good to a few eps and not to half of one, and what later operations make of
    earlier errors:

        |found - wanted| ≤ safety × terms × eps × scale

    It is one bound for all elements: where an element is a difference of large numbers, its own size says nothing
    about its error, so there is no relative tolerance.

    Where the same program runs on the same values, nothing may differ: compare bits there.

    Args:
        found: Array or number, of numpy, JAX or torch.
        wanted: The same, computed in another way.
        terms: How many operations stand one after another on the longest way to an element: for products of matrices
            the lengths of their sums, added up over the layers; for training, times the steps.
        scale: The largest size of what is added up. The default, the largest element of `wanted`, will do only where
            the large elements are not themselves differences of larger numbers.
        dtype: In what was computed, where the arguments do not say: Python numbers count as float64.
        safety: A factor for what `terms` does not count.
    """
    one, other = _array(found), _array(wanted)
    assert one.shape == other.shape, f"shapes {one.shape} and {other.shape}"
    dtypes = [dtype] if dtype else [array.dtype for array in (one, other) if array.dtype.kind not in "biu"]
    wide = "complex128" if "c" in (one.dtype.kind, other.dtype.kind) else "float64"
    one, other = one.astype(wide), other.astype(wide)
    apart = (one != other) & ~(np.isnan(one) & np.isnan(other))
    if scale is None:
        scale = np.abs(other[np.isfinite(other)]).max(initial=0.0)
    limit = bound(*dtypes, terms=terms, scale=scale, safety=safety)
    with np.errstate(invalid="ignore"):
        error = float(np.abs(one[apart] - other[apart]).max(initial=0.0))
    if MARGINS:
        with Path(MARGINS).open("a") as file:
            test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]
            file.write(f"{error / limit if limit else float(error > 0):.3g} {test}\n")
    assert error <= limit, (
        f"{error:.3g} apart, where {limit:.3g} = {safety} × {terms} terms × eps × {float(scale):.3g} is allowed\n"
        f"found:  {one}\nwanted: {other}"
    )


def _array(values):
    """As a numpy array of the same dtype."""
    if hasattr(values, "detach"):
        values = values.detach()
        if "bfloat16" in str(values.dtype):
            return values.float().numpy().astype(ml_dtypes.bfloat16)
    return np.asarray(values)
