"""Models of transformers as the GGUF files that llama.cpp reads, and back: leaves by a layout, keys by a configuration.

What a key means is said in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from paramend.anatomy.documents import Document, document_of
from paramend.edits.plan import call
from paramend.errors import Unsupported
from paramend.formats.gguf.keys import nested
from paramend.formats.jsontext import CONFIG
from paramend.leaves.specs import BLOCKS
from paramend.mapping.llama_cpp_tokens import tokens_of
from paramend.mapping.shelf import layout

# `model_type` → architecture in GGUF, of which there is a layout.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# What a configuration calls a number, and what GGUF does, below the architecture.
_NUMBERS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "vocab_size": "vocab_size",
}
# `general.file_type` by the dtype of most leaves.
_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}
_ROPE = ("rope_parameters", "rope_scaling")


def translated(checkpoint: Any, form: str) -> tuple[Any, tuple[str, ...]]:
    """A checkpoint as another format has its model, and what is to be said of that: from and to GGUF, leaves have the
    names and the order of rows that llama.cpp has, or transformers.

    Args:
        checkpoint: from `pm.open`.
        form: the name of the format that is written.

    Raises:
        Unsupported: what the model computes cannot be said in GGUF, or codes would have to become floats.
    """
    if "gguf" not in (form, checkpoint.format) or form == checkpoint.format:
        return checkpoint, ()
    document = document_of(checkpoint)
    values: dict[str, Any] = {} if document is None else document.values
    if form != "gguf":
        return _from_gguf(checkpoint, values)
    kind = values.get("model_type")
    if kind is None:
        return checkpoint, ()
    if kind not in _ARCHITECTURES:
        raise Unsupported(
            f"how llama.cpp stores models of {kind} is not known here", hint=f"{', '.join(_ARCHITECTURES)} are"
        )
    return _to_gguf(checkpoint, values, _ARCHITECTURES[kind])


def _to_gguf(checkpoint: Any, config: Mapping[str, Any], kind: str) -> tuple[Any, tuple[str, ...]]:
    keys, said = tokens_of(checkpoint, config)
    made, _ = layout(f"hf_to_llama_cpp_{kind}").to(checkpoint)
    specs = {number: made.spec(number) for number in made.index.numbers}
    # llama.cpp computes with norms and biases of float32 alone.
    short = [n for n, spec in specs.items() if spec.ndim < 2 and spec.kind == "float" and spec.dtype != "float32"]
    made = made.edited(dict.fromkeys(short, call("cast", {"dtype": "float32"}))) if short else made
    most = Counter(spec.dtype for spec in specs.values() if spec.ndim > 1).most_common(1)
    general = {
        "general.architecture": kind,
        "general.name": Path(checkpoint.path).resolve().name,
        "general.file_type": _FILE_TYPES.get(most[0][0] if most else "", 0),
        "general.quantization_version": 2,
    }
    text = json.dumps(nested(general | _numbers(config, kind) | keys, every=True)).encode()
    return made.planned(made.plan.beside(Document(Path("keys"), b"", text, own=True))), said


def _numbers(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The keys of an architecture, from a configuration."""
    heads = config["num_attention_heads"]
    values = {"num_key_value_heads": heads, "rms_norm_eps": 1e-6, "rope_theta": 10000.0} | dict(config)
    values["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    rope = next((config[key] for key in _ROPE if config.get(key)), {})
    values["rope_theta"] = float(rope.get("rope_theta") or values["rope_theta"])
    found = {f"{kind}.{key}": values[name] for name, key in _NUMBERS.items() if values.get(name) is not None}
    found |= {f"{kind}.attention.value_length": values["head_dim"], f"{kind}.rope.dimension_count": values["head_dim"]}
    way = rope.get("rope_type", rope.get("type", "default"))
    if way not in ("default", "linear"):
        raise Unsupported(f"the configuration scales positions by {way}, which is not translated to GGUF")
    if way == "linear":
        found |= {f"{kind}.rope.scaling.type": way, f"{kind}.rope.scaling.factor": float(rope["factor"])}
    if config.get("use_sliding_window", kind == "llama") and config.get("sliding_window"):
        found[f"{kind}.attention.sliding_window"] = config["sliding_window"]
    return found


def _from_gguf(checkpoint: Any, values: Mapping[str, Any]) -> tuple[Any, tuple[str, ...]]:
    kind = values.get("general", {}).get("architecture")
    coded = next((n for n in checkpoint.index.numbers if checkpoint.spec(n).dtype in BLOCKS), None)
    if coded is not None:
        raise Unsupported(
            f"{checkpoint.index.path(coded)} is in {checkpoint.spec(coded).dtype}, which GGUF alone holds",
            hint=f"paramend dequantize {checkpoint.path} --dtype float16 -o FLOATS.gguf, and convert that",
        )
    if kind not in _CLASSES:
        return checkpoint, (f"names stay those of llama.cpp: there is no layout for {kind}",) if kind else ()
    metadata = {f"{kind}.{key}": None for key in _NUMBERS.values()} | dict(checkpoint.metadata)
    found = {name: _plain(metadata[f"{kind}.{key}"]) for name, key in _NUMBERS.items()}
    config = {"architectures": [_CLASSES[kind]], "model_type": kind, "hidden_act": "silu"}
    config |= {name: value for name, value in found.items() if value is not None}
    heads = config["num_attention_heads"]
    names = {checkpoint.index.path(number): number for number in checkpoint.index.numbers}
    config["num_key_value_heads"] = config.get("num_key_value_heads", heads)
    config.setdefault("vocab_size", checkpoint.spec(names["token_embd.weight"]).shape[0])
    config["tie_word_embeddings"] = "output.weight" not in names
    config["dtype"] = Counter(
        spec.dtype for number in names.values() if (spec := checkpoint.spec(number)).ndim > 1
    ).most_common(1)[0][0]
    for name in ("bos", "eos"):
        if (token := metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[f"{name}_token_id"] = int(token)
    if "rope_freqs.weight" in names or metadata.get(f"{kind}.rope.scaling.type") not in (None, "none"):
        raise Unsupported(f"{checkpoint.path} scales positions, which is not translated from GGUF")
    numbers = {} if kind != "llama" else {key: config[key] for key in ("num_attention_heads", "num_key_value_heads")}
    made, _ = layout(f"hf_to_llama_cpp_{kind}").back(checkpoint, **numbers)
    text = json.dumps(config, indent=2).encode() + b"\n"
    document = Document(Path(checkpoint.path).with_name(CONFIG), b"", text)
    plan = replace(made.plan, texts=(document,))
    return made.planned(plan), (
        "the tokenizer stays in the GGUF file: take the files of the model that it was made of",
    )


def _plain(value: Any) -> Any:
    return value if value is None else float(str(value)) if value.dtype.kind == "f" else value.item()
