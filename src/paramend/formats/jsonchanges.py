"""JSON text with other values: whatever stays keeps its characters."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
    at = _SPACE.match(text, int(text.startswith("\ufeff"))).end()  # type: ignore[union-attr]
    old, stop = _decode(text, at)
    draft.change(at, stop, old, dict(new))
    return draft.spliced()


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
    """An entry of an object or an array: its key, where that begins, and where its value begins and ends."""

    key: Any
    start: int
    at: int
    stop: int


class _Draft:
    """A text, and what is to stand in place of which of its characters."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.edits: list[tuple[int, int, str]] = []
        found = _INDENT.search(text)
        self.unit = found[1] if found else None
        self.newline = "\r\n" if "\r\n" in text else "\n"
        self.ascii = "\\u" in text and text.isascii()
        found = re.search(r'"([ \t]*:[ \t]*)', text)
        self.colon = found[1] if found else ": "
        self.blank = " " if self.colon[-1] == " " else ""

    def change(self, at: int, stop: int, old: Any, new: Any) -> None:
        """Note how the value between two characters becomes another."""
        if json.dumps(old) == json.dumps(new):
            return
        if type(old) is dict and type(new) is dict:
            self._change_object(at, old, new)
        elif type(old) is list and type(new) is list and len(old) == len(new):
            for child, before, after in zip(self.children(at)[0], old, new, strict=True):
                self.change(child.at, child.stop, before, after)
        else:
            self.edits.append((at, stop, self._written(new, at, self.text[at:stop])))

    def _change_object(self, at: int, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        children, close = self.children(at)
        kept = {child.key: n for n, child in enumerate(children) if child.key in new}  # the last of a name counts
        for key, n in kept.items():
            self.change(children[n].at, children[n].stop, old[key], new[key])
        lead, gap, tail = self._spaces(children, at, close)
        more = [self._entry(key, new[key], at) for key in new if key not in old]
        if not kept:
            self.edits.append((at + 1, close, f"{lead}{f',{gap}'.join(more)}{tail}" if more else ""))
            return
        first = min(kept.values())
        for n, child in enumerate(children):
            if child.key not in new:
                place = (child.start, children[n + 1].start) if n < first else (children[n - 1].stop, child.stop)
                self.edits.append((*place, ""))
        end = children[max(kept.values())].stop
        self.edits.append((end, end, "".join(f",{gap}{each}" for each in more)))

    def _spaces(self, children: Sequence[_Child], at: int, close: int) -> tuple[str, str, str]:
        """The white space of an object: before its first entry, before others, after the last one."""
        if not children:
            if self.unit is None:
                return "", self.blank, ""
            tail = f"{self.newline}{self.margin(at)}"
            return tail + self.unit, tail + self.unit, tail
        lead, tail = self.text[at + 1 : children[0].start], self.text[children[-1].stop : close]
        if len(children) == 1:
            return lead, lead or self.blank, tail
        return lead, self.text[children[0].stop : children[1].start].partition(",")[2], tail

    def _entry(self, key: str, value: Any, at: int) -> str:
        """A new entry of the object that begins here."""
        return f"{json.dumps(key, ensure_ascii=self.ascii)}{self.colon}{self._written(value, at, inner=True)}"

    def children(self, at: int) -> tuple[list[_Child], int]:
        """The entries of the object or array that begins here, and where its closing bracket is."""
        text, found = self.text, list[_Child]()
        end = self._space(at + 1)
        while text[end] not in "]}":
            start, key = end, None
            if text[at] == "{":
                key, end = _decode(text, end)
                end = self._space(self._space(end) + 1)
            _, stop = _decode(text, end)
            found.append(_Child(key, start, end, stop))
            end = self._space(stop)
            end = self._space(end + 1) if text[end] == "," else end
        return found, end

    def _space(self, at: int) -> int:
        """Where the white space that begins here ends."""
        return _SPACE.match(self.text, at).end()  # type: ignore[union-attr]

    def margin(self, at: int) -> str:
        """The white space at the beginning of the line of a character."""
        line = self.text.rfind("\n", 0, at) + 1
        return re.match(r"[ \t]*", self.text[line:at])[0]  # type: ignore[index]

    def _written(self, value: Any, at: int, old: str = "", *, inner: bool = False) -> str:
        """A value as text, in lines where the old one, or else the text, is.

        Args:
            value: the value.
            at: a character on the line whose indentation counts.
            old: the text in its place.
            inner: whether it stands one level further in.
        """
        inline = self.unit is None or (old[:1] in ("[", "{") and len(old) > 2 and "\n" not in old)
        if inline:
            return json.dumps(value, ensure_ascii=self.ascii, separators=(f",{self.blank}", self.colon))
        text = json.dumps(value, ensure_ascii=self.ascii, indent=self.unit, separators=(",", self.colon))
        return text.replace("\n", f"{self.newline}{self.margin(at)}{self.unit if inner else ''}")

    def spliced(self) -> str:
        """The text with all that was noted."""
        parts, done = [], 0
        for start, stop, new in sorted(self.edits):
            parts += [self.text[done:start], new]
            done = stop
        return "".join([*parts, self.text[done:]])
