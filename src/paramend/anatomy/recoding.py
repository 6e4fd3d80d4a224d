"""What a configuration says of its weights after some got another code."""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from paramend.anatomy.quantization import FILES, IGNORE, named_by, names, part_of, stated, texts_of
from paramend.errors import Unsupported
from paramend.formats.jsontext import CONFIG
from paramend.leaves.groups import methods_of

# quant_method → the list of modules left out that its readers know. GPTQModel has a map of patterns instead.
_LISTS = {"compressed-tensors": "ignore", "bitsandbytes": "llm_int8_skip_modules", "quark": "exclude"}


def dequantised(
    file: str, values: Mapping[str, Any], modules: Sequence[str], floats: Sequence[str], *, left: bool
) -> dict[str, Any] | None:
    """What one of `FILES` holds after modules are no longer quantised; None if it has nothing to tell any more.

    `floats` are all others that are not: readers find those out themselves only where there is no list. `left` says
    whether any module still is.

    >>> config = {"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}}
    >>> dequantised("config.json", config, ["fc"], [], left=True)["quantization_config"]["modules_to_not_convert"]
    ['lm_head', 'fc']
    >>> dequantised("config.json", config, ["fc"], [], left=False)
    {}
    """
    new, keys = copy.deepcopy(dict(values)), dict(FILES)[file]
    if left:
        part = part_of(new, keys)
        if part is not None:
            _leave_out(part, modules, floats)
        return new
    for section in filter(None, (new, new.get("text_config"))):
        for key in keys:
            section.pop(key, None)
    return new if file == CONFIG else None


def _leave_out(config: Any, modules: Sequence[str], floats: Sequence[str]) -> None:
    """Enter modules into the lists of those that are not quantised."""
    method = next(iter(methods_of(config)), "")
    if method == "gptq":
        config["dynamic"] = {f"-:^{re.escape(each)}$": {} for each in modules} | (config.get("dynamic") or {})
        return
    usual = "exclude_modules" if "quant_algo" in config else _LISTS.get(method, "modules_to_not_convert")
    for key in [key for key in IGNORE if isinstance(config.get(key), list)] or [usual]:
        listed = list(floats) if config.get(key) is None else config[key]
        config[key] = [*listed, *(each for each in modules if not any(names(e, each) for e in texts_of(listed)))]


def listed(file: str, values: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """What one of `FILES` holds after modules came that are not quantised."""
    new = copy.deepcopy(dict(values))
    part = part_of(new, dict(FILES)[file])
    if part is not None and modules:
        _leave_out(part, modules, [])
    return new


def renamed(file: str, values: Mapping[str, Any], moved: Mapping[str, str]) -> dict[str, Any]:
    """What one of `FILES` holds after modules got other names, which its lists of modules have then.

    >>> config = {"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": ["mtp", "re:a.*"]}}
    >>> found = renamed("config.json", config, {"mtp.fc": "model.mtp.fc", "a.x": "b.x", "c": "c"})
    >>> found["quantization_config"]["modules_to_not_convert"]
    ['model.mtp', 're:a.*', 'b.x']
    """
    new = copy.deepcopy(dict(values))
    part: Any = part_of(new, dict(FILES)[file])
    if part is None:
        return new
    below: dict[str, dict[str, None]] = {}  # a module, or what it is in → its names then
    for old, now in moved.items():
        for end in (len(old), *(found.start() for found in re.finditer(r"\.", old))):
            if now.endswith(old[end:]):
                below.setdefault(old[:end], {})[now[: len(now) - len(old) + end]] = None
    ignored = [now for old, now in moved.items() if old != now and stated(part, old).ignored]
    groups = [each for each in (part.get("config_groups") or {}).values() if isinstance(each, dict)]
    for holder, keys in ((part, IGNORE), *((group, ("targets",)) for group in groups)):
        for key in keys:
            if isinstance(holder.get(key), list):
                holder[key] = list(dict.fromkeys(now for entry in holder[key] for now in below.get(entry, [entry])))
    missing = [module for module in ignored if not stated(part, module).ignored]
    if missing:  # those that a pattern named
        _leave_out(part, missing, [])
    return new


def quantised(
    file: str,
    values: Mapping[str, Any],
    scheme: str,
    group_size: int | None,
    modules: Sequence[str],
    floats: Sequence[str],
) -> dict[str, Any]:
    """What one of `FILES` holds after modules are quantised, and others stay floats; only `config.json` tells of it.

    >>> found = quantised("config.json", {}, "fp8-block", None, ["fc"], ["lm_head"])["quantization_config"]
    >>> found["weight_block_size"], found["modules_to_not_convert"]
    ([128, 128], ['lm_head'])
    """
    new, wanted = copy.deepcopy(dict(values)), _said(scheme, group_size)
    if file != CONFIG:
        return new
    old: Any = part_of(new, dict(FILES)[CONFIG])
    if old is None:
        _leave_out(wanted, floats, floats)
        return new | {"quantization_config": wanted}
    differ = [key for key, value in wanted.items() if old.get(key) != value]
    if differ:
        there, here = (", ".join(f"{key}: {part.get(key)}" for key in differ) for part in (old, wanted))
        raise Unsupported(
            f"{CONFIG} says {there}, and {scheme} is written as {here}: a model is quantised in one way",
            hint="pm.dequantize(model) first, or simulate=True",
        )
    for key in IGNORE:
        if isinstance(old.get(key), list):
            old[key] = [entry for entry in old[key] if entry not in modules]
    if "dynamic" in old:
        old["dynamic"] = {
            key: old["dynamic"][key] for key in old["dynamic"] if key[3:-1] not in map(re.escape, modules)
        }
    for module in modules:
        if entry := named_by(old, module):
            raise Unsupported(f"{entry!r} in {CONFIG} says that {module} is not quantised", hint="pm.config")
    return new


def _said(scheme: str, group_size: int | None) -> dict[str, Any]:
    size = group_size or (-1 if scheme == "int8" else 128)
    bnb = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": scheme, "load_in_4bit": True}
    own: dict[str, dict[str, Any]] = {
        "fp8-block": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        "gptq": {"quant_method": "gptq", "bits": 4, "group_size": size, "sym": True, "desc_act": False}
        | {"checkpoint_format": "gptq"},
        "awq": {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"},
        "nf4": bnb,
        "fp4": bnb,
        "bnb-int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    }
    if scheme in own:
        return own[scheme]
    grouped = {"strategy": "channel"} if size < 0 else {"strategy": "group", "group_size": size}
    form, bits, kind, how = {
        "fp8-tensor": ("float-quantized", 8, "float", {"strategy": "tensor"}),
        "fp8-channel": ("float-quantized", 8, "float", {"strategy": "channel"}),
        "int8": ("pack-quantized", 8, "int", grouped),
        "int4": ("pack-quantized", 4, "int", grouped),
        "mxfp4": ("mxfp4-pack-quantized", 4, "float", {"strategy": "group", "group_size": 32}),
        "nvfp4": ("nvfp4-pack-quantized", 4, "float", {"strategy": "tensor_group", "group_size": 16}),
    }[scheme]
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False, **how}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    status = {"format": form, "quantization_status": "compressed", "config_groups": {"group_0": group}}
    return {"quant_method": "compressed-tensors", **status}
