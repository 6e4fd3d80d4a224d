"""Layouts in which published checkpoints store quantised weights, as names, shapes and dtypes."""

import json
import math

import numpy as np

from paramend.leaves.specs import numpy_dtype

F8, E8M0 = "float8_e4m3fn", "float8_e8m0fnu"

# Scheme, and who writes it so → name: (dtype, shape). The first leaf is the payload; `norm.weight` is none of it.
LAYOUTS = {
    ("fp8-block", "DeepSeek-V3"): {"weight": (F8, (256, 200)), "weight_scale_inv": ("float32", (2, 2))},
    ("fp8-block", "Qwen3-FP8, BF16 scales"): {"weight": (F8, (256, 128)), "weight_scale_inv": ("bfloat16", (2, 1))},
    ("fp8-block", "compressed-tensors"): {"weight": (F8, (130, 128)), "weight_scale": ("bfloat16", (2, 1))},
    ("fp8-block", "DeepSeek-V4, dense"): {"weight": (F8, (256, 256)), "scale": (E8M0, (2, 2))},
    ("fp8-block", "MXFP8"): {"weight": (F8, (4, 64)), "weight_scale": ("uint8", (4, 2))},
    ("fp8-block", "fused experts"): {
        "gate_up_proj": (F8, (2, 256, 128)),
        "gate_up_proj_scale_inv": ("float32", (2, 2, 1)),
    },
    ("fp8-block", "fused experts, scales"): {
        "down_proj": (F8, (2, 256, 128)),
        "down_proj_scales_inv": ("float32", (2, 2, 1)),
    },
    ("fp8-channel", "compressed-tensors"): {"weight": (F8, (8, 4)), "weight_scale": ("bfloat16", (8, 1))},
    ("fp8-channel", "fbgemm"): {"gate_up_proj": (F8, (2, 4, 8)), "gate_up_proj_scale": ("float32", (2, 1, 8))},
    ("fp8-tensor", "compressed-tensors"): {
        "weight": (F8, (8, 4)),
        "weight_scale": ("float32", (1,)),
        "input_scale": ("float32", (1,)),
    },
    ("fp8-tensor", "static activations"): {
        "weight": (F8, (8, 4)),
        "weight_scale_inv": ("float32", ()),
        "activation_scale": ("float32", ()),
    },
    ("fp8-tensor", "ComfyUI"): {"weight": (F8, (8, 4)), "scale_weight": ("float32", (1,))},
    ("fp8-tensor", "Mistral"): {
        "weight": (F8, (8, 4)),
        "qscale_weight": ("bfloat16", ()),
        "qscale_act": ("bfloat16", ()),
    },
    ("fp8-tensor", "TensorRT-LLM"): {
        "weight": (F8, (8, 4)),
        "weights_scaling_factor": ("float32", (1,)),
        "activation_scaling_factor": ("float32", (1,)),
    },
    ("tinygemm", "gpt-fast"): {"weight": ("int32", (1, 1, 32, 4)), "scales_and_zeros": ("bfloat16", (1, 8, 2))},
    ("int4", "compressed-tensors"): {
        "weight_packed": ("int32", (8, 2)),
        "weight_scale": ("bfloat16", (8, 1)),
        "weight_shape": ("int64", (2,)),
        "weight_zero_point": ("int32", (1, 1)),
        "weight_g_idx": ("int32", (16,)),
    },
    ("gptq", "GPTQModel"): {
        "qweight": ("int32", (4, 16)),
        "qzeros": ("int32", (1, 2)),
        "scales": ("float16", (1, 16)),
        "g_idx": ("int32", (32,)),
    },
    ("awq", "AutoAWQ"): {
        "qweight": ("int32", (32, 2)),
        "qzeros": ("int32", (1, 2)),
        "scales": ("float16", (1, 16)),
    },
    ("mxfp4", "gpt-oss"): {
        "gate_up_proj_blocks": ("uint8", (2, 8, 3, 16)),
        "gate_up_proj_scales": ("uint8", (2, 8, 3)),
    },
    ("mxfp4", "DeepSeek-V4"): {"weight": ("int8", (4, 32)), "scale": (E8M0, (4, 2))},
    ("mxfp4", "compressed-tensors"): {"weight_packed": ("uint8", (4, 32)), "weight_scale": ("uint8", (4, 2))},
    ("nvfp4", "modelopt"): {
        "weight": ("uint8", (4, 16)),
        "weight_scale": (F8, (4, 2)),
        "weight_scale_2": ("float32", ()),
        "input_scale": ("float32", ()),
    },
    ("nvfp4", "compressed-tensors"): {
        "weight_packed": ("uint8", (4, 16)),
        "weight_scale": (F8, (4, 2)),
        "weight_global_scale": ("float32", (1,)),
        "input_global_scale": ("float32", (1,)),
    },
    ("nf4", "bitsandbytes"): {
        "weight": ("uint8", (64, 1)),
        "weight.absmax": ("uint8", (2,)),
        "weight.quant_map": ("float32", (16,)),
        "weight.nested_absmax": ("float32", (1,)),
        "weight.nested_quant_map": ("float32", (256,)),
        "weight.quant_state.bitsandbytes__nf4": ("uint8", (80,)),
    },
    ("nf4", "bitsandbytes, stored as bfloat16"): {
        "weight": ("bfloat16", (32, 1)),
        "weight.absmax": ("float32", (2,)),
        "weight.quant_map": ("float32", (16,)),
        "weight.quant_state.bitsandbytes__nf4": ("uint8", (80,)),
    },
    ("fp4", "bitsandbytes"): {
        "weight": ("uint8", (64, 1)),
        "weight.absmax": ("float32", (2,)),
        "weight.quant_map": ("float32", (16,)),
        "weight.quant_state.bitsandbytes__fp4": ("uint8", (80,)),
    },
    ("bnb-int8", "bitsandbytes"): {
        "weight": ("int8", (8, 4)),
        "SCB": ("float32", (8,)),
        "weight_format": ("uint8", ()),
    },
    ("int8", "compressed-tensors"): {
        "weight": ("int8", (8, 4)),
        "weight_scale": ("bfloat16", (8, 1)),
        "weight_zero_point": ("int8", (8, 1)),
    },
    ("eetq", "EETQ"): {"weight": ("int8", (4, 8)), "weight_scales": ("float16", (8,))},
    ("int8", "Praxis"): {
        "w": ("int8", (4, 8)),
        "w_quantized_scale": ("float32", (8,)),
        "w_quantized_zp": ("float32", (8,)),
    },
    ("int8", "Flax"): {"kernel": ("int8", (4, 8)), "scale": ("float32", (8,))},
    ("mlx", "mlx-lm"): {
        "weight": ("uint32", (8, 8)),
        "scales": ("float16", (8, 1)),
        "biases": ("float16", (8, 1)),
    },
    ("bitnet", "transformers"): {"weight": ("uint8", (2, 8)), "weight_scale": ("bfloat16", (1,))},
    ("torchao", "torchao"): {
        "_weight_qdata": (F8, (8, 4)),
        "_weight_scale": ("float32", (8, 1)),
        "_weight_act_pre_scale": ("float32", (4,)),
    },
    ("quanto", "quanto"): {"weight._data": ("int8", (8, 4)), "weight._scale": ("float32", (8, 1))},
    ("quanto", "quanto, packed"): {
        "weight._data._data": ("uint8", (4, 4)),
        "weight._scale": ("float32", (8, 1)),
        "weight._shift": ("float32", (8, 1)),
    },
    ("hqq", "HQQ"): {
        "W_q": ("uint8", (4, 8)),
        "scale": ("float16", (8, 1)),
        "zero": ("float16", (8, 1)),
        "nbits": ("int64", ()),
        "shape": ("int64", (2,)),
    },
    ("aqt", "Qwix"): {"qvalue": ("int8", (4, 8)), "scale": ("float32", (1, 8))},
    ("aqlm", "AQLM"): {
        "codes": ("int8", (8, 1, 2)),
        "codebooks": ("float16", (2, 256, 1, 8)),
        "scales": ("float16", (8, 1, 1, 1)),
    },
    ("vptq", "VPTQ"): {"indices": ("int32", (1, 8, 4)), "centroids.weight": ("float16", (1, 64))},
    ("higgs", "HIGGS"): {
        "weight": ("int16", (8, 4)),
        "scales": ("float16", (1, 8)),
        "tables": ("float16", (16,)),
        "tables2": ("float32", (256, 2)),
    },
    ("exl2", "ExLlamaV2"): {
        "q_weight": ("int32", (4, 8)),
        "q_scale": ("int32", (1, 1)),
        "q_scale_max": ("float16", (1,)),
        "q_groups": ("int16", (2,)),
        "q_invperm": ("int32", (32,)),
    },
    ("mlc", "MLC"): {"q_weight": ("uint32", (8, 4)), "q_scale": ("float16", (8, 1))},
    ("uint8", "asymmetric"): {
        "weight": ("uint8", (8, 4)),
        "weight_scale": ("float32", (8, 1)),
        "weight_zero_point": ("uint8", (8, 1)),
    },
    ("exl3", "ExLlamaV3"): {
        "trellis": ("int16", (1, 1, 64)),
        "suh": ("float16", (16,)),
        "svh": ("float16", (16,)),
    },
    ("bnb-optim8", "bitsandbytes"): {
        "state1": ("uint8", (8, 4)),
        "absmax1": ("float32", (1,)),
        "qmap1": ("float32", (256,)),
    },
}


