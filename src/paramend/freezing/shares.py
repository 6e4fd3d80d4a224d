"""Shares: which parts of an optimizer state belong to which leaves.

Nothing is assumed about the optimizer. Its state for all leaves is compared with the state that it makes when some
of them are masked: what disappears belongs to these, and what stays, such as a count, belongs to all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from paramend.errors import Unsupported
from paramend.freezing.places import FrozenPlace

_flatten = jax.tree_util.tree_flatten_with_path


@dataclass(frozen=True)
class Share:
    """The part of a state that remains when some leaves are left out."""

    paths: tuple[Any, ...] | None = None  # the paths in the part, in its order; None: the part is the whole state
    structure: Any = None

    def cut(self, state: Any) -> Any:
        """The part of a state."""
        if self.paths is None:
            return state
        values = dict(_flatten(state)[0])
        return self.structure.unflatten([_at(values, path) for path in self.paths])

    def join(self, state: Any, part: Any) -> Any:
        """The state with a new part, and the rest as it was."""
        if self.paths is None:
            return part
        pairs, structure = _flatten(state)
        new = dict(_flatten(part)[0])
        return structure.unflatten([new.get(path, old) for path, old in pairs])


class Shares:
    """The shares in the state of one transformation; `trained` makes, of a tree of bools, that of the leaves where it
    is false."""

    def __init__(self, trained: Callable[[Any], Any]) -> None:
        self._trained = trained
        self._known: dict[Any, tuple[dict[Any, Any], Any]] = {}

    def of(self, gone: tuple[bool, ...], always: tuple[bool, ...], like: Any) -> Share:
        """The share of the leaves that are not gone, in the state for all that are not always gone; `Unsupported` if
        the state cannot be split by leaf."""
        if gone == always:
            return Share()
        whole, _ = self._paths(always, like)
        part, structure = self._paths(gone, like)
        for path, spec in part.items():
            if whole.get(path) != spec:
                raise Unsupported(
                    f"the state of this transformation cannot be split by leaf: {jax.tree_util.keystr(path)} "
                    "differs when leaves are left out",
                    hint='pm.freeze(tx, selector, how="updates", until=...) leaves the state as it is',
                )
        return Share(tuple(part), structure)

    def held(
        self, places: list[FrozenPlace], now: list[Any], always: tuple[bool, ...], like: Any, before: Any, after: Any
    ) -> Any:
        """The state after an update, in which the moments of frozen slices are what they were before. These are the
        arrays that belong to the leaf and have its shape. Arrays that mix the elements of a leaf, such as the row and
        column statistics of factored optimizers, belong to the whole leaf."""
        whole, _ = self._paths(always, like)
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(like)]
        owner: dict[Any, int] = {}
        for number, place in enumerate(places):
            if place.partial:
                without = tuple(flag or i == number for i, flag in enumerate(always))
                rest = {} if all(without) else self._paths(without, like)[0]  # some optimizers need at least one leaf
                owner |= {path: number for path in whole if path not in rest and whole[path][0] == shapes[number]}
        old = dict(_flatten(before)[0])
        pairs, structure = _flatten(after)
        return structure.unflatten(
            [jnp.where(now[owner[path]], old[path], new) if path in owner else new for path, new in pairs]
        )

    def _paths(self, gone: tuple[bool, ...], like: Any) -> tuple[dict[Any, Any], Any]:
        """The paths and shapes of the state without some leaves, and its structure."""
        leaves, structure = jax.tree.flatten(like)
        key = (structure, tuple(jnp.shape(leaf) for leaf in leaves), gone)
        if key not in self._known:
            specs = jax.eval_shape(self._trained(structure.unflatten(gone)).init, like)
            pairs, found = _flatten(specs)
            self._known[key] = ({path: (spec.shape,) for path, spec in pairs}, found)
        return self._known[key]


def _at(values: dict[Any, Any], path: Any) -> Any:
    if path not in values:
        raise Unsupported(
            f"the optimizer state has nothing at {jax.tree_util.keystr(path)}: it belongs to another transformation",
            hint="state, report = pm.graft_opt_state(tx.init(params), old_state) continues from an earlier state",
        )
    return values[path]
