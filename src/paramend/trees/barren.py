"""Barren trees: what users pass in place of a tree of arrays, and what they mean."""

import os
from typing import Any

from paramend.reports.wording import described


def barren(root: Any) -> tuple[str, str]:
    """What something without arrays is, and code that gives what was meant; "" where that is unknown.

    >>> barren("model.safetensors")
    ('a path, and nothing was opened', 'pm.open("model.safetensors")')
    >>> barren(dict)
    ('the class dict', 'an instance of it')
    """
    if isinstance(root, str | os.PathLike):
        return "a path, and nothing was opened", f'pm.open("{os.fspath(root)}")'
    if isinstance(root, type):
        return described(root), "an instance of it"
    if any(base.__module__.startswith("flax.linen") for base in type(root).__mro__):
        return f"{described(root)}, which holds no parameters", "its parameters: params = model.init(key, x)"
    if isinstance(root, tuple) and all(callable(getattr(root, verb, None)) for verb in ("init", "update")):
        return "an optax transformation, which holds no state", "its state: tx.init(params)"
    if isinstance(root, tuple) and all(callable(getattr(root, verb, None)) for verb in ("init", "apply")):
        return "a pair of functions, which holds no parameters", "its parameters: params = model.init(key, x)"
    if root is None or callable(root) or isinstance(root, bool | int | float | complex | bytes):
        return "None" if root is None else described(root), "a tree of arrays: parameters, a model, a checkpoint"
    return "", ""
