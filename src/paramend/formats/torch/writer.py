"""Files as `torch.save` writes them, made without torch, and pickles that are read so that they can be written again.

A pickle holds only names that `torch.load(weights_only=True)` allows, in the protocol that this supports best. Calls in
one that is read are recorded, not carried out: entries may be added, removed and replaced; a tensor is the call that
rebuilds it.
"""

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from paramend.errors import BadCheckpoint
from paramend.formats.source import Item, LeafBytes, Parts, Writer, outline_of_items
from paramend.formats.torch.pickles import MAX_INTEGER, Flaw, Name, Vocabulary
from paramend.formats.torch.rebuilds import KNOWN, STORAGES
from paramend.formats.zips import ZipHeaders
from paramend.leaves.nested import MAX_DEPTH
from paramend.leaves.outlines import ATOMS, Outline, Place, closed, once
from paramend.leaves.specs import BITS, Spec, kind_of

# Deeper values would exhaust the stack of those who read the file.
_DEPTH = 3 * MAX_DEPTH


@dataclass(slots=True, eq=False)
class Rebuilt:
    """The result of a call, and the state that is set afterwards; None if there is none."""

    function: Name
    arguments: tuple[Any, ...]
    state: Any = None


@dataclass(slots=True, eq=False)
class StorageRef:
    """A storage that tensors view: its kind, the key of its record, device, length, and what some writers add."""

    reference: tuple[Any, ...]

    @property
    def key(self) -> str:
        """The bytes are in the record "data/<key>"."""
        key: str = self.reference[1]
        return key


class Recorder:
    """A vocabulary with the names of another, which records calls of them; the other, read first, checks arguments."""

    def __init__(self, words: Vocabulary) -> None:
        self._names = {text: _recording(name) for text, name in words.names().items()}

    def names(self) -> Mapping[str, Name]:
        return self._names

    def foreign(self, module: str, name: str) -> Name:
        raise Flaw(f"objects of {module}.{name} cannot be written again")

    def resolve(self, reference: Any) -> StorageRef:
        return StorageRef(reference[1:])

    def build(self, thing: Any, state: Any) -> None:
        if type(thing) is not Rebuilt:
            raise Flaw(f"{type(thing).__name__.lower()} takes no state")
        thing.state = state


def _recording(name: Name) -> Name:
    if name.call is None or name.text == "collections.OrderedDict":
        return name
    made = Name(name.text)
    made.call = lambda *arguments: Rebuilt(made, arguments)
    return made


def pickled(root: Any, leaves: Mapping[int, Any] | None = None, *, used: set[str] | None = None) -> bytes:
    """The pickle of what was recorded; a value in several places is written once. `leaves` are what to write for each
    array, a scalar that holds a leaf number; `used` receives the keys of all storages."""
    return b"\x80\x02" + b"".join(_Pickler(leaves or {}, set() if used is None else used).run(root)) + b"."


# What is still to be written: values, bytes, and `_Done` where a value ends.
_Rest = list[Any]


class _Raw(bytes):
    """Instructions of the pickle, not a value."""


class _Done(NamedTuple):
    """The end of a value: it is remembered, if it can be only now, and no longer open."""

    node: Any
    keep: bool = True


