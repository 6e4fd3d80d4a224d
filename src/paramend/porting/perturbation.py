"""`perturbed`: a model with other parameters, so that zeros and ones hide no mistake."""

import math
import re
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from paramend.errors import BadArgument
from paramend.porting.frameworks import copied, runs
from paramend.porting.values import Values, largest, wide
from paramend.reports import wording
from paramend.trees.lookup import find_kind, is_torch_module

M = TypeVar("M")
_VARIANCE = re.compile(r"(.*[/._])?(running_)?(var|variance|var_ema[/.].*)")


def perturbed(model: M, seed: int = 0) -> M:
    """A copy of a model, or of a tree of arrays, with random parameters near its own.

    What is positive throughout stays so, and so do variances. Values have half of the digits of their dtype, so that
    sums of two (the biases of a recurrent layer) are exact. Integers and tables that are not saved stay as they are.

    Args:
        model: a torch, NNX or Equinox module, a bound linen module, or a tree.
        seed: of the numbers.

    Raises:
        BadArgument: it is not a model that holds its parameters.

    >>> model = {"scale": np.ones(3), "bias": np.zeros(3), "steps": np.array(7)}
    >>> new = perturbed(model)
    >>> bool((new["scale"] > 0).all() and (new["scale"] != 1).all() and (new["bias"] != 0).all()), int(new["steps"])
    (True, 7)
    """
    if find_kind(model) is None and not runs(model):
        what = wording.described(model)
        raise BadArgument(f"{what} holds no parameters", hint="module.bind(variables) for linen; or give the tree")
    anything: Any = model
    saved = anything.state_dict() if is_torch_module(model) else None
    random = np.random.default_rng(seed)

    def change(path: str, values: Values) -> Values | None:
        if saved is not None and path not in saved:
            return None
        old, noise = wide(values), random.normal(size=values.shape)
        if old.dtype.kind == "f" and (old > 0).all():
            new = old * np.exp(0.3 * noise)
        else:
            new = old + noise * max(0.1, 0.3 * largest(old))
        new = np.abs(new) + 0.1 if _VARIANCE.fullmatch(path) else new
        unit = 2.0 ** (math.frexp(largest(new))[1] - ml_dtypes.finfo(values.dtype).nmant // 2)
        rounded: Values = (np.round(new / unit) * unit + unit / 2).astype(values.dtype)
        return rounded

    return copied(model, change)
