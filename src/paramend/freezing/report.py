"""The report of what is frozen, what trains, and what the optimizer keeps for it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from paramend.leaves.specs import Spec
from paramend.reports import wording
from paramend.reports.fields import data_of
from paramend.reports.report import Report, Section

TITLES = {
    "trained": "trained",
    "frozen": "frozen",
    "scheduled": "frozen for a while",
    "partly": "frozen in part",
    "moving": "moved by the model itself",
}


@dataclass(frozen=True, slots=True)
class FrozenRow:
    """One leaf.

    Attributes:
        path: its path.
        spec: its shape and dtype.
        status: "trained", "frozen", "thawed", "scheduled" (frozen for a while), "partly" (slices of it) or "moving"
            (in the forward pass, as running statistics do: no optimizer trains it or holds it).
    """

    _data: ClassVar = ("path", "spec.shape", "spec.dtype")

    path: str
    spec: Spec
    status: str


class FreezeReport(list[str], Report):
    """What was frozen or thawed in place: a list of the paths, and a report of them.

    Attributes:
        did: "frozen" or "thawed".
        rows: one for each leaf, in the order of the paths.
        sliced: the slice of each leaf, as it is written between brackets; "" for whole leaves.
    """

    _data = ("did", "sliced as slice", "rows as leaves")

    def __init__(self, did: str, rows: Iterable[FrozenRow], sliced: str = "") -> None:
        self.did, self.rows, self.sliced = did, tuple(rows), sliced
        super().__init__(row.path for row in self.rows)

    def headline(self) -> str:
        count = wording.plural(len(self.rows), "leaf", "leaves")
        return f"{self.did}: {f'[{self.sliced}] of ' if self.sliced else ''}{count}"

    def sections(self) -> list[Section]:
        return [Section.of(self.did, self.rows, "spec")]


@dataclass(frozen=True, repr=False)
class FrozenReport(Report):
    """What is frozen.

    Attributes:
        rows: one for each leaf, in the order of the tree.
        state_nbytes: bytes of optimizer state; None if no optimizer was given.
    """

    rows: tuple[FrozenRow, ...]
    state_nbytes: int | None = None

    def of(self, status: str) -> list[FrozenRow]:
        """The rows of one status."""
        return [row for row in self.rows if row.status == status]

    @property
    def frozen(self) -> list[FrozenRow]:
        """The leaves that are frozen as a whole and for good."""
        return self.of("frozen")

    @property
    def trained(self) -> list[FrozenRow]:
        """The leaves that are never frozen, not even in part."""
        return self.of("trained")

    @property
    def moving(self) -> list[FrozenRow]:
        """The leaves that the forward pass moves: no optimizer trains them or holds them."""
        return self.of("moving")

    def headline(self) -> str:
        def count(rows: Any) -> str:
            return f"{wording.plural(sum(row.spec.size for row in rows), 'scalar')} in {len(rows)}"

        parts = [f"{TITLES[status]}: {count(self.of(status))}" for status in TITLES if self.of(status)]
        state = "" if self.state_nbytes is None else f"; optimizer state: {wording.size(self.state_nbytes)}"
        return f"{', '.join(parts)} of {wording.plural(len(self.rows), 'leaf', 'leaves')}{state}"

    def sections(self) -> list[Section]:
        return [Section.of(title, self.of(status), "spec") for status, title in TITLES.items()]

    def to_dict(self) -> dict[str, Any]:
        rows = [data_of(row) | {"status": row.status} for row in self.rows]
        return {"leaves": rows, "state_nbytes": self.state_nbytes}
