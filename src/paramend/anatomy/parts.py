"""Parts: models inside a model, such as the text model of a vision-language model, and their own configurations."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paramend.anatomy.beside import HEADS, WITH_HEAD
from paramend.anatomy.counts import Pieces, numbered
from paramend.anatomy.sections import sections_of, senses


def _rows(kinds: str, with_head: str, without: str) -> dict[str, tuple[str, str]]:
    """The names of classes by model_type, from the stem that is written after it."""
    pairs = (kind.split(":") for kind in kinds.split())
    return {kind: (with_head.format(stem), without.format(stem)) for kind, stem in pairs}


# model_type → the class with a head, "" if there is none, and the class without.
_CLASSES = {
    **_rows(
        "cohere:Cohere cohere2:Cohere2 deepseek_v2:DeepseekV2 deepseek_v3:DeepseekV3 gemma:Gemma gemma2:Gemma2 glm:Glm "
        "glm4:Glm4 granite:Granite llama:Llama ministral3:Ministral3 mistral:Mistral mixtral:Mixtral olmo2:Olmo2 "
        "persimmon:Persimmon phi:Phi phi3:Phi3 qwen2:Qwen2 qwen2_moe:Qwen2Moe qwen3:Qwen3 qwen3_moe:Qwen3Moe "
        "smollm3:SmolLM3 stablelm:StableLm aria_text:AriaText",
        "{}ForCausalLM",
        "{}Model",
    ),
    **_rows(
        "gemma3_text:Gemma3 gemma3n_text:Gemma3n gemma4_text:Gemma4 llama4_text:Llama4 mllama_text_model:Mllama "
        "qwen3_5_moe_text:Qwen3_5Moe qwen3_5_text:Qwen3_5",
        "{}ForCausalLM",
        "{}TextModel",
    ),
    **_rows(
        "glm4v_moe_text:Glm4vMoe glm4v_text:Glm4v qwen2_5_vl_text:Qwen2_5_VL qwen2_vl_text:Qwen2VL "
        "qwen3_vl_moe_text:Qwen3VLMoe qwen3_vl_text:Qwen3VL",
        "",
        "{}TextModel",
    ),
    **_rows(
        "clip_vision_model:CLIP mllama_vision_model:Mllama pixtral:Pixtral siglip_vision_model:Siglip",
        "",
        "{}VisionModel",
    ),
    **_rows("idefics3_vision:Idefics3 smolvlm_vision:SmolVLM", "", "{}VisionTransformer"),
}
_TEXT, _TIED = "text_config", "tie_word_embeddings"
_DTYPES = ("dtype", "torch_dtype")
# What the configuration of the whole model may say of its parts too.
_SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config", "transformers_version")


@dataclass(frozen=True, slots=True)
class Part:
    """A model inside a model."""

    name: str  # the key of its configuration, such as `text_config`
    layers: Pieces  # the path of its layers
    leaves: frozenset[int]  # the numbers of its leaves, without its head
    head: frozenset[int]  # those of its head


def parts_of(config: Mapping[str, Any], paths: Mapping[int, Pieces]) -> Iterator[Part]:
    """The models inside a model, where its configuration and its names tell them apart.

    >>> config = {"text_config": {"num_hidden_layers": 1}, "vision_config": {"depth": 2}}
    >>> names = ["lm.model.layers.0.w", "lm.lm_head.w", "visual.blocks.0.w", "visual.blocks.1.w", "connector.w"]
    >>> for part in parts_of(config, dict(enumerate(tuple(name.split(".")) for name in names))):
    ...     print(part.name, part.layers, sorted(part.leaves), sorted(part.head))
    text_config ('lm', 'model', 'layers') [0] [1]
    vision_config ('visual', 'blocks') [2, 3] []
    """
    layers = dict(_layers(config, list(paths.values())))
    sensing = {path for path in paths.values() if senses(path)}
    for name, own in layers.items():
        others = [other for other in layers.values() if other != own] + ([*sensing] if name == _TEXT else [])
        if not others:  # nothing says where the part ends
            continue
        root = own[: next((n for n in range(1, len(own)) if not any(o[:n] == own[:n] for o in others)), None)]
        heads = {n for n, path in paths.items() if HEADS.intersection(path) and path not in sensing and name == _TEXT}
        under = {n for n, path in paths.items() if path[: len(root)] == root}
        yield Part(name, own, frozenset(under - heads), frozenset(heads))


def _layers(config: Mapping[str, Any], paths: Sequence[Pieces]) -> Iterator[tuple[str, Pieces]]:
    """The key of each part's configuration, and a run of layers that it counts; the last one has the most leaves."""
    runs = numbered(paths, {})
    leaves = Counter(path[:depth] for path in paths for depth in range(1, len(path)) if path[:depth] in runs)
    for parent in sorted(runs, key=leaves.__getitem__):
        for place in sections_of(config, len(runs[parent]), parent):
            if len(place) == 1 and place[0].endswith("_config"):
                yield place[0], parent


