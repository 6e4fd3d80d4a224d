"""The structure of a file of `torch.save`: its tensors, those that are one, and containers like those it has."""

from collections.abc import Iterable, Mapping
from typing import Any

from paramend.formats.structure import Walk
from paramend.formats.torch.rebuilds import Tensor


def children_of(node: Any) -> Iterable[Any]:
    """The values in a container; none in anything else."""
    return node.values() if isinstance(node, dict) else node if type(node) in (list, tuple) else ()


def like(node: Any, values: list[Any], attributes: Mapping[str, Any]) -> Any:
    """A container with other values, and with attributes; anything else as it is."""
    if not isinstance(node, dict):
        return type(node)(values) if type(node) in (list, tuple) else node
    made = type(node)(zip(node, values, strict=True))
    if attributes:
        vars(made).update(attributes)
    return made


class TorchWalk(Walk):
    """The tensors of a structure; `ties` leads from the number of each that occurs again to the first one."""

    kind, separator, shares = Tensor, ".", True

    def __init__(self, root: Any, place: str, *, room: int) -> None:
        self.ties: dict[int, int] = {}
        self._first: dict[tuple[Any, ...], int] = {}
        super().__init__(root, place, room=room)

    def crowded(self, containers: bool) -> str:
        what = "containers" if containers else "values, or long keys,"
        return f"the same {what} are in too many places"

    def _leaf(self, names: dict[Any, Any], key: Any, leaf: Tensor) -> None:
        flaw = leaf.flaw()
        if flaw:
            raise self._bad(flaw)
        super()._leaf(names, key, leaf)
        number = len(self.leaves) - 1
        same: tuple[Any, ...] = (id(leaf),)
        if leaf.storage is not None:
            same = (
                leaf.storage.key,
                leaf.offset,
                leaf.shape,
                leaf.stride,
                leaf.dtype,
                leaf.conj,
                leaf.neg,
                leaf.sealed,
            )
        first = self._first.setdefault(same, number)
        if first != number:
            self.ties[first] = self.ties[number] = first
