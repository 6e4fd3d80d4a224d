"""Parts: models inside a model, such as the text model of a vision-language model, and their own configurations."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from paramend.anatomy.counts import Pieces, numbered
from paramend.anatomy.heads import HEADS, WITH_HEAD
from paramend.anatomy.sections import SENSES, sections_of
from paramend.reports import wording

# model_type → the stem of the names of its classes.
_STEMS = {
    "cohere": "Cohere",
    "cohere2": "Cohere2",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "glm": "Glm",
    "glm4": "Glm4",
    "granite": "Granite",
    "llama": "Llama",
    "ministral3": "Ministral3",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "olmo2": "Olmo2",
    "phi": "Phi",
    "phi3": "Phi3",
    "qwen2": "Qwen2",
    "qwen2_moe": "Qwen2Moe",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "persimmon": "Persimmon",
    "smollm3": "SmolLM3",
    "stablelm": "StableLm",
}
# model_type → the class with a head, "" if there is none, and the class without.
_CLASSES: Mapping[str, tuple[str, str]] = {
    **{kind: (f"{stem}ForCausalLM", f"{stem}Model") for kind, stem in _STEMS.items()},
    "aria_text": ("AriaTextForCausalLM", "AriaTextModel"),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextModel"),
    "gemma3n_text": ("Gemma3nForCausalLM", "Gemma3nTextModel"),
    "gemma4_text": ("Gemma4ForCausalLM", "Gemma4TextModel"),
    "glm4v_moe_text": ("", "Glm4vMoeTextModel"),
    "glm4v_text": ("", "Glm4vTextModel"),
    "llama4_text": ("Llama4ForCausalLM", "Llama4TextModel"),
    "mllama_text_model": ("MllamaForCausalLM", "MllamaTextModel"),
    "qwen2_5_vl_text": ("", "Qwen2_5_VLTextModel"),
    "qwen2_vl_text": ("", "Qwen2VLTextModel"),
    "qwen3_5_moe_text": ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextModel"),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", "Qwen3_5TextModel"),
    "qwen3_vl_moe_text": ("", "Qwen3VLMoeTextModel"),
    "qwen3_vl_text": ("", "Qwen3VLTextModel"),
    "clip_vision_model": ("", "CLIPVisionModel"),
    "idefics3_vision": ("", "Idefics3VisionTransformer"),
    "mllama_vision_model": ("", "MllamaVisionModel"),
    "pixtral": ("", "PixtralVisionModel"),
    "siglip_vision_model": ("", "SiglipVisionModel"),
    "smolvlm_vision": ("", "SmolVLMVisionTransformer"),
}
_TEXT = "text_config"
_DTYPES = ("dtype", "torch_dtype")
# What the configuration of the whole model says of its parts too.
_SHARED = (*_DTYPES, "bos_token_id", "eos_token_id", "pad_token_id", "quantization_config", "transformers_version")


@dataclass(frozen=True, slots=True)
class Part:
    """A model inside a model.

    Attributes:
        name: the key of its configuration, such as `text_config`.
        layers: the path of its layers.
        root: the path of all that belongs to it, but for its head.
        leaves: the numbers of its leaves, without its head.
        head: those of its head.
    """

    name: str
    layers: Pieces
    root: Pieces
    leaves: frozenset[int]
    head: frozenset[int]

    def configured(self, config: Mapping[str, Any], *, head: bool) -> tuple[dict[str, Any], list[str]]:
        """The configuration of the part alone, and what is to be said of it.

        Args:
            config: that of the whole model.
            head: whether the part has a head, or ties one to its embedding.
        """
        inner = config[self.name]
        shared = {key: config[key] for key in _SHARED if config.get(key) is not None and key not in inner}
        dtypes = {key: config[key] for key in _DTYPES if key in config}
        new = {key: value for key, value in inner.items() if key not in _DTYPES or not dtypes}
        kind = inner.get("model_type")
        classes = dict(zip((True, False), _CLASSES.get(kind, ("", "")), strict=True))
        own = inner.get("architectures")
        named = own[0] if isinstance(own, list) and own and str(own[0]).endswith(WITH_HEAD) == head else ""
        found = named or classes[head] or classes[False]
        said = [f"{self.name} becomes the configuration" + (f", of a {found}" if found else "")]
        if found:
            new["architectures"] = [found]
        else:
            new.pop("architectures", None)
            said.append(f"architectures is left out: no class is known for the model_type {kind!r}")
        if head and not found.endswith(WITH_HEAD):
            said.append(f"no class of {kind} with a head is known")
        if self.name == _TEXT:
            tied = config.get("tie_word_embeddings", inner.get("tie_word_embeddings"))
            new["tie_word_embeddings"] = head and not self.head if tied is None else tied
        return {**new, **shared, **dtypes}, said


def parts_of(config: Mapping[str, Any], paths: Mapping[int, Pieces]) -> list[Part]:
    """The models inside a model, where its configuration and its names tell them apart.

    Args:
        config: the configuration of the whole model.
        paths: the paths of its leaves by number.

    >>> config = {"text_config": {"num_hidden_layers": 1}, "vision_config": {"depth": 2}}
    >>> names = ["lm.model.layers.0.w", "lm.lm_head.w", "visual.blocks.0.w", "visual.blocks.1.w", "connector.w"]
    >>> for part in parts_of(config, dict(enumerate(tuple(name.split(".")) for name in names))):
    ...     print(part.name, part.root, sorted(part.leaves), sorted(part.head))
    text_config ('lm',) [0] [1]
    vision_config ('visual',) [2, 3] []
    """
    layers = dict(_layers(config, list(paths.values())))
    senses = [path for path in paths.values() if any(word in piece for piece in path for word in SENSES)]
    roots: dict[str, Pieces] = {}
    for name, own in layers.items():
        apart = [*(other for other in layers.values() if other != own), *(senses if name == _TEXT else ())]
        if apart:
            roots[name] = _root(own, apart)
    found = []
    for name, root in roots.items():
        under = {number for number, path in paths.items() if path[: len(root)] == root}
        others = [other for other in roots.values() if other != root]
        apart = {n for n, path in paths.items() if not any(path[: len(other)] == other for other in others)}
        head = {n for n in apart if HEADS.intersection(paths[n])} if name == _TEXT else set[int]()
        found.append(Part(name, layers[name], root, frozenset(under - head), frozenset(head)))
    return found


def _layers(config: Mapping[str, Any], paths: Sequence[Pieces]) -> Iterator[tuple[str, Pieces]]:
    """The key of each part's configuration, and where its layers are: the run of layers with the most leaves."""
    runs = numbered(paths, {})
    leaves = Counter(path[:depth] for path in paths for depth in range(1, len(path)) if path[:depth] in runs)
    for parent in sorted(runs, key=leaves.__getitem__):
        for place in sections_of(config, len(runs[parent]), parent):
            if len(place) == 1 and place[0].endswith("_config"):
                yield place[0], parent