def part_config(
    config: Mapping[str, Any], paths: Mapping[int, Pieces], renamed: Mapping[int, Pieces]
) -> tuple[str, dict[str, Any], list[str]] | None:
    """The key of the part that was taken, its configuration, and what is to be said; None if it is not one."""
    taken = renamed.keys()
    part = next((part for part in parts_of(config, paths) if taken in (part.leaves, part.leaves | part.head)), None)
    if part is None:
        return None
    inner = config[part.name]
    ties = [side[_TIED] for side in (config, inner) if side.get(_TIED) is not None]
    if part.head or part.name != _TEXT:
        head, tied = bool(part.head & taken), ties[:1] == [True]
    else:  # the head of the whole model, if it has one, is its embedding
        whole = str([*(config.get("architectures") or ()), ""][0])
        head = tied = whole.endswith(WITH_HEAD) and (True in ties or not ties)
    kind, own = inner.get("model_type"), [*(inner.get("architectures") or ()), ""][0]
    with_head, without = _CLASSES.get(kind, ("", ""))
    known = own if str(own).endswith(WITH_HEAD) == head else ""
    found = known or (head and with_head) or without
    said = [f"{part.name} becomes the configuration" + (f", of a {found}" if found else "")]
    if not found:
        said.append(f"architectures is left out: no class is known for the model_type {kind!r}")
    elif head and not found.endswith(WITH_HEAD):
        said.append(f"no class of {kind} with a head is known")
    if part.head and not head:
        said.append(f"its head, {'.'.join(paths[min(part.head)])}, is not taken")
    if part.name == _TEXT and found:
        said += _names(part, paths, renamed, ("model",) if found.endswith(WITH_HEAD) else ())
    shared = {key: config[key] for key in _SHARED if config.get(key) is not None and key not in inner}
    dtypes = {key: config[key] for key in _DTYPES if key in config}
    new = {key: value for key, value in inner.items() if key not in (*(_DTYPES if dtypes else ()), "architectures")}
    new |= ({"architectures": [found]} if found else {}) | shared | dtypes
    if part.name == _TEXT:
        new[_TIED] = tied
    return part.name, new, said


def _names(part: Part, paths: Mapping[int, Pieces], renamed: Mapping[int, Pieces], above: Pieces) -> Iterator[str]:
    """What is to be said of the new names, if the class looks for its layers at another path."""
    first = next(n for n in sorted(part.leaves) if paths[n][: len(part.layers)] == part.layers)
    rest = paths[first][len(part.layers) - 1 :]
    if renamed[first] in ((*above, *rest), ("model", *rest)):
        return
    rules = {(*part.layers[:-1], "**"): (*above, "**")}
    rules |= {(*paths[n][:-1], "**"): ("lm_head", "**") for n in part.head if n in renamed and len(paths[n]) > 2}
    typed = " ".join(f"--rename '{'.'.join(old)}={'.'.join(new)}'" for old, new in rules.items())
    there = ".".join(renamed[first][: 1 - len(rest)])
    yield f"its class looks for {'.'.join((*above, rest[0]))}, and its layers are in {there}: {typed}"
