"""What the configuration beside the weights says of their quantisation, and what once some got another code."""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

from paramend.anatomy.documents import Document
from paramend.anatomy.sections import config_beside
from paramend.errors import Unsupported
from paramend.formats.jsontext import CONFIG
from paramend.leaves.codecs.codec import Stated
from paramend.leaves.groups import methods_of

Said: TypeAlias = Mapping[str, Any]
# Files in the order in which they count, and the keys below which they say it; () is the file itself.
FILES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("config.json", ("quantization_config", "compression_config", "quantization")),
    ("quantize_config.json", ()),
    ("quant_config.json", ()),
    ("hf_quant_config.json", ("quantization",)),
)


def quantization_of(path: Path, texts: Iterable[Document] = ()) -> Mapping[str, object] | None:
    """The part of a configuration that tells how weights are quantised, or None; `texts` are files that edits change.
    A damaged one tells nothing here.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "config.json").write_text('{"text_config": {"quantization_config": {"quant_method": "fp8"}}}')
    >>> quantization_of(folder), quantization_of(folder / "model.safetensors")
    ({'quant_method': 'fp8'}, {'quant_method': 'fp8'})
    """
    names = {name for name, _ in FILES}
    new = {each.name: each.values if each.text else {} for each in texts if each.name in names}
    found = (part_of(new[name] if name in new else config_beside(path, name), keys) for name, keys in FILES)
    return next((part for part in found if part), None)


def part_of(data: Said, keys: tuple[str, ...]) -> Said | None:
    """What lies below one of the keys, in the data itself or in the configuration of its text model."""
    if not keys:
        return data
    for part in (data, data.get("text_config")):
        for key in keys:
            if isinstance(part, Mapping) and isinstance(part.get(key), Mapping):
                return part[key]  # type: ignore[no-any-return]
    return None


# Where configurations of several methods list the modules that they leave as they are.
IGNORE = ("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules", "llm_int8_skip_modules", "exclude")


def stated(config: Said | None, module: str) -> Stated:
    """What a `quantization_config`, if there is one, says of the weight of a module.

    >>> config = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
    >>> stated(config, "model.layers.0.mlp.up_proj").block, stated(config, "lm_head").ignored
    ((128, 128), 'lm_head')
    """
    if not config:
        return Stated()
    module = module.replace("/", ".")
    ignored = named_by(config, module)
    method = next(iter(methods_of(config)), "")
    said = dict(config)
    for entry, more in _pairs(config.get("dynamic")):  # of GPTQModel: what it says of some modules
        if re.match(entry.removeprefix("-:").removeprefix("+:"), module):
            ignored = ignored or (entry if entry.startswith("-:") else "")
            said |= more
            break
    weights = _group(config, module)
    strategy = str(weights.get("strategy") or "")
    block = weights.get("block_structure") if weights else said.get("weight_block_size")
    group = _first(weights, "group_size") if weights else _first(said, "group_size", "q_group_size")
    return Stated(
        method=method,
        bits=_first(weights, "num_bits") if weights else _first(said, "bits", "w_bit"),
        group=-1 if strategy in ("channel", "tensor") else group,
        block=(int(block[0]), int(block[1])) if isinstance(block, Sequence) and len(block) == 2 else None,
        symmetric=next((each for each in (weights.get("symmetric"), said.get("sym")) if isinstance(each, bool)), None),
        form=str(said.get("checkpoint_format") or said.get("version") or ""),
        ignored=ignored,
    )


def named_by(config: Said, module: str) -> str:
    """The entry of a list of those that are not quantised that names a module, or ""."""
    return next((entry for key in IGNORE for entry in texts_of(config.get(key)) if names(entry, module)), "")


def _group(config: Said, module: str) -> Said:
    """What compressed-tensors says of the weights of a module: a group that names it, or the first one of a class."""
    groups = [group for _, group in _pairs(config.get("config_groups"))]
    named = (group for group in groups if any(names(entry, module) for entry in texts_of(group.get("targets"))))
    classes = (group for group in groups if any(entry[:1].isupper() for entry in texts_of(group.get("targets"))))
    found = next(named, None) or next(classes, {})
    weights = found.get("weights")
    return weights if isinstance(weights, Mapping) else {}


def names(entry: str, module: str) -> bool:
    """Whether an entry of a list names a module or what it is in: a name, the end of one, a pattern, `re:...`."""
    if entry.startswith("re:"):
        return re.match(entry[3:], module) is not None
    if f"{module}.".startswith(f"{entry}.") or module.endswith(f".{entry}"):
        return True
    parts = module.split(".")
    above = (".".join(parts[:stop]) for stop in range(len(parts), 0, -1))
    return not set("*?[").isdisjoint(entry) and any(fnmatchcase(each, entry) for each in above)


def texts_of(value: object) -> list[str]:
    """The texts in a list."""
    return [each for each in value if isinstance(each, str)] if isinstance(value, Sequence) else []


def _pairs(value: object) -> Iterator[tuple[str, Said]]:
    items = value.items() if isinstance(value, Mapping) else ()
    return ((str(key), each) for key, each in items if isinstance(each, Mapping))


def _first(said: Said, *keys: str) -> int | None:
    """The first of some keys that has a whole number."""
    return next((said[key] for key in keys if type(said.get(key)) is int), None)


# quant_method → the list of modules left out that its readers know. GPTQModel has a map of patterns instead.
_LISTS = {"compressed-tensors": "ignore", "bitsandbytes": "llm_int8_skip_modules", "quark": "exclude"}


def dequantised(
    file: str, values: Said, modules: Sequence[str], floats: Sequence[str], *, left: bool
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


def listed(file: str, values: Said, modules: Sequence[str]) -> dict[str, Any]:
    """What one of `FILES` holds after modules came that are not quantised."""
    new = copy.deepcopy(dict(values))
    part = part_of(new, dict(FILES)[file])
    if part is not None and modules:
        _leave_out(part, modules, [])
    return new


def renamed(file: str, values: Said, moved: Mapping[str, str]) -> dict[str, Any]:
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
    file: str, values: Said, scheme: str, group_size: int | None, modules: Sequence[str], floats: Sequence[str]
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
        why = f"{CONFIG} says {there}, and {scheme} is written as {here}: a model is quantised in one way"
        raise Unsupported(why, hint="pm.dequantize(model) first, or simulate=True")
    for key in IGNORE:
        if isinstance(old.get(key), list):
            old[key] = [entry for entry in old[key] if entry not in modules]
    if "dynamic" in old:
        gone = [re.escape(each) for each in modules]
        old["dynamic"] = {key: value for key, value in old["dynamic"].items() if key[3:-1] not in gone}
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
