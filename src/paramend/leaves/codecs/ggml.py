"""Blocks of ggml, as GGUF stores them: codes and scales of a few values in a row, together in a few bytes.

Values are those of `gguf.quants`, bit for bit. That package decodes what is not common: its iq types hold grids of
thousands of numbers.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

from paramend._optional import need
from paramend.errors import Unsupported
from paramend.leaves.codecs.codec import Codec, Parts, Stated
from paramend.leaves.codecs.codes import codes_of
from paramend.leaves.codecs.fields import Field
from paramend.leaves.codecs.scalings import Plain
from paramend.leaves.origins.boxes import Box, Places, evenly
from paramend.leaves.specs import BLOCKS, Array, Spec, numpy_dtype

_F32 = np.float32
# Blocks that are computed together, so that they stay in the cache of a processor.
_STEP = 1 << 12
# What a factor may cost a scale: rounding is finer, but where float16 ends, below 0.00006.
_LOSS = 2.0**-8
# Where the scales of float16 are in a block, all of which a factor multiplies.
_SCALES: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("q4_0", "q5_0", "q8_0", "iq4_nl", "iq4_xs"), (0,)),
    **dict.fromkeys(("iq1_s", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"), (0,)),
    **dict.fromkeys(("q4_1", "q5_1", "q4_k", "q5_k"), (0, 2)),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q6_k": (208,),
    "tq1_0": (52,),
    "tq2_0": (64,),
}
# Where the sign of a scale is, if code 0 stands for a negative number: -0 of it makes +0.
_SIGNS = {name: _SCALES[name][0] + 1 for name in ("q4_0", "q5_0", "q6_k", "iq4_nl", "iq1_s", "tq1_0", "tq2_0")}
_SIGNS["iq1_m"] = 55


class Blocks(Codec):
    """The codec of a weight that is stored in blocks, each of them whole in itself."""

    @property
    def size(self) -> int:
        """How many values a block holds."""
        return BLOCKS[self.scheme][0]

    @property
    def writes(self) -> bool:
        return self.scheme in _ENCODE

    @property
    def dtype(self) -> np.dtype[np.void]:
        """That of blocks in memory."""
        return numpy_dtype(self.scheme)

    @property
    def block(self) -> str:
        return str(self.size)

    @property
    def zero_word(self) -> int:
        """The bytes of a block in which all values are +0."""
        sign = _SIGNS.get(self.scheme)
        return 0 if sign is None else 0x80 << 8 * sign

    def decode(self, views: Parts, box: Box) -> Array:
        blocks = self.fields["payload"].places(box)
        found = self.of(views["payload"].read_box(blocks))
        places = box[-1]
        if isinstance(places, range) and places.step == 1:
            first = places.start % self.size
            return found[..., first : first + len(places)]
        at = np.asarray(places)
        chosen: Array = found[
            ..., np.searchsorted(np.asarray(blocks[-1]), at // self.size) * self.size + at % self.size
        ]
        return chosen

    def of(self, blocks: Array) -> Array:
        """The values of blocks, float32."""
        nbytes, flat = BLOCKS[self.scheme][1], np.ascontiguousarray(blocks).reshape(-1)
        found: Array = np.empty((len(flat), self.size), _F32)
        for at in range(0, len(flat), _STEP):
            some = flat[at : at + _STEP].view(np.uint8).reshape(-1, nbytes)
            with np.errstate(all="ignore"):
                found[at : at + _STEP] = (
                    _DECODE[self.scheme](some) if self.scheme in _DECODE else _by_gguf(self.scheme, some)
                )
        return found.reshape(*blocks.shape[:-1], -1)

    def blocks(self, values: Array) -> Array:
        """The blocks of values, each to the nearest; `Unsupported` if one is not finite, or too large for a scale."""
        rows = np.ascontiguousarray(values, _F32).reshape(-1, self.size)
        found: Array = np.empty(len(rows), self.dtype)
        for at in range(0, len(rows), _STEP):
            with np.errstate(all="ignore"):
                scale, codes = _ENCODE[self.scheme](rows[at : at + _STEP])
            if not np.isfinite(scale).all():
                raise Unsupported(f"a value is not finite, or too large for {self.scheme}", hint="cast it to float32")
            joined = np.concatenate([scale.view(np.uint8), codes.view(np.uint8)], axis=1)
            found[at : at + _STEP] = joined.view(found.dtype)[:, 0]
        return found.reshape(*values.shape[:-1], -1)

    def times(self, blocks: Array, factor: float) -> Array | None:
        """The blocks of a weight times a number, by their scales; None if one of these cannot take it."""
        found = np.array(blocks, order="C").reshape(-1)
        data = found.view(np.uint8).reshape(-1, BLOCKS[self.scheme][1])
        if self.scheme == "mxfp4":
            fraction, more = math.frexp(factor)
            moved = data[:, 0].astype(np.int64) + more - 1
            if fraction != 0.5 or (moved < 0).any() or (moved > 254).any():
                return None
            data[:, 0] = moved
        for at in _SCALES.get(self.scheme, ()):
            old = data[:, at : at + 2].copy().view(np.float16)
            with np.errstate(all="ignore"):
                wanted = old.astype(np.float64) * factor
                new = wanted.astype(np.float16)
                right = np.abs(new - wanted) <= np.abs(wanted) * _LOSS
            if not (np.isfinite(new) & right).all():
                return None
            data[:, at : at + 2] = new.view(np.uint8)
        return found.reshape(blocks.shape) if self.scheme in _SCALES or self.scheme == "mxfp4" else None

    def around(self, blocks: Places) -> Places:
        """The places of the values of blocks along the last axis."""
        if isinstance(blocks, range) and blocks.step == 1:
            return range(blocks.start * self.size, blocks.stop * self.size)
        return evenly((np.asarray(blocks)[:, None] * self.size + np.arange(self.size)).reshape(-1))


def ggml(scheme: str, parts: Parts, stated: Stated) -> Codec:
    """The codec of blocks of ggml, which lie along the last axis."""
    payload = parts["payload"].spec
    size, last = BLOCKS[scheme][0], payload.ndim - 1
    fields = {"payload": Field(payload, (*[1] * last, size))}
    spec = Spec((*payload.shape[:-1], payload.shape[-1] * size), "float32")
    return Blocks(scheme, spec, fields, codes_of("int8"), Plain())


# ---- from blocks to values ---------------------------------------------------------------------------------------


def _halves(blocks: Array, at: int) -> Array:
    """Scales of float16, as float32."""
    found: Array = blocks[:, at : at + 2].copy().view(np.float16).astype(_F32)
    return found


def _planes(data: Array, bits: int, run: int) -> Array:
    """Codes of some bits: of so many bytes in a row the lowest ones first, then those above."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    found: Array = data.reshape(len(data), -1, 1, run) >> shifts & np.uint8((1 << bits) - 1)
    return found.reshape(len(data), -1)


