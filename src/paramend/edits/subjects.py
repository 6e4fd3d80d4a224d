"""Subjects: what is given in place of a tree, and what to pass instead."""

import os
import re
from typing import Any

from paramend.disk.urls import path_of
from paramend.errors import BadArgument
from paramend.reports import wording
from paramend.selectors.messages import quoted
from paramend.selectors.selector import Selector
from paramend.trees.lookup import find_kind


def check_subject(tree: Any) -> None:
    """Raise `BadArgument` if what holds no arrays is no tree, but finds or has one: a path, a selector, a model."""
    given = wording.described(tree)
    if isinstance(tree, os.PathLike) or (isinstance(tree, str) and _is_file(tree)):
        shown = quoted(str(tree))
        raise BadArgument(f"a tree of arrays is needed, and {shown} is a path", hint=f"pm.open({shown})")
    if isinstance(tree, str | re.Pattern | Selector):
        shown = quoted(tree) if isinstance(tree, str) else repr(tree)
        raise BadArgument(f"the tree comes first, then the selector {shown}", hint=f"pm.at(tree, {shown})")
    if isinstance(tree, type):
        raise BadArgument(f"a tree of arrays is needed, and this is {given}", hint="an instance, or its parameters")
    if callable(getattr(tree, "init", None)) and callable(getattr(tree, "update", None)):
        raise BadArgument(
            f"an optimizer holds no arrays; its state does, and this is {given}", hint="state = tx.init(params)"
        )
    if callable(getattr(tree, "init", None)) and callable(getattr(tree, "apply", None)):
        raise BadArgument(
            f"a model of Flax or Haiku holds no parameters itself, and this is {given}: pass its params",
            hint="params = model.init(jax.random.key(0), x); pm.at(params, selector)",
        )
    if callable(tree) and find_kind(tree) is None:
        why = f"a tree of arrays is needed, and this is {given}: pass its params"
        raise BadArgument(why, hint="pm.at(params, ...)")


def _is_file(text: str) -> bool:
    """Whether a text is, or looks like, the path of a checkpoint rather than of a leaf."""
    if re.search(r"\.(safetensors|pt|pth|bin|ckpt|npz|msgpack|orbax|json|gguf)$|/$", text):
        return True
    try:
        return path_of(text).exists()
    except (OSError, ValueError):
        return False


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
        return wording.described(root), "an instance of it"
    if any(base.__module__.startswith("flax.linen") for base in type(root).__mro__):
        return f"{wording.described(root)}, which holds no parameters", "its parameters: params = model.init(key, x)"
    if isinstance(root, tuple) and all(callable(getattr(root, verb, None)) for verb in ("init", "update")):
        return "an optax transformation, which holds no state", "its state: tx.init(params)"
    if isinstance(root, tuple) and all(callable(getattr(root, verb, None)) for verb in ("init", "apply")):
        return "a pair of functions, which holds no parameters", "its parameters: params = model.init(key, x)"
    if root is None or callable(root) or isinstance(root, bool | int | float | complex | bytes):
        return "None" if root is None else wording.described(
            root
        ), "a tree of arrays: parameters, a model, a checkpoint"
    return "", ""
