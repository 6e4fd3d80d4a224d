"""Tables: rows of text whose columns line up, safe to show on a terminal."""

from collections.abc import Iterable, Sequence


def printable(text: str) -> str:
    r"""The text with control characters written out; names from files may contain them, and terminals obey them.

    >>> printable("a\x1b[2Jb\n")
    'a\\x1b[2Jb\\n'
    """
    if text.isprintable():
        return text
    # Lone surrogates come from file names that are not UTF-8; they are not printable either.
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def aligned(rows: Iterable[Sequence[str]], *, right: str = "") -> list[str]:
    """One line of text for each row, columns two spaces apart.

    Args:
        rows: cells; a row may have fewer than others.
        right: the alignment of each column, one character each: "r" for right, anything else for left.

    >>> for line in aligned([("name", "size"), ("bias", "8"), ("kernel", "1024")], right="lr"):
    ...     print(line)
    name    size
    bias       8
    kernel  1024
    """
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
