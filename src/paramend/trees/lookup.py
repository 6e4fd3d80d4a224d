"""Which kind a container is. Only frameworks that the user has imported are used."""

import importlib
from typing import Any

import numpy as np

from paramend._optional import imported
from paramend.arrays.registry import backend_of
from paramend.trees import builtin
from paramend.trees.kind import Kind

# Adapters in the order in which they are asked; each is imported only after its framework.
_ADAPTERS = (("torch", "module"), ("flax", "nnx"))

_kinds: dict[type, Kind] = dict(builtin.EXACT)
# Types known to be arrays, and types known to be leaves: walks look types up, because calls per leaf are too slow.
array_types: set[type] = {np.ndarray}
leaf_types: set[type] = {np.ndarray, int, float, bool, complex, str, bytes}


def find_kind(node: Any) -> Kind | None:
    """The kind of a node, or None for a leaf."""
    kind = type(node)
    return None if kind in leaf_types else _kinds.get(kind) or _ask_adapters(kind, node)


def _ask_adapters(kind: type, node: Any) -> Kind | None:
    """The kind of a node. Types that a framework may register later are asked for each time."""
    if backend_of(kind) is not None:
        leaf_types.add(kind)
        array_types.add(kind)
        return None
    if isinstance(node, type):
        return None
    found: Kind | None = None
    for framework, adapter in _ADAPTERS:
        if found is None and imported(framework):
            found = importlib.import_module(f"paramend.trees.{adapter}").kind_of(kind)
    if found is None and imported("jax") and not (issubclass(kind, tuple) and hasattr(kind, "_fields")):
        from paramend.trees import pytree  # imports jax

        found = pytree.kind_of(kind, node)
    found = found or builtin.kind_of(kind)
    if found is not None:
        _kinds[kind] = found
    return found


def is_torch_module(node: Any) -> bool:
    """Whether the node is a torch module."""
    kind = find_kind(node)
    return kind is not None and kind.name == "torch module"
