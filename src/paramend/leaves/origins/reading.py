"""`read_origin`: an origin from its text. Texts come from files: what they may ask for is bounded."""

import json
import re
from collections.abc import Callable, Iterator

import numpy as np

from paramend.errors import BadArgument
from paramend.leaves.origins import moved
from paramend.leaves.origins.boxes import Places
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Zeros
from paramend.leaves.specs import BITS, Array, Spec

# The most levels, axes, parts, places and elements that a text may name.
_DEEP, _AXES, _PARTS, _PLACES, _SIZE = 100, 32, 1 << 20, 1 << 24, 1 << 50
_INT = "-?[0-9]{1,15}"
_INTS = rf"\[((?:{_INT}(?:, {_INT})*)?)\]"
_BARE = r"(?:[\w./+@~-]|\{[0-9]{1,15}\.\.[0-9]{1,15}\})+"
_ONE = rf'"(?:[^"\\]|\\.)*"|{_BARE}'
_verb = re.compile(r"(concat|stack|interleave|transpose|reshape|zeros)\(").match
_name = re.compile(rf"(?:({_ONE}):)?({_ONE})").match
_hole = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}").search
_index = re.compile(rf"\[((?::, )*)(?:({_INT}):({_INT})?(?::({_INT}))?|\[([0-9:, ]*)\])\]").match
_run = re.compile(r"([0-9]{1,15})(?::([0-9]{1,15}))?").fullmatch
_ints = re.compile(rf", {_INTS}\)").match
_axis = re.compile(r", axis=([0-9]{1,15})\)").match
_zeros = re.compile(rf"{_INTS}, (\w+)\)").match

# The leaf of a name, in a file that is named too, or "".
Finder = Callable[[str, str], Origin]


def read_origin(text: str, find: Finder) -> Origin:
    """The origin that a text says.

    Args:
        text: the text of an origin whose leaves are named by `quoted`, each after `file:` if it is not in the first.
        find: (file, name) → the leaf.

    Raises:
        BadArgument: it is none, what it joins does not fit, or it asks for too much; and what `find` raises.

    >>> from paramend.leaves.origins.stored import Held
    >>> found = read_origin('concat(a[1:3], b.npz:"c d", axis=0)', lambda file, name: Held(np.arange(4)))
    >>> found.spec.shape
    (6,)
    """
    reader = _Reader(text, find)
    found = reader.origin()
    if reader.at < len(text) or reader.number is not None:
        raise reader.wrong("its end, or names are counted where nothing is joined")
    return found


