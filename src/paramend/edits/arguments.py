"""The kinds of arguments of edits as data: how each is read, and its JSON Schema."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from paramend.arrays.initializers import INITIALIZERS
from paramend.arrays.registry import backend_of
from paramend.errors import BadArgument
from paramend.leaves.specs import ALIASES, BITS, dtype_name
from paramend.reports import wording

# The arguments of an edit by name.
Args = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Value:
    """A kind of argument."""

    says: str
    read: Callable[[Any], Any]  # data → the argument; raises BadArgument
    schema: Mapping[str, Any]  # the JSON Schema of the data
    array: bool = False  # whether it may be an array too
    scalar: bool = False  # whether it is one number, also in Python
    example: str = ""

    def named(self, says: str, example: str) -> "Value":
        """The same kind of argument, with the description and example of one edit."""
        return replace(self, says=says, example=example)

    def typed(self, text: str) -> Any:
        """The argument from text on a command line; `BadArgument` if the text is not such an argument.

        >>> SEED.typed("3"), NUMBER.typed("-1e-3"), DTYPE.typed("bf16")
        (3, -0.001, 'bfloat16')
        """
        try:
            return self.read(text)
        except BadArgument:
            if not re.fullmatch("[-+]?[0-9]{1,4000}", text):
                raise
            return self.read(int(text))


_INF, _NAN = r"\.?[iI][nN][fF]([iI][nN][iI][tT][yY])?", r"\.?[nN][aA][nN]"
_DECIMAL = r"([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?"
_NUMBER = rf"[tT][rR][uU][eE]|[fF][aA][lL][sS][eE]|[-+]?({_DECIMAL}|{_INF}|{_NAN})"
_AXIS = r"\s*([-+]?[0-9]+|([-+]?[0-9]+)?:([-+]?[0-9]+)?(:([-+]?[0-9]+)?)?|\.\.\.)\s*"
_INDEX = rf"{_AXIS}(,{_AXIS})*,?\s*"
_MAX_DEPTH = 32


def read_number(data: Any) -> int | float | bool:
    """A number, also from text: YAML 1.1 reads `1e-3` as text, and JSON has no infinity. Else `BadArgument`.

    >>> read_number("3"), read_number("1e-3"), read_number("-inf"), read_number("true")
    (3, 0.001, -inf, True)
    """
    if isinstance(data, str) and re.fullmatch(_NUMBER, data):
        text = data.lower()
        if text in ("true", "false"):
            return text == "true"
        digits = text.lstrip("+-").isdecimal()
        number = int(text[:4000]) if digits else float(text.replace(".inf", "inf").replace(".n", "n"))
        if len(text) > 4000 or (abs(number) == float("inf") and "inf" not in text):
            raise BadArgument(f"{shown(text)} is too large")
        return number
    if isinstance(data, int):  # bools too
        if data.bit_length() > 4096:
            raise BadArgument(f"a number of {data.bit_length():,} bits is too large")
        return data
    if isinstance(data, float):
        return float(data)
    raise BadArgument(f"{shown(data)} is not a number", hint="3, 0.5, 1e-3, inf, nan, true or false")


def shown(data: Any) -> str:
    """Data in a message, cut if it is long.

    >>> shown({"a": 1}), shown("x" * 99)[-8:]
    ("{'a': 1}", 'xxxxx...')
    """
    library = backend_of(type(data))
    if library is not None and data.shape:
        return f"an array, {library.spec(data)}"
    text = repr(data)
    if re.search(r"\b([aA]rray|tensor)\(", text):  # arrays within containers
        return wording.described(data)
    return text if len(text) <= 80 else f"{text[:76]}..."


def _integer(data: Any) -> int:
    if isinstance(data, float) and data.is_integer():
        return int(data)
    if isinstance(data, bool) or not isinstance(data, int):
        raise BadArgument(f"{shown(data)} is not a whole number")
    return data


def _natural(data: Any) -> int:
    number = _integer(data)
    if number < 0:
        raise BadArgument(f"{number} is negative")
    return number


def _deviation(data: Any) -> float:
    number = read_number(data)
    if isinstance(data, bool) or not 0 <= number < float("inf"):
        raise BadArgument(f"{shown(data)} is not a standard deviation", hint="0.01")
    return float(number)


def _numbers(data: Any, depth: int = 0) -> Any:
    if not isinstance(data, list | tuple):
        return read_number(data)
    if depth == _MAX_DEPTH:
        raise BadArgument(f"an array has at most {_MAX_DEPTH} axes")
    rows = [_numbers(row, depth + 1) for row in data]
    if len({_lengths(row) for row in rows}) > 1:
        raise BadArgument(f"the rows of {shown(data)} differ in length")
    return rows


def _lengths(rows: Any) -> tuple[int, ...]:
    return (len(rows), *(_lengths(rows[0]) if rows else ())) if isinstance(rows, list) else ()


def _sequence(data: Any, what: str, hint: str) -> Sequence[Any]:
    if not isinstance(data, list | tuple):
        raise BadArgument(f"{shown(data)} is not {what}", hint=hint)
    return data


def _array(data: Any) -> Any:
    return _numbers(_sequence(data, "a list of numbers", "[0.5, 0.5]; for one scalar: fill"))


def _text_of(data: Any) -> str:
    if not isinstance(data, str) or not data:
        raise BadArgument(f"{shown(data)} is not text", hint=f'"{data}"' if type(data) in (int, float, bool) else "")
    return data


def _lengths_of_axes(data: Any) -> list[int]:
    return [_natural(length) for length in _sequence(data, "a shape", "[4, 8]")]


def _listed(data: Any) -> Any:
    """A list typed as text: `1, 0`, `[1, 0]`."""
    if isinstance(data, str) and re.fullmatch(r"\s*(\[[^\]]*\]|[^\[\]]*)\s*", data) and data.strip(" []"):
        return [read_number(part.strip()) for part in data.strip(" []").removesuffix(",").split(",")]
    return [data] if type(data) is int else data


def _new_shape(data: Any) -> list[int]:
    found = _sequence(_listed(data), "a shape", "[4, -1]")
    return [_integer(length) if length == -1 else _natural(length) for length in found]


def _indices(data: Any) -> Any:
    if isinstance(data, str) and ":" in data and isinstance(read_index(data), slice):
        return data
    found = _sequence(_listed(data), "a list of places", '[0, 2], or a slice such as "0:4"')
    return [each if type(each) is bool else _integer(each) for each in found]


def _integers(data: Any) -> list[int]:
    return [_integer(place) for place in _sequence(_listed(data), "a list of whole numbers", "[1, 0]")]


def _one_of(choices: Iterable[str], says: str) -> Callable[[Any], str]:
    known = list(choices)

    def read(data: Any) -> str:
        if data in known:
            return str(data)
        near = wording.closest(data, known, limit=1) if isinstance(data, str) else []
        raise BadArgument(
            f"{shown(data)} is not {says}",
            hint=f'"{near[0]}"' if near else wording.listing([f'"{n}"' for n in known], 12),
        )

    return read


def read_index(data: Any) -> Any:
    """A slice, from a position or from the text between brackets; `BadArgument` if it is neither.

    >>> read_index(-1), read_index("0:4"), read_index("[0, ::2]")
    (-1, slice(0, 4, None), (0, slice(None, None, 2)))
    """
    text = _index_text(data)
    if isinstance(text, int):
        return text
    parts = [_axis(part.strip()) for part in text.rstrip().removesuffix(",").split(",")]
    return parts[0] if len(parts) == 1 else tuple(parts)


def _axis(text: str) -> Any:
    if text == "...":
        return Ellipsis
    if ":" not in text:
        return int(text)
    found = slice(*(int(part) if part.strip() else None for part in text.split(":")))
    if found.step == 0:
        raise BadArgument(f"{text!r} is not a slice: its step is 0")
    return found


def _index_text(data: Any) -> int | str:
    """A slice as data: a position, or text without brackets; from a list with an entry for each axis too."""
    if isinstance(data, list | tuple) and data and all(type(part) in (int, str) for part in data):
        data = ", ".join(map(str, data))
    if type(data) is int:
        return data
    if isinstance(data, str):
        inner = data.strip()
        inner = inner[1:-1] if inner.startswith("[") and inner.endswith("]") else inner
        if re.fullmatch(_INDEX, inner):
            return inner
    raise BadArgument(f"{shown(data)} is not a slice", hint='-1, "0:4", "::2" or "0, :4"')


def _index(data: Any) -> int | str:
    read_index(data)
    return _index_text(data)


_NUMBER_SCHEMA = {"anyOf": [{"type": ["number", "boolean"]}, {"type": "string", "pattern": f"^({_NUMBER})$"}]}
_ARRAY_SCHEMA = {"$ref": "#/$defs/array"}
_KINDS = ("float", "int", "bool", "complex")
_DTYPES = sorted({*BITS, *ALIASES})

# The targets of `#/$defs/...` in the rows: an array is a list of numbers or of arrays.
DEFINITIONS: Mapping[str, Any] = {
    "number": _NUMBER_SCHEMA,
    "array": {"type": "array", "items": {"anyOf": [{"$ref": "#/$defs/number"}, _ARRAY_SCHEMA]}},
}

NUMBER = Value("a number", read_number, {"$ref": "#/$defs/number"}, scalar=True, example="0.5")
BOUND = replace(NUMBER, says="a bound", scalar=False)  # in Python also None
ARRAY = Value("a list of numbers", _array, _ARRAY_SCHEMA, array=True)
DIRECTION = replace(ARRAY, says="a direction, a list of numbers as long as one of the last two axes")
OPERAND = Value(
    "a number or a list of numbers", _numbers, {"anyOf": [NUMBER.schema, _ARRAY_SCHEMA]}, array=True, example="0.5"
)
DEVIATION = Value(
    "a standard deviation",
    _deviation,
    {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": rf"^\+?{_DECIMAL}$"}]},
    scalar=True,
    example="0.01",
)
NATURAL = Value("a whole number", _natural, {"type": "integer", "minimum": 0}, example="1")
SEED = NATURAL.named("the seed of the random values, a whole number", "1")
TEXT = Value("text", _text_of, {"type": "string", "minLength": 1})
DTYPE = Value(
    "a dtype",
    lambda data: dtype_name(_one_of(_DTYPES, "a dtype that Paramend knows")(data)),
    {"enum": _DTYPES},
    example="bfloat16",
)
DTYPE_OR_KIND = Value(
    "a dtype, or a kind of them",
    lambda data: data if data in _KINDS else DTYPE.read(data),
    {"enum": sorted({*_DTYPES, *_KINDS})},
)
SHAPE = Value("a shape", _lengths_of_axes, {"type": "array", "items": NATURAL.schema})
INITIALIZER = Value(
    "an initializer", _one_of(INITIALIZERS, "an initializer"), {"enum": list(INITIALIZERS)}, example="lecun_normal"
)
# How a quantised weight is encoded where new values make that necessary.
RULES = {
    "amax": "anew, with scales by the greatest magnitude of each block (amax)",
    "keep": "anew, with the scales that are there",
    "never": "not at all: what cannot be done exactly is refused",
}
REQUANTIZE = Value(
    "how blocks of quantised weights are encoded", _one_of(RULES, "a way to encode"), {"enum": [*RULES]}, example="amax"
)
_INTEGERS = {"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": ["integer", "string"]}]}
SIZES = Value("the length of each part along the axis", _integers, _INTEGERS, example="2,4")
AXIS = Value("an axis, counted from 0 or, with a minus, from the end", _integer, {"type": "integer"}, example="0")
ALONG = AXIS.named("the axis that it is along; by default, the one of its length among the last two", "0")
AXES = Value("for each new axis, the old one", _integers, _INTEGERS, example="1,0")
NEW_SHAPE = Value("a shape of as many elements, in which one length may be -1", _new_shape, _INTEGERS, example="4,-1")
PLACES = Value(
    "places along the axis, a slice, or a mask of bools",
    _indices,
    {"anyOf": [{"type": "array", "items": {"type": ["integer", "boolean"]}}, {"type": ["integer", "string"]}]},
    example="0,2",
)
PERMUTATION = Value("the old place of each new one along the axis", _integers, _INTEGERS, example="1,0")
INDEX = Value(
    "a slice",
    _index,
    {
        "anyOf": [
            {"type": "integer"},
            {"type": "string", "pattern": rf"^\s*(\[{_INDEX}\]|{_INDEX})$"},
            {"type": "array", "minItems": 1, "items": {"anyOf": [{"type": "integer"}, {"type": "string"}]}},
        ]
    },
)
