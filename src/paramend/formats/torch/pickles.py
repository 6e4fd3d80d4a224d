"""A reader of Python pickles that runs nothing: a pickle names what to build, and a vocabulary says what that means.

A pickle is a program. This is an interpreter of the harmless part of its language: numbers, text, dicts, lists,
tuples, sets, and the few names of a vocabulary. A name outside the vocabulary is an error, so only code in this
folder is ever called. Memory and time are bounded by the length of the pickle.
"""

import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from paramend.errors import BadCheckpoint
from paramend.leaves.names import Alone

# Larger integers, in bytes, take longer to print than to read.
MAX_INTEGER = 255
# Tuples can be made to collide as keys, unlike text: then the time grows with the square of their number.
_MAX_TUPLES = 10_000
_COPIED = frozenset({str, bytes, bytearray, list, tuple, dict, OrderedDict, set})


class Flaw(ValueError):
    """A fault in one step of a pickle; the reader adds the byte, and `hint` says what to do about it."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


class Name(Alone):
    """A global name in a pickle, such as "torch.float32": it is never loaded, and `call` is called in its place."""

    __slots__ = ("call", "text")

    def __init__(self, text: str, call: Callable[..., Any] | None = None) -> None:
        self.text = text
        self.call = call

    def __repr__(self) -> str:
        return self.text


class Foreign(Alone):
    """An object of a class that is not loaded: the name of the class, and what the object was made from."""

    __slots__ = ("parts", "text")

    def __init__(self, text: str, *parts: Any) -> None:
        self.text = text
        self.parts: list[Any] = list(parts)

    def __repr__(self) -> str:
        return f"<{self.text}, not read>"


class Vocabulary(Protocol):
    """The meaning of the names in a pickle."""

    def names(self) -> Mapping[str, Name]:
        """The known names."""

    def foreign(self, module: str, name: str) -> Name:
        """A name that is not known. Raises `Flaw` if it is refused."""

    def resolve(self, reference: Any) -> Any:
        """The object that a persistent id, such as the key of a storage, refers to. Raises `Flaw`."""

    def build(self, thing: Any, state: Any) -> None:
        """Set the state of a thing that a call returned. Raises `Flaw`."""


def unpickle(data: bytes, words: Vocabulary, *, file: str, place: str) -> Any:
    """The value of a pickle: plain containers and scalars, what the vocabulary makes; `BadCheckpoint` for all else."""
    machine = _Machine(data, words)
    at, hint = 0, ""
    try:
        while not machine.done:
            at = machine.at
            machine.at = at + 1
            _TABLE[data[at]](machine)
    except Flaw as flaw:
        reason, hint = str(flaw), flaw.hint
    except IndexError:
        reason = "the pickle ends too early" if machine.at >= len(data) else "an instruction has no operand"
    else:
        return machine.stack.pop()
    raise BadCheckpoint(f"{file}: {place}, byte {at:,}: {reason}", hint=hint)


class _Machine:
    """A pickle that is being read."""

    def __init__(self, data: bytes, words: Vocabulary) -> None:
        self.data, self.words, self.names = data, words, words.names()
        self.at = 0  # the next byte
        self.stack: list[Any] = []  # values since the last mark
        self.below: list[list[Any]] = []  # the stacks under it, one for each open mark
        self.memo: dict[int, Any] = {}  # remembered values by key. A dict, so that a huge key takes no room
        self.done = False  # whether the end has been reached
        # How much more calls may copy, because one remembered list can be passed to many calls.
        self.room = 1_000_000 + 4 * len(data)
        self.tuples = 0  # how many keys are tuples

    def take(self, length: int) -> bytes:
        stop = self.at + length
        if stop > len(self.data):
            raise Flaw("the pickle ends too early")
        piece = self.data[self.at : stop]
        self.at = stop
        return piece

    def number(self, length: int) -> int:
        return int.from_bytes(self.take(length), "little")

    # The four most frequent instructions read the bytes directly.

    def byte(self) -> None:
        self.stack.append(self.data[self.at])
        self.at += 1

    def keep_near(self) -> None:
        self.memo[self.data[self.at]] = self.stack[-1]
        self.at += 1

    def keep_far(self) -> None:
        at = self.at
        self.at = at + 4  # beyond the end of the pickle the next instruction fails
        self.memo[int.from_bytes(self.data[at : at + 4], "little")] = self.stack[-1]

    def recall_near(self) -> None:
        key = self.data[self.at]
        self.at += 1
        if key not in self.memo:
            raise Flaw(f"value {key} is used but was never stored")
        self.stack.append(self.memo[key])

    def line(self) -> str:
        stop = self.data.find(b"\n", self.at, self.at + 1000)
        if stop < 0:
            raise Flaw("a name has no end")
        text = _text(self.data[self.at : stop])
        self.at = stop + 1
        return text

    def items(self) -> list[Any]:
        """The values since the last mark, which is removed."""
        found = self.stack
        if not self.below:
            raise Flaw("there is no mark to go back to")
        self.stack = self.below.pop()
        return found

    def recall(self, key: int) -> None:
        if key not in self.memo:
            raise Flaw(f"value {key:,} is used but was never stored")
        self.stack.append(self.memo[key])

    def keep(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def receiver(self, kinds: tuple[type, ...], values: list[Any], what: str) -> Any:
        """What values are put into; None for an object that is not read, which has taken them."""
        target = self.stack[-1]
        if type(target) in kinds:
            return target
        if type(target) is not Foreign:
            raise Flaw(f"{what}, not to {_kind(target)}")
        target.parts += values
        return None

    def enter(self, pairs: list[Any]) -> None:
        target = self.receiver((dict, OrderedDict), pairs, "entries can be added to a dict")
        if target is None:
            return
        if len(pairs) % 2:
            raise Flaw("the last key has no value")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) is not str:
                self.check_key(key)
            target[key] = value

    def extend(self, values: list[Any]) -> None:
        target = self.receiver((list,), values, "values can be appended to a list")
        if target is not None:
            target.extend(values)

    def unite(self, values: list[Any]) -> None:
        target = self.receiver((set,), values, "values can be added to a set")
        for value in values if target is not None else ():
            self.check_key(value)
            target.add(value)

    def check_key(self, key: Any) -> None:
        self.tuples += type(key) is tuple
        if self.tuples > _MAX_TUPLES:
            raise Flaw(f"more than {_MAX_TUPLES:,} keys are tuples")
        check_key(key)

    def find(self, module: str, name: str) -> None:
        module = {"__builtin__": "builtins"}.get(module, module)
        self.stack.append(self.names.get(f"{module}.{name}") or self.words.foreign(module, name))

    def find_on_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise Flaw("a name must be text")
        self.find(module, name)

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Name or function.call is None:
            raise Flaw(f"{function if type(function) is Name else _kind(function)} cannot be called")
        if type(arguments) is not tuple:
            raise Flaw(f"the arguments of {function.text} are {_kind(arguments)}, not a tuple")
        self.spend(arguments, *arguments)
        try:
            self.stack.append(function.call(*arguments))
        except TypeError:
            raise Flaw(f"{function.text} does not take {len(arguments)} arguments of these kinds") from None

    def spend(self, *values: Any) -> None:
        for value in values:
            if type(value) in _COPIED:
                self.room -= len(value)
        if self.room < 0:
            raise Flaw("the pickle uses the same values over and over")

    def build(self) -> None:
        state, thing = self.stack.pop(), self.stack[-1]
        if type(thing) is Foreign:
            thing.parts.append(state)
            return
        if type(thing) is not OrderedDict:
            self.words.build(thing, state)
            return
        # torch keeps the versions of modules as an attribute of a state dict.
        if type(state) is not dict:
            raise Flaw(f"the attributes of a dict are {_kind(state)}, not a dict")
        self.spend(state)
        for key, value in state.items():
            if type(key) is not str or not key.isidentifier() or hasattr(OrderedDict, key):
                raise Flaw(f"a dict cannot have the attribute {key!r:.100}")
            setattr(thing, key, value)

    def integer(self, length: int) -> None:
        if length > MAX_INTEGER:
            raise Flaw(f"an integer of {length:,} bytes is too long")
        self.stack.append(int.from_bytes(self.take(length), "little", signed=True))

    def tuple(self, length: int) -> None:
        values = self.stack[-length:]
        if len(values) < length:
            raise Flaw("an instruction has no operand")
        self.stack[-length:] = [tuple(values)]

    def close_tuple(self) -> None:
        values = tuple(self.items())  # which is another stack then
        self.stack.append(values)

    def open_mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def refuse(self) -> None:
        raise Flaw(f"instruction {self.data[self.at - 1 : self.at]!r} is not allowed")

    def start(self) -> None:
        protocol = self.number(1)
        if not 2 <= protocol <= 5:
            raise Flaw(f"pickle protocol {protocol} is unknown")

    def stop(self) -> None:
        if self.below or len(self.stack) != 1:
            raise Flaw("the pickle does not end with exactly one value")
        self.done = True


def check_key(key: Any) -> None:
    """Raise `Flaw` if a value cannot be a key of a dict, or only at great cost: anything but plain values and flat
    tuples. Tuples in tuples take exponential time to hash, and huge integers can be made to collide."""
    for part in key if type(key) is tuple else (key,):
        if type(part) is int:
            if -(2**63) <= part < 2**64:
                continue
            raise Flaw("an integer of more than 64 bits cannot be a key")
        if type(part) not in (str, bytes, bool, float, type(None), Foreign):
            raise Flaw(f"{_kind(part)} cannot be a key")


def _kind(value: Any) -> str:
    if value is None:
        return "None"
    name = value.text if type(value) is Name else type(value).__name__.lower()
    return f"an {name}" if name[0] in "aeio" else f"a {name}"


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Flaw("a string is not UTF-8") from None


_STEPS: dict[int, Callable[[_Machine], object]] = {
    ord(code): step
    for code, step in {
        "\x80": _Machine.start,
        "\x95": lambda m: m.take(8),  # a frame only says how much to read at once
        ".": _Machine.stop,
        # scalars
        "N": lambda m: m.stack.append(None),
        "\x88": lambda m: m.stack.append(True),
        "\x89": lambda m: m.stack.append(False),
        "K": _Machine.byte,
        "M": lambda m: m.stack.append(m.number(2)),
        "J": lambda m: m.integer(4),
        "\x8a": lambda m: m.integer(m.number(1)),
        "\x8b": lambda m: m.integer(m.number(4)),
        "G": lambda m: m.stack.append(*struct.unpack(">d", m.take(8))),
        "X": lambda m: m.stack.append(_text(m.take(m.number(4)))),
        "\x8c": lambda m: m.stack.append(_text(m.take(m.number(1)))),
        "\x8d": lambda m: m.stack.append(_text(m.take(m.number(8)))),
        "C": lambda m: m.stack.append(m.take(m.number(1))),
        "B": lambda m: m.stack.append(m.take(m.number(4))),
        "\x8e": lambda m: m.stack.append(m.take(m.number(8))),
        "\x96": lambda m: m.stack.append(bytearray(m.take(m.number(8)))),
        # containers
        "(": _Machine.open_mark,
        ")": lambda m: m.stack.append(()),
        "]": lambda m: m.stack.append([]),
        "}": lambda m: m.stack.append({}),
        "\x8f": lambda m: m.stack.append(set()),
        "\x85": lambda m: m.tuple(1),
        "\x86": lambda m: m.tuple(2),
        "\x87": lambda m: m.tuple(3),
        "t": _Machine.close_tuple,
        "a": lambda m: m.extend([m.stack.pop()]),
        "e": lambda m: m.extend(m.items()),
        "s": lambda m: m.enter([m.stack.pop(), m.stack.pop()][::-1]),
        "u": lambda m: m.enter(m.items()),
        "\x90": lambda m: m.unite(m.items()),
        # remembered values
        "q": _Machine.keep_near,
        "r": _Machine.keep_far,
        "\x94": lambda m: m.keep(len(m.memo)),
        "h": _Machine.recall_near,
        "j": lambda m: m.recall(m.number(4)),
        # names and what the vocabulary makes of them
        "c": lambda m: m.find(m.line(), m.line()),
        "\x93": _Machine.find_on_stack,
        "R": _Machine.call,
        "\x81": _Machine.call,
        "b": _Machine.build,
        "Q": lambda m: m.stack.append(m.words.resolve(m.stack.pop())),
    }.items()
}
_TABLE = [_STEPS.get(code, _Machine.refuse) for code in range(256)]
