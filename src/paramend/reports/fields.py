"""Fields: what reports hold of an object, by the names of its attributes.

A field is an attribute, or one of an attribute, under its last name or under another: "path", "spec.shape",
"rows as weights". One that ends in "?" is left out where there is nothing in it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from functools import cache
from numbers import Number
from operator import attrgetter
from typing import Any


def picked(one: Any, *names: str) -> dict[str, Any]:
    """Some fields of an object as data that JSON can hold.

    >>> picked(1 + 2j, "real", "imag as imaginary")
    {'real': 1.0, 'imaginary': 2.0}
    """
    read, keys, needed = _reader(names)
    return {
        key: value if type(value) in _PLAIN else data_of(value)
        for key, value, always in zip(keys, read(one), needed, strict=False)
        if always or value
    }


_PLAIN = frozenset({str, int, float, bool, type(None)})  # most values


@cache
def _reader(names: tuple[str, ...]) -> tuple[Callable[[Any], Sequence[Any]], list[str], list[bool]]:
    """What reads the attributes of fields, what these are called, and which are never left out."""
    attributes, keys = zip(*(parted(name.removesuffix("?")) for name in names), strict=True)
    read = attrgetter(*attributes, "__class__")  # of several, it gives a tuple
    return read, list(keys), [not name.endswith("?") for name in names]


def data_of(value: Any) -> Any:
    """A value as data that JSON can hold: a dataclass as its text if it has one, or as the fields in its `_data`.

    >>> data_of({1: (2, "three")})
    {'1': [2, 'three']}
    """
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, list | tuple):
        return [each if type(each) in _PLAIN else data_of(each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): data_of(each) for key, each in value.items()}
    if isinstance(value, datetime):
        return value.isoformat()
    if not is_dataclass(value):
        return value
    return str(value) if type(value).__str__ is not object.__str__ else picked(value, *fields_of(value))


def fields_of(one: Any) -> Sequence[str]:
    """The fields that its class names in `_data`; else all."""
    return getattr(one, "_data", None) or [field.name for field in fields(one)]


def values(rows: Iterable[Any], name: str) -> list[Any]:
    """A field of each of some objects: numbers and None as they are, anything else as text."""
    found = map(attrgetter(name), rows)
    return [value if type(value) in _PLAIN or isinstance(value, Number) else str(value) for value in found]


def parted(field: str) -> tuple[str, str]:
    """The attribute of a field, and what it is called.

    >>> parted("spec.shape"), parted("rows as weights")
    (('spec.shape', 'shape'), ('rows', 'weights'))
    """
    name, _, key = field.partition(" as ")
    return name, key or name.rpartition(".")[2]
