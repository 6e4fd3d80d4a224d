"""`Described`: leaves reduced to their names and specs, for reports."""

from collections.abc import Mapping
from typing import Any, NoReturn

from paramend.errors import Unsupported
from paramend.leaves.leaves import Index, Leaves
from paramend.leaves.specs import Spec


class Described:
    """What leaves are called and what they are, without values; `path` is that of their checkpoint, or ""."""

    def __init__(self, leaves: Leaves) -> None:
        self.path = str(getattr(leaves, "path", ""))
        self.ties: Mapping[int, int] = dict(leaves.ties)
        self.index = Index(leaves.index.separator)
        self.index.names, self.index.numbers = leaves.index.names, leaves.index.numbers
        self._specs = {number: leaves.spec(number) for number in leaves.index.numbers}
        self._nbytes = {number: leaves.nbytes(number) for number in leaves.index.numbers}

    def __eq__(self, other: object) -> bool:
        return self._said() == other._said() if isinstance(other, Described) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.path)

    def _said(self) -> tuple[object, ...]:
        return self.path, self.ties, self.index.texts, self._specs

    def spec(self, number: int) -> Spec:
        return self._specs[number]

    def nbytes(self, number: int) -> int:
        return self._nbytes[number]

    def refusal(self, number: int) -> str:
        return f"a report tells of {self.index.path(number)} and does not hold it"

    def read(self, number: int) -> NoReturn:
        """Refuses: the values are elsewhere."""
        raise Unsupported(self.refusal(number), hint=f'pm.open("{self.path}")' if self.path else "")

    def children(self, node: Any) -> None:
        return None
