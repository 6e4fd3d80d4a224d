"""Observations of what one call of a solution did, and their differences."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np

_RELATIVE, _ABSOLUTE = 1e-4, 1e-5

# What an exception is about: the name of a layer, else a quoted name. The rest of its text depends on versions.
_layer = re.compile(r"\b[A-Za-z]\w*_\d+\b")
_quoted = re.compile(r"['\"](\w+)['\"]")


@dataclass(frozen=True)
class Raised:
    """An exception that left a solution."""

    kind: str
    says: str  # the first line of its text
    place: str = ""  # file and line of the solution's own code where it was raised, or an empty string
    # The names in its first line, of layers or in quotes; if it has none, the line and the names in the rest.
    about: frozenset[str] = frozenset()

    def alike(self, other: "Raised") -> bool:
        """Whether both are of one type and about the same names."""
        return self.kind == other.kind and self.about == other.about

    def __str__(self) -> str:
        return f"{self.kind}: {self.says}" + (f"  ({self.place})" if self.place else "")


@dataclass(frozen=True)
class Observation:
    """What a call returned or raised, with facts about what it did, by name. Facts that could not be seen, such as
    values inside `jit`, are missing and not compared."""

    result: Any = None
    raised: Raised | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


def observed(call: Callable[[], Any], solve: Callable[..., Any]) -> Observation:
    """The result of a call, or the exception that left it."""
    try:
        return Observation(result=call())
    except (Exception, SystemExit) as error:
        first, _, rest = str(error).strip().partition("\n")
        about = _names(first) or frozenset({first, *_layer.findall(rest), *_quoted.findall(rest)})
        says, place = first.partition(" (https://")[0], place_in(error, file_of(solve))
        return Observation(raised=Raised(type(error).__name__, says, place, about))


def _names(text: str) -> frozenset[str]:
    return frozenset(map(_as_flax, _layer.findall(text))) or frozenset(_quoted.findall(text))


def _as_flax(name: str) -> str:
    """The name, or `Dense_<n>` for layer n of a solution that names its layers otherwise."""
    base, _, number = name.rpartition("_")
    return f"Dense_{number}" if base and number.isdigit() and base.casefold() != "dense" else name


def file_of(solve: Callable[..., Any]) -> str:
    """The file of a function's code, even wrapped by `jax.jit` or `functools.wraps`; "" if it has none."""
    for _ in range(32):
        code = getattr(solve, "__code__", None)
        inner = getattr(solve, "__wrapped__", None) or getattr(solve, "func", None)
        if isinstance(code, CodeType) and inner is None:
            return code.co_filename
        if inner is None:
            break
        solve = inner
    call = type(solve).__call__ if callable(solve) else None
    code = getattr(call, "__code__", None)
    return code.co_filename if isinstance(code, CodeType) else ""


def place_in(error: BaseException, file: str) -> str:
    """The last line of `file` that an exception passed through, as "answer.py, line 3", or an empty string."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"{Path(file).name}, line {line}" if line else ""


def differences(got: Observation, want: Observation) -> list[tuple[str, str]]:
    """What differs, as pairs of texts (got, want); empty if both did the same."""
    if got.raised or want.raised:
        same = got.raised and want.raised and got.raised.alike(want.raised)
        return [] if same else [(_ending(got), _ending(want))]
    pairs = [] if _agree(got.result, want.result) else [(outcome(got), outcome(want))]
    seen = [name for name in want.facts if name in got.facts]
    return pairs + [
        (f"{name}: {got.facts[name]}", f"{name}: {want.facts[name]}")
        for name in seen
        if got.facts[name] != want.facts[name]
    ]


def outcome(observation: Observation) -> str:
    """The result or the exception as text."""
    if observation.raised:
        return str(observation.raised)
    return sketch(observation.result)


def _ending(observation: Observation) -> str:
    return "no exception" if observation.raised is observation.result is None else outcome(observation)


def sketch(value: Any) -> str:
    """A value in one line: the kind of numbers, the shape, and the numbers, abbreviated if there are many.

    >>> sketch(np.arange(3)), sketch("text"), sketch(None)
    ('integers (3,): [0 1 2]', "'text'", 'None')
    """
    array = _numbers(value)
    if array is None:
        text = " ".join(repr(value).split())
        return text if len(text) <= 160 else text[:157] + "..."
    kind = {"i": "integers", "u": "integers", "f": "floats"}.get(array.dtype.kind, str(array.dtype))
    numbers = np.array2string(array, precision=4, threshold=12, edgeitems=2, max_line_width=10_000)
    return f"{kind} {array.shape}: {' '.join(numbers.split())}".replace("[ ", "[")


def _numbers(value: Any) -> np.ndarray[Any, Any] | None:
    if value is None or isinstance(value, str | bytes | Mapping):
        return None
    try:
        array = np.asarray(value)
    except Exception:  # whatever a foreign `__array__` raises, the value is not an array of numbers
        return None
    # bfloat16 and float8 are floats to a learner, but not to numpy (kind "V")
    if array.dtype.name.startswith(("bfloat", "float8")):
        array = array.astype(np.float32)
    return array if array.dtype.kind in "iufcb" else None


def _agree(got: Any, want: Any) -> bool:
    if want is None or got is None:
        return want is got
    wanted, given = _numbers(want), _numbers(got)
    if wanted is None or given is None:
        return bool(wanted is given is None and type(got) is type(want) and repr(got) == repr(want))
    if given.shape != wanted.shape or given.dtype.kind not in "iuf":
        return False
    if wanted.dtype.kind != "f":
        return bool(np.array_equal(given, wanted))
    # integers where the reference returns floats mean that a dtype was lost
    return given.dtype.kind == "f" and bool(np.allclose(given, wanted, rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=True))
