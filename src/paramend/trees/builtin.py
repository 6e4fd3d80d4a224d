"""Kinds of built-in containers: dicts, lists, tuples, named tuples, dataclasses, None."""

import copy
import dataclasses
from collections import OrderedDict, defaultdict
from typing import Any

from paramend.trees.kind import Kind


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

EXACT: dict[type, Kind] = {
    dict: DICT,
    OrderedDict: MAPPING,
    defaultdict: MAPPING,
    list: LIST,
    tuple: TUPLE,
    type(None): EMPTY,
}


def kind_of(kind: type) -> Kind | None:
    """The kind of a subclass of a built-in container, or None."""
    if issubclass(kind, tuple):
        return NAMED_TUPLE if hasattr(kind, "_fields") else None
    if issubclass(kind, dict):
        return MAPPING
    if dataclasses.is_dataclass(kind):
        return DATACLASS
    return None
