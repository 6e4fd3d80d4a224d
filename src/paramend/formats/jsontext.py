"""JSON text of a checkpoint, read strictly: what the reference readers refuse is refused, and so are duplicate keys.

With other values, whatever stays keeps its characters.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from paramend.errors import BadCheckpoint
from paramend.formats.limits import shown
from paramend.leaves.nested import is_deep

# The file beside the weights that says which model they are of.
CONFIG = "config.json"


class _Flaw(ValueError):
    """A broken rule, found while the text is parsed."""


def bad(file: str, place: str, reason: str, hint: str = "") -> BadCheckpoint:
    """The error for a fault at a place in a file."""
    return BadCheckpoint(f"{file}: {place}: {reason}", hint=hint)


def parse_object(raw: bytes, file: str, place: str, *, flat: bool = False) -> dict[str, Any]:
    """A JSON object, validated. A caller that refuses what is nested says `flat`: huge texts are refused fast then."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise _Flaw(f"{shown(twice)} appears twice")
        return found

    def constant(text: str) -> NoReturn:
        raise _Flaw(f"{text} is not a JSON number")

    def finite(text: str) -> float:
        number = float(text)
        if number in (float("inf"), float("-inf")):
            raise _Flaw(f"the number {shown(text)} is too large")
        return number

    def whole(text: str) -> int | float:
        return -0.0 if text == "-0" else int(text)  # as the reference reads it

    try:
        table = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=constant,
            parse_float=finite,
            parse_int=whole if b"-0" in raw else None,  # a hook for each number is slow, so only where needed
        )
        if b"\\u" in raw:
            json.dumps(table, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        around = shown(error.object[max(error.start - 20, 0) : error.end + 20])
        raise bad(file, place, f"half a surrogate pair is not text, in {around}") from None
    except UnicodeDecodeError as error:
        raise bad(file, f"{place}, byte {error.start}", "the text is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise bad(file, f"{place}, character {error.pos}", f"the text is not JSON: {error.msg}") from None
    except RecursionError:
        raise bad(file, place, "brackets are nested too deeply") from None
    except _Flaw as flaw:
        raise bad(file, place, str(flaw)) from None
    except ValueError as error:  # an integer of thousands of digits
        raise bad(file, place, str(error)) from None
    if not flat and is_deep(table):
        raise bad(file, place, "brackets are nested too deeply")
    if type(table) is not dict:
        raise bad(file, place, f"a JSON object is expected, not {json_type(table)}")
    return table


def json_type(value: Any) -> str:
    """The name of a JSON value's type in messages."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a bool", int: "an integer"}
    return "null" if value is None else names.get(type(value), "a number with a point")


_SPACE = re.compile(r"[ \t\r\n]*")
_INDENT = re.compile(r"\n([ \t]+)")
_decode = json.JSONDecoder().raw_decode


def rewritten(text: str, new: Mapping[str, Any]) -> str:
    """The text of a JSON object, changed where it differs from another object.

    Order, indentation, separators and the spelling of numbers and texts stay wherever a value stays. New keys go last,
    written like those that are there.

    >>> print(rewritten('{"b": 1e-05, "a": [1,  2]}', {"a": [1, 3], "b": 1e-5, "c": None}))
    {"b": 1e-05, "a": [1,  3], "c": null}
    """
    draft = _Draft(text)
    at = text.index("{")
    old, stop = _decode(text, at)
    return text[:at] + draft.changed(_Child(None, at, at, stop, old), dict(new)) + text[stop:]


def entry_of(text: str, key: str) -> str:
    """The text of an entry of a JSON object, as a text of its own: its lines are indented one level less.

    >>> entry_of('{"a": {"b": 1e0}}', "a")
    '{"b": 1e0}'
    """
    draft = _Draft(text)
    child = next(each for each in reversed(draft.children(text.index("{"))[0]) if each.key == key)
    inner = text[child.at : child.stop].replace(f"\n{draft.margin(child.at)}", "\n")
    return inner + text[text.rindex("}") + 1 :]


class _Child(NamedTuple):
    """An entry of an object or an array: its key, where that begins, where its value begins and ends, and the value."""

    key: Any
    start: int
    at: int
    stop: int
    value: Any


class _Draft:
    """A text, and how values are written in it."""

    def __init__(self, text: str) -> None:
        self.text = text
        found = _INDENT.search(text)
        self.unit = found[1] if found else None
        self.newline = "\r\n" if "\r\n" in text else "\n"
        self.ascii = "\\u" in text and text.isascii()
        found = re.search(r'"([ \t]*:[ \t]*)', text)
        self.colon = found[1] if found else ": "
        self.blank = " " if self.colon[-1] == " " else ""

    def changed(self, child: _Child, new: Any) -> str:
        old, text = child.value, self.text[child.at : child.stop]
        if json.dumps(old) == json.dumps(new):
            return text
        if type(old) is dict and type(new) is dict:
            return self._object(child.at, new)
        if type(old) is not list or type(new) is not list or len(old) != len(new):
            return self._written(new, child.at, text)
        found, done = list[str](), child.at
        for each, value in zip(self.children(child.at)[0], new, strict=True):
            found += self.text[done : each.at], self.changed(each, value)
            done = each.stop
        return "".join((*found, self.text[done : child.stop]))

    def _object(self, at: int, new: Mapping[str, Any]) -> str:
        """The text of the object that begins here, with other entries; white space stays before those that stay."""
        children, close = self.children(at)
        line = "" if self.unit is None else f"{self.newline}{self.margin(at)}"
        lead, tail = (line and f"{line}{self.unit}"), line
        if children:
            lead, tail = self.text[at + 1 : children[0].start], self.text[children[-1].stop : close]
        gap = f",{lead or self.blank}"
        if len(children) > 1:
            gap = self.text[children[0].stop : children[1].start]
        found: list[str] = []
        for n, child in enumerate(children):
            if child.key in new:
                before = self.text[children[n - 1].stop : child.start] if found else lead
                found += before, self.text[child.start : child.at], self.changed(child, new[child.key])
        there = {child.key for child in children}
        for key in (key for key in new if key not in there):
            name = json.dumps(key, ensure_ascii=self.ascii)
            found += gap if found else lead, name, self.colon, self._written(new[key], at, inner=True)
        return "".join(("{", *found, tail if found else "", "}"))

    def children(self, at: int) -> tuple[list[_Child], int]:
        """The entries of the object or array that begins here, and where its closing bracket is."""
        text, found = self.text, list[_Child]()
        end = self._space(at + 1)
        while text[end] not in "]}":
            start, key = end, None
            if text[at] == "{":
                key, end = _decode(text, end)
                end = self._space(self._space(end) + 1)
            value, stop = _decode(text, end)
            found.append(_Child(key, start, end, stop, value))
            end = self._space(stop)
            end = self._space(end + 1) if text[end] == "," else end
        return found, end

    def _space(self, at: int) -> int:
        """Where the white space that begins here ends."""
        return _SPACE.match(self.text, at).end()  # type: ignore[union-attr]

    def margin(self, at: int) -> str:
        """The white space at the beginning of the line of a character."""
        line = self.text.rfind("\n", 0, at) + 1
        return self.text[line : min(_SPACE.match(self.text, line).end(), at)]  # type: ignore[union-attr]

    def _written(self, value: Any, at: int, old: str = "", *, inner: bool = False) -> str:
        """A value as text, in lines where `old`, or else the text, is, indented as the line of the character `at` or,
        if `inner`, further."""
        if self.unit is None or (old[:1] in ("[", "{") and len(old) > 2 and "\n" not in old):
            return json.dumps(value, ensure_ascii=self.ascii, separators=(f",{self.blank}", self.colon))
        text = json.dumps(value, ensure_ascii=self.ascii, indent=self.unit, separators=(",", self.colon))
        return text.replace("\n", f"{self.newline}{self.margin(at)}{self.unit if inner else ''}")
