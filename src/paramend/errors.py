"""The exceptions of Paramend, one tree under `ParamendError`, and one warning, `ValuesLost`.

Every message says what was written, what was there and, after an empty line, `hint:` with what to type.
Each class has a stable `code` for programs to test.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


def printable(text: str) -> str:
    r"""The text with control characters written out, also those that turn the direction of writing.

    Names from files may contain them, and terminals, browsers and editors obey them.

    >>> printable("a\x1b[2Jb\n")
    'a\\x1b[2Jb\\n'
    """
    if text.isprintable():
        return text
    # Lone surrogates come from file names that are not UTF-8; they are not printable either.
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def printable_lines(text: str) -> str:
    r"""A text of several lines that is safe to show: as `printable`, but its line breaks stay.

    >>> printable_lines("a\u202eb\nc")
    'a\\u202eb\nc'
    """
    return text if text.isprintable() else "\n".join(map(printable, text.split("\n")))


_LOGIN = re.compile(r"(https?://)[^\s/@]+@")
_SIGNED = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")


def masked(text: str) -> str:
    """The text without what lets its readers in: the logins and signatures of web addresses.

    >>> masked("no https://me:pass@host/a.pt?signature=1 here")
    'no https://***@host/a.pt here'
    """
    return _SIGNED.sub(r"\1", _LOGIN.sub(r"\1***@", text)) if "://" in text else text


_WIDTH = 100  # characters of a text that are shown before, at and after a fault in it


class ParamendError(Exception):
    """Base of all errors that Paramend raises on purpose.

    Attributes:
        code: a stable identifier of the kind of error.
        hint: code or a command that works instead, or "".
    """

    code = "paramend"

    def __init__(self, message: str, *, hint: str = "") -> None:
        message, hint = masked(message), masked(hint)
        super().__init__(f"{message}\n\nhint: {hint}" if hint else message)
        self.hint = hint

    def __str__(self) -> str:
        return printable_lines(super().__str__())

    def __reduce__(self) -> tuple[Any, ...]:
        """By what it holds: workers send errors home, and `__init__` wants the parts that the message was made of."""
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[ParamendError], args: tuple[Any, ...], state: dict[str, Any]) -> ParamendError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class SelectorError(ParamendError, ValueError):
    """The text of a selector breaks the grammar at `text[span[0]:span[1]]`."""

    code = "selector"

    def __init__(self, message: str, *, text: str, span: tuple[int, int], hint: str = "") -> None:
        before, at, after = map(printable, (text[: span[0]], text[slice(*span)], text[span[1] :]))
        before = before if len(before) <= _WIDTH else f"...{before[-_WIDTH:]}"
        at, after = at[:_WIDTH], after if len(after) <= _WIDTH else f"{after[:_WIDTH]}..."
        caret = " " * len(before) + "~" * max(min(span[1] - span[0], len(at) or 1) - 1, 0) + "^"
        super().__init__(f"{message}\n\n    {before}{at}{after}\n    {caret}", hint=hint)
        self.text = text
        self.span = span


class NoMatch(ParamendError, LookupError):
    """A selector matched no leaf. `near` lists selectors or paths that do match."""

    code = "no-match"

    def __init__(self, message: str, *, hint: str = "", near: Sequence[str] = ()) -> None:
        super().__init__(message, hint=hint)
        self.near = tuple(near)


class OutOfRange(NoMatch, IndexError):
    """A position in a selector or in a slice does not exist."""

    code = "out-of-range"


class WrongCount(ParamendError, LookupError):
    """The selector matched `found` leaves where `wanted` were demanded."""

    code = "wrong-count"

    def __init__(self, message: str, *, found: int, wanted: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.found = found
        self.wanted = wanted


class SpecMismatch(ParamendError, ValueError):
    """A shape or a dtype differs where it must agree."""

    code = "spec-mismatch"


class Unsupported(ParamendError, TypeError):
    """A leaf or a container cannot take this edit."""

    code = "unsupported"


class Quantized(Unsupported):
    """A leaf is a part of a quantised weight, and what was asked would take codes for values, or part the group.

    Attributes:
        scheme: the name of its scheme, such as "fp8-block".
        payload: the path of the leaf with the codes; "" if it is in another file.
        companions: the paths of its scales, zero points and tables.
    """

    code = "quantized"

    def __init__(
        self, message: str, *, scheme: str, payload: str, companions: Sequence[str] = (), hint: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.scheme = scheme
        self.payload = payload
        self.companions = tuple(companions)


class BadArgument(ParamendError, ValueError):
    """An argument is not a valid choice."""

    code = "bad-argument"


class ValuesLost(UserWarning):
    """An edit in memory gave values that their dtype cannot hold: they became inf, NaN or another number.

    The edit is done. On disk the report of a save or a patch has these numbers.
    """


class Problem(NamedTuple):
    """One fault of a recipe.

    Attributes:
        address: where, such as `$.steps[2].at`.
        message: what is wrong.
        hint: what to write instead, or "".
        code: the code of the error that an edit in Python would raise; "expect" for an unmet expectation.
        line: the line of the file, counted from 1, or 0.
    """

    address: str
    message: str
    hint: str = ""
    code: str = ""
    line: int = 0

    def __str__(self) -> str:
        line = f" (line {self.line})" if self.line else ""
        hint = f"\nhint: {self.hint}" if self.hint else ""
        return re.sub(r"\n(?=.)", "\n    ", f"{self.address}{line}: {self.message}{hint}")


class BadRecipe(ParamendError, ValueError):
    """A recipe cannot be carried out. `problems` lists all its faults, each with its address."""

    code = "bad-recipe"

    def __init__(self, name: str, problems: Sequence[Problem], *, recipe: object = None) -> None:
        count = f"{len(problems):,} problem{'' if len(problems) == 1 else 's'}"
        super().__init__("\n".join([f"{name}: {count}", "", *map(str, problems)]))
        self.problems = tuple(problems)
        self.recipe = recipe
        self.hint = next((problem.hint for problem in problems if problem.hint), "")


class RenameClash(ParamendError, ValueError):
    """A rename gives two leaves the same path, or a path that the containers cannot hold."""

    code = "rename-clash"


class GraftRefused(ParamendError, ValueError):
    """Source and target do not fit. `report` lists every case, `ways` the options of each call that would work."""

    code = "graft-refused"

    def __init__(self, message: str, *, report: Any, ways: Sequence[dict[str, Any]] = (), hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.report = report
        self.ways = list(ways)


class PortRefused(ParamendError, ValueError):
    """A model cannot be ported. `report` lists what was found, `candidates` what could be paired in several ways."""

    code = "port-refused"

    def __init__(
        self, message: str, *, report: Any, candidates: Sequence[tuple[list[str], list[str]]] = (), hint: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.report = report
        self.candidates = list(candidates)


class UnexpectedChange(ParamendError, AssertionError):
    """Leaves differ that must be equal. `changes` maps the path of each to what happened to it."""

    code = "unexpected-change"

    def __init__(self, message: str, *, changes: Mapping[str, str], hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.changes = dict(changes)


class BadCheckpoint(ParamendError, ValueError):
    """A file is damaged, hostile or of unknown format."""

    code = "bad-checkpoint"


class CannotRead(ParamendError, OSError):
    """There is no such file, or no permission to read it."""

    code = "cannot-read"


class CannotWrite(ParamendError, OSError):
    """The output exists, the folder is read-only or the disk is full; the message says what was written."""

    code = "cannot-write"


class Busy(CannotWrite):
    """Another program is writing, or has just put another file in the place; try again."""

    code = "busy"


class MissingExtra(ParamendError, ImportError):
    """An optional dependency is not installed."""

    code = "missing-extra"
