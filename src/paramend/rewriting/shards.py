"""Sharded models: the shards of the source, edited, or new ones of a given size, and their index."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from paramend.edits.plan import Plan, Row
from paramend.errors import BadArgument
from paramend.formats.registry import Format
from paramend.formats.safetensors import layout
from paramend.formats.shards import Shards, index_name, index_text
from paramend.rewriting.arrangement import base_of
from paramend.rewriting.copies import edited_file, rows_by_file
from paramend.rewriting.files import File, fresh_file, nbytes_of, ordered, text_file


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
