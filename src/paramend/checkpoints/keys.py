"""`Keyed`: a checkpoint whose typed PRNG keys are keys of JAX, for comparisons with trees in memory that hold keys."""

import copy
from typing import Any

from paramend.checkpoints.checkpoint import Checkpoint
from paramend.checkpoints.memory import is_key
from paramend.formats.source import HoldsKeys, Source
from paramend.leaves.specs import Spec
from paramend.trees.tree import Tree


def matched(leaves: Any, other: Any) -> Any:
    """A tree or a checkpoint whose typed keys are of the kind that the other side has.

    A checkpoint holds the numbers of a key and says that they are one; as a leaf they are these numbers. Where the
    other side is a tree in memory that holds keys, they are keys.
    """
    held = getattr(leaves, "source", None)
    if type(leaves) is not Checkpoint or not isinstance(held, HoldsKeys) or not held.implementations:
        return leaves
    return Keyed(leaves) if isinstance(other, Tree) and any(map(is_key, other.values)) else leaves


def numbered(tree: Any, other: Any) -> Any:
    """A tree in memory with numbers in place of typed keys, if the other side is a checkpoint that holds keys."""
    held = getattr(other, "source", None)
    if not isinstance(tree, Tree) or not isinstance(held, HoldsKeys) or not held.implementations:
        return tree
    from paramend.arrays import jax  # needed for keys alone

    twin = copy.copy(tree)
    twin.values = [jax.key_numbers(value)[2] if is_key(value) else value for value in tree.values]
    return twin


class Keyed(Checkpoint):
    """A checkpoint whose typed PRNG keys are keys."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.source, checkpoint._plan, checkpoint.recipe)

    def _implementation(self, number: int) -> str:
        assert isinstance(self.source, HoldsKeys)
        numbers = Checkpoint.spec(self, number)
        return self.source.implementations.get(number, "") if numbers.dtype == "uint32" and numbers.shape else ""

    def spec(self, number: int) -> Spec:
        found, implementation = super().spec(number), self._implementation(number)
        if not implementation:
            return found
        from paramend.arrays import jax  # imported already

        return Spec(found.shape[:-1], jax.key_dtype(implementation))

    def read(self, number: int) -> Any:
        found, implementation = super().read(number), self._implementation(number)
        if not implementation:
            return found
        from paramend.arrays import jax  # imported already

        return jax.typed_keys(found, implementation)

    def fetch(self, number: int, index: Any = None) -> Any:
        if index is None and self._implementation(number):
            return self.read(number)
        return super().fetch(number, index)

    def home(self, number: int) -> Source | None:
        """The source, if it holds the values of a leaf as they are read."""
        return None if self._implementation(number) else super().home(number)
