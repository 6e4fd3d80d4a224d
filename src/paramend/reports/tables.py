"""Tables: rows of text whose columns line up, safe to show on a terminal."""

from collections.abc import Iterable, Sequence

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
