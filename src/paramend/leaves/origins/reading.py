"""`read_origin`: an origin from its text. Texts come from files: what they may ask for is bounded."""

import json
import re
from collections.abc import Callable, Iterator

import numpy as np

from paramend.errors import BadArgument, SpecMismatch
from paramend.leaves.origins import moved
from paramend.leaves.origins.boxes import Places
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Zeros
from paramend.leaves.origins.texts import CHARACTERS
from paramend.leaves.specs import BITS, Array, Spec

# The most levels, axes, parts, places and elements that a text may name.
_DEEP, _AXES, _PARTS, _PLACES, _SIZE = 100, 32, 1 << 20, 1 << 24, 1 << 50
_INT, _INTS = "(-?[0-9]{1,15})", r"\[([0-9, ]*)\]"
_ONE = rf'("(?:[^"\\]|\\.)*"|(?:[{CHARACTERS}]|\{{[0-9]{{1,15}}\.\.[0-9]{{1,15}}\}})+)'
_verb = re.compile(r"(concat|stack|interleave|transpose|reshape)\(").match
_zeros = re.compile(rf"zeros\({_INTS}, (\w+)\)").match
_leaf = re.compile(rf"(?:{_ONE}:)?{_ONE}").match
_counted = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}").search
_index = re.compile(rf"\[((?::, )*)(?:{_INT}:{_INT}?(?::{_INT})?|\[([0-9:, ]*)\])\]").match
_run = re.compile("([0-9]{1,15})(?::([0-9]{1,15}))?").fullmatch
_end = re.compile(rf", (?:axis=([0-9]{{1,15}})|{_INTS})\)").match

# (file, or "" for the first one; name) → the leaf.
Finder = Callable[[str, str], Origin]


def read_origin(text: str, find: Finder) -> Origin:
    """The origin that a text says, whose leaves `find` finds: they are named by `quoted`, each after `file:` if it is
    not in the first. `BadArgument` if it is none, or asks for too much; `SpecMismatch` if the leaves do not fit it.

    >>> from paramend.leaves.origins.stored import Held
    >>> found = read_origin('concat(a[1:3], b.npz:"c d", axis=0)', lambda file, name: Held(np.arange(4)))
    >>> found.spec.shape
    (6,)
    """
    reader = _Reader(text, find)
    found = reader.origin()
    if reader.at < len(text) or reader.number is not None:
        raise reader.wrong("its end")
    return found


