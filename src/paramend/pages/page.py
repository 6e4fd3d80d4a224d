"""`Page`: a report as one self-contained HTML file with a chart, a table and a search box."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from importlib.resources import files
from typing import Any, Literal

from paramend.errors import printable, printable_lines
from paramend.leaves.leaves import separator_of
from paramend.leaves.paths import natural
from paramend.reports.fields import parted, values

# Notebooks store what they show: with more leaves they show only the headline, and `to_html` writes a file.
_MOST_IN_A_NOTEBOOK = 20_000

# Groups of leaves that nothing happened to: grey, and after the others.
QUIET = frozenset({"identical", "kept", "agrees", "no difference"})
# Colours that people with colour vision deficiency can distinguish (Okabe and Ito); groups also have textures.
COLOURS = ("#d55e00", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#f0e442")


@dataclass(frozen=True, slots=True)
class Scale:
    """How figures become colours. Those with a sign lie about zero; a log scale begins at the least above zero."""

    low: float
    high: float
    kind: Literal["linear", "log", "signed"]

    @classmethod
    def of(cls, values: Sequence[Any]) -> "Scale | None":
        """The scale of some figures; None if none of them is a finite number.

        >>> Scale.of([0.0, 0.01, None, 4.0]), Scale.of([-1, 3]).low
        (Scale(low=0.01, high=4.0, kind='log'), -3)
        """
        known = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
        if not known:
            return None
        low, high = min(known), max(known)
        if low < 0:
            return cls(-max(-low, high), max(-low, high), "signed")
        least = min((value for value in known if value > 0), default=high)
        return cls(least, high, "log") if high > 100 * least else cls(low, high, "linear")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a page's table."""

    name: str
    values: Sequence[Any]  # one for each leaf; None if a leaf has none
    kind: str = "number"  # "number" or "text"

    def __post_init__(self) -> None:
        values = [printable(value) if isinstance(value, str) else value for value in self.values]
        object.__setattr__(self, "values", values)

    @classmethod
    def of(cls, rows: Sequence[Any], field: str) -> "Column":
        """A field of each of some rows."""
        name, key = parted(field)
        found = values(rows, name)
        kind = "text" if any(isinstance(value, str) for value in found) else "number"
        return cls(key.replace("_", " "), found, kind)

    @property
    def empty(self) -> bool:
        """Whether it says nothing of any leaf: all values are missing, empty or zero."""
        return not set(self.values) - {None, "", 0}

    @property
    def tells_apart(self) -> bool:
        """Whether it says something of some leaf that it does not say of all."""
        return not self.empty and (len(set(self.values)) > 1 or len(self.values) == 1)


@dataclass(frozen=True, slots=True)
class Histogram:
    """The distribution of the values of a leaf."""

    low: float  # where the first bin begins
    high: float  # where the last one ends
    before: Sequence[int]  # the count of each bin
    after: Sequence[int] | None = None  # the counts of the other tree, in the same bins; None if there is none


