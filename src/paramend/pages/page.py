"""`Page`: a report as one self-contained HTML file with a map of the tree, a table and a search box."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from typing import Any

from paramend.errors import printable, printable_lines
from paramend.leaves.leaves import separator_of

# Notebooks store what they show: with more leaves they show only the headline, and `to_html` writes a file.
_MOST_IN_A_NOTEBOOK = 20_000


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a page's table."""

    name: str
    values: Sequence[Any]  # one for each leaf; None if a leaf has none
    kind: str = "number"  # "number" or "text"

    def __post_init__(self) -> None:
        values = [printable(value) if isinstance(value, str) else value for value in self.values]
        object.__setattr__(self, "values", values)


@dataclass(frozen=True, slots=True)
class Histogram:
    """The distribution of the values of a leaf."""

    low: float  # where the first bin begins
    high: float  # where the last one ends
    before: Sequence[int]  # the count of each bin
    after: Sequence[int] | None = None  # the counts of the other tree, in the same bins; None if there is none


@dataclass(frozen=True, slots=True)
class Page:
    """What a page shows. Names from files may hold control characters: these are written out."""

    title: str
    headline: str
    paths: Sequence[str]
    sizes: Sequence[int]  # the number of scalars of each
    columns: Sequence[Column] = ()
    groups: Sequence[str] = ()  # the name of the group of each leaf; empty if there are no groups
    group_title: str = "state"  # the title of the groups
    histograms: Mapping[int, Histogram] = field(default_factory=dict)  # place in `paths` → histogram
    colour: str = ""  # the name of the column that colours the map at first; "" for the groups

    def __post_init__(self) -> None:
        for name in ("title", "headline", "group_title"):
            object.__setattr__(self, name, printable_lines(getattr(self, name)))
        for name in ("paths", "groups"):
            object.__setattr__(self, name, list(map(printable, getattr(self, name))))

    def html(self) -> str:
        """The page as the text of one file that needs no network and no other file."""
        import jinja2  # slow to import, and most programs write no page
        from markupsafe import Markup

        folder = files("paramend.pages")
        environment = jinja2.Environment(autoescape=True, keep_trailing_newline=True)
        template = environment.from_string(folder.joinpath("page.html.jinja").read_text("utf-8"))
        text: str = template.render(
            title=self.title,
            headline=self.headline,
            style=Markup(folder.joinpath("page.css").read_text("utf-8")),
            script=Markup(folder.joinpath("page.js").read_text("utf-8")),
            data=Markup(_in_script(self._data())),
        )
        return text

    def notebook(self) -> str:
        """The page as a frame in a notebook; only the headline if it would be too large."""
        if len(self.paths) > _MOST_IN_A_NOTEBOOK:
            return f"<pre>{escape(self.headline)}</pre>"
        style = "width:100%;height:900px;border:0"
        return f'<iframe srcdoc="{escape(self.html())}" style="{style}" title="{escape(self.title)}"></iframe>'

    def _data(self) -> dict[str, Any]:
        names = {name: place for place, name in enumerate(dict.fromkeys(self.groups))}
        return {
            "paths": list(self.paths),
            "sizes": list(self.sizes),
            "separator": separator_of(self.paths),
            "groups": list(names),
            "group": [names[group] for group in self.groups],
            "group_title": self.group_title,
            "columns": [
                {"name": column.name, "kind": column.kind, "values": list(map(_plain, column.values))}
                for column in self.columns
            ],
            "histograms": {
                str(place): {"edges": [_plain(h.low), _plain(h.high)], "before": h.before, "after": h.after}
                for place, h in self.histograms.items()
            },
            "colour": self.colour,
        }


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _in_script(data: Any) -> str:
    """Data as JSON that is safe in a script element, whatever the names of leaves are."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
