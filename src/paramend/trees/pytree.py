"""Kinds of containers registered with JAX: FrozenDict, struct dataclasses, optax states, Equinox modules, boxes."""

from typing import Any

import jax

from paramend.trees.kind import ELIDED, Kind


def _open(node: Any) -> tuple[tuple[Any, ...], tuple[Any, ...], Any]:
    pairs, structure = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return tuple(_key(path[-1]) for path, _ in pairs), tuple(child for _, child in pairs), structure


def _open_box(node: Any) -> tuple[tuple[Any, ...], tuple[Any, ...], Any]:
    keys, children, structure = _open(node)
    return tuple(ELIDED if key == "value" else key for key in keys), children, structure


def _key(entry: Any) -> Any:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return str(entry)


def _close(node: Any, children: Any) -> Any:
    return jax.tree_util.tree_flatten(node, is_leaf=lambda x: x is not node)[1].unflatten(children)


def _rekey(node: Any, children: dict[Any, Any]) -> Any:
    return type(node)(children)


REGISTERED = Kind("pytree", _open, _close, compiled=True)
REGISTERED_MAPPING = Kind("mapping", _open, _close, _rekey, compiled=True)
FROZEN_DICT = Kind(
    "mapping",
    # `_dict`, because reading a FrozenDict wraps its values, and JAX's walk loses the order of the keys.
    open=lambda node: (tuple(node._dict), tuple(node._dict.values()), None),
    close=lambda node, children: type(node)(dict(zip(node._dict, children, strict=True)), __unsafe_skip_copy__=True),
    rekey=_rekey,
)
BOX = Kind("box", _open_box, _close, compiled=True)

flatten = jax.tree_util.tree_flatten


def kind_of(kind: type, node: Any) -> Kind | None:
    """The kind of a registered container, or None if JAX treats it as a leaf."""
    if jax.tree_util.all_leaves([node]):
        return None
    if any(base.__module__ == "flax.core.meta" and base.__name__ == "AxisMetadata" for base in kind.__mro__):
        return BOX
    if kind.__module__.startswith("flax."):
        return {"FrozenDict": FROZEN_DICT, "State": REGISTERED_MAPPING}.get(kind.__name__, REGISTERED)
    return REGISTERED