class _Pickler:
    def __init__(self, leaves: Mapping[int, Any], used: set[str]) -> None:
        self.leaves = leaves
        self.used = used
        # Objects are kept alive with their places, so that no other object gets the same id.
        self.memo: dict[Any, tuple[int, Any]] = {}
        self.open: set[int] = set()

    def run(self, root: Any) -> Iterator[bytes]:
        """The instructions, in order, from a stack of what is left to write."""
        rest: _Rest = [root]
        while rest:
            node = rest.pop()
            kind = type(node)
            if kind is np.ndarray:
                node = self.leaves[int(node)]
                kind = type(node)
            write = _PLAIN.get(kind)
            if kind is _Raw:
                yield node
            elif kind is _Done:
                self.open.discard(id(node.node))
                if node.keep:
                    yield self.keep(node.node)
            elif write is not None:
                yield write(node)
            elif (known := self.memo.get(node if kind is str else id(node))) is not None:
                yield _place(known[0], b"h", b"j")
            elif id(node) in self.open or len(self.open) > _DEPTH:
                raise BadCheckpoint("the pickle holds values that contain themselves, or are nested too deeply")
            else:
                rest += reversed(self._PARTS[kind](self, node))

    def keep(self, node: Any) -> bytes:
        number = len(self.memo)
        self.memo[node if type(node) is str else id(node)] = (number, node)
        return _place(number, b"q", b"r")

    def within(self, node: Any, parts: _Rest, *, keep: bool = True) -> _Rest:
        """The parts of a value during which it is open: until then it cannot be referred to."""
        self.open.add(id(node))
        return [*parts, _Done(node, keep)]

    def _text(self, node: str) -> _Rest:
        encoded = node.encode()
        return [_Raw(b"X" + struct.pack("<I", len(encoded)) + encoded + self.keep(node))]

    def _mapping(self, node: Mapping[Any, Any]) -> _Rest:
        first = (b"}" if type(node) is dict else b"ccollections\nOrderedDict\n)R") + self.keep(node)
        entries = [part for pair in node.items() for part in pair]
        parts = [_Raw(first), *([_Raw(b"("), *entries, _Raw(b"u")] if node else [])]
        if type(node) is OrderedDict and vars(node):
            parts += [vars(node), _Raw(b"b")]
        return self.within(node, parts, keep=False)

    def _list(self, node: list[Any]) -> _Rest:
        first = _Raw(b"]" + self.keep(node))
        return self.within(node, [first, *([_Raw(b"("), *node, _Raw(b"e")] if node else [])], keep=False)

    def _tuple(self, node: tuple[Any, ...]) -> _Rest:
        return self.within(node, [_Raw(b"("), *node, _Raw(b"t")]) if node else [_Raw(b")")]

    def _made(self, node: Rebuilt) -> _Rest:
        call = self.within(node, [_Raw(_name(node.function)), node.arguments, _Raw(b"R")])
        return call if node.state is None else [*call, node.state, _Raw(b"b")]

    def _stored(self, node: StorageRef) -> _Rest:
        self.used.add(node.key)
        return [_Raw(b"("), "storage", *node.reference, _Raw(b"tQ")]

    # The protocol has no instructions for these types: calls make them.

    def _set(self, node: set[Any]) -> _Rest:
        return [Rebuilt(Name("builtins.set"), (sorted(node, key=repr),)), _Done(node)]

    def _bytes(self, node: bytes | bytearray) -> _Rest:
        name = "_codecs.encode" if type(node) is bytes else "builtins.bytearray"
        return [Rebuilt(Name(name), (node.decode("latin1"), "latin1")), _Done(node)]

    def _complex(self, node: complex) -> _Rest:
        return [Rebuilt(Name("builtins.complex"), (node.real, node.imag)), _Done(node)]

    _PARTS: Mapping[type, Callable[["_Pickler", Any], _Rest]] = {
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


_STORAGES = {dtype: kind for kind, dtype in STORAGES.items() if dtype in BITS}
# Newer dtypes have no storage class: their tensors view bytes and carry the dtype themselves.
_NEWER = frozenset({"uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"})
_NEWER |= {"float8_e5m2fnuz", "float8_e8m0fnu"}
_FOLDER = "archive"


class TorchWriter(Writer):
    """Lays out files that `torch.load(weights_only=True)` reads: dicts, lists and tuples of tensors and plain values.
    Leaves that are tied are one tensor."""

    seals = True

    def refusal(self, spec: Spec) -> str:
        return "" if spec.dtype in _STORAGES or spec.dtype in _NEWER else f"torch cannot hold {spec.dtype}"

    def holds(self, value: Any) -> bool:
        return written(value) is not _NOTHING

    def parts(self, items: Sequence[Item], metadata: Mapping[str, Any], outline: Outline | None = None) -> Parts:
        zipped = ZipHeaders()
        own = [item.tied in (-1, i) for i, item in enumerate(items)]
        yield from zipped.member(f"{_FOLDER}/data.pkl", _pickle(items, own, outline or outline_of_items(items)))
        yield from zipped.member(f"{_FOLDER}/byteorder", b"little")
        for i, item in enumerate(items):
            if own[i]:
                yield zipped.open(f"{_FOLDER}/data/{i}", item.nbytes)
                yield LeafBytes(i, 0, item.nbytes)
                yield zipped.close()
        yield from zipped.member(f"{_FOLDER}/version", b"3\n")
        yield zipped.finish()


def _pickle(items: Sequence[Item], own: Sequence[bool], outline: Outline) -> bytes:
    tensors = [tensor(item.spec, str(i)) if own[i] else None for i, item in enumerate(items)]

    plain = once(written)  # a list in several places is written once

    def made(value: Any) -> Any:
        if type(value) is not Place:
            return plain(value)
        i = value.number
        return tensors[i] if own[i] else tensors[items[i].tied]

    entries = [entry for entry in outline.entries if type(entry[1]) is Place or plain(entry[1]) is not _NOTHING]
    return pickled(Outline(entries, outline.containers).nested(made, _close))


def _close(entries: dict[Any, Any], like: Any) -> Any:
    """A container of entries, with those attributes of an OrderedDict that are plain."""
    if isinstance(like, OrderedDict):
        plain: OrderedDict[Any, Any] = OrderedDict()
        vars(plain).update({name: value for name, value in vars(like).items() if _is_plain(value)})
        like = plain
    return closed(entries, like)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) in ATOMS and _is_plain(child) for key, child in value.items())
    return all(map(_is_plain, value)) if isinstance(value, list | tuple) else written(value) is not _NOTHING


