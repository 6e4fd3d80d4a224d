"""Labels of modules that can be called."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from paramend._optional import imported


class Labels:
    """The tree of labels of a module that can be called, as a function that returns it.

    optax calls labels that can be called, and a tree of the module's own class would run the model. Else it is like the
    tree: it has its attributes, its entries and its leaves, and `jax.tree.map` makes a tree of it.
    """

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        if imported("jax"):
            _register()

    def __call__(self, params: Any) -> Any:
        """The labels of these parameters, which may be a part of the module: the State of its `nnx.Param`."""
        return _part(self.tree, params)

    def __getattr__(self, name: str) -> Any:
        if name == "tree" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tree, name)

    def __getitem__(self, key: Any) -> Any:
        return self.tree[key]

    def __eq__(self, other: object) -> bool:
        return bool(self.tree == (other.tree if isinstance(other, Labels) else other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self.tree)


def _part(labels: Any, params: Any, kind: Any = None) -> Any:
    if isinstance(labels, Mapping) and isinstance(params, Mapping):  # within a State these are plain dicts
        kind = kind or type(params)
        return kind({key: _part(labels[key], params[key], dict) for key in params})
    return labels


@cache
def _register() -> None:
    import jax  # a pytree of JAX, once the user has imported it

    jax.tree_util.register_pytree_node(Labels, lambda node: ((node.tree,), None), lambda _, trees: trees[0])
