"""GGUF files of a rewrite: keys follow the configuration that they are, and the parts of a model stay its parts."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from paramend.edits.plan import Plan, Row
from paramend.errors import Unsupported
from paramend.formats.gguf.keys import SPLIT, alignment
from paramend.formats.gguf.source import WRITER, GgufFile, GgufParts, header
from paramend.rewriting.copies import rows_by_file
from paramend.rewriting.files import File, copied_file, items_of, laid
from paramend.rewriting.keys import document_in, keys_of


def gguf_file(made: Plan, rows: Sequence[Row], metadata: dict[str, Any], name: str) -> File:
    """A new file of some leaves."""
    pieces, _, nbytes = laid(made, rows, WRITER.parts(items_of(made, rows), metadata))
    return File(name, nbytes, pieces)


def same_parts(made: Plan, source: GgufParts, *, link: bool) -> list[File]:
    """The files of a model in several, each with its remaining leaves."""
    found: list[File] = []
    rows = {id(file): mine for file, mine in rows_by_file(source, [(row.source, row) for row in made.rows])}
    for file in source.files:
        mine = [row for _, row in rows.get(id(file), ())]
        metadata, name = _of_part(made, file, first=not found), file.path.name
        if made.restructured or any(row.calls for row in mine) or (not found and document_in(made) is not None):
            found.append(gguf_file(made, mine, metadata, name))
        else:
            found.append(copied_file(file.path, file.stat.st_size, name, link=link))
    return found


def _of_part(made: Plan, file: GgufFile, *, first: bool) -> dict[str, Any]:
    own = {key: value for key, value in file.metadata.items() if key.startswith(SPLIT)}
    count = own.get(f"{SPLIT}tensors.count")
    if isinstance(count, np.integer):
        own[f"{SPLIT}tensors.count"] = type(count)(len(made.rows))
    return {key: own.pop(key, value) for key, value in (keys_of(made) if first else file.metadata).items()} | own


def in_place(made: Plan, source: Any) -> list[File]:
    """The files that take the places of those whose headers change, or whose leaves do."""
    if isinstance(source, GgufParts):
        if made.leaves is not source:
            raise Unsupported(
                f"{source.path}: leaves of a model in several files move only into a new one", hint="-o OUT.gguf"
            )
        return [file for file in same_parts(made, source, link=False) if file.origin is None]
    return [gguf_file(made, made.rows, keys_of(made), source.path.name)]


def new_head(made: Plan, source: Any) -> tuple[Path, bytes]:
    """The file that holds the keys of a model, and its header for others; empty if tensors would have to move."""
    file, rows = source, made.rows
    if isinstance(source, GgufParts):
        file, rows = source.files[0], tuple(row for row in made.rows if not source.home(row.source)[0])
    metadata = _of_part(made, file, first=True)
    data = header(items_of(made, rows), metadata)
    step = alignment(metadata)
    places = accumulate((-(-entry.nbytes // step) * step for entry in file.rows), initial=file.start)
    stays = all(entry.start == at for entry, at in zip(file.rows, places, strict=False))
    fits = len(data) == file.start and stays and step == alignment(file.metadata)
    return file.path, data if fits and not made.restructured else b""
