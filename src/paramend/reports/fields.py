"""Fields: what reports hold of an object, by the names of its attributes.

A field is an attribute, or one of an attribute, under its last name or under another: "path", "spec.shape",
"rows as weights". One that ends in "?" is left out where there is nothing in it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from numbers import Number
from operator import attrgetter
from typing import Any


def picked(one: Any, *names: str) -> dict[str, Any]:
    """Some fields of an object as data that JSON can hold.

    >>> picked(1 + 2j, "real", "imag as imaginary")
    {'real': 1.0, 'imaginary': 2.0}
    """
    found = {}
    for field in names:
        name, key = parted(field.removesuffix("?"))
        value = attrgetter(name)(one)
        if value or not field.endswith("?"):
            found[key] = data_of(value)
    return found


def data_of(value: Any) -> Any:
    """A value as data that JSON can hold: a dataclass as its text if it has one, or as the fields in its `_data`.

    >>> data_of({1: (2, "three")})
    {'1': [2, 'three']}
    """
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): data_of(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return list(map(data_of, value))
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
    return [value if isinstance(value, Number | None) else str(value) for value in found]


def parted(field: str) -> tuple[str, str]:
    """The attribute of a field, and what it is called.

    >>> parted("spec.shape"), parted("rows as weights")
    (('spec.shape', 'shape'), ('rows', 'weights'))
    """
    name, _, key = field.partition(" as ")
    return name, key or name.rpartition(".")[2]
