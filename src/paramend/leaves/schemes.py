"""The table of quantised schemes: a row says how the leaves are called that are one weight together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from paramend.leaves.codecs.bnb import bnb4, bnb8
from paramend.leaves.codecs.codec import Codec, Parts, Stated
from paramend.leaves.codecs.fp8 import fp8, mxfp4, nvfp4, nvfp4_ct, torchao
from paramend.leaves.codecs.ggml import ggml
from paramend.leaves.codecs.integers import awq, gptq, packed
from paramend.leaves.rules import Codec as Rule
from paramend.leaves.specs import BLOCKS, Spec

# Spec of the payload, and those of its companions by role → whether their shapes and dtypes agree with the scheme.
Fit = Callable[[Spec, Mapping[str, Spec]], bool]
# Name of the scheme, the leaves by role, what a configuration says → how the weight is made of them.
Coding = Callable[[str, Parts, Stated], Codec]

# In names, `*` is the name of the weight in its module. A name without one is that of the module's companion: it
# belongs to a payload with one of these names, and not to just any leaf beside it.
WEIGHTS = ("weight", "kernel", "w")


@dataclass(frozen=True, slots=True)
class Companion:
    """A leaf that is read together with a payload."""

    role: str  # what it is to the codec: "scale", "zero", "global", "input" ...
    names: tuple[str, ...]  # in use; the first that is there counts
    says: str
    optional: bool = False  # whether the weight can be read without it


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to store a quantised weight in several leaves."""

    name: str  # its name, as users type it
    says: str
    payload: tuple[str, ...]  # the names of the leaf that holds the codes
    dtypes: tuple[str, ...]  # its dtypes; empty for any
    companions: tuple[Companion, ...]
    fits: Fit = lambda payload, companions: True  # whether shapes and dtypes agree with it
    methods: tuple[str, ...] = ()  # what `quantization_config` calls it
    alone: bool = False  # whether its payload is known by its name, without companions
    codec: Coding | None = None  # how the weight is made of the leaves; None where it is known only that they are one
    weight: str = WEIGHTS[0]  # the name of a weight whose payload has none in its own name
    rule: Rule | None = None  # how it is made by functions that take whole leaves; None in the table


FP8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e4m3", "float8_e4m3b11fnuz")
WORDS, BYTES = ("int32",), ("uint8",)
FP4 = ("int8", "uint8", "float4_e2m1fn")
INT8 = ("int8", "int4", "uint4")
POWERS = ("float8_e8m0fnu", "uint8")

# In names of most libraries, of Mistral's own files, of TensorRT-LLM.
_SCALE = (
    *("*_scale_inv", "*_scales_inv", "*_scale", "*_scales", "*_quantized_scale", "scale_weight", "scale", "scales"),
    *("qscale_weight", "weights_scaling_factor", "per_channel_scale"),
)
_INPUTS = (
    *("input_scale", "*_input_scale", "activation_scale", "*_activation_scale", "input_scale_ub", "scale_input"),
    *("qscale_act", "activation_scaling_factor", "prequant_scaling_factor"),
)
_ZERO = Companion("zero", ("*_zero_point", "*_zp", "*_quantized_zp"), "zero points", optional=True)
_INPUT = Companion("input", _INPUTS, "the scale of the inputs", optional=True)
_FORMAT = Companion("format", ("comfy_quant",), "the format, as bytes of JSON", optional=True)
_FP8 = (Companion("scale", _SCALE, "the scale, a multiplier"), _ZERO, _INPUT, _FORMAT)
_FP8_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "mxfp8", "quark")
_PACKED = ("*_packed",)
_CT = ("compressed-tensors",)
_MXFP4_METHODS = ("fp8", "mxfp4", *_CT, "quark")
_GPTQ = (
    Companion("scale", ("scales",), "the scales of the groups"),
    Companion("zero", ("qzeros",), "packed zero points", optional=True),
    Companion("group", ("g_idx",), "the group of each input", optional=True),
)
_BNB4 = (
    Companion("scale", ("*.absmax",), "the greatest magnitude of each block"),
    Companion("map", ("*.quant_map",), "the values of the codes", optional=True),
    Companion("nested scale", ("*.nested_absmax",), "the scales of the scales", optional=True),
    Companion("nested map", ("*.nested_quant_map",), "the values of their codes", optional=True),
)