_NOTHING = object()


def written(value: Any) -> Any:
    """A value that is not an array as a pickle holds it without torch; `_NOTHING` if it has no place there."""
    if isinstance(value, np.generic):
        value = value.item()
    kind = type(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _NOTHING if value else {}
    if isinstance(value, list | tuple):
        items = [written(each) for each in value]
        if _NOTHING in items:
            return _NOTHING
        return items if isinstance(value, list) else tuple(items)
    if kind is int:
        return value if value.bit_length() < 8 * MAX_INTEGER else _NOTHING
    if kind in ATOMS or (kind in (dict, OrderedDict) and not value):
        return value
    if kind is set:
        return value if all(type(each) in ATOMS for each in value) else _NOTHING
    if kind is bytearray or (kind is Name and value.text in KNOWN):
        return value
    if f"{kind.__module__}.{kind.__name__}" == "torch.dtype":
        return Name(str(value))
    if f"{kind.__module__}.{kind.__name__}" == "torch.device":
        return Rebuilt(Name("torch.device"), (value.type,) if value.index is None else (value.type, value.index))
    return _NOTHING


def tensor(
    spec: Spec, key: str, *, device: Any = "cpu", grad: bool = False, hooks: Mapping[str, Any] | None = None
) -> Rebuilt:
    """The call that rebuilds a tensor whose storage holds its elements alone; with gradients if its dtype has them."""
    strides: list[int] = []
    step = 1
    for length in reversed(spec.shape):
        strides.insert(0, step)
        step *= max(length, 1)
    grad = bool(grad) and kind_of(spec.dtype) in ("float", "complex")
    hooks = OrderedDict() if hooks is None else hooks
    kind = _STORAGES.get(spec.dtype)
    if kind:
        storage = StorageRef((Name(f"torch.{kind}Storage"), key, device, spec.size))
        return Rebuilt(_V2, (storage, 0, spec.shape, tuple(strides), grad, hooks))
    storage = StorageRef((Name("torch.storage.UntypedStorage"), key, device, spec.nbytes))
    return Rebuilt(_V3, (storage, 0, spec.shape, tuple(strides), grad, hooks, Name(f"torch.{spec.dtype}")))


_V2, _V3 = Name("torch._utils._rebuild_tensor_v2"), Name("torch._utils._rebuild_tensor_v3")


def retargeted(made: Rebuilt, spec: Spec, key: str) -> Rebuilt:
    """The call that rebuilds a tensor with the elements of another member: it keeps its class and its attributes."""
    around: list[Callable[[Rebuilt], Rebuilt]] = []
    while (wrapper := _wrapper(made, spec)) is not None:
        made, again = wrapper
        around.append(again)
    storage, *more = made.arguments
    grad, hooks = (*more[3:5], False, None)[:2]
    made = tensor(spec, key, device=storage.reference[2], grad=grad, hooks=hooks)
    for again in reversed(around):
        made = again(made)
    return made


def _wrapper(made: Rebuilt, spec: Spec) -> tuple[Rebuilt, Callable[[Rebuilt], Rebuilt]] | None:
    """What a call makes of the result of another: that other one, and how to make it again; None for a tensor."""
    arguments = made.arguments
    if made.function.text == "torch._tensor._rebuild_from_type_v2":
        function, kind, inner, state = arguments
        new = made.function
        return Rebuilt(function, inner), lambda found: Rebuilt(new, (found.function, kind, found.arguments, state))
    if made.function.text.startswith("torch._utils._rebuild_parameter"):
        data, grad, *more = arguments
        grad, outer = bool(grad) and kind_of(spec.dtype) in ("float", "complex"), made.function
        return data, lambda found: Rebuilt(outer, (found, grad, *more))
    return None
