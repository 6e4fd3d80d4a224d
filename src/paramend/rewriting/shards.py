"""Sharded models: the shards of the source, edited, and further ones for leaves that come; or new ones; the index."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from paramend.disk.publishing import there
from paramend.edits.plan import Plan, Row
from paramend.errors import BadArgument
from paramend.formats.gathered import Gathered
from paramend.formats.registry import DEFAULT, Format
from paramend.formats.safetensors import RECORD, SafetensorsFile, layout
from paramend.formats.shards import Shards, index_name, index_text
from paramend.leaves.origins.stored import Stored
from paramend.leaves.specs import BITS
from paramend.rewriting.arrangement import base_of
from paramend.rewriting.copies import edited_file, rows_by_file
from paramend.rewriting.files import File, copied_file, fresh_file, nbytes_of, ordered, text_file


def same_shards(made: Plan, source: Shards, *, link: bool) -> list[File]:
    """The files of the source, each with its remaining leaves, and the index, updated."""
    leaves = [(row.source, row) for row in made.rows]
    files = [edited_file(made, file, rows, file.path.name, link=link) for file, rows in rows_by_file(source, leaves)]
    if source.shard_index is None:
        return files
    if made.restructured or any(row.spec != row.before for row in made.rows):
        return [*files, index_file(made, source, homes_of(made, source, leaves))]
    path = source.shard_index.path
    return [*files, text_file(path.name, path.read_bytes())]


def homes_of(made: Plan, source: Shards, leaves: Sequence[tuple[int, Row]]) -> dict[str, str]:
    """The file of each leaf that stays: those that the index of the source lists, in its order; without one, all."""
    names = source.index.name
    listed = map(names, source.index.numbers) if source.shard_index is None else source.shard_index.weight_map
    order = {name: place for place, name in enumerate(listed)}
    kept = [(order[names(number)], number, row) for number, row in leaves if names(number) in order]
    return {made.name(row): source.files[source.home(number)[0]].path.name for _, number, row in sorted(kept)}


def index_file(made: Plan, source: Shards, weight_map: Mapping[str, str]) -> File:
    """The index of the source with a new map from leaves to files; a new one if it has none."""
    ties = made.leaves.ties
    once = {ties.get(row.source, row.source): row for row in made.rows}.values()
    nbytes = sum(nbytes_of(made, row) for row in once)
    if source.shard_index is None:
        table = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
        return text_file(index_name(stem_of(source)), index_text(table))
    text = source.shard_index.to_bytes(weight_map, nbytes=nbytes, size=sum(row.spec.size for row in once))
    return text_file(source.shard_index.path.name, text)


def new_shards(made: Plan, form: Format, limit: int | None) -> list[File]:
    """As many files as the limit requires, and their index if there are several."""
    groups = grouped(made, ordered(made, form), limit)
    stem = stem_of(base_of(made))
    if len(groups) == 1:
        return [fresh_file(made, groups[0], form, f"{stem}.safetensors")]
    files: list[File] = []
    weight_map: dict[str, str] = {}
    for place, group in enumerate(groups, 1):
        name = f"{stem}-{place:05}-of-{len(groups):05}.safetensors"
        files.append(fresh_file(made, group, form, name))
        for row in group:
            if weight_map.setdefault(made.name(row), name) != name:
                layout(((made.name(row), row.spec, 0) for row in made.rows), None)  # its error names the duplicate
    table = {"metadata": {"total_size": sum(nbytes_of(made, row) for row in made.rows)}, "weight_map": weight_map}
    files.append(text_file(index_name(stem), index_text(table)))
    return files


def grouped(made: Plan, rows: Iterable[Row], limit: int | None) -> list[list[Row]]:
    """The rows of each of as many files as the limit requires, at least one."""
    groups: list[list[Row]] = [[]]
    filled = 0
    for row in rows:
        nbytes = nbytes_of(made, row)
        if limit is not None and groups[-1] and filled + nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(row)
        filled += nbytes
    return groups


# The names of weight files in directories, which readers look for, with a variant and the number of a shard.
_NAMED = re.compile(
    r"(?P<name>[^.]+)(?P<variant>\.(?!0)[A-Za-z0-9_]+)?(?:-\d+-of-\d+)?(?P<late>\.[A-Za-z0-9_]+)?\.(?:safetensors|bin)"
)


def stem_of(source: Any) -> str:
    """The name of new weight files without numbers and suffix: that of the source, where readers look for it."""
    files = source.files if isinstance(source, Shards) else [source]
    found = {_stem_in(getattr(getattr(file, "path", None), "name", "")) for file in files}
    stem = found.pop() if len(found) == 1 else "model"
    return stem if isinstance(source, Shards) or stem.startswith(_READ) else "model"


_READ = ("model", "adapter_model", "diffusion_pytorch_model")


def _stem_in(name: str) -> str:
    """
    >>> _stem_in("diffusion_pytorch_model.fp16-00001-of-00002.safetensors"), _stem_in("pytorch_model-1-of-2.bin")
    ('diffusion_pytorch_model.fp16', 'model')
    """
    found = _NAMED.fullmatch(name)
    if found is None:
        return "model"
    stem = re.sub(r"-\d+-of-\d+$", "", found["name"])
    return ("model" if stem == "pytorch_model" else stem) + (found["variant"] or found["late"] or "")


def largest(source: Any) -> int | None:
    """The number of bytes of the tensors in the largest of several files."""
    if not isinstance(source, Shards) or len(source.files) == 1:
        return None
    filled = [0] * len(source.files)
    for number in source.index.numbers:
        filled[source.home(number)[0]] += source.nbytes(number)
    return max(filled)


def parse_size(size: int | str) -> int:
    """A number of bytes given as text, in powers of 1000, or of 1024 with an "i".

    >>> parse_size("5GB"), parse_size("1.5 MiB"), parse_size(1000)
    (5000000000, 1572864, 1000)
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(?:([kmgt])(i?))?b?", str(size).strip().lower())
    number = 0.0 if found is None else float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " ")
    if number < 1:
        raise BadArgument(f"{size!r} is not a size", hint='one such as "5GB", "500MB", 1_000_000')
    return int(number)


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
