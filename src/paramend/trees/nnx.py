"""Kinds of Flax NNX: modules, which are objects with identity, and Variables, which are boxes."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from paramend.trees.kind import ELIDED, Kind


def _open_module(module: Any) -> tuple[tuple[Any, ...], tuple[Any, ...], Any]:
    """The attributes that may hold leaves, in the order in which the module defines them."""
    holds = vars(module).get("_pytree__nodes", {})
    names = [name for name in vars(module) if not name.startswith("_pytree__") and holds.get(name, True)]
    keys = (int(name) if name.isdigit() else name for name in names) if isinstance(module, nnx.List) else names
    return tuple(keys), tuple(vars(module)[name] for name in names), None


def _replace(module: Any, changes: Mapping[int, Any]) -> Any:
    graph, state = nnx.split(module)
    fresh = [
        (path, leaf.replace(changes.get(id(leaf), leaf.get_raw_value())))
        if isinstance(leaf, nnx.Variable)
        else (path, changes.get(id(leaf), leaf))
        for path, leaf in nnx.to_flat_state(state)
    ]
    new = nnx.merge(graph, nnx.from_flat_state(fresh))
    for (_, old), (_, twin) in zip(nnx.iter_graph(module), nnx.iter_graph(new), strict=True):
        if isinstance(old, nnx.Pytree):  # merge sorts attributes
            held = {name: vars(twin)[name] for name in vars(old)}
            vars(twin).clear()
            vars(twin).update(held)
    return new


def _label(module: Any, labels: Mapping[int, Any]) -> Any:
    """A State of labels without Variables: it fits one with Variables, and one of arrays, which optax is given."""
    flat = nnx.to_flat_state(nnx.split(module)[1])
    return nnx.from_flat_state([(path, labels[id(leaf)]) for path, leaf in flat])


VARIABLE = Kind(
    "NNX Variable",
    open=lambda variable: ((ELIDED,), (variable.get_raw_value(),), None),
    close=lambda variable, children: variable.replace(children[0]),
    assign=lambda variable, value: variable.set_raw_value(value),
)
MODULE = Kind("NNX module", _open_module, close=lambda module, children: module, replace=_replace, label=_label)


def kind_of(kind: type) -> Kind | None:
    """The kind of a Variable or a module, or None."""
    if issubclass(kind, nnx.Variable):
        return VARIABLE
    return MODULE if issubclass(kind, nnx.Pytree) else None
