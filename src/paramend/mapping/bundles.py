"""Bundles: the leaves that a rule of a layout takes, which its steps turn into others."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from paramend.errors import BadArgument

# One family for each path: the numbers that count its leaves → a leaf; () → the leaf where nothing counts them.
Family: TypeAlias = dict[tuple[int, ...], Any]
Bundle: TypeAlias = list[Family]
Data: TypeAlias = Mapping[str, Any]


def over(bundle: Bundle, change: Callable[[Any], Any]) -> Bundle:
    """The bundle with every leaf changed."""
    return [{key: change(x) for key, x in family.items()} for family in bundle]


def abreast(name: str, bundle: Bundle) -> dict[tuple[int, ...], list[Any]]:
    """For each number the leaves of all paths."""
    keys = bundle[0].keys()
    if any(family.keys() != keys for family in bundle):
        raise BadArgument(f"{name}: the paths of `from` do not have the same numbers")
    return {key: [family[key] for family in bundle] for key in keys}


def alone(name: str, bundle: Bundle) -> Family:
    """The one family of a bundle."""
    if len(bundle) != 1:
        raise BadArgument(f"{name} takes one path, and there are {len(bundle)}")
    return bundle[0]
