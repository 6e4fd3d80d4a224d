"""`Recorder`: reads a pickle so that it can be written again. Its calls are recorded, not carried out.

`pickled` writes what was read, in the protocol that `torch.load(weights_only=True)` supports best. In between,
entries may be added, removed and replaced: containers are plain, and a tensor is the call that rebuilds it.
"""

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from paramend.errors import BadCheckpoint
from paramend.formats.torch.pickles import Flaw, Name, Vocabulary

# Deeper values would exhaust the stack of the writer.
_DEPTH = 200


class Rebuilt:
    """The result of a call.

    Attributes:
        function: the function.
        arguments: its arguments.
        state: the state that is set afterwards; None if there is none.
    """

    __slots__ = ("arguments", "function", "state")

    def __init__(self, function: Name, arguments: tuple[Any, ...]) -> None:
        self.function = function
        self.arguments = arguments
        self.state: Any = None


class StorageRef:
    """A storage that tensors view.

    Attributes:
        reference: the kind, the key of the record, the device and the length; then what some writers add.
    """

    __slots__ = ("reference",)

    def __init__(self, reference: tuple[Any, ...]) -> None:
        self.reference = reference

    @property
    def key(self) -> str:
        """The bytes are in the record "data/<key>"."""
        key: str = self.reference[1]
        return key


class Recorder:
    """A vocabulary with the names of another, which records calls of them.

    Args:
        words: the other. Read the pickle with it first, because it checks arguments.

    >>> import pickle
    >>> from paramend.formats.torch.pickles import unpickle
    >>> class Words:
    ...     def names(self): return {"builtins.complex": Name("builtins.complex", complex)}
    >>> made = unpickle(pickle.dumps([1j], 2), Recorder(Words()), file="x", place="y")[0]
    >>> made.function, made.arguments, pickle.loads(pickled([made, (2, made)]))
    (builtins.complex, (0.0, 1.0), [1j, (2, 1j)])
    """

    def __init__(self, words: Vocabulary) -> None:
        self._names = {text: _recording(name) for text, name in words.names().items()}

    def names(self) -> Mapping[str, Name]:
        """The known names."""
        return self._names

    def foreign(self, module: str, name: str) -> Name:
        """Raise: objects of other classes cannot be written again."""
        raise Flaw(f"objects of {module}.{name} cannot be written again")

    def resolve(self, reference: Any) -> StorageRef:
        """A storage, recorded."""
        return StorageRef(reference[1:])

    def build(self, thing: Any, state: Any) -> None:
        """Record the state of what a call returned."""
        if type(thing) is not Rebuilt:
            raise Flaw(f"{type(thing).__name__.lower()} takes no state")
        thing.state = state


def _recording(name: Name) -> Name:
    if name.call is None or name.text == "collections.OrderedDict":
        return name
    made = Name(name.text)
    made.call = lambda *arguments: Rebuilt(made, arguments)
    return made


# ---- writing -----------------------------------------------------------------------------------------------------


def pickled(root: Any, leaves: Mapping[int, Any] | None = None, *, used: set[str] | None = None) -> bytes:
    """The pickle of what was recorded; a value in several places is written once.

    Args:
        root: the outermost value.
        leaves: what to write for each array in it, which is a scalar that holds a leaf number.
        used: receives the keys of all storages.

    Raises:
        BadCheckpoint: a value contains itself, or is nested too deeply.
    """
    writer = _Pickler(leaves or {}, set() if used is None else used)
    return b"\x80\x02" + b"".join(writer.parts(root, 0)) + b"."


