"""Configurations beside the weights: what they say of the dtype follows a cast; what they count is compared."""

import json
from collections.abc import Sequence
from typing import Any

from paramend.anatomy.counts import miscounted, retyped
from paramend.anatomy.documents import Document
from paramend.anatomy.sections import beside
from paramend.disk.urls import path_of
from paramend.edits.plan import Plan
from paramend.errors import BadCheckpoint
from paramend.formats.jsontext import CONFIG
from paramend.rewriting.files import File, text_file

_MAX = 10_000_000


def followed_files(made: Plan, files: Sequence[File]) -> tuple[tuple[File, ...], list[str]]:
    """The files of an outcome, its configuration adapted to the plan, and what is to be said of it."""
    place = next((place for place, file in enumerate(files) if file.name == CONFIG), None)
    retypes = any(row.spec.dtype != row.before.dtype for row in made.rows if row.calls)
    if place is None or not (made.restructured or retypes) or files[place].nbytes > _MAX:
        return tuple(files), []
    file = files[place]
    try:
        document = _document(made, file)
        config = document.values
    except (BadCheckpoint, OSError):  # it is copied as it is
        return tuple(files), []
    said: list[str] = []
    if made.restructured:
        old, new = made.leaves.index, made.index
        said = miscounted(config, map(old.pieces, old.numbers), map(new.pieces, new.numbers), old.layers)
    changed, told = retyped(config, [row.before.dtype for row in made.rows], [row.spec.dtype for row in made.rows])
    if document.asked and any(change.key.endswith("dtype") for change in document.changes):
        changed, told = config, []
    if changed == config:
        return tuple(files), said + told
    new_file = text_file(file.name, document.holding(changed).text)
    return (*files[:place], new_file, *files[place + 1 :]), said + told


def left_behind(made: Plan, source: Any) -> tuple[str, ...]:
    """What the configuration beside the weights says that does not hold for a file of these leaves alone."""
    if any(document.own and not document.before for document in made.texts):
        return ()
    changed = [document for document in made.texts if document.text != document.before and not document.own]
    own = getattr(source, "configuration", None)
    if own is not None and not changed:
        return tuple(_said_by(made, next((each.text for each in made.texts if each.own), own)))
    if changed:
        told = [line for document in changed for line in document.said]
        return (*told, *(f"{document.name} changes, and is not written beside a single file" for document in changed))
    path = beside(path_of(getattr(source, "path", "")))
    if not getattr(source, "stats", None) or not path.is_file():
        return ()
    files, said = followed_files(made, [File(CONFIG, path.stat().st_size, (), path)])
    if files[0].origin is None:
        said = [f"{path} is not changed, and should be: {line.removeprefix(f'{CONFIG}: ')}" for line in said]
    return tuple(said)


def _said_by(made: Plan, text: bytes) -> list[str]:
    """What a configuration in the file of the weights says that does not hold for them."""
    old, new = made.leaves.index, made.index
    if not made.restructured:
        return []
    found = miscounted(json.loads(text), map(old.pieces, old.numbers), map(new.pieces, new.numbers), old.layers)
    return [line.replace(CONFIG, "its configuration", 1) for line in found]


def _document(made: Plan, file: File) -> Document:
    found = next((each for each in made.texts if each.name == file.name), None)
    if found is None:
        assert file.origin is not None
        text = file.origin.read_bytes()
        return Document(file.origin, text, text)
    return found