_NVFP4 = (
    Companion("scale", ("*_scale",), "the scale of 16 codes"),
    Companion("global", ("*_scale_2",), "the scale of the scales, a multiplier"),
    _INPUT,
)
_NVFP4_PACKED = (
    Companion("scale", ("*_scale",), "the scale of 16 codes"),
    Companion("global", ("*_global_scale",), "the scale of the scales, a divisor"),
    Companion("input", ("input_global_scale", "*_input_global_scale"), "the scale of the inputs", optional=True),
)
_MXFP4_BLOCKS = (Companion("scale", ("*_scales",), "the exponent of 32 codes"),)
_MXFP4_PACKED = (Companion("scale", ("*_scale", "scale", "scales"), "the exponent of 32 codes"),)
_INT4 = (
    Companion("scale", ("*_scale",), "the scales of the groups"),
    Companion("shape", ("*_shape",), "the shape of the weight", optional=True),
    Companion("zero", ("*_zero_point",), "packed zero points", optional=True),
    Companion("group", ("*_g_idx",), "the group of each input", optional=True),
    _INPUT,
)
_BNB8 = (
    Companion("scale", ("SCB",), "the greatest magnitude of each row"),
    Companion("format", ("weight_format",), "the layout", optional=True),
)
_MLX = (
    Companion("scale", ("scales",), "the scales of the groups"),
    Companion("zero", ("biases", "qbiases"), "what the groups begin at", optional=True),
)
_UINT8 = (
    Companion("scale", _SCALE, "the scale, a multiplier"),
    Companion("zero", (*_ZERO.names, "zero_point", "zero", "zeros"), "zero points"),
    _INPUT,
)
_BITNET = (Companion("scale", ("weight_scale",), "the scale"),)
_TINYGEMM = (Companion("scale", ("scales_and_zeros",), "scales and zero points"),)
_TORCHAO = (
    Companion("scale", ("_*_scale", "_*_scale_and_zero", "*_scale"), "the scale"),
    Companion("zero", ("_*_zero_point", "*_zero_point"), "zero points", optional=True),
    Companion("global", ("_*_per_tensor_scale",), "the scale of the scales", optional=True),
    Companion("input", ("_*_act_pre_scale",), "the scale of the inputs", optional=True),
)
_QUANTO = (
    Companion("scale", ("_scale",), "the scale"),
    Companion("zero", ("_shift", "_zeropoint"), "the shift", optional=True),
)
_HQQ_PACKING = ("nbits", "group_size", "shape", "axis", "packing", "view_as_float", "unpack_view_dtype")
_HQQ = (
    Companion("scale", ("scale", "scale_q"), "the scale"),
    Companion("zero", ("zero", "zero_q"), "the zero point"),
    *(Companion(name, (name,), "how it is packed", optional=True) for name in _HQQ_PACKING),
)
_AQT = (
    Companion("scale", ("scale", "scale.0"), "the scale"),
    Companion("zero", ("zero_point", "bias.0"), "zero points", optional=True),
)
_AQLM = (Companion("codebooks", ("codebooks",), "the codebooks"), Companion("scale", ("scales",), "the scales"))
_VPTQ = (Companion("codebooks", ("centroids.weight", "centroids"), "the codebooks"),)
_HIGGS = (
    Companion("scale", ("scales",), "the scales"),
    Companion("codebooks", ("tables",), "the grid"),
    Companion("pairs", ("tables2",), "the grid of pairs", optional=True),
)
_EXL2 = (
    Companion("scale", ("q_scale",), "packed scales"),
    Companion("global", ("q_scale_max",), "the scales of the scales", optional=True),
    Companion("group", ("q_groups",), "the groups", optional=True),
    Companion("order", ("q_invperm", "q_perm"), "the order of the inputs", optional=True),
)
_MLC = (Companion("scale", ("q_scale",), "the scales of the groups"),)
_EXL3 = (
    Companion("in", ("suh", "su"), "the signs and scales of the inputs"),
    Companion("out", ("svh", "sv"), "the signs and scales of the outputs"),
)
_EETQ = (Companion("scale", ("weight_scales",), "the scale"),)
_INT8_SCALED = (Companion("scale", _SCALE, "the scale, a multiplier"), _ZERO, _INPUT)