class _Pickler:
    def __init__(self, leaves: Mapping[int, Any], used: set[str]) -> None:
        self.leaves = leaves
        self.used = used
        # Objects are kept alive with their places, so that no other object gets the same id.
        self.memo: dict[Any, tuple[int, Any]] = {}
        self.open: set[int] = set()

    def parts(self, node: Any, depth: int) -> Iterator[bytes]:
        kind = type(node)
        if kind is np.ndarray:
            node = self.leaves[int(node)]
            kind = type(node)
        write = _PLAIN.get(kind)
        if write is not None:
            yield write(node)
            return
        known = self.memo.get(node if kind is str else id(node))
        if known is not None:
            yield _place(known[0], b"h", b"j")
            return
        if depth > _DEPTH or id(node) in self.open:
            raise BadCheckpoint("the pickle holds values that contain themselves, or are nested too deeply")
        yield from self._PARTS[kind](self, node, depth + 1)

    def keep(self, node: Any) -> bytes:
        number = len(self.memo)
        self.memo[node if type(node) is str else id(node)] = (number, node)
        return _place(number, b"q", b"r")

    def _text(self, node: str, depth: int) -> Iterator[bytes]:
        encoded = node.encode()
        yield b"X" + struct.pack("<I", len(encoded)) + encoded + self.keep(node)

    def _mapping(self, node: Mapping[Any, Any], depth: int) -> Iterator[bytes]:
        yield (b"}" if type(node) is dict else b"ccollections\nOrderedDict\n)R") + self.keep(node)
        if node:
            yield b"("
            for key, child in node.items():
                yield from self.parts(key, depth)
                yield from self.parts(child, depth)
            yield b"u"
        if type(node) is OrderedDict and vars(node):
            yield from self.parts(vars(node), depth)
            yield b"b"

    def _list(self, node: list[Any], depth: int) -> Iterator[bytes]:
        yield b"]" + self.keep(node)
        if node:
            yield b"("
            for child in node:
                yield from self.parts(child, depth)
            yield b"e"

    def _tuple(self, node: tuple[Any, ...], depth: int) -> Iterator[bytes]:
        if not node:
            yield b")"
            return
        self.open.add(id(node))
        yield b"("
        for child in node:
            yield from self.parts(child, depth)
        yield b"t" + self.keep(node)
        self.open.remove(id(node))

    def _made(self, node: Rebuilt, depth: int) -> Iterator[bytes]:
        self.open.add(id(node))
        yield _name(node.function)
        yield from self.parts(node.arguments, depth)
        yield b"R" + self.keep(node)
        self.open.remove(id(node))
        if node.state is not None:
            yield from self.parts(node.state, depth)
            yield b"b"

    def _stored(self, node: StorageRef, depth: int) -> Iterator[bytes]:
        self.used.add(node.key)
        yield b"("
        for child in ("storage", *node.reference):
            yield from self.parts(child, depth)
        yield b"tQ"

    # The protocol has no instructions for these types: calls make them.

    def _set(self, node: set[Any], depth: int) -> Iterator[bytes]:
        yield from self._made(Rebuilt(Name("builtins.set"), (sorted(node, key=repr),)), depth)
        yield self.keep(node)

    def _bytes(self, node: bytes | bytearray, depth: int) -> Iterator[bytes]:
        text = node.decode("latin1")
        name = "_codecs.encode" if type(node) is bytes else "builtins.bytearray"
        yield from self._made(Rebuilt(Name(name), (text, "latin1")), depth)
        yield self.keep(node)

    def _complex(self, node: complex, depth: int) -> Iterator[bytes]:
        yield from self._made(Rebuilt(Name("builtins.complex"), (node.real, node.imag)), depth)
        yield self.keep(node)

    _PARTS: Mapping[type, Callable[["_Pickler", Any, int], Iterator[bytes]]] = {
        str: _text,
        dict: _mapping,
        OrderedDict: _mapping,
        list: _list,
        tuple: _tuple,
        Rebuilt: _made,
        StorageRef: _stored,
        set: _set,
        bytes: _bytes,
        bytearray: _bytes,
        complex: _complex,
    }


def _place(number: int, near: bytes, far: bytes) -> bytes:
    return near + bytes([number]) if number < 256 else far + struct.pack("<I", number)


def _name(name: Name) -> bytes:
    module, _, own = name.text.rpartition(".")
    return f"c{module}\n{own}\n".encode()


def _integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


_PLAIN: Mapping[type, Callable[[Any], bytes]] = {
    type(None): lambda value: b"N",
    bool: lambda value: b"\x88" if value else b"\x89",
    int: _integer,
    float: lambda value: b"G" + struct.pack(">d", value),
    Name: _name,
}
