"""`GgufWriter`: files as llama.cpp reads them, each tensor aligned, in the order of what the header says of them."""

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from paramend.errors import RenameClash
from paramend.formats.gguf.keys import alignment, written
from paramend.formats.limits import shown
from paramend.formats.writer import Item, LeafBytes
from paramend.leaves.outlines import Outline
from paramend.leaves.specs import BLOCKS, Spec

MAGIC = b"GGUF"
# The types of ggml by number.
GGML = {
    0: "float32",
    1: "float16",
    2: "q4_0",
    3: "q4_1",
    6: "q5_0",
    7: "q5_1",
    8: "q8_0",
    10: "q2_k",
    11: "q3_k",
    12: "q4_k",
    13: "q5_k",
    14: "q6_k",
    16: "iq2_xxs",
    17: "iq2_xs",
    18: "iq3_xxs",
    19: "iq1_s",
    20: "iq4_nl",
    21: "iq3_s",
    22: "iq2_s",
    23: "iq4_xs",
    24: "int8",
    25: "int16",
    26: "int32",
    27: "int64",
    28: "float64",
    29: "iq1_m",
    30: "bfloat16",
    34: "tq1_0",
    35: "tq2_0",
    39: "mxfp4",
    40: "nvfp4",
}
_NUMBERS = {name: number for number, name in GGML.items()}
# What ggml has room for.
_AXES, _NAME = 4, 63


class GgufWriter:
    """Lays out files of version 3. Other metadata than keys with a dot has no place, and is left out."""

    seals = False
    copies_raw = True
    flat = True

    def refusal(self, spec: Spec) -> str:
        if spec.dtype not in _NUMBERS:
            return f"GGUF cannot hold {spec.dtype}"
        return f"ggml has no tensor of {spec.ndim} axes" if spec.ndim > _AXES else ""

    def holds(self, value: Any) -> bool:
        return False

    def parts(
        self, items: Sequence[Item], metadata: Mapping[str, Any], outline: Outline | None = None
    ) -> Iterator[bytes | LeafBytes]:
        """The file from its first byte to its last; each leaf needs a name of its own."""
        yield header(items, metadata)
        step = alignment(metadata)
        for place, item in enumerate(items):
            yield LeafBytes(place, 0, item.nbytes)
            yield b"\0" * (-item.nbytes % step)


def header(items: Sequence[Item], metadata: Mapping[str, Any]) -> bytes:
    """What stands before the tensors, with its padding."""
    keys = {key: value for key, value in metadata.items() if "." in key}
    step, at, taken = alignment(keys), 0, set[str]()
    head = [MAGIC, struct.pack("<IQQ", 3, len(items), len(keys)), *(written(*each) for each in keys.items())]
    for item in items:
        head.append(_info(item, taken, at))
        at += item.nbytes + -item.nbytes % step
    data = b"".join(head)
    return data + b"\0" * (-len(data) % step)


def _info(item: Item, taken: set[str], offset: int) -> bytes:
    name, spec = item.name.encode("utf-8", "surrogateescape"), item.spec
    if item.name in taken or not name:
        raise RenameClash(f"two leaves would have the same name, {shown(item.name)}", hint="rename or delete one first")
    if len(name) > _NAME:
        raise RenameClash(f"{shown(item.name)} is too long: ggml has names of {_NAME} bytes", hint="rename it first")
    taken.add(item.name)
    shape, kind = spec.shape, _NUMBERS.get(spec.dtype)
    if spec.dtype in BLOCKS:
        shape = (*shape[:-1], shape[-1] * BLOCKS[spec.dtype][0])
    number = int(spec.dtype[len("raw<ggml ") : -1]) if kind is None else kind
    dims = struct.pack(f"<{spec.ndim}Q", *reversed(shape))
    return (
        struct.pack("<Q", len(name)) + name + struct.pack("<I", spec.ndim) + dims + struct.pack("<IQ", number, offset)
    )