def _root(own: Pieces, others: Sequence[Pieces]) -> Pieces:
    """The shortest path to layers that leads to no others."""
    return next((own[:n] for n in range(1, len(own)) if not any(o[:n] == own[:n] for o in others)), own)


def part_config(
    config: Mapping[str, Any], paths: Mapping[int, Pieces], taken: Set[int], renamed: Mapping[int, Pieces]
) -> tuple[str, dict[str, Any], list[str]] | None:
    """The key of the part whose leaves were taken, its configuration, and what is to be said; None if it is not one.

    Args:
        config: the configuration of the whole model.
        paths: the paths of its leaves by number.
        taken: the leaves that were taken.
        renamed: their new paths.
    """
    for part in parts_of(config, paths):
        if taken not in (part.leaves, part.leaves | part.head):
            continue
        classes = config.get("architectures")
        whole = str(classes[0]) if isinstance(classes, list) and classes else ""
        tied = not part.head and part.name == _TEXT and whole.endswith(WITH_HEAD)
        head = tied or (bool(part.head) and taken == part.leaves | part.head)
        new, said = part.configured(config, head=head)
        if part.head and not head:
            said.append(f"its head, {'.'.join(paths[min(part.head)])}, is not taken")
        said += _names(part, paths, renamed, head=head, kind=str(new.get("model_type")))
        return part.name, new, said
    return None


def _names(
    part: Part, paths: Mapping[int, Pieces], renamed: Mapping[int, Pieces], *, head: bool, kind: str
) -> list[str]:
    """What is to be said of the new names, if the class looks for others."""
    if part.name != _TEXT or kind not in _CLASSES:
        return []
    above = ("model",) if head and _CLASSES[kind][0] else ()
    first = next(n for n in part.leaves if paths[n][: len(part.layers)] == part.layers)
    rest = paths[first][len(part.layers) - 1 :]
    if renamed[first] in ((*above, *rest), ("model", *rest)):
        return []
    rules = {(*part.layers[:-1], "**"): (*above, "**")}
    rules |= {(*paths[n][:-1], "**"): ("lm_head", "**") for n in part.head if head and paths[n][:-1] != ("lm_head",)}
    said = " ".join(f"--rename '{'.'.join(old)}={'.'.join(new)}'" for old, new in rules.items())
    looks = wording.listing([".".join((*above, *rest[:1]))])
    return [f"its class looks for {looks}, and these are in {'.'.join(renamed[first][: -len(rest) + 1])}: {said}"]
