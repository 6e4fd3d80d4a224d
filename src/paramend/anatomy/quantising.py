"""What a configuration says when more weights are quantised."""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from paramend.anatomy.quantization import IGNORE, LISTS, named_by
from paramend.errors import Unsupported


def quantised(
    values: Mapping[str, Any],
    scheme: str,
    modules: Sequence[str],
    floats: Sequence[str],
    group_size: int | None = None,
    *,
    fused: bool = False,
) -> dict[str, Any]:
    """What `config.json` holds after modules are quantised.

    Args:
        values: what it holds.
        scheme: the name of the scheme.
        modules: the modules.
        floats: the others, which stay floats.
        group_size: how many inputs share a scale, where the scheme leaves it open.
        fused: whether a leaf holds the weights of several experts.

    Raises:
        Unsupported: it says that the model is quantised in another way, or not to quantise what a pattern names.

    >>> found = quantised({"model_type": "llama"}, "fp8-block", ["fc"], ["lm_head"])["quantization_config"]
    >>> found["weight_block_size"], found["modules_to_not_convert"]
    ([128, 128], ['lm_head'])
    """
    new = copy.deepcopy(dict(values))
    wanted = _says(scheme, group_size, fused)
    method = wanted["quant_method"]
    old = new.get("quantization_config") or next((part for key in _OTHERS if (part := new.get(key))), None)
    if old is None:
        if method == "gptq":
            wanted["dynamic"] = {f"-:^{re.escape(each)}$": {} for each in floats}
        else:
            wanted[LISTS.get(method, "modules_to_not_convert")] = list(floats)
        return new | {"quantization_config": wanted}
    differ = {key: old.get(key) for key, value in wanted.items() if old.get(key) != value}
    if differ:
        there, here = (", ".join(f"{key}: {part[key]}" for key in differ) for part in (differ, wanted))
        raise Unsupported(
            f"config.json says {there}, and {scheme} is written as {here}: a model is quantised in one way",
            hint="pm.dequantize(model) first, or simulate=True",
        )
    for key in IGNORE:
        if isinstance(old.get(key), list):
            old[key] = [entry for entry in old[key] if entry not in modules]
    ignored = [(entry, each) for each in modules if (entry := named_by(old, each))]
    if ignored:
        raise Unsupported(f"{ignored[0][0]!r} of config.json says that {ignored[0][1]} is not quantised")
    return new


_OTHERS = ("compression_config", "quantization")
_NF4 = {
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_compute_dtype": "bfloat16",
}


def _says(scheme: str, group_size: int | None, fused: bool) -> dict[str, Any]:
    """What is said of a scheme, as its loaders read it."""
    size = group_size or (-1 if scheme == "int8" else 128)
    grouped = {"strategy": "channel"} if size < 0 else {"strategy": "group", "group_size": size}
    match scheme:
        case "fp8-block":
            return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
        case "fp8-tensor" | "fp8-channel":
            return _tensors("float-quantized", 8, "float", {"strategy": scheme.removeprefix("fp8-")})
        case "int4" | "int8":
            return _tensors("pack-quantized", int(scheme[3:]), "int", grouped)
        case "nvfp4":
            return _tensors("nvfp4-pack-quantized", 4, "float", {"strategy": "tensor_group", "group_size": 16})
        case "mxfp4" if not fused:
            return _tensors("mxfp4-pack-quantized", 4, "float", {"strategy": "group", "group_size": 32})
        case "mxfp4":
            return {"quant_method": "mxfp4"}
        case "gptq":
            says = {"bits": 4, "group_size": size, "sym": True, "desc_act": False, "checkpoint_format": "gptq"}
            return {"quant_method": "gptq", **says}
        case "awq":
            return {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}
        case "bnb-int8":
            return {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    return {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": scheme, **_NF4}


def _tensors(form: str, bits: int, kind: str, how: Mapping[str, Any]) -> dict[str, Any]:
    """What compressed-tensors reads: weights alone are quantised."""
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False, **how}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    status = {"format": form, "quantization_status": "compressed", "config_groups": {"group_0": group}}
    return {"quant_method": "compressed-tensors", **status}
