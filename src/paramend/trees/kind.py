"""How containers are opened and closed: one `Kind` for each type of container."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Children = Sequence[Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """One way of holding children; `close` and `rekey` make new containers of the same type."""

    name: str
    # Container → (keys, children, static). Keys and static are hashable and, with the types of the children, identify
    # the structure. The key `ELIDED` marks a box whose only child takes the path of the box.
    open: Callable[[Any], tuple[tuple[Hashable, ...], Children, Hashable]]
    close: Callable[[Any, Children], Any]  # with the same static part
    # With these keys, for delete and rename; None if the keys are fixed, like the fields of a dataclass.
    rekey: Callable[[Any, dict[Any, Any]], Any] | None = None
    # For objects with identity (torch and NNX modules), with new leaves by the id of a leaf or its box: shared parts
    # stay shared. `close` is then not called for anything under it. `label` gives a tree of labels by the same ids.
    replace: Callable[[Any, Mapping[int, Any]], Any] | None = None
    label: Callable[[Any, Mapping[int, Any]], Any] | None = None
    assign: Callable[[Any, Any], None] | None = None  # for boxes: put the value into the box in place
    compiled: bool = False  # whether JAX's walk opens and closes this kind without loss

    def entries(self, container: Any) -> list[tuple[Any, Any]]:
        """The children of a container with their keys, or their positions if it has none."""
        keys, children, _ = self.open(container)
        return list(zip(keys or range(len(children)), children, strict=True))


class _Elided:
    def __repr__(self) -> str:
        return "ELIDED"


ELIDED = _Elided()
