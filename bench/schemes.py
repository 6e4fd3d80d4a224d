"""Models in the layouts of published quantised checkpoints, written by hand, and each weight decoded by its formula."""

import json
from typing import NamedTuple

import ml_dtypes
import numpy as np

WHERE = "model.layers.{}.mlp.{}"
LAYERS, SPECIAL = 3, 1  # the layer that is edited
FILES = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
DTYPES = {"F32": "<f4", "F16": "<f2", "I32": "<i4", "I64": "<i8", "U8": "u1", "I8": "i1", "BF16": ml_dtypes.bfloat16}
DTYPES |= {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E8M0": ml_dtypes.float8_e8m0fnu}
CODES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], "f4")
NF4 = (-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334)
NF4 += (-0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224)
NF4 = np.array((*NF4, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1), "f4")
FP4 = np.array([0, 0.0052083333, 0.66666667, 1, 1 / 3, 0.5, 1 / 6, 0.25], "f4")
FP4 = np.concatenate([FP4, -FP4])
AWQ = (0, 4, 1, 5, 2, 6, 3, 7)


# ---- files -----------------------------------------------------------------------------------------------------------


def write(path, leaves):
    """A safetensors file."""
    header, at = {}, 0
    for name, leaf in leaves.items():
        stop = at + leaf.nbytes
        header[name] = {"dtype": CODES[leaf.dtype], "shape": list(leaf.shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in leaves.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read(folder):
    """All leaves of a folder, as they are stored."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, row in json.loads(data[8:start]).items():
            if name != "__metadata__":
                low, high = (start + at for at in row["data_offsets"])
                found[name] = np.frombuffer(data[low:high], DTYPES[row["dtype"]]).reshape(row["shape"])
    return found


def model_in(folder, scheme):
    """A model of a scheme, with norms and a head that are floats."""
    folder.mkdir()
    random = np.random.default_rng(0)
    some = {"lm_head.weight": random.standard_normal((8, 4)).astype("f4"), "model.norm.weight": np.ones(4, "f4")}
    shards = [some, {}]
    for layer in range(LAYERS):
        for number, (name, leaf) in enumerate(scheme.make(random).items()):
            shards[number > 0][WHERE.format(layer, name)] = leaf
    for file, leaves in zip(FILES, shards, strict=True):
        write(folder / file, leaves)
    weight_map = {name: file for file, leaves in zip(FILES, shards, strict=True) for name in leaves}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": "llama", "num_hidden_layers": LAYERS, "quantization_config": scheme.config}
    (folder / "config.json").write_text(json.dumps(config))


def values(leaves, scheme, layer=SPECIAL):
    """A weight of a model, decoded; as it is if it is stored in floats."""
    name = WHERE.format(layer, scheme.name)
    if name in leaves and leaves[name].dtype in ("f4", "f2", ml_dtypes.bfloat16):
        return leaves[name].astype("f4")
    above = WHERE.format(layer, "")
    return scheme.decode({key.removeprefix(above): leaf for key, leaf in leaves.items() if key.startswith(above)})


# ---- schemes ---------------------------------------------------------------------------------------------------------


class Scheme(NamedTuple):
    """A layout of published checkpoints.

    Attributes:
        make: random numbers → name of a leaf below the module's parent: array; the codes come first.
        decode: the same leaves → the weight, float32.
        config: its `quantization_config`.
        loss: the relative L2 that rounding to the nearest has at most.
        name: what the weight is called.
    """

    make: object
    decode: object
    config: dict
    loss: float
    name: str = "down_proj.weight"


def words(codes, bits):
    """Codes along the last axis as words of 32 bits, the first in the lowest ones."""
    stream = (codes[..., None].astype("u1") >> np.arange(bits, dtype="u1") & 1).reshape(*codes.shape[:-1], -1)
    stream = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, -stream.shape[-1] % 32)])
    return np.packbits(stream, axis=-1, bitorder="little").view("<i4")


def codes(words_, bits, count):
    """The other way."""
    stream = np.unpackbits(np.ascontiguousarray(words_).view("u1"), axis=-1, bitorder="little")[..., : count * bits]
    return stream.reshape(*words_.shape[:-1], count, bits) @ (1 << np.arange(bits))


def nibbles(bytes_, high_first=False):
    low, high = bytes_.view("u1") & 15, bytes_.view("u1") >> 4
    pair = (high, low) if high_first else (low, high)
    return np.stack(pair, -1).reshape(*bytes_.shape[:-1], -1)


def spread(scale, shape, block):
    """Scales repeated over their blocks; those at the edges are cut."""
    scale = scale.astype("f4")
    for axis, every in zip((-2, -1), block, strict=True):
        scale = np.repeat(scale, min(every, shape[axis]), axis)
    return scale[..., : shape[-2], : shape[-1]]


def some(random, *shape, dtype="u1"):
    """Random bytes; of FP8 without NaN."""
    found = random.integers(0, 256, (*shape[:-1], shape[-1] * np.dtype(dtype).itemsize), dtype="u1")
    if dtype is ml_dtypes.float8_e4m3fn:
        found = np.where(found & 127 == 127, 0x40, found)
    return found.view(dtype)


def scales(random, *shape, dtype="f4"):
    if dtype is ml_dtypes.float8_e8m0fnu:
        return random.integers(118, 124, shape, dtype="u1").view(dtype)
    return (random.random(shape) * 0.02 + 0.01).astype("f4").astype(dtype)


F8, ALL = ml_dtypes.float8_e4m3fn, 10**6
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}


def fp8(shape, grid, block, config=BLOCKS, dtype="f4", names=("down_proj.weight", "down_proj.weight_scale_inv")):
    def make(random):
        return {names[0]: some(random, *shape, dtype=F8), names[1]: scales(random, *grid, dtype=dtype)}

    def decode(leaves):
        scale = leaves[names[1]].reshape((*leaves[names[0]].shape[:-2], *np.atleast_2d(leaves[names[1]]).shape[-2:]))
        return leaves[names[0]].astype("f4") * spread(scale, leaves[names[0]].shape, block)

    return Scheme(make, decode, config, 0.03, names[0])


def tensors(form, ignore=("lm_head",), **weights):
    """What compressed-tensors says."""
    group = {"targets": ["Linear"], "weights": {"dynamic": False, "symmetric": True, "type": "float", **weights}}
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return config | {"ignore": list(ignore)}


def packed(bits, group, *, symmetric=True, order=False, shape=(24, 64)):
    kind = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group}
    grid, half = (shape[0], shape[1] // group), 1 << bits - 1

    def make(random):
        found = {"weight_packed": words(random.integers(0, 2 * half, shape), bits)}
        found |= {"weight_scale": scales(random, *grid, dtype=ml_dtypes.bfloat16), "weight_shape": np.array(shape)}
        if not symmetric:
            found["weight_zero_point"] = words(random.integers(0, 2 * half, grid).T, bits).T.copy()
        if order:
            found["weight_g_idx"] = random.permutation(np.arange(shape[1]) // group).astype("i4")
        return {f"down_proj.{name}": leaf for name, leaf in found.items()}

    def decode(leaves):
        rows, columns = map(int, leaves["down_proj.weight_shape"])
        of = leaves.get("down_proj.weight_g_idx", np.arange(columns) // group)
        found = codes(leaves["down_proj.weight_packed"], bits, columns).astype("f4") - half
        if not symmetric:
            zero = codes(leaves["down_proj.weight_zero_point"].T, bits, rows).T - half
            found -= zero[:, of].astype("f4")
        return found * leaves["down_proj.weight_scale"].astype("f4")[:, of]

    return Scheme(make, decode, tensors("pack-quantized", **kind), 0.13 if bits == 4 else 0.01)


def gptq(bits, *, version=1, symmetric=True, order=False, outputs=32, inputs=64, group=32):
    form, most, middle = ("gptq", "gptq_v2")[version - 1], (1 << bits) - 1, 1 << bits - 1
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "checkpoint_format": form}
    first = 2 - version

    def make(random):
        found = {"qweight": words(random.integers(0, most + 1, (outputs, inputs)), bits).T.copy()}
        grid = (inputs // group, outputs)
        zero = np.full(grid, middle - first) if symmetric else random.integers(1, most - 1, grid)
        found |= {"qzeros": words(zero, bits), "scales": scales(random, *grid, dtype="<f2")}
        of = np.arange(inputs, dtype="i4") // group
        found["g_idx"] = random.permutation(of) if order else of
        return {f"down_proj.{name}": leaf for name, leaf in found.items()}

    def decode(leaves):
        of = leaves["down_proj.g_idx"]
        outputs = leaves["down_proj.qweight"].shape[1]
        found = codes(leaves["down_proj.qweight"].T, bits, len(of)).T
        zero = codes(leaves["down_proj.qzeros"], bits, outputs) + first
        return ((found - zero[of]).astype("f4") * leaves["down_proj.scales"][of].astype("f4")).T

    return Scheme(make, decode, config, {2: 0.6, 3: 0.27, 4: 0.14, 8: 0.01}[bits])


def awq(outputs=32, inputs=64, group=32):
    def pack(codes_):
        return words(codes_.reshape(-1, outputs // 8, 8)[..., np.argsort(AWQ)].reshape(-1, outputs), 4)

    def unpack(words_):
        return codes(words_, 4, outputs).reshape(-1, outputs // 8, 8)[..., AWQ].reshape(-1, outputs)

    def make(random):
        grid = (inputs // group, outputs)
        found = {
            "qweight": pack(random.integers(0, 16, (inputs, outputs))),
            "qzeros": pack(random.integers(0, 16, grid)),
        }
        found["scales"] = scales(random, *grid, dtype="<f2")
        return {f"down_proj.{name}": leaf for name, leaf in found.items()}

    def decode(leaves):
        of = np.arange(inputs) // group
        found = unpack(leaves["down_proj.qweight"]) - unpack(leaves["down_proj.qzeros"])[of]
        return (found.astype("f4") * leaves["down_proj.scales"].astype("f4")[of]).T

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Scheme(make, decode, config | {"modules_to_not_convert": ["lm_head"]}, 0.14)


def gpt_oss(experts=3, outputs=8, inputs=64):
    name = "experts.gate_up_proj"

    def make(random):
        grid = (experts, outputs, inputs // 32)
        scale = random.integers(118, 124, grid, dtype="u1")
        return {f"{name}_blocks": some(random, *grid, 16), f"{name}_scales": scale}

    def decode(leaves):
        blocks, scale = leaves[f"{name}_blocks"], leaves[f"{name}_scales"]
        found = E2M1[nibbles(blocks)] * np.exp2(scale.astype("f4") - 127)[..., None]
        return found.reshape(*scale.shape[:2], -1).transpose(0, 2, 1)

    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return Scheme(make, decode, config, 0.25, name)


def fp4(config, group, payload, scale, *, codes_="u1", dtype="u1", top=None, divides=False, shape=(12, 64)):
    """MXFP4 and NVFP4 of Linear layers."""

    def make(random):
        found = {payload: some(random, shape[0], shape[1] // 2, dtype=codes_)}
        grid = (shape[0], shape[1] // group)
        if dtype is F8:
            found[scale] = (random.random(grid) * 400 + 20).astype(F8)
        else:
            found[scale] = random.integers(118, 124, grid, dtype="u1").view(dtype)
        if top:
            found[top] = np.array([1e4], "f4") if divides else np.array(1e-4, "f4")
        return {f"down_proj.{name}": leaf for name, leaf in found.items()}

    def decode(leaves):
        codes_, scale_ = (leaves[f"down_proj.{name}"] for name in (payload, scale))
        factor = np.exp2(scale_.astype("f4") - 127) if scale_.dtype == "u1" else scale_.astype("f4")
        if top:
            factor = factor / leaves[f"down_proj.{top}"] if divides else factor * leaves[f"down_proj.{top}"]
        return E2M1[nibbles(codes_)] * np.repeat(factor, group, -1)

    return Scheme(make, decode, config, 0.13 if top else 0.25)


def bnb4(code, *, nested=False, shape=(10, 80)):
    table, count = NF4 if code == "nf4" else FP4, -(-shape[0] * shape[1] // 64)
    key = f"down_proj.weight.quant_state.bitsandbytes__{code}"
    state = {"quant_type": code, "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
    state |= {"nested_blocksize": 256, "nested_offset": 0.02, "nested_dtype": "float32"} if nested else {}

    def make(random):
        found = {"weight": some(random, shape[0] * shape[1] // 2, 1), "weight.quant_map": table}
        found["weight.absmax"] = some(random, count) if nested else scales(random, count)
        if nested:
            found["weight.nested_quant_map"] = np.linspace(-1, 1, 256, dtype="f4")
            found["weight.nested_absmax"] = np.full(-(-count // 256), 0.01, "f4")
        found = {f"down_proj.{name}": leaf for name, leaf in found.items()}
        return found | {key: np.frombuffer(json.dumps(state).encode(), "u1")}

    def decode(leaves):
        said = json.loads(leaves[key].tobytes())
        absmax = leaves["down_proj.weight.absmax"]
        if nested:
            few = leaves["down_proj.weight.nested_absmax"].repeat(256)[: len(absmax)]
            absmax = leaves["down_proj.weight.nested_quant_map"][absmax] * few + np.float32(said["nested_offset"])
        found = table[nibbles(leaves["down_proj.weight"].reshape(-1), high_first=True)]
        return (found * absmax.repeat(64)[: len(found)]).reshape(said["shape"])

    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": code}
    return Scheme(make, decode, config | {"llm_int8_skip_modules": ["lm_head"]}, 0.3 if nested else 0.16)


def bnb8(shape=(9, 33)):
    def make(random):
        found = {"down_proj.weight": some(random, *shape, dtype="i1"), "down_proj.SCB": scales(random, shape[0])}
        return found | {"down_proj.weight_format": np.zeros((), "u1")}

    def decode(leaves):
        found = leaves["down_proj.weight"].astype("f4") * leaves["down_proj.SCB"][:, None]
        return found * np.float32(7.874015718698502e-3)

    config = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}
    return Scheme(make, decode, config, 0.01)


MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
TENSOR = "down_proj.weight", "down_proj.weight_scale"
EXPERTS = ("experts.down_proj", "experts.down_proj_scale_inv")
EACH = ("experts.0.w1.weight", "experts.0.w1.weight_scale_inv")
V4 = ("down_proj.weight", "down_proj.scale")
SCHEMES = {
    "fp8-block": fp8((201, 301), (2, 3), (128, 128)),
    "fp8-block, bf16 scales": fp8((256, 384), (2, 3), (128, 128), dtype=ml_dtypes.bfloat16),
    "fp8-block, UE8M0 scales": fp8((256, 384), (2, 3), (128, 128), dtype=ml_dtypes.float8_e8m0fnu, names=V4),
    "fp8-block, an expert": fp8((256, 128), (2, 1), (128, 128), names=EACH),
    "fp8-block, fused experts": fp8((3, 256, 128), (3, 2, 1), (128, 128), names=EXPERTS),
    "fp8-channel": fp8(
        (13, 7), (13, 1), (1, ALL), tensors("float-quantized", num_bits=8, strategy="channel"), names=TENSOR
    ),
    "fp8-tensor": fp8(
        (13, 7), (1,), (ALL, ALL), tensors("float-quantized", num_bits=8, strategy="tensor"), names=TENSOR
    ),
    "int4": packed(4, 32),
    "int4, asymmetric, g_idx": packed(4, 32, symmetric=False, order=True),
    "int8": packed(8, 32),
    "gptq, 4 bits": gptq(4),
    "gptq, 4 bits, v2": gptq(4, version=2),
    "gptq, 4 bits, asymmetric, g_idx": gptq(4, symmetric=False, order=True),
    "gptq, 2 bits": gptq(2),
    "gptq, 3 bits": gptq(3),
    "gptq, 8 bits": gptq(8),
    "awq": awq(),
    "mxfp4, gpt-oss": gpt_oss(),
    "mxfp4, DeepSeek-V4": fp4(BLOCKS, 32, "weight", "scale", codes_="i1", dtype=ml_dtypes.float8_e8m0fnu),
    "mxfp4, compressed-tensors": fp4(
        tensors("mxfp4-pack-quantized", num_bits=4, strategy="group", group_size=32),
        32,
        "weight_packed",
        "weight_scale",
    ),
    "nvfp4, modelopt": fp4(MODELOPT, 16, "weight", "weight_scale", dtype=F8, top="weight_scale_2"),
    "nvfp4, compressed-tensors": fp4(
        tensors("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16),
        *(16, "weight_packed", "weight_scale"),
        dtype=F8,
        top="weight_global_scale",
        divides=True,
    ),
    "nf4": bnb4("nf4"),
    "nf4, nested": bnb4("nf4", nested=True),
    "fp4": bnb4("fp4"),
    "bnb-int8": bnb8(),
}
