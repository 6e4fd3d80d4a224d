"""The report of a change of depth: what each layer of the new model is made of."""

import re
from dataclasses import dataclass, field
from typing import Any

from paramend.errors import BadArgument
from paramend.growth.depth import Order
from paramend.pages.page import Page
from paramend.pages.paged import Paged
from paramend.reports import wording
from paramend.reports.report import braced
from paramend.reports.tables import aligned
from paramend.selectors.selector import Selector, sel


@dataclass(frozen=True, slots=True)
class LayerRow:
    """What one layer of the new model is.

    Attributes:
        path: its path.
        source: the path of the old layer that it was made of.
        did: "kept", "copied", or "identity".
        set: for an identity, leaf that was set → its value.
        parameters: the number of scalars.
    """

    path: str
    source: str
    did: str
    set: dict[str, float] = field(default_factory=dict)
    parameters: int = 0

    @property
    def settings(self) -> str:
        """The leaves that were set, as text."""
        return ", ".join(f"{path} = {value:g}" for path, value in self.set.items())

    @property
    def new(self) -> bool:
        """Whether the old model does not have this layer."""
        return self.did != "kept"


@dataclass(repr=False)
class DeepenReport(Paged):
    """What each layer of the new model is, and what to freeze.

    Attributes:
        order: the order of the layers.
        layers: one row for each layer of the new model, for each stack.
        new: a selector of the leaves of the new layers; None if there are no new layers.
        config: descriptions of the changes to the model's configuration.
        rename: rules with which `pm.graft` carries what belongs to the old layers, such as moments, to their new
            places: `pm.graft(tx.init(params), old_state, rename=report.rename)`.
        family: the family that determined which leaves make a layer the identity, or "".
        stacked: for layers stacked along an axis, the selector of their leaves; else "".
    """

    _data = ("order.sources as order", "order.identity", "order.of", "layers", "new", "config", "rename", "family")

    order: Order
    layers: list[LayerRow] = field(default_factory=list)
    new: Selector | None = None
    config: list[str] = field(default_factory=list)
    rename: dict[str, str | None] = field(default_factory=dict)
    family: str = ""
    stacked: str = ""

    @property
    def frozen(self) -> Selector:
        """A selector of all leaves except those of the new layers, to freeze while these are trained.

        Raises:
            BadArgument: the layers are slices of leaves, and no selector combines whole leaves and slices.
        """
        if self.stacked and self.new is not None:
            why = "the new layers are slices of leaves: freeze all, and thaw these from the start"
            raise BadArgument(why, hint='pm.freeze(tx, "**", until={report.new: 0})')
        return sel("**") if self.new is None else ~self.new

    @property
    def old(self) -> list[str]:
        """The paths of the old layers, stack by stack; those of dropped layers are counted on from the others."""
        found: list[str] = []
        for start in range(0, len(self.layers), len(self.order)):
            known = dict(zip(self.order.sources, (row.source for row in self.layers[start:]), strict=False))
            first, path = next(iter(known.items()))
            before, number, after = _parts(path)
            found += [known.get(one, f"{before}{number - first + one}{after}") for one in range(self.order.of)]
        return found

    def headline(self) -> str:
        """The numbers of layers before and after, and what became of them."""
        said = {did: sum(row.did == did for row in self.layers) for did in ("kept", "copied", "identity")}
        stacks = len(self.layers) // len(self.order)
        each = f" in each of {stacks} stacks" if stacks > 1 else ""
        parts = [f"{count // stacks} {did}" for did, count in said.items() if count]
        if self.order.dropped:
            parts.append(f"{len(self.order.dropped)} dropped")
        return f"deepen: {wording.plural(self.order.of, 'layer')} -> {len(self.order)}{each}, {', '.join(parts)}"

    def __str__(self) -> str:
        lines = [_line(run) for run in _runs(self.layers)]
        blocks = [self.headline(), "\n".join(f"  {line}" for line in aligned(lines))]
        return "\n\n".join([*blocks, *([f"config: {', '.join(self.config)}"] if self.config else [])])

    def page(self) -> Page:
        """Arrows from the old layers to the new ones, coloured by what became of them."""
        columns, ends = ("source", "settings as set", "parameters"), list(self.old)
        chart: Any = {"chart": "arrows", "ends": ends, "links": [[ends.index(row.source)] for row in self.layers]}
        shown = "deepen", self.headline(), self.layers
        return Page.of_rows(*shown, *columns, size="parameters", groups="did", group_title="layer", **chart)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"new": None if self.new is None else repr(self.new)}


def _runs(rows: list[LayerRow]) -> list[list[LayerRow]]:
    """Rows grouped into runs of consecutive layers that were made in the same way from consecutive layers."""
    runs: list[list[LayerRow]] = []
    for row in rows:
        run = runs[-1] if runs else []
        step = _step(run[-1], row) if run and (run[-1].did, run[-1].set) == (row.did, row.set) else None
        if step is not None and step == _step(*[*run, row][:2]):
            run.append(row)
        else:
            runs.append([row])
    return runs


def _step(one: LayerRow, other: LayerRow) -> int | None:
    """By how much the numbers of two rows rise, if their paths and sources rise equally."""
    numbers = []
    for first, second in ((one.path, other.path), (one.source, other.source)):
        (before, a, after), (before_too, b, after_too) = _parts(first), _parts(second)
        if (before, after) != (before_too, after_too):
            return None
        numbers.append(b - a)
    return numbers[0] if numbers[0] == numbers[1] > 0 else None


def _parts(path: str) -> tuple[str, int, str]:
    found = re.fullmatch(r"(.*?)([0-9]+)([^0-9]*)", path, re.DOTALL)
    return (found[1], int(found[2]), found[3]) if found else (path, 0, "")


def _line(run: list[LayerRow]) -> tuple[str, ...]:
    paths = [_written([row.path for row in run]), _written([row.source for row in run])]
    path = paths[0] if paths[0] == paths[1] else " ◄─ ".join(paths)
    values: dict[float, list[str]] = {}
    for name, value in run[0].set.items():
        values.setdefault(value, []).append(name)
    said = "; ".join(f"{', '.join(names)} = {value:g}" for value, names in values.items())
    return path, run[0].did if len(run) == 1 else f"{len(run)} × {run[0].did}", said


def _written(paths: list[str]) -> str:
    """Numbered paths as one text: `layers.{0..11}`."""
    if len(paths) == 1:
        return paths[0]
    parts = [_parts(path) for path in paths]
    return f"{parts[0][0]}{braced([str(number) for _, number, _ in parts])}{parts[0][2]}"
