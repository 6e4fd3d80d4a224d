"""`TorchWriter`: files as `torch.save` writes them, without torch.

The pickle holds only names that `torch.load(weights_only=True)` allows.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from paramend.formats.torch.pickles import MAX_INTEGER, Name
from paramend.formats.torch.rebuilds import KNOWN, STORAGES
from paramend.formats.torch.recordings import Rebuilt, StorageRef, pickled
from paramend.formats.writer import Item, LeafBytes, outline_of_items
from paramend.formats.zips.headers import ZipHeaders
from paramend.leaves.outlines import ATOMS, Outline, Place, closed, once
from paramend.leaves.specs import BITS, Spec, kind_of

_STORAGES = {dtype: kind for kind, dtype in STORAGES.items() if dtype in BITS}
# Newer dtypes have no storage class: their tensors view bytes and carry the dtype themselves.
_NEWER = frozenset({"uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"})
_NEWER |= {"float8_e5m2fnuz", "float8_e8m0fnu"}
_FOLDER = "archive"


class TorchWriter:
    """Lays out files that `torch.load(weights_only=True)` reads: dicts, lists and tuples of tensors and plain values.
    Leaves that are tied are one tensor."""

    seals = True
    copies_raw = False
    flat = False

    def refusal(self, spec: Spec) -> str:
        return "" if spec.dtype in _STORAGES or spec.dtype in _NEWER else f"torch cannot hold {spec.dtype}"

    def holds(self, value: Any) -> bool:
        return written(value) is not _NOTHING

    def parts(
        self, items: Sequence[Item], metadata: Mapping[str, Any], outline: Outline | None = None
    ) -> Iterator[bytes | LeafBytes]:
        """The file from its first byte to its last; no leaf may have the path of a container of others."""
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
