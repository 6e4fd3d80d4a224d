"""`perturbed`: a model with other parameters, so that zeros and ones hide no mistake."""

import re
from collections.abc import Collection
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from paramend.errors import BadArgument
from paramend.porting.calls import adapter_of, replaced
from paramend.porting.values import Values, wide
from paramend.reports import wording
from paramend.trees.lookup import find_kind, is_torch_module

M = TypeVar("M")
_VARIANCE = re.compile(r"(.*[/._])?(running_)?(var|variance|var_ema[/.].*)")


def perturbed(model: M, seed: int = 0, *, paths: Collection[str] | None = None) -> M:
    """A copy of a model, or of a tree of arrays, with random parameters near its own.

    What is positive throughout stays so, and so do variances; all else is rounded to half of the digits, so that sums
    of two (the biases of a recurrent layer) are exact. Integers and tables that are not saved stay as they are.

    Args:
        model: a torch, NNX or Equinox module, a bound linen module, or a tree.
        seed: of the numbers.
        paths: the leaves to change; None for all.

    Raises:
        BadArgument: it is not a model that holds its parameters.

    >>> model = {"scale": np.ones(3), "bias": np.zeros(3), "steps": np.array(7)}
    >>> new = perturbed(model)
    >>> bool((new["scale"] > 0).all() and (new["scale"] != 1).all() and (new["bias"] != 0).all()), int(new["steps"])
    (True, 7)
    """
    if find_kind(model) is None and adapter_of(model) is None:
        what = wording.described(model)
        raise BadArgument(f"{what} holds no parameters", hint="module.bind(variables) for linen; or give the tree")
    random = np.random.default_rng(seed)
    model_: Any = model
    saved: Any = model_.state_dict() if is_torch_module(model) else paths

    def change(path: str, values: Values) -> Values | None:
        if (saved is not None and path not in saved) or (paths is not None and path not in paths):
            return None
        old, noise = wide(values), random.normal(size=values.shape)
        if old.dtype.kind == "f" and (old > 0).all():
            return (old * np.exp(0.3 * noise)).astype(values.dtype)
        new = old + noise * max(0.1, 0.3 * float(np.sqrt(np.mean(np.abs(old) ** 2))))
        if _VARIANCE.fullmatch(path):
            return (np.abs(new) + 0.1).astype(values.dtype)
        unit = 2.0 ** -(ml_dtypes.finfo(values.dtype).nmant // 2)
        return (np.floor(new / unit) * unit + unit / 2).astype(values.dtype)

    return (adapter_of(model) or _Trees).replaced(model, change)


class _Trees:
    replaced = staticmethod(replaced)
