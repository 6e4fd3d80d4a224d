"""Which kind a container is. Only frameworks that the user has imported are used."""

import copy
import dataclasses
import importlib
from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np

from paramend._optional import imported
from paramend.arrays.registry import backend_of
from paramend.trees.kind import Kind

# Adapters in the order in which they are asked; each is imported only after its framework.
_ADAPTERS = (("torch", "module"), ("flax", "nnx"))

# Types known to be arrays, and types known to be leaves: walks look types up, because calls per leaf are too slow.
array_types: set[type] = {np.ndarray}
leaf_types: set[type] = {np.ndarray, int, float, bool, complex, str, bytes}


def _close_mapping(node: Any, children: Any) -> Any:
    # A copy keeps the order of the keys, the default factory and attributes such as a state dict's `_metadata`.
    new = copy.copy(node)
    for key, child in zip(node, children, strict=True):
        new[key] = child
    return new


def _rekey_mapping(node: Any, children: dict[Any, Any]) -> Any:
    new = copy.copy(node)
    new.clear()
    new.update(children)
    return new


def _rekey_sequence(node: Any, children: dict[Any, Any]) -> Any:
    return type(node)(children[i] for i in range(len(children)))


def _fields(node: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(node))


def _close_dataclass(node: Any, children: Any) -> Any:
    # Not `replace`: it runs __init__ again, which may check, convert or draw random numbers.
    new = copy.copy(node)
    for name, child in zip(_fields(node), children, strict=True):
        object.__setattr__(new, name, child)
    return new


DICT = Kind(
    "dict",
    open=lambda node: (tuple(node), tuple(node.values()), None),
    close=lambda node, children: dict(zip(node, children, strict=True)),
    rekey=lambda node, children: dict(children),
    compiled=True,
)
MAPPING = Kind(
    "mapping", open=lambda node: (tuple(node), tuple(node.values()), None), close=_close_mapping, rekey=_rekey_mapping
)
LIST = Kind("list", lambda node: ((), tuple(node), None), lambda node, new: list(new), _rekey_sequence, compiled=True)
TUPLE = Kind("tuple", lambda node: ((), node, None), lambda node, new: tuple(new), _rekey_sequence, compiled=True)
NAMED_TUPLE = Kind(
    "named tuple",
    open=lambda node: (node._fields, tuple(node), None),
    close=lambda node, new: node._make(new),
    compiled=True,
)
DATACLASS = Kind(
    "dataclass",
    open=lambda node: (_fields(node), tuple(getattr(node, name) for name in _fields(node)), None),
    close=_close_dataclass,
)
EMPTY = Kind("None", lambda node: ((), (), None), lambda node, new: None, compiled=True)

# The kinds that are known, by type.
_kinds: dict[type, Kind] = {
    dict: DICT,
    OrderedDict: MAPPING,
    defaultdict: MAPPING,
    list: LIST,
    tuple: TUPLE,
    type(None): EMPTY,
}


def _built_in(kind: type) -> Kind | None:
    """The kind of a subclass of a built-in container, or None."""
    if issubclass(kind, tuple):
        return NAMED_TUPLE if hasattr(kind, "_fields") else None
    if issubclass(kind, dict):
        return MAPPING
    if dataclasses.is_dataclass(kind):
        return DATACLASS
    return None


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
    found = found or _built_in(kind)
    if found is not None:
        _kinds[kind] = found
    return found


def is_torch_module(node: Any) -> bool:
    """Whether the node is a torch module."""
    kind = find_kind(node)
    return kind is not None and kind.name == "torch module"
