"""What became of weights that got another code."""

from dataclasses import dataclass

from paramend.leaves.specs import Spec
from paramend.pages.page import Page
from paramend.pages.paged import Paged
from paramend.reports import wording
from paramend.reports.report import Line, Section


@dataclass(frozen=True, slots=True)
class Coded:
    """A weight.

    Attributes:
        path: its path, as one leaf.
        scheme: the name of its scheme.
        spec: its shape and dtype as floats.
        leaves: the paths of the leaves that it is stored in when it is quantised.
        relative_l2: how far its values are from what they were, as a share of their norm; None if they are the same.
        max_abs: the greatest difference of a value; None likewise.
    """

    path: str
    scheme: str
    spec: Spec
    leaves: tuple[str, ...] = ()
    relative_l2: float | None = None
    max_abs: float | None = None

    @property
    def error(self) -> str:
        """Both, as a table shows them."""
        return "" if self.relative_l2 is None else f"relative L2 {self.relative_l2:.3g}, max {self.max_abs:.3g}"


@dataclass(frozen=True, repr=False)
class QuantizeReport(Paged):
    """What became of weights that got another code.

    Attributes:
        did: "dequantised", "quantised" or "simulated".
        rows: the weights, in the order of the tree.
        kept: other quantised weights, which stay as they are: path → scheme.
        others: the number of other leaves, which are the same.
        said: what changes in the configuration beside the weights, and what should.
    """

    _data = ("did", "rows as weights", "kept", "others", "said")

    did: str
    rows: tuple[Coded, ...]
    kept: dict[str, str]
    others: int
    said: tuple[str, ...] = ()

    def headline(self) -> str:
        """How many weights of which schemes."""
        schemes = wording.listing(sorted({row.scheme for row in self.rows}))
        more = f", {len(self.kept):,} stay quantised" if self.kept else ""
        rest = wording.plural(self.others, "other leaf", "other leaves")
        counted = wording.plural(len(self.rows), "weight", "weights")
        return "\n".join((f"{counted} {self.did} ({schemes}){more}, {rest} kept", *self.said))

    def sections(self) -> list[Section]:
        """The weights, each with its scheme and its error, and those that stay quantised."""
        kept = [Line((path,), (scheme,)) for path, scheme in self.kept.items()]
        return [Section.of(self.did, self.rows, "spec", "scheme", "error"), Section("still quantised", kept)]

    def page(self) -> Page:
        """The weights as a map, with their schemes and errors."""
        shown = f"{self.did} weights", self.headline(), self.rows, "relative_l2 as relative L2", "max_abs", "spec"
        return Page.of_rows(*shown, groups="scheme", group_title="scheme")
