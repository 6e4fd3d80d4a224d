"""The shared base of reports: rows are data; printed, they are a table with repeated layers folded."""

import html
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from paramend.errors import MissingExtra, printable, printable_lines
from paramend.reports import wording
from paramend.reports.fields import fields_of, picked, values
from paramend.reports.tables import aligned

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a printed report."""

    paths: tuple[str, ...]  # the path of the line, and paths that belong to it, such as its source
    cells: tuple[str, ...] = ()  # its other columns
    size: int = 0
    members: tuple[str, ...] = ()  # the paths of all leaves in the line

    @property
    def leaves(self) -> int:
        """The number of leaves in the line."""
        return len(self.members) or 1


@dataclass(frozen=True, slots=True)
class Section:
    """A titled part of a report."""

    title: str  # what the leaves have in common
    lines: list[Line] = field(default_factory=list)
    columns: tuple[str, ...] = ()  # the titles of the cells that `cells` returns
    # A line → more cells, computed after folding: figures over all leaves of the line.
    cells: Callable[[Line], tuple[str, ...]] = lambda line: ()

    @classmethod
    def of(cls, title: str, rows: Sequence[Any], *cells: str, size: str = "spec.size") -> "Section":
        """The section with a line for each of some rows, whose cells are the fields named."""
        columns = [values(rows, name) for name in cells]
        sizes = values(rows, size) if size else [0] * len(rows)
        paths = [(path,) for path in values(rows, "path")]
        return cls(title, list(map(Line, paths, zip(*columns, strict=True), sizes)))

    def text(self, *, elsewhere: Iterable[str] = ()) -> str:
        """The section as a table, folded. `elsewhere` as in `fold`."""
        lines = fold(self.lines, elsewhere=elsewhere)
        if not self.columns:
            return table(lines)
        width = max(len(line.cells) for line in lines)
        header = Line(("path",), ("spec", *[""] * (width - 1), *self.columns))
        rows = [
            replace(line, cells=(*line.cells, *[""] * (width - len(line.cells)), *self.cells(line))) for line in lines
        ]
        return table([header, *rows])


class Report:
    """What was done, as data. `str(report)` is text for people, `to_dict()` is for JSON."""

    _data: ClassVar[Sequence[str]] = ()  # the fields in `to_dict()`, by default all

    def headline(self) -> str:
        """A summary in one sentence."""
        raise NotImplementedError

    def sections(self) -> list[Section]:
        """The sections, with one line per row; none if there are no rows, or the text lists them in its own way."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers."""
        return picked(self, *fields_of(self))

    def to_frame(self) -> "DataFrame":
        """The rows of `to_dict()` as a pandas data frame. Where they are in several lists, a column `part` names it.

        Raises:
            MissingExtra: pandas is not installed.
        """
        try:
            from pandas import DataFrame  # only for this
        except ImportError:
            raise MissingExtra("a data frame needs pandas", hint="pip install pandas") from None
        parts = {name: rows for name, rows in self.to_dict().items() if isinstance(rows, list)}
        parts = {name: rows for name, rows in parts.items() if all(isinstance(row, dict) for row in rows)}
        several = len(parts) > 1
        return DataFrame([({"part": name} if several else {}) | row for name, rows in parts.items() for row in rows])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def __str__(self) -> str:
        sections = self.sections()
        blocks = [printable_lines(self.headline())]
        for section in sections:
            if not section.lines:
                continue
            elsewhere = [line.paths[0] for other in sections if other is not section for line in other.lines]
            leaves = wording.plural(len({line.paths[0] for line in section.lines}), "leaf", "leaves")
            blocks.append(f"{printable(section.title)}: {leaves}\n{section.text(elsewhere=elsewhere)}")
        return "\n\n".join(blocks)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {printable_lines(self.headline())}>"


def table(lines: Sequence[Line], *, indent: str = "  ") -> str:
    """Lines as text in aligned columns.

    >>> print(table([Line(("a/w", "b/w"), ("float32[2]",)), Line(("head",), ("int8[3]", "kept"))]))
      a/w ◄─ b/w  float32[2]
      head        int8[3]     kept
    """
    rows = [(" ◄─ ".join(line.paths), *line.cells) for line in lines]
    return "\n".join(indent + row for row in aligned(rows))


def fold(lines: Iterable[Line], *, limit: int = 16, elsewhere: Iterable[str] = ()) -> list[Line]:
    """The lines, folded: numbered layers that agree become one line, and beyond `limit` lines whole subtrees do, except
    those with a path that is `elsewhere` in the report."""
    groups: dict[Any, list[_Numbered]] = {}
    for line in lines:
        numbered = _Numbered(line if line.members else replace(line, members=(line.paths[0],)))
        groups.setdefault((numbered.texts, line.cells), []).append(numbered)
    folded = [line for group in groups.values() for line in _fold_numbers(group)]
    if len(folded) > limit:
        folded = _fold_subtrees(folded, limit, list(elsewhere))
    return [_counted(line) for line in folded]