@dataclass(frozen=True, slots=True)
class Page:
    """What a page shows. Names from files may hold control characters: these are written out.

    The chart is a map of the tree, whose leaves are brought into natural order; or bars, one for each leaf that is
    linked to one end, over a matrix of those that are linked to two; or arrows to each leaf from the end linked to it.
    """

    title: str
    headline: str
    paths: Sequence[str]
    sizes: Sequence[int]  # the number of scalars of each
    columns: Sequence[Column] = ()  # those that matter first come first: narrow screens have no room for the others
    groups: Sequence[str] = ()  # the name of the group of each leaf; empty if there are no groups
    group_title: str = "state"  # the title of the groups
    histograms: Mapping[int, Histogram] = field(default_factory=dict)  # place in `paths` → histogram
    colour: str = ""  # the name of the column that colours the chart at first; "" for the groups
    of: str = ""  # what the page is about, such as the names of files; the heading, if there is one
    chart: Literal["map", "bars", "arrows"] = "map"
    ends: Sequence[str] = ()
    links: Sequence[Sequence[int]] = ()  # for each leaf the places of its ends
    legend: Sequence[str] = ()  # the names of the groups in order; by default as they come, the quiet ones last

    @classmethod
    def of_rows(
        cls,
        title: str,
        headline: str,
        rows: Sequence[Any],
        *columns: str | Column,
        size: str = "spec.size",
        groups: str | Sequence[str] = (),
        **more: Any,
    ) -> "Page":
        """The page of some rows with a path and a size; columns, and groups as a text, are fields."""
        groups = values(rows, groups) if isinstance(groups, str) else groups
        paths, sizes = values(rows, "path"), values(rows, size)
        shown = [each if isinstance(each, Column) else Column.of(rows, each) for each in columns]
        return cls(title, headline, paths, sizes, shown, groups, **more)

    def __post_init__(self) -> None:
        for name in ("title", "headline", "group_title", "of"):
            object.__setattr__(self, name, printable_lines(getattr(self, name)))
        for name in ("paths", "groups", "ends"):
            object.__setattr__(self, name, list(map(printable, getattr(self, name))))
        legend = self.legend or sorted(dict.fromkeys(self.groups), key=lambda name: name in QUIET)
        object.__setattr__(self, "legend", list(legend))
        if self.chart == "map":
            self._arrange(sorted(range(len(self.paths)), key=[natural(path) for path in self.paths].__getitem__))

    def _arrange(self, order: Sequence[int]) -> None:
        for name in ("paths", "sizes", "groups"):
            values = getattr(self, name)
            object.__setattr__(self, name, [values[place] for place in order] if values else [])
        columns = [Column(c.name, [c.values[place] for place in order], c.kind) for c in self.columns]
        drawn = {new: self.histograms[old] for new, old in enumerate(order) if old in self.histograms}
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "histograms", drawn)

    @property
    def styles(self) -> list[tuple[str, int]]:
        """The colour and the texture of each group in the legend; no colour for the quiet ones. Where there are some,
        the others are louder: none of them is plain, and the first is red."""
        quiet = not QUIET.isdisjoint(self.legend)
        loud = [
            (COLOURS[at % 7], 1 + at % 5) if quiet else (COLOURS[(at + 1) % 7], at % 6)
            for at in range(len(self.legend))
        ]
        return [("", 0) if name in QUIET else loud[place] for place, name in enumerate(self.legend)]

    def html(self) -> str:
        """The page as the text of one file that needs no network and no other file."""
        import jinja2  # slow to import, and most programs write no page
        from markupsafe import Markup

        folder = files("paramend.pages")
        environment = jinja2.Environment(autoescape=True, keep_trailing_newline=True)
        template = environment.from_string(folder.joinpath("page.html.jinja").read_text("utf-8"))
        text: str = template.render(
            title=self.title,
            of=self.of,
            headline=self.headline,
            style=Markup(folder.joinpath("page.css").read_text("utf-8")),
            script=Markup("".join(folder.joinpath(name).read_text("utf-8") for name in ("chart.js", "page.js"))),
            data=Markup(_in_script(self._data())),
        )
        return text

    def notebook(self) -> str:
        """The page as a frame in a notebook; only the headline if it would be too large."""
        if len(self.paths) > _MOST_IN_A_NOTEBOOK:
            return f"<pre>{escape(self.headline)}</pre>"
        style = "width:100%;height:900px;border:0"
        return (
            f'<iframe srcdoc="{escape(self.html())}" style="{style}" title="{escape(self.of or self.title)}"></iframe>'
        )

    def _data(self) -> dict[str, Any]:
        names = {name: place for place, name in enumerate(self.legend)}
        return {
            "paths": list(self.paths),
            "sizes": list(self.sizes),
            "separator": separator_of(self.paths) if self.chart == "map" else "",
            "groups": list(names),
            "styles": self.styles,
            "group": [names[group] for group in self.groups],
            "group_title": self.group_title,
            "columns": [_column(each) for each in self.columns if not each.empty or each.name == self.colour],
            "histograms": {
                str(place): {"edges": [_plain(h.low), _plain(h.high)], "before": h.before, "after": h.after}
                for place, h in self.histograms.items()
            },
            "colour": self.colour,
            "chart": self.chart,
            "ends": list(self.ends),
            "links": [list(each) for each in self.links],
        }


def _column(column: Column) -> dict[str, Any]:
    scale = None if column.kind == "text" else Scale.of(column.values)
    values = list(map(_plain, column.values))
    said = {"name": column.name, "kind": column.kind, "values": values, "table": column.tells_apart}
    return said | {"scale": scale and asdict(scale)}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _in_script(data: Any) -> str:
    """Data as JSON that is safe in a script element, whatever the names of leaves are."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
