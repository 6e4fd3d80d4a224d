"""`TorchWriter`: files as `torch.save` writes them, without torch.

The pickle holds only names that `torch.load(weights_only=True)` allows.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from paramend.errors import RenameClash
from paramend.formats.torch.pickles import Name
from paramend.formats.torch.recordings import Rebuilt, StorageRef, pickled
from paramend.formats.writer import Item, LeafBytes
from paramend.formats.zips.headers import ZipHeaders
from paramend.leaves.specs import Spec, kind_of

_STORAGES = {
    "float64": "Double",
    "float32": "Float",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "int64": "Long",
    "int32": "Int",
    "int16": "Short",
    "int8": "Char",
    "uint8": "Byte",
    "bool": "Bool",
    "complex128": "ComplexDouble",
    "complex64": "ComplexFloat",
}
# Newer dtypes have no storage class: their tensors view bytes and carry the dtype themselves.
_NEWER = frozenset({"uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"})
_NEWER |= {"float8_e5m2fnuz", "float8_e8m0fnu"}
_FOLDER = "archive"


class TorchWriter:
    """Lays out files that `torch.load(weights_only=True)` reads: nested dicts of tensors, by their keys.

    The metadata of a source has no place in such a dict, and is left out.
    """

    seals = True
    copies_raw = False

    def refusal(self, spec: Spec) -> str:
        """Why the format cannot hold such a leaf, or ""."""
        return "" if spec.dtype in _STORAGES or spec.dtype in _NEWER else f"torch cannot hold {spec.dtype}"

    def parts(self, items: Sequence[Item], metadata: Mapping[str, Any]) -> Iterator[bytes | LeafBytes]:
        """The file from its first byte to its last.

        Raises:
            RenameClash: a leaf has the path of a container of others.

        >>> item = Item("fc.weight", ("fc.weight",), Spec((2,), "float32"), 8)
        >>> [part for part in TorchWriter().parts([item], {}) if isinstance(part, LeafBytes)]
        [LeafBytes(item=0, start=0, stop=8)]
        """
        zipped = ZipHeaders()
        yield from zipped.member(f"{_FOLDER}/data.pkl", _pickle(items))
        yield from zipped.member(f"{_FOLDER}/byteorder", b"little")
        for i, item in enumerate(items):
            yield zipped.open(f"{_FOLDER}/data/{i}", item.nbytes)
            yield LeafBytes(i, 0, item.nbytes)
            yield zipped.close()
        yield from zipped.member(f"{_FOLDER}/version", b"3\n")
        yield zipped.finish()


# ---- the pickle ----------------------------------------------------------------------------------------------


def _pickle(items: Sequence[Item]) -> bytes:
    tree: dict[str, Any] = {}
    for i, item in enumerate(items):
        node = tree
        for key in item.keys[:-1]:
            node = node.setdefault(key, {})
            if type(node) is not dict:
                raise RenameClash(f"{item.name} would go into {key!r}, which is a leaf")
        if item.keys[-1] in node:
            raise RenameClash(f"{item.name}: another leaf or container has that path")
        node[item.keys[-1]] = tensor(item.spec, str(i))
    return pickled(tree)


def tensor(
    spec: Spec, key: str, *, device: Any = "cpu", grad: bool = False, hooks: Mapping[str, Any] | None = None
) -> Rebuilt:
    """The call that rebuilds a tensor whose storage holds exactly its elements, contiguous.

    Args:
        spec: its shape and dtype.
        key: of the member of its storage.
        device: its device, as torch writes it.
        grad: whether it requires gradients, if its dtype can.
        hooks: what torch writes for hooks, an empty dict.
    """
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
    """The call that rebuilds a tensor, with other elements: it stays a parameter, and keeps its attributes.

    Args:
        made: the call as it was.
        spec: the new shape and dtype.
        key: the key of the member that holds the new elements.
    """
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
