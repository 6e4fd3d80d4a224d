"""Copies of the files of a source in which some leaves have other values, names or specs; everything else stays."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from paramend.edits.plan import Plan, Row
from paramend.errors import Unsupported
from paramend.formats.safetensors import SafetensorsFile
from paramend.formats.shards import Shards
from paramend.formats.source import LeafBytes, Sealed
from paramend.rewriting.files import Copy, File, copied_file, laid, with_header, with_rows


def overlays(made: Plan) -> bool:
    """Whether the result is a copy of the source that differs only in the bytes of some leaves."""
    source: Any = made.leaves
    if made.restructured or not source.stats or any(each.own and each.text != each.before for each in made.texts):
        return False
    changed = [row for row in made.rows if row.calls]
    if any(row.spec != row.before for row in changed):
        return False
    # A new file takes any edit, but holds only the leaves.
    return bool(source.metadata) or all(source.extent(row.source) is not None for row in changed)


def rows_by_file(source: Shards, leaves: Iterable[tuple[int, Row]]) -> Iterator[tuple[Any, list[tuple[int, Row]]]]:
    """The files of a source that remain, each with its leaves, (number in the file, row), from those of the source."""
    rows: list[list[tuple[int, Row]]] = [[] for _ in source.files]
    for number, row in leaves:
        place, inner = source.home(number)
        rows[place].append((inner, row))
    for file, mine in zip(source.files, rows, strict=True):
        if mine or not file.index.numbers:
            yield file, mine


def edited_file(made: Plan, file: Any, rows: list[tuple[int, Row]], name: str, *, link: bool) -> File:
    """A file of the source, edited, under a new name; with `link`, perhaps a hard link to the old one. The rows are
    (number in the file, row). `Unsupported` if the format cannot hold a leaf, or its copy has no place for it."""
    if isinstance(file, SafetensorsFile):
        return _with_header(made, file, rows, name, link=link)
    if file.format == "torch":
        from paramend.rewriting import torch  # most programs use no torch files

        if not torch.overlays(file, rows):
            return torch.torch_file(file, rows, name)
    return _overlaid(file, rows, name, link=link)


def _with_header(made: Plan, file: SafetensorsFile, rows: list[tuple[int, Row]], name: str, *, link: bool) -> File:
    """A file that keeps the header of another as far as it can: metadata, unknown fields, both orders."""
    by_place: Mapping[int, Row] = dict(rows)
    header = file.header.edited({place: (made.name(row), row.spec) for place, row in by_place.items()})
    if header is file.header and not any(row.calls for row in by_place.values()):
        return copied_file(file.path, file.stat.st_size, name, link=link)
    ordered = [by_place[place] for place in sorted(by_place)]
    head = [Copy(file.path, 0, header.nbytes)] if header is file.header else []
    leaves = [LeafBytes(place, 0, entry.nbytes) for place, entry in enumerate(header.entries)]
    pieces, _, nbytes = laid(made, ordered, [*head, *leaves])
    return File(name, nbytes, pieces) if head else with_header(name, header.raw, pieces)


def _overlaid(file: Any, rows: Iterable[tuple[int, Row]], name: str, *, link: bool) -> File:
    """A copy of a file with the edited leaves computed in place. Tied leaves are one, and edited once."""
    size = file.stat.st_size
    places: dict[tuple[int, int], Row] = {}
    for number, row in rows:
        if not row.calls:
            continue
        extent = file.extent(number)
        if extent is None:
            raise Unsupported(
                f"{row.path} cannot take {row.edit} in a copy of the file: its bytes are not contiguous",
                hint="-o OUT.safetensors",
            )
        places[extent.start, extent.start + extent.nbytes] = row
    pieces = with_rows(file.path, 0, size, places)
    ranges = tuple(sorted((start, stop) for start, stop in places if start < stop))
    origin = None if ranges else file.path
    sealed = ranges if isinstance(file, Sealed) else ()
    return File(name, size, tuple(pieces), origin, link=link and not ranges, patched=sealed, reopen=type(file))
