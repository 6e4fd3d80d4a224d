"""Heads: one leaf for a head and its embedding, and two leaves made of it."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from paramend.arrays.registry import backend
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.checkpoints.config import config as config_of
from paramend.edits.memory import editable
from paramend.errors import Unsupported
from paramend.leaves.leaves import Editable, Group, keys_of
from paramend.leaves.origins.origin import Origin
from paramend.leaves.paths import labels
from paramend.merging.destinations import TIED, Destinations


def untied(bases: Destinations, path: str) -> tuple[Editable, str]:
    """A model in which a tied head has a leaf of its own, with the values of the embedding, and what is to be said.

    Args:
        bases: the leaves of the model, whose head is tied.
        path: that of the head, if the model has none.
    """
    assert bases.tie is not None
    leaves, (embedding, head, _) = bases.leaves, bases.tie
    paths = leaves.index.paths
    both = paths[embedding], labels(path) if head is None else paths[head]

    def make(old: Sequence[Any]) -> list[Any]:
        values = [old[0], old[-1]]
        return values if isinstance(old[0], Origin) else [values[0], backend(values[1]).like(values[1], values[1])]

    keys = tuple([(key, depth) for depth, key in enumerate(keys_of(each))] for each in both)
    made = leaves.regrouped([Group((embedding,) if head is None else (embedding, head), keys, make)])
    said = f"the head, {path or leaves.index.path(cast(int, head))}, gets a leaf of its own"
    if isinstance(made, Checkpoint) and bases.config:
        inner = bases.config.get("text_config")
        nested = isinstance(inner, Mapping) and TIED in inner
        keys_said = [TIED] * (TIED in bases.config or not nested) + [f"text_config.{TIED}"] * nested
        try:
            made = config_of(made).set(dict.fromkeys(keys_said, False))
        except Unsupported:
            said += f"; set {TIED} to false in the config.json beside it"
    return editable(made), said