# FP8 with scales of a layout that is not known: it is recognised, and cannot be decoded.
ODD = {"weight": (F8, (256, 200)), "weight_scale_inv": ("float32", (7,))}


def stored(layout, module="model.layers.0.mlp.fc", *, norm=True):
    """A layout as numpy arrays by name; the values are the bytes 1 to 99."""
    rng = np.random.default_rng(0)
    tree = {}
    for name, (dtype, shape) in layout.items():
        kind = numpy_dtype(dtype)
        values = rng.integers(1, 100, (math.prod(shape), kind.itemsize), "uint8")
        tree[f"{module}.{name}"] = values.view(kind).reshape(shape)
    return tree | ({"model.norm.weight": np.ones(3, "float64")} if norm else {})


def write(file, tree, config=None):
    """The path of a safetensors file of numpy arrays, written by the reference library; a configuration beside it."""
    import torch  # layouts are read where there is none
    from safetensors.torch import save_file  # as above

    tensors = {
        name: torch.from_numpy(np.frombuffer(array.tobytes(), "uint8").copy())
        .view(getattr(torch, array.dtype.name))
        .reshape(array.shape)
        for name, array in tree.items()
    }
    save_file(tensors, file)
    if config is not None:
        (file.parent / "config.json").write_text(json.dumps(config))
    return file
