"""`TorchWriter`: writes tensors as `torch.save` does, without torch, in one pass and in bounded memory.

The pickle holds names that `torch.load(weights_only=True)` knows. Checksums follow each record, so that a leaf is
computed once and nothing is written twice.
"""

import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

from paramend.errors import RenameClash
from paramend.formats.torch.pickles import Name
from paramend.formats.torch.recordings import Made, Stored, pickled
from paramend.formats.writer import Item
from paramend.formats.zips.headers import ALIGNMENT, ZipHeaders
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
# Newer dtypes have no storage class of their own: their tensors look at bytes and say the dtype themselves.
_NEWER = frozenset({"uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"})
_NEWER |= {"float8_e5m2fnuz", "float8_e8m0fnu"}
_FOLDER = "archive"


class TorchWriter:
    """Writes files that `torch.load(weights_only=True)` reads: nested dicts of tensors, by their keys.

    What a source says besides its leaves has no place in such a dict, and is left out.
    """

    def refusal(self, spec: Spec) -> str:
        """Why the format cannot hold such a leaf, or ""."""
        return "" if spec.dtype in _STORAGES or spec.dtype in _NEWER else f"torch has no dtype {spec.dtype}"

    def nbytes(self, items: Sequence[Item], metadata: Mapping[str, Any]) -> int:
        """How large the file will be at most."""
        header = 30 + 46 + 24 + 2 * 28 + 2 * len(f"{_FOLDER}/data/{len(items)}") + ALIGNMENT + 4
        return sum(item.nbytes + header for item in items) + len(_pickle(items)) + 4 * header + 98

    def write(self, file: BinaryIO, items: Sequence[Item], metadata: Mapping[str, Any]) -> None:
        """Writes the whole file.

        Raises:
            RenameClash: a leaf stands where others have their container.

        >>> import tempfile
        >>> import numpy as np
        >>> from pathlib import Path
        >>> from paramend.formats.torch.source import TorchFile
        >>> path = Path(tempfile.mkdtemp(), "model.pt")
        >>> data = np.array([1, 2], "float32")
        >>> item = Item("fc.weight", ("fc.weight",), Spec((2,), "float32"), 8, lambda: iter([data.view("u1").data]))
        >>> with path.open("wb") as file:
        ...     TorchWriter().write(file, [item], {})
        >>> with TorchFile(path) as file:
        ...     print(file.index.path(0), file.read(0))
        fc.weight [1. 2.]
        """
        zipped = ZipHeaders()

        def add(name: str, chunks: Iterable[bytes | memoryview], nbytes: int = 0) -> None:
            file.write(zipped.open(f"{_FOLDER}/{name}", nbytes))
            crc = count = 0
            for chunk in chunks:
                crc = zlib.crc32(chunk, crc)
                count += len(chunk)
                file.write(chunk)
            file.write(zipped.close(crc, count))

        add("data.pkl", [_pickle(items)])
        add("byteorder", [b"little"])
        for i, item in enumerate(items):
            add(f"data/{i}", item.chunks(), item.nbytes)
        add("version", [b"3\n"])
        file.write(zipped.finish())


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
) -> Made:
    """The call that rebuilds a tensor whose storage holds its elements side by side, and nothing else.

    Args:
        spec: its shape and dtype.
        key: of the record of its storage.
        device: where it goes, as torch writes it.
        grad: whether it takes gradients, if its dtype can.
        hooks: what torch writes in their place, an empty dict.
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
        storage = Stored((Name(f"torch.{kind}Storage"), key, device, spec.size))
        return Made(_V2, (storage, 0, spec.shape, tuple(strides), grad, hooks))
    storage = Stored((Name("torch.storage.UntypedStorage"), key, device, spec.nbytes))
    return Made(_V3, (storage, 0, spec.shape, tuple(strides), grad, hooks, Name(f"torch.{spec.dtype}")))


_V2, _V3 = Name("torch._utils._rebuild_tensor_v2"), Name("torch._utils._rebuild_tensor_v3")


def retargeted(made: Made, spec: Spec, key: str) -> Made:
    """The call that rebuilds a tensor, about other elements: it stays a parameter, and keeps its attributes.

    Args:
        made: the call as it was.
        spec: the new shape and dtype.
        key: of the record that holds the new elements.
    """
    arguments = made.arguments
    if made.function.text == "torch._tensor._rebuild_from_type_v2":
        function, kind, inner, state = arguments
        found = retargeted(Made(function, inner), spec, key)
        return Made(made.function, (found.function, kind, found.arguments, state))
    if made.function.text.startswith("torch._utils._rebuild_parameter"):
        data, grad, *more = arguments
        grad = bool(grad) and kind_of(spec.dtype) in ("float", "complex")
        return Made(made.function, (retargeted(data, spec, key), grad, *more))
    storage, *more = arguments
    grad, hooks = (*more[3:5], False, None)[:2]
    return tensor(spec, key, device=storage.reference[2], grad=grad, hooks=hooks)
