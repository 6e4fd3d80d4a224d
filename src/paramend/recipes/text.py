"""The text of recipes as data: JSON, or YAML by the rules of YAML 1.2, which includes JSON.

Unlike in YAML 1.1, `on`, `off`, `yes`, `no` and `1:30` are text and `1e-3` is a number. Tags are refused, so the result
holds only maps, lists and scalars, and its size is bounded.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

from paramend.errors import BadRecipe, Problem
from paramend.leaves.nested import is_deep

# Reading a recipe of this size takes seconds; one with a step for each tensor of the largest models has a tenth of it.
MAX_BYTES = 1_000_000
_MAX_GROWN = 4 * MAX_BYTES  # with aliases expanded, and 16 bytes for each value
_MAX_ADDRESSES = 20 * MAX_BYTES  # the characters of all addresses: each value has that of what it is in
_MAX_VALUES = 250_000
MAX_LEVELS = 64
_MAX_KEY = 100  # characters of a key in an address
MAX_PROBLEMS = 100
_DEFAULT = {
    kind: f"tag:yaml.org,2002:{tag}" for kind, tag in (("scalar", "str"), ("sequence", "seq"), ("mapping", "map"))
}
_QUOTE = 'quote a selector that begins with * or contains [ ] { }: zero: "**/bias"'


def finite(text: str) -> float | str:
    """A float; one that is too large stays text, which is refused where a number is required."""
    number = float(text)
    return number if math.isfinite(number) else text


def _whole(text: str) -> int | str:
    return int(text) if len(text) <= 4000 else text


_SCALARS: tuple[tuple[str, Callable[[str], Any]], ...] = (
    (r"null|Null|NULL|~|", lambda text: None),
    (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    (r"[-+]?[0-9]{1,4000}", int),
    (r"0o[0-7]{1,4000}", lambda text: int(text, 8)),
    (r"0x[0-9a-fA-F]{1,4000}", lambda text: int(text, 16)),
    (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", finite),
    (r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", lambda text: float(text.lower().replace(".", ""))),
)


@dataclass(slots=True)
class Document:
    """The result of reading a text: maps, lists and scalars; what is wrong although it can be read, such as a duplicate
    key; and address → the line where it begins, counted from 1, empty for JSON."""

    data: Any = None
    problems: list[Problem] = field(default_factory=list)
    lines: dict[str, int] = field(default_factory=dict)


def below(address: str, key: str | int) -> str:
    """The address of an entry.

    >>> below("$.steps", 0), below("$", "steps"), below("$", "a b")
    ('$.steps[0]', '$.steps', '$["a b"]')
    """
    if isinstance(key, int):
        return f"{address}[{key}]"
    if len(key) > _MAX_KEY:
        key = f"{key[:_MAX_KEY]}..."
    return f"{address}.{key}" if re.fullmatch(r"\w+", key) else f"{address}[{json.dumps(key)}]"


def read(text: str, name: str) -> Document:
    """The data of a recipe's text; messages call the recipe by the given name. `BadRecipe` if it is neither YAML nor
    JSON, or too large.

    >>> read("version: 1\\nsteps: [zero: w]", "recipe").data
    {'version': 1, 'steps': [{'zero': 'w'}]}
    """
    if len(text) > MAX_BYTES:
        raise _refused(name, f"{len(text):,} characters are too many: a recipe has at most {MAX_BYTES:,}")
    if text.lstrip().startswith("{") or name.endswith(".json"):
        try:
            return _read_json(text)
        except json.JSONDecodeError as error:
            if name.endswith(".json"):
                place = f"column {error.colno}: {error.msg}"
                raise _refused(name, f"the text is not JSON: {place}", line=error.lineno) from None
        except (RecursionError, ValueError) as error:
            why = "brackets are nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise _refused(name, why) from None
    return _Reader(name, text).read()


def _read_json(text: str) -> Document:
    document = Document()

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                document.problems.append(Problem("$", f"the key {key!r} appears twice in one map"))
            found.setdefault(key, value)
        return found

    document.data = json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_int=_whole)
    del document.problems[MAX_PROBLEMS:]
    if is_deep(document.data, MAX_LEVELS):
        raise RecursionError
    return document


def _refused(name: str, message: str, hint: str = "", line: int = 0) -> BadRecipe:
    return BadRecipe(name, [Problem("$", message, hint, "syntax", line)])


class _TooMuch(Exception):
    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


class _Loader(yaml.BaseLoader):  # type: ignore[misc]  # yaml has no types
    """The base loader, which stops at too many values, or too deep ones: it takes long for both."""

    values = depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.values, self.depth = self.values + 1, self.depth + 1
        if self.depth > MAX_LEVELS or self.values > _MAX_VALUES:
            deep = self.depth > MAX_LEVELS
            what = "the data is nested too deeply" if deep else f"there are more than {_MAX_VALUES:,} values"
            raise _TooMuch(what, self.peek_event().start_mark.line + 1)
        node: Any = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Reader:
    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text
        self.document = Document()
        self.grown = self.addressed = 0

    def read(self) -> Document:
        try:
            # The base loader constructs no objects and gives plain scalars no type: both are done here.
            node: Any = yaml.compose(self.text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            raise self._wrong(error) from None
        except yaml.reader.ReaderError as error:
            why = f"character {error.position}: {error.reason}"
            raise _refused(self.name, why, line=self.text.count("\n", 0, error.position) + 1) from None
        except _TooMuch as error:
            raise _refused(self.name, str(error), line=error.line) from None
        except RecursionError:
            raise _refused(self.name, "the data is nested too deeply") from None
        except (ValueError, OverflowError) as error:
            raise _refused(self.name, f"an escape is not a character: {error}") from None
        self.document.data = None if node is None else self.data(node, "$", 0)
        return self.document

    def data(self, node: Any, address: str, depth: int) -> Any:
        line = node.start_mark.line + 1
        self.document.lines.setdefault(address, line)
        self.grown += 16 + (len(node.value) if node.id == "scalar" else 0)
        self.addressed += len(address)
        if self.grown > _MAX_GROWN or self.addressed > _MAX_ADDRESSES or depth > MAX_LEVELS:
            what = "is nested too deeply" if depth > MAX_LEVELS else "is too large with aliases expanded"
            raise _refused(self.name, f"the data {what}", line=line)
        if node.tag != _DEFAULT[node.id]:
            self.problem(address, f"{node.tag!r}: a recipe has no tags", line)
        if node.id == "sequence":
            return [self.data(child, below(address, n), depth + 1) for n, child in enumerate(node.value)]
        if node.id == "scalar":
            return node.value if node.style else _scalar(node.value)
        found: dict[str, Any] = {}
        for key_node, child in node.value:
            if key_node.id != "scalar":
                self.problem(address, "a key is text", key_node.start_mark.line + 1, _QUOTE)
                continue
            key = key_node.value
            if key in found:
                line = child.start_mark.line + 1
                self.problem(below(address, key), f"the key {key!r} appears twice in one map", line)
                continue
            found[key] = self.data(child, below(address, key), depth + 1)
        return found

    def problem(self, address: str, message: str, line: int, hint: str = "") -> None:
        if len(self.document.problems) < MAX_PROBLEMS:
            self.document.problems.append(Problem(address, message, hint, "syntax", line))

    def _wrong(self, error: Any) -> BadRecipe:
        mark = error.problem_mark or error.context_mark
        lines = self.text.split("\n")
        said = " ".join(part for part in (error.context, error.problem) if part)
        line = lines[mark.line].rstrip("\r") if mark is not None and mark.line < len(lines) else ""
        message = f"the text is not YAML: {said}"
        if line and len(line) <= 200:
            message += f"\n\n    {line}\n    {' ' * mark.column}^"
        hint = ""
        if "unknown escape" in said:
            hint = r"use single quotes, which keep backslashes: zero: 'a\*b/w'"
        elif "\\t" in said:
            hint = "indent with spaces"
        elif "single document" in said:
            hint = "a file holds one recipe: remove the line ---"
        elif any(char in line for char in "*[]{}"):
            hint = _QUOTE
        return _refused(self.name, message, hint, 0 if mark is None else mark.line + 1)


def _scalar(text: str) -> Any:
    """The value of an unquoted scalar, by the core schema of YAML 1.2 (section 10.3.2)."""
    for pattern, make in _SCALARS:
        if re.fullmatch(pattern, text):
            return make(text)
    return text


def write_scalar(data: Any) -> str:
    """A scalar, or a list or map of them, as text that `read` can read.

    >>> print(write_scalar(["a\\u0085b", 0.5, float("inf"), True]))
    ["a\\x85b", 0.5, .inf, true]
    """
    if isinstance(data, list):
        return f"[{', '.join(map(write_scalar, data))}]"
    if isinstance(data, dict):
        return f"{{{', '.join(f'{_key(key)}: {write_scalar(value)}' for key, value in data.items())}}}"
    if isinstance(data, str):
        return f'"{"".join(map(_escaped, data))}"'
    if isinstance(data, bool):
        return str(data).lower()
    text = repr(data)
    return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan", "None": "null"}.get(text, text)


def _key(key: str) -> str:
    plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", key) and key.lower() not in ("true", "false", "null")
    return key if plain else write_scalar(key)


def _escaped(char: str) -> str:
    if char in '"\\':
        return f"\\{char}"
    if char.isprintable():
        return char
    code = ord(char)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