def _times(scales: Array, codes: Array, less: Array | None = None) -> Array:
    """Codes, each times the scale of its part of the block, less what is taken from all of that part."""
    parts = codes.reshape(len(codes), scales.shape[1], -1).astype(_F32)
    found: Array = scales[:, :, None] * parts
    return (found if less is None else found - less[:, :, None]).reshape(len(codes), -1)


def _signed(codes: Array, zero: int) -> Array:
    return codes.astype(np.int16) - np.int16(zero)


def _sixes(packed: Array) -> tuple[Array, Array]:
    """Eight scales and eight minima of six bits, in twelve bytes."""
    d, m, both = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([d & 63, both & 15 | d >> 2 & 48], axis=1)
    return scales.astype(_F32), np.concatenate([m & 63, both >> 4 | m >> 2 & 48], axis=1).astype(_F32)


def _q4_k(blocks: Array) -> Array:
    scales, low = _sixes(blocks[:, 4:16])
    return _times(_halves(blocks, 0) * scales, _planes(blocks[:, 16:], 4, 32), _halves(blocks, 2) * low)


def _q5_k(blocks: Array) -> Array:
    scales, low = _sixes(blocks[:, 4:16])
    codes = _planes(blocks[:, 48:], 4, 32) | _planes(blocks[:, 16:48], 1, 32) << 4
    return _times(_halves(blocks, 0) * scales, codes, _halves(blocks, 2) * low)


def _q6_k(blocks: Array) -> Array:
    codes = _planes(blocks[:, :128], 4, 64) | _planes(blocks[:, 128:192], 2, 32) << 4
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(_F32)
    return _times(_halves(blocks, 208) * scales, _signed(codes, 32))


_DECODE: Mapping[str, Callable[[Array], Array]] = {
    "q4_0": lambda blocks: _halves(blocks, 0) * _signed(_planes(blocks[:, 2:], 4, 16), 8).astype(_F32),
    "q8_0": lambda blocks: _halves(blocks, 0) * np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(_F32),
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}


def _by_gguf(scheme: str, blocks: Array) -> Array:
    need("gguf", extra="gguf", to=f"decode {scheme}")
    import gguf  # only for what is not common

    kind = gguf.GGMLQuantizationType[scheme.upper()]
    found: Array = gguf.quants.dequantize(np.ascontiguousarray(blocks), kind)
    return found


# ---- and back ----------------------------------------------------------------------------------------------------


def _inverse(scale: Array) -> Array:
    found: Array = np.where(scale == 0, _F32(0), _F32(1) / scale)
    return found


def _to_q8_0(values: Array) -> tuple[Array, Array]:
    scale = np.abs(values).max(axis=1, keepdims=True) / _F32(127)
    exact = values * _inverse(scale)
    whole = np.trunc(exact)
    return scale.astype(np.float16), (whole + np.trunc(2 * (exact - whole))).astype(np.int8)


def _to_q4_0(values: Array) -> tuple[Array, Array]:
    most = np.take_along_axis(values, np.abs(values).argmax(axis=1)[:, None], axis=1)
    scale = most / _F32(-8)
    codes = np.trunc(values * _inverse(scale) + _F32(8.5)).astype(np.uint8).clip(0, 15)
    return scale.astype(np.float16), codes[:, :16] | codes[:, 16:] << 4


_ENCODE: Mapping[str, Callable[[Array], tuple[Array, Array]]] = {"q8_0": _to_q8_0, "q4_0": _to_q4_0}
WRITABLE = tuple(_ENCODE)