class _Reader:
    def __init__(self, text: str, find: Finder) -> None:
        self.text, self.find, self.at = text, find, 0
        self.depth, self.parts, self.places = 0, _PARTS, _PLACES
        self.number: int | None = None  # what stands in the name of a part for numbers that count up
        self.last = 0

    def wrong(self, wanted: str) -> BadArgument:
        return BadArgument(f"{self.text[self.at : self.at + 20]!r}, at character {self.at:,}, is not {wanted}")

    def taken(self, found: re.Match[str] | None, wanted: str) -> re.Match[str]:
        if found is None:
            raise self.wrong(wanted)
        self.at = found.end()
        return found

    def origin(self) -> Origin:
        self.depth += 1
        if self.depth > _DEEP:
            raise BadArgument(f"it has more than {_DEEP} levels")
        verb, zeros = _verb(self.text, self.at), _zeros(self.text, self.at)
        if verb is not None:
            self.at = verb.end()
            found = self.made(verb[1])
        elif zeros is not None and zeros[2] in BITS:
            self.at = zeros.end()
            found = Zeros(Spec(tuple(self.lengths(zeros[1])), zeros[2]))
        else:
            names = self.taken(_leaf(self.text, self.at), "a name").groups(default="")
            found = self.find(*map(self.named, names))
        while self.text.startswith("[", self.at):
            found = self.indexed(found)
        if found.spec.size > _SIZE:
            raise BadArgument(f"{found.spec} is larger than any leaf")
        self.depth -= 1
        return found

    def named(self, name: str) -> str:
        counted = _counted(name)
        if name.startswith('"'):
            try:
                return str(json.loads(name))
            except ValueError:
                raise self.wrong("what follows a name in quotes") from None
        if counted is None:
            return name
        first, self.last = int(counted[1]), int(counted[2])
        if not first < self.last < first + self.parts:
            raise self.wrong(f"what follows numbers that count up, {_PARTS:,} at most")
        self.number = first if self.number is None else self.number
        return f"{name[: counted.start()]}{self.number}{name[counted.end() :]}"

    def made(self, verb: str) -> Origin:
        parts = list(self.joined())
        axis, lengths = self.taken(_end(self.text, self.at), "an axis, or axes").groups()
        spec = parts[0].spec
        if verb in ("transpose", "reshape"):
            if lengths is None or len(parts) > 1:
                raise self.wrong(f"what follows {verb} of one leaf")
            numbers = self.lengths(lengths)
            if verb == "reshape":
                return moved.reshape(parts[0], numbers)
            if sorted(numbers) != list(range(spec.ndim)):
                raise SpecMismatch(f"{numbers} are not the axes of {spec}")
            return moved.permute_axes(parts[0], numbers)
        if axis is None or int(axis) >= spec.ndim + (verb == "stack"):
            raise SpecMismatch(f"{spec} has no axis {axis or lengths}")
        return moved.join(parts, int(axis), verb)  # type: ignore[arg-type]

    def joined(self) -> Iterator[Origin]:
        outer = self.number, self.last
        while True:
            start = self.at
            found, first = self.part(start, None)
            yield found
            for number in range(first + 1, self.last + 1) if first is not None else ():
                yield self.part(start, number)[0]
            if _end(self.text, self.at) or not self.text.startswith(", ", self.at):
                break
            self.at += 2
        self.number, self.last = outer

    def part(self, start: int, number: int | None) -> tuple[Origin, int | None]:
        """A part, and what stood in its name for numbers that count up."""
        self.at, self.number = start, number
        self.parts -= 1
        if self.parts < 0:
            raise BadArgument(f"it has more than {_PARTS:,} parts")
        return self.origin(), self.number

    def lengths(self, text: str) -> list[int]:
        words = text.split(", ") if text else []
        if len(words) > _AXES or not all(word.isdigit() and len(word) <= 15 for word in words):
            raise BadArgument(f"{text:.60} are not lengths or numbers of axes")
        return list(map(int, words))

    def indexed(self, whole: Origin) -> Origin:
        before, start, stop, step, places = self.taken(_index(self.text, self.at), "an index").groups()
        axis, by = len(before) // len(":, "), int(step or 1)
        if axis >= whole.spec.ndim or not by:
            raise SpecMismatch(f"{whole.spec} has no axis {axis}, or an index no step")
        length = whole.spec.shape[axis]
        if places is not None:
            return moved.take(whole, self.scattered(places, length), axis)
        found = range(int(start), int(stop) if stop is not None else length if by > 0 else -1, by)
        if found and not (0 <= found[0] < length and 0 <= found[-1] < length):
            raise SpecMismatch(f"axis {axis} of {whole.spec} does not have the places {start} to {stop}")
        return moved.take(whole, found, axis)

    def scattered(self, text: str, length: int) -> Places:
        found: list[Array] = [np.zeros(0, np.int64)]
        for word in text.split(", ") if text else ():
            run = _run(word)
            first, stop = (int(run[1]), int(run[2] or int(run[1]) + 1)) if run else (0, 0)
            self.places -= stop - first
            if not 0 <= first < stop or self.places < 0:
                raise BadArgument(f"{word} is not a place, or one too many")
            if stop > length:
                raise SpecMismatch(f"{word} is not among {length:,} places")
            found.append(np.arange(first, stop))
        return np.concatenate(found)
