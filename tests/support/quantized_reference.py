"""Quantised weights as the libraries that define them decode them: leaves in, values out, as bytes.

Run as a script it makes `quantized_reference.npz` anew, with compressed-tensors, transformers, bitsandbytes and
torchao; tests read that file, so that none of them is needed to run them.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from paramend.leaves.codecs.codec import Stated
from paramend.leaves.schemes import SCHEMES
from paramend.leaves.specs import numpy_dtype

FILE = Path(__file__).with_suffix(".npz")


class Case(NamedTuple):
    """One weight.

    Attributes:
        name: the scheme, and what is special.
        row: the row of the table.
        stated: what a configuration says.
        leaves: role → array as it is stored.
        weight: what the library decodes.
    """

    name: str
    row: object
    stated: Stated
    leaves: dict
    weight: np.ndarray


def row_of(says):
    """The row of the table that says this."""
    return next(row for row in SCHEMES if row.says == says)


def cases():
    """All cases of the file."""
    with np.load(FILE) as file:
        meta = json.loads(file["meta"].tobytes())
        arrays = [file[str(number)] for number in range(len(file.files) - 1)]
    found = []
    for name, says, stated, roles in meta:
        leaves = {}
        for role, number, dtype, shape in roles:
            leaves[role] = arrays[number].view(numpy_dtype(dtype)).reshape(shape)
        stated["block"] = stated["block"] and tuple(stated["block"])
        found.append(Case(name, row_of(says), Stated(**stated), leaves, leaves.pop("weight")))
    return found


def save(made):
    """Write the file."""
    arrays, meta = [], []
    for name, says, stated, leaves in made:
        roles = []
        for role, tensor in leaves.items():
            dtype, shape = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
            roles.append((role, len(arrays), dtype, shape))
            arrays.append(np.frombuffer(_bytes(tensor), np.uint8))
        meta.append((name, says, {each: getattr(stated, each) for each in Stated.__slots__}, roles))
    text = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    np.savez_compressed(FILE, meta=text, **{str(number): array for number, array in enumerate(arrays)})


def _bytes(tensor):
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def make():
    """What the libraries make of random leaves."""
    import bitsandbytes.functional as bnb
    import torch
    from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
    from compressed_tensors.compressors.mxfp8 import MXFP8QuantizationCompressor
    from compressed_tensors.compressors.naive_quantized import NaiveQuantizationCompressor
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from torchao.quantization.quant_primitives import _dequantize_affine_float8
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = torch.Generator().manual_seed(0)
    by_grid = Fp8Dequantize(None)._dequantize_one
    roles = {"weight": "payload", "weight_packed": "payload", "weight_scale": "scale", "weight_shape": "shape"}
    roles |= {"weight_zero_point": "zero", "weight_global_scale": "global"}

    def some(*shape, dtype=torch.uint8):
        size = dtype.itemsize * shape[-1]
        return torch.randint(0, 256, (*shape[:-1], size), dtype=torch.uint8, generator=random).view(dtype)

    def floats(*shape, dtype=torch.float32):
        return (torch.rand(shape, generator=random) + 0.01).to(dtype)

    def of(compressor, says, name, leaves, stated=None, **args):
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
        weight = compressor.decompress(dict(leaves), scheme)["weight"]
        given = stated or Stated("compressed-tensors")
        return name, says, given, {roles[each]: leaf for each, leaf in leaves.items()} | {"weight": weight}

    f8, e8, bf16, i8 = torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.bfloat16, torch.int8
    block, channel, tensor = "FP8, a scale for each block", "FP8, a scale for each channel", "FP8, one scale"
    for dtype in (torch.float32, bf16, torch.float16):
        naive = {"num_bits": 8, "type": "float"}
        for rows, columns in ((34, 50), (5, 3)):
            leaves = {"weight": some(rows, columns, dtype=f8)}
            kind = f"{dtype} scales, {rows}x{columns}"
            grid = floats(-(-rows // 16), -(-columns // 32), dtype=dtype)
            cut = {"strategy": "block", "block_structure": [16, 32]}
            stated = Stated("compressed-tensors", block=(16, 32))
            weight = NaiveQuantizationCompressor
            yield of(weight, block, f"block, {kind}", leaves | {"weight_scale": grid}, stated, **naive, **cut)
            each = floats(rows, 1, dtype=dtype)
            yield of(weight, channel, f"channel, {kind}", leaves | {"weight_scale": each}, strategy="channel", **naive)
            one = floats(1, dtype=dtype)
            yield of(weight, tensor, f"tensor, {kind}", leaves | {"weight_scale": one}, strategy="tensor", **naive)
    for scale in (floats(2, 5), floats(2, 5, dtype=bf16), some(2, 5, dtype=e8), some(2, 5)):
        codes = some(24, 35, dtype=f8)
        leaves = {"payload": codes, "scale": scale, "weight": by_grid(codes, scale)}
        yield f"block by the grid, {scale.dtype}", block, Stated("fp8"), leaves
    for scale in (floats(12, 1), floats(1, 1), floats(3, 5)):
        qdata = some(12, 35, dtype=f8)
        weight = _dequantize_affine_float8(qdata, scale, torch.float32)
        yield f"torchao, {list(scale.shape)}", "torchao", Stated(), {"payload": qdata, "scale": scale, "weight": weight}
    leaves = {"weight": some(7, 96, dtype=f8), "weight_scale": some(7, 3)}
    mx8 = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
    yield of(MXFP8QuantizationCompressor, block, "MXFP8", leaves, **mx8)

    for symmetric in (True, False):
        leaves = {"weight": some(5, 33, dtype=i8), "weight_scale": floats(5, 1, dtype=bf16)}
        leaves |= {} if symmetric else {"weight_zero_point": some(5, 1, dtype=i8)}
        args = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": symmetric}
        yield of(NaiveQuantizationCompressor, "int8, with scales", f"int8, symmetric {symmetric}", leaves, **args)
        for bits in range(1, 9):
            for rows, columns, group in ((13, 96, 32), (19, 33, -1), (17, 30, 10)):
                groups = 1 if group < 0 else columns // group
                scale = floats(rows, groups, dtype=bf16)
                zero = torch.randint(-(1 << bits - 1), 1 << bits - 1, (rows, groups), dtype=i8, generator=random)
                args = {"num_bits": bits, "type": "int", "symmetric": symmetric}
                args |= {"strategy": "channel"} if group < 0 else {"strategy": "group", "group_size": group}
                scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
                start = {"weight": torch.randn(rows, columns, generator=random) * (1 << bits), "weight_scale": scale}
                leaves = PackedQuantizationCompressor.compress(
                    start | {"weight_zero_point": zero * (not symmetric)}, scheme
                )
                says, stated = "integers packed by compressed-tensors", Stated(bits=bits, group=group)
                name = f"int{bits}, {rows}x{columns}, groups of {group}, symmetric {symmetric}"
                yield of(PackedQuantizationCompressor, says, name, leaves, stated, **args)

    for shape in ((2, 6, 3), (1, 256, 1)):
        blocks = some(*shape, 16)
        scale = torch.arange(256, dtype=torch.uint8).reshape(shape) if 256 in shape else some(*shape)
        leaves = {"payload": blocks, "scale": scale, "weight": convert_moe_packed_tensors(blocks, scale)}
        yield f"gpt-oss {list(shape)}", "MXFP4 of gpt-oss", Stated("mxfp4"), leaves
    for rows, columns in ((5, 96), (7, 32)):
        codes, scale = some(rows, columns // 2, dtype=i8), some(rows, columns // 32, dtype=e8)
        leaves = {"payload": codes, "scale": scale, "weight": by_grid(codes, scale)}
        yield f"DeepSeek-V4 {rows}x{columns}", "MXFP4, packed", Stated("fp8", block=(128, 128)), leaves
        four = {"num_bits": 4, "type": "float"}
        leaves = {"weight_packed": some(rows, columns // 2), "weight_scale": some(rows, columns // 32)}
        args = {"strategy": "group", "group_size": 32, **four}
        yield of(MXFP4PackedCompressor, "MXFP4, packed", f"MXFP4 {rows}x{columns}", leaves, **args)
        leaves = {"weight_packed": some(rows, columns // 2), "weight_scale": some(rows, columns // 16, dtype=f8)}
        leaves["weight_global_scale"] = floats(1) * 100
        args = {"strategy": "tensor_group", "group_size": 16, **four}
        yield of(NVFP4PackedCompressor, "NVFP4 of compressed-tensors", f"NVFP4 {rows}x{columns}", leaves, **args)

    # The library's kernel for AVX-512 takes the wrong scale where blocks go over the end of a row of even length.
    for code in ("nf4", "fp4"):
        for shape, size in (((8, 64), 64), ((5, 33), 64), ((129,), 64), ((3, 5, 7), 128), ((2, 256), 128)):
            for nested in (False, True):
                for dtype in (torch.float32, bf16, torch.float16):
                    weight = torch.randn(shape, generator=random).to(dtype)
                    codes, state = bnb.quantize_4bit(
                        weight, blocksize=size, compress_statistics=nested, quant_type=code
                    )
                    said = state.as_dict(packed=True)
                    leaves = {"payload": codes, "scale": said["absmax"], "map": said["quant_map"]}
                    leaves["state"] = said[f"quant_state.bitsandbytes__{code}"]
                    if nested:
                        leaves |= {"nested scale": said["nested_absmax"], "nested map": said["nested_quant_map"]}
                    leaves["weight"] = bnb.dequantize_4bit(codes, state).reshape(shape)
                    name = f"{code} {list(shape)} in {size}, nested {nested}, {dtype}"
                    yield name, f"{code} of bitsandbytes", Stated("bitsandbytes"), leaves
    codes, scale = some(5, 33, dtype=i8), floats(5)
    leaves = {"payload": codes, "scale": scale, "weight": bnb.int8_vectorwise_dequant(codes, scale)}
    yield "int8 of bitsandbytes", "int8 of bitsandbytes", Stated("bitsandbytes"), leaves


if __name__ == "__main__":
    save(make())
