"""Tables: rows of text whose columns line up, safe to show on a terminal."""

from collections.abc import Iterable, Sequence
from html import escape

from paramend.errors import printable


def aligned(rows: Iterable[Sequence[str]], *, right: str = "") -> list[str]:
    """One line of text for each row, columns two spaces apart; an "r" in `right` aligns a column right."""
    table = [tuple(map(printable, row)) for row in rows]
    widths: dict[int, int] = {}
    for row in table:
        for column, cell in enumerate(row):
            widths[column] = max(widths.get(column, 0), len(cell))
    return [
        "  ".join(
            cell.rjust(widths[column]) if right[column : column + 1] == "r" else cell.ljust(widths[column])
            for column, cell in enumerate(row)
        ).rstrip()
        for row in table
    ]


def as_html(headline: str, rows: Sequence[Sequence[str]]) -> str:
    """A headline and a table, the first row its titles, as a notebook shows them."""
    body = ""
    for place, row in enumerate(rows):
        tag = "td" if place else "th"
        cells = (f'<{tag} style="text-align:left">{escape(printable(cell))}</{tag}>' for cell in row)
        body += f"<tr>{''.join(cells)}</tr>"
    return f"<div>{escape(printable(headline))}</div><table>{body}</table>"
