"""JSON text of a checkpoint, read strictly: what the reference readers refuse is refused, and so are duplicate keys."""

import json
from collections import Counter
from typing import Any, NoReturn

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
    names: dict[type, str] = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a bool",
        int: "an integer",
        float: "a number with a point",
        type(None): "null",
    }
    return names[type(value)]
