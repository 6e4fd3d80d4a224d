"""`Blocked` and `Times`: the blocks of a weight that is stored in blocks, for new values and times a number."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from paramend.errors import Quantized
from paramend.leaves.codecs.encoding import Misfit
from paramend.leaves.codecs.ggml import Blocks
from paramend.leaves.origins.boxes import Box
from paramend.leaves.origins.moved import reshape
from paramend.leaves.origins.origin import CHUNK, Computed, Namer, Origin
from paramend.leaves.specs import Array, Spec


@dataclass(frozen=True, eq=False, repr=False)
class Blocked(Origin):
    """The blocks for some values, each encoded when it is read."""

    codec: Blocks
    values: Origin
    kept: Origin | None = None  # the blocks as they are, of an edited weight: those whose values stay keep their bytes
    misfit: Misfit | None = None  # what is measured while blocks are read
    moves = False

    @property
    def children(self) -> tuple[Origin, ...]:  # type: ignore[override]
        return (self.values,) if self.kept is None else (self.values, self.kept)

    @property
    def spec(self) -> Spec:
        return self.codec.fields["payload"].spec

    @property
    def tile(self) -> int:
        return max(CHUNK // self.codec.size, 1)

    @property
    def extents(self) -> None:
        """None: the bytes are computed."""

    def text(self, name: Namer) -> str:
        return f"encode({self.codec.scheme}, {self.values.text(name)})"

    def read_box(self, box: Box) -> Array:
        values = self.values.read_box((*box[:-1], self.codec.around(box[-1]))).astype(np.float32)
        parts = values.reshape(*values.shape[:-1], -1, self.codec.size)
        changed = np.ones(parts.shape[:-1], np.bool_)
        old = None if self.kept is None else self.kept.read_box(box)
        if old is not None:
            before = self.codec.of(old).reshape(parts.shape)
            changed = (parts.view(np.uint32) != before.view(np.uint32)).any(axis=-1)
        found: Array = np.empty(changed.shape, self.codec.dtype) if old is None else np.array(old)
        found[changed] = self.codec.blocks(parts[changed].reshape(1, -1))[0] if changed.any() else found[changed]
        if self.misfit is not None and changed.size:
            start = tuple(int(places[0]) for places in box)
            self.misfit.measure(start, values, self.codec.of(found), int(changed.sum()))
        return found


@dataclass(frozen=True, eq=False, repr=False)
class Times(Computed):
    """Blocks of which the scales are multiplied by a number."""

    codec: Blocks
    factor: float

    def read_box(self, box: Box) -> Array:
        found = self.codec.times(self.whole.read_box(box), self.factor)
        assert found is not None
        return found

    def text(self, name: Namer) -> str:
        return f"{self.whole.text(name)}.multiply({self.factor:g})"


def encoded_blocks(
    codec: Blocks, weight: Origin, kept: Mapping[str, Origin], misfit: Misfit | None
) -> dict[str, Origin]:
    """The blocks for new values of a weight, as the leaves of its group."""
    if not codec.writes:
        said = f"a weight in {codec.scheme} would be encoded, which is only decoded"
        raise Quantized(said, scheme=codec.scheme, payload="", hint='pm.dequantize(tree, selector, dtype="float16")')
    return {"payload": Blocked(codec, reshape(weight, codec.spec.shape), kept.get("payload"), misfit)}


def times(codec: Blocks, parts: Mapping[str, Origin], factor: float) -> dict[str, Origin] | None:
    """The blocks of a weight times a number, if the scales of all of them can take it; else None."""
    payload = parts["payload"]
    if not factor or any(codec.times(payload.read_range(*each), factor) is None for each in payload.ranges()):
        return None
    return {"payload": Times(payload, codec, factor)}