def _state(code: str) -> Companion:
    name = f"*.quant_state.bitsandbytes__{code}"
    return Companion("state", (name,), "shape, dtype and block size, as bytes of JSON")


def _optimizer_state(n: str) -> Scheme:
    scale = Companion("scale", (f"absmax{n}",), "the greatest magnitude of each block")
    codes = Companion("map", (f"qmap{n}",), "the values of the codes")
    return Scheme("bnb-optim8", "8-bit moments of bitsandbytes", (f"state{n}",), ("uint8", "int8"), (scale, codes))


def _per_tensor(payload: Spec, by: Mapping[str, Spec]) -> bool:
    scale = by["scale"]  # one of shape [1, 1] is that of the only block
    stacked = payload.ndim > 2 and scale.shape == payload.shape[:1]
    return _multiplies(payload, by) and ((scale.size == 1 and scale.ndim < 2) or stacked)


def _per_channel(payload: Spec, by: Mapping[str, Spec]) -> bool:
    if payload.ndim < 2 or not _multiplies(payload, by):
        return False
    return by["scale"].size in {payload.size // max(payload.shape[axis], 1) for axis in (-1, -2)}


def _per_block(payload: Spec, by: Mapping[str, Spec]) -> bool:
    scale = by["scale"]
    inside = scale.ndim == payload.ndim and all(a <= b for a, b in zip(scale.shape, payload.shape, strict=True))
    return inside and (_multiplies(payload, by) or scale.dtype in POWERS)


def _multiplies(payload: Spec, by: Mapping[str, Spec]) -> bool:
    """Whether the scale is of floats, and of no more than the payload has."""
    return by["scale"].kind == "float" and by["scale"].size <= max(payload.size, 1)


def _in_groups(payload: Spec, by: Mapping[str, Spec]) -> bool:
    """Whether weights of two or more axes have scales of floats."""
    return payload.ndim >= 2 and _multiplies(payload, by)


def _by_16(payload: Spec, by: Mapping[str, Spec]) -> bool:
    return by["scale"].dtype in FP8


def _blocks_of_32(payload: Spec, by: Mapping[str, Spec]) -> bool:
    scale = by["scale"]
    return scale.dtype in POWERS and payload.shape == (*scale.shape, 16)


def _by_32(payload: Spec, by: Mapping[str, Spec]) -> bool:
    scale, codes = by["scale"], 1 if payload.dtype.startswith("float4") else 2
    alike = payload.ndim == scale.ndim >= 2 and payload.shape[:-1] == scale.shape[:-1]
    return scale.dtype in POWERS and alike and -(-payload.shape[-1] * codes // 32) == scale.shape[-1]


def _along_in(payload: Spec, by: Mapping[str, Spec]) -> bool:
    return payload.ndim >= 2 and payload.shape[-1:] == by["scale"].shape[-1:]


def _along_out(payload: Spec, by: Mapping[str, Spec]) -> bool:
    scale = by["scale"]
    return payload.ndim >= 2 and scale.ndim == payload.ndim and scale.shape[-1] == 8 * payload.shape[-1]


def _rows(payload: Spec, by: Mapping[str, Spec]) -> bool:
    scale = by["scale"]
    return payload.ndim == scale.ndim >= 2 and payload.shape[:-1] == scale.shape[:-1]


# The first row that fits a payload counts; the rows of one library that know less of a layout come after the others.
SCHEMES: tuple[Scheme, ...] = (
    Scheme("fp8-tensor", "FP8, one scale", ("*",), FP8, _FP8, _per_tensor, _FP8_METHODS, codec=fp8),
    Scheme("fp8-channel", "FP8, a scale for each channel", ("*",), FP8, _FP8, _per_channel, _FP8_METHODS, codec=fp8),
    Scheme("fp8-block", "FP8, a scale for each block", ("*",), FP8, _FP8, _per_block, _FP8_METHODS, codec=fp8),
    Scheme("fp8", "FP8, scales of another layout", ("*",), FP8, _FP8, methods=_FP8_METHODS),
    Scheme("nvfp4", "NVFP4 of modelopt", ("*",), FP4, _NVFP4, _by_16, ("modelopt", "nvfp4"), codec=nvfp4),
    Scheme("nvfp4", "NVFP4 of compressed-tensors", _PACKED, FP4, _NVFP4_PACKED, _by_16, _CT, codec=nvfp4_ct),
    Scheme("mxfp4", "MXFP4 of gpt-oss", ("*_blocks",), BYTES, _MXFP4_BLOCKS, _blocks_of_32, ("mxfp4",), codec=mxfp4),
    Scheme("mxfp4", "MXFP4, packed", ("*", *_PACKED), FP4, _MXFP4_PACKED, _by_32, _MXFP4_METHODS, codec=mxfp4),
    Scheme(
        "int4", "integers packed by compressed-tensors", _PACKED, WORDS, _INT4, methods=_CT, alone=True, codec=packed
    ),
    Scheme("gptq", "GPTQ", ("qweight",), WORDS, _GPTQ, _along_in, ("gptq", "auto-round"), alone=True, codec=gptq),
    Scheme("awq", "AWQ", ("qweight",), WORDS, _GPTQ, _along_out, ("awq", "auto-round"), alone=True, codec=awq),
    Scheme("packed", "codes of another layout", ("qweight",), (), _GPTQ, methods=("gptq", "awq", "fp_quant")),
    Scheme("nf4", "nf4 of bitsandbytes", ("*",), (), (*_BNB4, _state("nf4")), codec=bnb4),
    Scheme("fp4", "fp4 of bitsandbytes", ("*",), (), (*_BNB4, _state("fp4")), codec=bnb4),
    Scheme("bnb-4bit", "nf4 or fp4 of bitsandbytes", ("*",), ("uint8",), _BNB4, methods=("bitsandbytes",)),
    Scheme("bnb-int8", "int8 of bitsandbytes", ("*",), ("int8",), _BNB8, methods=("bitsandbytes",), codec=bnb8),
    Scheme("mlx", "codes of MLX", ("*",), ("uint32",), _MLX, _rows, ("mlx", "metal")),
    Scheme("uint8", "uint8, with scales and zero points", ("*",), ("uint8",), _UINT8, _in_groups, codec=fp8),
    Scheme("bitnet", "BitNet", ("weight",), ("uint8",), _BITNET, methods=("bitnet",)),
    Scheme("tinygemm", "int4 of tinygemm, as gpt-fast stores it", ("weight",), ("int32", "uint8"), _TINYGEMM),
    Scheme("torchao", "torchao", ("_*_qdata", "*_qdata"), (), _TORCHAO, methods=("torchao",), codec=torchao),
    Scheme("quanto", "quanto", ("_data", "_data._data"), (), _QUANTO, methods=("quanto",)),
    Scheme("hqq", "HQQ", ("W_q",), (), _HQQ, methods=("hqq",)),
    Scheme("aqt", "a QTensor of AQT, or a QArray of Qwix", ("qvalue",), (), _AQT),
    Scheme("aqlm", "AQLM", ("codes",), ("int8", "int16", "uint8"), _AQLM, methods=("aqlm",)),
    Scheme("vptq", "VPTQ", ("indices",), (), _VPTQ, methods=("vptq",)),
    Scheme("higgs", "HIGGS", ("*",), ("int16",), _HIGGS, methods=("higgs",)),
    Scheme("exl2", "EXL2", ("q_weight",), ("int32",), _EXL2),
    Scheme("mlc", "MLC", ("q_weight",), ("uint32",), _MLC),
    Scheme("exl3", "EXL3", ("trellis",), ("int16", "uint16"), _EXL3),
    Scheme("eetq", "int8 of EETQ, in the order of its kernels", ("weight",), INT8, _EETQ, _in_groups, ("eetq",)),
    Scheme("int8", "int8, with scales", ("*",), INT8, _INT8_SCALED, _in_groups, (*_CT, "quark"), codec=fp8),
    _optimizer_state("1"),
    _optimizer_state("2"),
)
# Dtype of blocks → the scheme of leaves that hold codes and scales themselves, whatever they are called.
IN_BLOCKS = {
    name: Scheme(name, f"blocks of {size} in GGUF", ("*",), (name,), (), codec=ggml)
    for name, (size, _) in BLOCKS.items()
}
# The formats of files with such leaves.
WITH_BLOCKS = ("gguf",)
