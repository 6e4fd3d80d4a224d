"""Documents: the JSON files beside the weights, as they are on disk and as edits make them."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paramend.anatomy.sections import beside, parsed
from paramend.disk.urls import path_of
from paramend.errors import BadArgument, NoMatch
from paramend.formats.jsontext import CONFIG, entry_of, rewritten
from paramend.reports import wording

_SHOWN = 60  # characters of a value in a table


@dataclass(frozen=True, slots=True)
class Change:
    """What edits make of one key.

    Attributes:
        file: the name of the file.
        key: the key; dots lead into parts.
        before: its value as JSON; None if it is new.
        after: its new value as JSON; None if it is deleted.
    """

    file: str
    key: str
    before: str | None
    after: str | None

    def __str__(self) -> str:
        both = self.before, self.after
        before, after = (text and (text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...") for text in both)
        if after is None:
            return f"{self.key}: {before} is deleted"
        return f"{self.key}: {after} (new)" if before is None else f"{self.key}: {before} -> {after}"

    def to_dict(self) -> dict[str, Any]:
        sides = {"before": self.before, "after": self.after}
        values = {name: json.loads(text) for name, text in sides.items() if text is not None}
        return {"file": self.file, "key": self.key, **values}


@dataclass(frozen=True, slots=True)
class Document:
    """A file beside the weights, of JSON unless it says what is shown of it."""

    file: Path  # where it is
    before: bytes  # its text there
    text: bytes  # its text after the edits; nothing if it goes
    asked: bool = False  # whether a user asked for edits of it; others follow from those of leaves
    said: tuple[str, ...] = ()  # what is to be said of it
    shown: tuple[Change, ...] | None = None  # what is shown of its changes; None for all keys of a JSON file
    own: bool = False  # whether the file of the weights holds it, as GGUF does

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def values(self) -> dict[str, Any]:
        return parsed(self.text, self.file)

    def holding(self, values: Mapping[str, Any]) -> "Document":
        """The document with other values; what stays keeps its characters."""
        return replace(self, text=rewritten(self.text.decode(), values).encode())

    def skipped(self, path: Path) -> str:
        """Why a checkpoint that was opened by this path is saved without the document; "" if it is not."""
        if self.own or path_of(path).is_dir():
            return ""
        return f"{self.file} is not changed; open {self.file.parent}/, the directory, to include it"

    def inner(self, key: str) -> "Document":
        return replace(self, text=entry_of(self.text.decode(), key).encode())

    def edited(self, values: Mapping[str, Any], gone: Iterable[str] = ()) -> "Document":
        """The document with some keys set, then others deleted; dots lead into parts.

        >>> Document(Path("config.json"), b"", b'{"a": {"b": 1}}').edited({"a.c": 2}, ["a.b"]).text
        b'{"a": {"c": 2}}'
        """
        new = self.values
        for key, value in values.items():
            part, last = place_of(new, key, self.name, makes=self.own)
            part[last] = json_value(key, value)
        for key in gone:
            part, last = place_of(new, key, self.name)
            if last not in part:
                raise absent(new, key, self.name)
            del part[last]
        return replace(self.holding(new), asked=True)

    @property
    def changes(self) -> list[Change]:
        if self.before in (b"", self.text) or not self.text:
            return []
        if self.shown is not None:
            return list(self.shown)
        return list(_changes(self.name, parsed(self.before, self.file), self.values))


def document_of(leaves: Any, name: str = CONFIG) -> Document | None:
    """A document beside an opened checkpoint, after the edits so far; None for other trees and where there is none."""
    path = getattr(leaves, "path", None)  # checkpoints alone have one
    if not isinstance(path, Path):
        return None
    if (own := getattr(leaves, "configuration", None)) is not None:
        edited = next((each for each in getattr(leaves, "texts", ()) if each.own), None)
        return None if name != CONFIG else edited or Document(path, own, own, own=True)
    found = next((each for each in getattr(leaves, "texts", ()) if each.name == name), None)
    file = beside(path, name)
    if found is not None or not file.is_file():
        return found
    text = file.read_bytes()
    return Document(file, text, text)


def place_of(
    config: dict[str, Any], key: str, file: str = CONFIG, *, makes: bool = False
) -> tuple[dict[str, Any], str]:
    """The part of a configuration that a key leads to, and the name there. Names that hold dots themselves come first;
    parts that are not there may be made.

    >>> place_of({"a.b": {"c.d": 1}}, "a.b.c.d")
    ({'c.d': 1}, 'c.d')
    """
    part, names = config, key.split(".")
    while len(names) > 1 and ".".join(names) not in part:
        cuts = range(len(names) - 1, 0, -1)
        cut = next((n for n in cuts if isinstance(part.get(".".join(names[:n])), dict)), 0)
        if not cut and makes:
            if names[0] in part:  # a value, in which nothing can be
                break
            part[names[0]], cut = {}, 1
        if not cut:
            raise absent(config, key, file)
        part, names = part[".".join(names[:cut])], names[cut:]
    return part, ".".join(names)


def absent(config: Mapping[str, Any], key: str, file: str = CONFIG) -> NoMatch:
    """The error for a key that is not there."""
    keys = list(_keys(config))
    last, tails = key.rpartition(".")[2], {one.rpartition(".")[2]: one for one in reversed(keys)}
    near = wording.closest(key, keys, limit=1) if "." in key else []
    near = near or [tails[tail] for tail in wording.closest(last, tails, limit=1)]
    return NoMatch(f"{file} has no {key!r}", hint=f'did you mean "{near[0]}"?' if near else "", near=near)


def _keys(part: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for key, value in part.items():
        yield f"{above}{key}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{above}{key}.")


def _changes(file: str, old: Mapping[str, Any], new: Mapping[str, Any], above: str = "") -> Iterator[Change]:
    for key in {**old, **new}:
        before, after = (json.dumps(side[key], ensure_ascii=False) if key in side else None for side in (old, new))
        if isinstance(old.get(key), dict) and isinstance(new.get(key), dict):
            yield from _changes(file, old[key], new[key], f"{above}{key}.")
        elif before != after:
            yield Change(file, f"{above}{key}", before, after)


def json_value(key: str, value: Any) -> Any:
    """A value as JSON would read it back."""
    try:
        text = json.dumps([key, value], allow_nan=False, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise BadArgument(f"{key}: {value!r:.60} is not a value of JSON: {error}") from None
    return json.loads(text)[1]