class _Reader:
    def __init__(self, text: str, find: Finder) -> None:
        self.text, self.find, self.at = text, find, 0
        self.depth, self.parts, self.places = 0, _PARTS, _PLACES
        self.number: int | None = None  # what stands for a run of numbers in a name
        self.last: int | None = None

    def wrong(self, wanted: str) -> BadArgument:
        return BadArgument(f"{self.text[self.at : self.at + 20]!r}, at character {self.at:,}, is not {wanted}")

    def taken(self, match: Callable[[str, int], re.Match[str] | None], wanted: str) -> re.Match[str]:
        found = match(self.text, self.at)
        if found is None:
            raise self.wrong(wanted)
        self.at = found.end()
        return found

    def origin(self) -> Origin:
        self.depth += 1
        if self.depth > _DEEP:
            raise BadArgument(f"it has more than {_DEEP} levels")
        verb = _verb(self.text, self.at)
        if verb is None:
            found = self.leaf()
        else:
            self.at = verb.end()
            found = self.made(verb[1])
        while self.text.startswith("[", self.at):
            found = self.indexed(found)
        if found.spec.size > _SIZE:
            raise BadArgument(f"{found.spec} is larger than any leaf")
        self.depth -= 1
        return found

    def leaf(self) -> Origin:
        found = self.taken(_name, "a name")
        file, name = (self.filled(each or "") for each in found.groups())
        return self.find(file, name)

    def filled(self, name: str) -> str:
        if name.startswith('"'):
            try:
                return str(json.loads(name))
            except ValueError:
                raise self.wrong("what follows a name in quotes") from None
        hole = _hole(name)
        if hole is None:
            return name
        first, self.last = int(hole[1]), int(hole[2])
        if not first < self.last < first + self.parts:
            raise self.wrong(f"what follows numbers that count up, {_PARTS:,} at most")
        self.number = first if self.number is None else self.number
        return f"{name[: hole.start()]}{self.number}{name[hole.end() :]}"

    def made(self, verb: str) -> Origin:
        if verb == "zeros":
            shape, dtype = self.taken(_zeros, "a shape and a dtype").groups()
            if dtype not in BITS:
                raise BadArgument(f"there is no dtype {dtype}")
            return Zeros(Spec(tuple(self.lengths(shape)), dtype))
        if verb in ("transpose", "reshape"):
            whole = self.origin()
            lengths = self.lengths(self.taken(_ints, "a list of whole numbers")[1])
            if verb == "reshape":
                return moved.reshape(whole, lengths)
            if sorted(lengths) != list(range(whole.spec.ndim)):
                raise BadArgument(f"{lengths} are not the axes of {whole.spec}")
            return moved.permute_axes(whole, lengths)
        parts = list(self.joined())
        axis, ndim = int(self.taken(_axis, "an axis")[1]), parts[0].spec.ndim
        if axis >= ndim + (verb == "stack"):
            raise BadArgument(f"{parts[0].spec} has no axis {axis}")
        return moved.join(parts, axis, verb)  # type: ignore[arg-type]

    def lengths(self, text: str) -> list[int]:
        found = [int(each) for each in text.split(", ") if each]
        if min(found, default=0) < 0 or len(found) > _AXES:
            raise BadArgument(f"{text:.60} are not lengths or numbers of axes")
        return found

    def joined(self) -> Iterator[Origin]:
        outer = self.number, self.last
        while True:
            start = self.at
            self.number = self.last = None
            found = self.origin()
            yield self.counted(found)
            while self.number is not None and self.last is not None and self.number < self.last:
                self.number, self.at = self.number + 1, start
                yield self.counted(self.origin())
            if _axis(self.text, self.at) or not self.text.startswith(", ", self.at):
                break
            self.at += 2
        self.number, self.last = outer

    def counted(self, found: Origin) -> Origin:
        self.parts -= 1
        if self.parts < 0:
            raise BadArgument(f"it has more than {_PARTS:,} parts")
        return found

    def indexed(self, whole: Origin) -> Origin:
        before, start, stop, step, places = self.taken(_index, "an index").groups()
        axis = len(before) // len(":, ")
        if axis >= whole.spec.ndim:
            raise BadArgument(f"{whole.spec} has no axis {axis}")
        length = whole.spec.shape[axis]
        if places is None:
            by = int(step or 1)
            if not by:
                raise self.wrong("what follows a step")
            end = int(stop) if stop is not None else length if by > 0 else -1
            found: Places = range(int(start), end, by)
        else:
            found = self.scattered(places, length)
        if len(found) and not (0 <= found[0] < length and 0 <= found[-1] < length):
            raise BadArgument(f"axis {axis} of {whole.spec} does not have the places {places or found}")
        return moved.take(whole, found, axis)

    def scattered(self, text: str, length: int) -> Array:
        found: list[Array] = []
        for each in text.split(", ") if text else ():
            run = _run(each)
            first, stop = (int(run[1]), int(run[2] or int(run[1]) + 1)) if run else (0, 0)
            self.places -= stop - first
            if not 0 <= first < stop <= length or self.places < 0:
                raise BadArgument(f"{each} is not among {length:,} places")
            found.append(np.arange(first, stop))
        return np.concatenate(found) if found else np.zeros(0, np.int64)
