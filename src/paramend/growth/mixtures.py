"""The report of a change of experts."""

from dataclasses import dataclass, field

from paramend.pages.page import Column, Page
from paramend.pages.paged import Paged
from paramend.reports import wording
from paramend.reports.report import Line, fold, table


@dataclass(frozen=True, repr=False)
class ExpertsReport(Paged):
    """Which experts each layer has.

    Attributes:
        did: "keep", "drop", "duplicate" or "upcycle".
        before: how many experts each layer had; 0 if it was dense.
        after: how many it has.
        layers: the path of each mixture → for each of its experts the old one that it is.
        redrawn: how many hidden units of each expert are new, of those that were dense.
        said: what changes in the configuration, and what else there is to know.
    """

    did: str
    before: int
    after: int
    layers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    redrawn: int = 0
    said: tuple[str, ...] = ()

    def headline(self) -> str:
        """How many experts became how many, in how many layers."""
        layers = wording.plural(len(self.layers), "layer")
        what = f"{self.before} -> {self.after}" if self.before else f"{self.after} instead of a dense layer"
        drawn = f", {wording.plural(self.redrawn, 'unit')} of each redrawn" if self.redrawn else ""
        return f"experts: {what} in {layers}{drawn}"

    def __str__(self) -> str:
        told = [wording.listing(list(map(str, ids)), 12) if self.before else "" for ids in self.layers.values()]
        lines = [Line((path,), (ids,)) for path, ids in zip(self.layers, told, strict=True)]
        return "\n\n".join(filter(None, (self.headline(), table(fold(lines)), "\n".join(self.said))))

    def page(self) -> Page:
        """The mixtures as a map."""
        ids = [", ".join(map(str, each)) for each in self.layers.values()]
        sizes = [self.after] * len(ids)
        return Page("experts", self.headline(), list(self.layers), sizes, [Column("experts", ids, "text")])