def _counted(line: Line) -> Line:
    if line.leaves == 1:
        return line
    first = f"{line.leaves:,} × {line.cells[0]}" if line.cells and line.cells[0] else f"{line.leaves:,} leaves"
    return replace(line, cells=(first, *line.cells[1:]))


# Longer runs of digits are no numbers of layers, and no model has layers within layers so often.
_split_numbers = re.compile(r"(?<![0-9])([0-9]{1,18})(?![0-9])").split
_MOST_NUMBERS = 16


class _Numbered:
    """A line and the numbers in its paths, apart."""

    def __init__(self, line: Line) -> None:
        self.line = line
        parts = [_split_numbers(path) for path in line.paths]
        parts = [part if len(part) <= 2 * _MOST_NUMBERS else ["".join(part)] for part in parts]
        self.texts = tuple(tuple(part[::2]) for part in parts)
        self.numbers = tuple(number for part in parts for number in part[1::2])
        self.own = len(parts[0]) // 2


def _fold_numbers(group: list[_Numbered]) -> list[Line]:
    """One line if the numbers in the path form a full grid, and those of its source follow them."""
    lines = [numbered.line for numbered in group]
    if len(group) == 1:
        return lines
    columns = list(zip(*(numbered.numbers for numbered in group), strict=True))
    own = [list(map(int, column)) for column in columns[: group[0].own]]
    values = [sorted(set(column)) for column in own]
    if len(set(zip(*own, strict=True))) == len(group) == math.prod(map(len, values)):
        follows = (_follows(list(map(int, column)), own) for column in columns[group[0].own :])
        if not all(follows):
            return lines
        numbers = iter(braced(column) for column in columns)
        paths = tuple("".join(_woven(texts, numbers)) for texts in group[0].texts)
        members = tuple(member for line in lines for member in line.members)
        return [replace(lines[0], paths=paths, size=sum(line.size for line in lines), members=members)]
    splitting = next((i for i, value in enumerate(values) if len(value) > 1), None)
    if splitting is None:
        return lines
    parts: dict[str, list[_Numbered]] = {}
    for numbered in group:
        parts.setdefault(numbered.numbers[splitting], []).append(numbered)
    return [line for part in parts.values() for line in _fold_numbers(part)]


def _follows(column: list[int], own: list[list[int]]) -> bool:
    """Whether numbers are constant, or those of a path with a shift."""
    shifts = ({a - b for a, b in zip(column, other, strict=True)} for other in own)
    return len(set(column)) == 1 or any(len(shift) == 1 for shift in shifts)


def braced(column: Sequence[str]) -> str:
    """Numbers as `{0..11}`, `{0,2,5}`, or a single one as it is.

    >>> braced(["3", "3"]), braced(["0", "1", "2"]), braced(["0", "7"])
    ('3', '{0..2}', '{0,7}')
    """
    texts = sorted(set(column), key=int)
    if len(texts) == 1:
        return texts[0]
    if len(texts) > 2 and int(texts[-1]) - int(texts[0]) == len(texts) - 1:
        return f"{{{texts[0]}..{texts[-1]}}}"
    return "{" + ",".join(texts) + "}"


def _woven(texts: Sequence[str], numbers: Any) -> Iterable[str]:
    yield texts[0]
    for text in texts[1:]:
        yield next(numbers)
        yield text


def _fold_subtrees(lines: list[Line], limit: int, elsewhere: list[str]) -> list[Line]:
    for depth in range(max(len(_keys(line.paths[0])) for line in lines) - 1, 0, -1):
        if len(lines) <= limit:
            break
        kept_out = {_head(path, depth) for path in elsewhere}
        groups: dict[str, list[Line]] = {}
        for line in lines:
            groups.setdefault(_head(line.paths[0], depth), []).append(line)
        lines = []
        for head, group in groups.items():
            inside = {_head(member, depth) for line in group for member in line.members}
            deep = all(len(_keys(line.paths[0])) > depth for line in group)
            lines += [_subtree(head, depth, group)] if len(group) > 1 and deep and not inside & kept_out else group
    return lines


def _subtree(head: str, depth: int, group: list[Line]) -> Line:
    def below(line: Line, path: str) -> str:
        return _head(path, len(_keys(path)) - len(_keys(line.paths[0])) + depth)

    sources = {tuple(below(line, path) for path in line.paths[1:]) for line in group}
    others = next(iter(sources)) if len(sources) == 1 else ()
    separator = group[0].paths[0][len(head)]
    columns = zip(*(line.cells[1:] for line in group), strict=False)
    cells = tuple(cell[0] if len(set(cell)) == 1 else "" for cell in columns)
    return Line(
        paths=(f"{head}{separator}**", *(f"{other}{separator}**" if other else "**" for other in others)),
        cells=("", *cells),
        size=sum(line.size for line in group),
        members=tuple(member for line in group for member in line.members),
    )


_keys: Callable[[str], list[str]] = re.compile(r"(?<!\.)[/.](?!\.)").split


def _head(path: str, depth: int) -> str:
    """The first keys of a path."""
    if depth <= 0:
        return ""
    return path[: sum(len(key) + 1 for key in _keys(path)[:depth]) - 1]
