"""What the configuration beside the weights says of their quantisation."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from paramend.anatomy.sections import config_beside
from paramend.leaves.codecs.stated import Stated
from paramend.leaves.groups import methods_of

# Files in the order in which they count, and the keys below which they say it; () is the file itself.
FILES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("config.json", ("quantization_config", "compression_config", "quantization")),
    ("quantize_config.json", ()),
    ("quant_config.json", ()),
    ("hf_quant_config.json", ("quantization",)),
)


def quantization_of(path: Path) -> Mapping[str, object] | None:
    """The part of a configuration that tells how weights are quantised, or None. A damaged one tells nothing here.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "config.json").write_text('{"text_config": {"quantization_config": {"quant_method": "fp8"}}}')
    >>> quantization_of(folder), quantization_of(folder / "model.safetensors")
    ({'quant_method': 'fp8'}, {'quant_method': 'fp8'})
    """
    found = (_part(config_beside(path, name), keys) for name, keys in FILES)
    return next((part for part in found if part), None)


def _part(data: Mapping[str, Any], keys: tuple[str, ...]) -> Mapping[str, Any] | None:
    """What lies below one of the keys, in the data itself or in the configuration of its text model."""
    if not keys:
        return data
    for part in (data, data.get("text_config")):
        for key in keys:
            if isinstance(part, Mapping) and isinstance(part.get(key), Mapping):
                return part[key]  # type: ignore[no-any-return]
    return None


# ---- what it says of one module ----------------------------------------------------------------------------------

# Where configurations of several methods list the modules that they leave as they are.
IGNORE = ("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules", "llm_int8_skip_modules", "exclude")


def stated(config: Mapping[str, Any] | None, module: str) -> Stated:
    """What a `quantization_config` says of the weight of a module.

    Args:
        config: the configuration, or None.
        module: the name of the module, with dots.

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


def named_by(config: Mapping[str, Any], module: str) -> str:
    """The entry of a list of those that are not quantised that names a module, or ""."""
    return next((entry for key in IGNORE for entry in _texts(config.get(key)) if _names(entry, module)), "")


def _group(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """What compressed-tensors says of the weights of a module: a group that names it, or the first one of a class."""
    groups = [group for _, group in _pairs(config.get("config_groups"))]
    named = (group for group in groups if any(_names(entry, module) for entry in _texts(group.get("targets"))))
    classes = (group for group in groups if any(entry[:1].isupper() for entry in _texts(group.get("targets"))))
    found = next(named, None) or next(classes, {})
    weights = found.get("weights")
    return weights if isinstance(weights, Mapping) else {}


def _names(entry: str, module: str) -> bool:
    """Whether an entry of a list names a module or what it is in: a name, the end of one, a pattern, `re:...`."""
    if entry.startswith("re:"):
        return re.match(entry[3:], module) is not None
    parts = module.split(".")
    above = (".".join(parts[:stop]) for stop in range(len(parts), 0, -1))
    return bool(entry) and (module.endswith(f".{entry}") or any(fnmatchcase(name, entry) for name in above))


def _texts(value: object) -> list[str]:
    return [each for each in value if isinstance(each, str)] if isinstance(value, Sequence) else []


def _pairs(value: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    items = value.items() if isinstance(value, Mapping) else ()
    return ((str(key), each) for key, each in items if isinstance(each, Mapping))


def _first(said: Mapping[str, Any], *keys: str) -> int | None:
    """The first of some keys that has a whole number."""
    return next((said[key] for key in keys if type(said.get(key)) is int), None)


# ---- what it says when fewer weights are quantised ---------------------------------------------------------------

# quant_method → the list that its readers know. GPTQModel has a map of patterns instead.
LISTS = {
    "compressed-tensors": "ignore",
    "modelopt": "ignore",
    "bitsandbytes": "llm_int8_skip_modules",
    "quark": "exclude",
}


def dequantised(
    name: str, values: Mapping[str, Any], modules: Sequence[str], floats: Sequence[str], *, left: bool
) -> dict[str, Any] | None:
    """What one of `FILES` holds after modules are no longer quantised; None if it has nothing to tell any more.

    Args:
        name: the name of the file.
        values: what it holds.
        modules: the modules.
        floats: the others that are not quantised, for a file that leaves it to its readers to know them.
        left: whether any module still is.

    >>> config = {"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}}
    >>> dequantised("config.json", config, ["fc"], [], left=True)["quantization_config"]["modules_to_not_convert"]
    ['lm_head', 'fc']
    >>> dequantised("config.json", config, ["fc"], [], left=False)
    {}
    """
    keys = dict(FILES)[name]
    if not left and name != FILES[0][0]:
        return None
    new = copy.deepcopy(dict(values))
    if not keys:
        _leave_out(new, modules, floats)
    for part in (new, new.get("text_config")):
        for key in keys:
            if isinstance(part, dict) and isinstance(part.get(key), dict):
                if left:
                    _leave_out(part[key], modules, floats)
                else:
                    del part[key]
    return new


def _leave_out(config: dict[str, Any], modules: Sequence[str], floats: Sequence[str]) -> None:
    """Enter modules into the lists of those that are not quantised."""
    method = next(iter(methods_of(config)), "")
    if method == "gptq":
        config["dynamic"] = {f"-:^{re.escape(each)}$": {} for each in modules} | (config.get("dynamic") or {})
        return
    lists = [key for key in IGNORE if isinstance(config.get(key), list)]
    lists = lists or ["exclude_modules" if "quant_algo" in config else LISTS.get(method, "modules_to_not_convert")]
    for key in lists:
        listed = config.get(key)
        listed = list(floats) if listed is None else listed
        config[key] = [*listed, *(each for each in modules if not any(_names(entry, each) for entry in _texts(listed)))]
