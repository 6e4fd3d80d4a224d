"""What the configuration beside the weights says of their quantisation."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from paramend.anatomy.documents import Document
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


def part_of(data: Mapping[str, Any], keys: tuple[str, ...]) -> Mapping[str, Any] | None:
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


def stated(config: Mapping[str, Any] | None, module: str) -> Stated:
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


def named_by(config: Mapping[str, Any], module: str) -> str:
    """The entry of a list of those that are not quantised that names a module, or ""."""
    return next((entry for key in IGNORE for entry in texts_of(config.get(key)) if names(entry, module)), "")


def _group(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
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
    return not set("*?[").isdisjoint(entry) and any(
        fnmatchcase(".".join(parts[:stop]), entry) for stop in range(len(parts), 0, -1)
    )


def texts_of(value: object) -> list[str]:
    """The texts in a list."""
    return [each for each in value if isinstance(each, str)] if isinstance(value, Sequence) else []


def _pairs(value: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    items = value.items() if isinstance(value, Mapping) else ()
    return ((str(key), each) for key, each in items if isinstance(each, Mapping))


def _first(said: Mapping[str, Any], *keys: str) -> int | None:
    """The first of some keys that has a whole number."""
    return next((said[key] for key in keys if type(said.get(key)) is int), None)
