"""Additions: the files of a model as they are, and further ones for leaves that come to it."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from paramend.disk.publishing import there
from paramend.edits.plan import Plan, Row
from paramend.formats.gathered import Gathered
from paramend.formats.registry import DEFAULT
from paramend.formats.safetensors import RECORD, SafetensorsFile
from paramend.formats.shards import Shards
from paramend.leaves.origins.stored import Stored
from paramend.leaves.specs import BITS
from paramend.rewriting.copies import edited_file, rows_by_file
from paramend.rewriting.files import File, copied_file, fresh_file
from paramend.rewriting.shards import grouped, homes_of, index_file, largest, stem_of

# Names of weights whose readers look for an index if there is no single file.
_INDEXED = ("model", "diffusion_pytorch_model")
_NUMBERED = re.compile(r"-(\d+)-of-\d+\.")


def parted(made: Plan) -> tuple[list[tuple[int, Row]], list[Row]]:
    """The leaves of the base of a plan that keep their names, as (number in it, row), and all others."""
    leaves: Any = made.leaves
    own, new = list[tuple[int, Row]](), list[Row]()
    for row in made.rows:
        origin = leaves.origins[row.source]
        stays = isinstance(origin, Stored) and origin.source is leaves.base
        if stays and origin.source.index.name(origin.number) == made.name(row):
            own.append((origin.number, row))
        else:
            new.append(row)
    return own, new


def grown_shards(made: Plan, source: Any, *, link: bool, splits: bool) -> list[File] | None:
    """The files of a source as they are, what comes to its leaves in further ones, and the index; None if leaves of the
    source go, move or are made anew, or if its readers would not find further files.

    The files keep their names, but a single `model.safetensors` may become the first of several if `splits`: readers
    prefer a file of that name to an index. A file of another checkpoint whose leaves all come under their names comes
    as it is.
    """
    if not isinstance(source, Shards) or not isinstance(made.leaves, Gathered):
        return None
    own, new = parted(made)
    stem, indexed = stem_of(source), source.shard_index is not None
    single = len(source.files) == 1 and source.files[0].path.name == f"{stem}.safetensors"
    grows = stem.partition(".")[0] in _INDEXED if single else indexed or len(source.files) > 1
    grows = grows and (indexed or splits) and all(isinstance(file, SafetensorsFile) for file in source.files)
    if not grows or len(own) < len(source.index.numbers) or not new:
        return None
    whole = list(_whole_files(made, new, source.files[0].metadata.get("format")))
    come = {id(row) for _, rows in whole for row in rows}
    rest = sorted((row for row in new if id(row) not in come), key=lambda row: -BITS.get(row.spec.dtype, 8))
    groups = grouped(made, rest, largest(source)) if rest else []
    first, *further = _free_names(source, stem, len(whole) + len(groups))
    homes, names = homes_of(made, source, own), iter(further)
    homes = dict.fromkeys(homes, first) if single else homes
    files = [
        edited_file(made, file, rows, first if single else file.path.name, link=link)
        for file, rows in rows_by_file(source, own)
    ]
    for file, rows in [*whole, *((None, rows) for rows in groups)]:
        name = next(names)
        homes |= {made.name(row): name for row in rows}
        files.append(
            fresh_file(made, rows, DEFAULT, name)
            if file is None
            else copied_file(file.path, file.stat.st_size, name, link=link)
        )
    return [*files, index_file(made, source, homes)] if indexed or single else files


def _free_names(source: Shards, stem: str, count: int) -> list[str]:
    """The name of a single file that becomes the first of several, and names for further files."""
    numbers = [int(found[1]) for file in source.files if (found := _NUMBERED.search(file.path.name))]
    last = max([*numbers, len(source.files)])
    while True:
        end = last + count
        names = [f"{stem}-{number:05}-of-{end:05}.safetensors" for number in (1, *range(last + 1, end + 1))]
        if not any(there(source.folder / name) for name in names):
            return names
        last += 1


def _whole_files(made: Plan, rows: Sequence[Row], framework: str | None) -> Iterator[tuple[SafetensorsFile, list[Row]]]:
    """The files whose leaves all come as they are, each with its rows. Their metadata must name the framework."""
    found: dict[int, tuple[SafetensorsFile, list[Row]]] = {}
    source: Any = made.leaves
    for row in rows:
        origin = source.origins[row.source]
        if not isinstance(origin, Stored) or row.calls:
            continue
        file, number = origin.source, origin.number
        if isinstance(file, Shards):
            place, number = file.home(number)
            file = file.files[place]
        if isinstance(file, SafetensorsFile) and file.header.entries[number].name == made.name(row):
            found.setdefault(id(file), (file, []))[1].append(row)
    for file, mine in found.values():
        told = file.metadata.get("format") == framework and RECORD not in file.metadata
        if told and len(mine) == len(file.header.entries):
            yield file, mine
