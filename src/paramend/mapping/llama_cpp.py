"""Models of transformers as the GGUF files that llama.cpp reads, and back: leaves by a layout, keys by a configuration.

What a key means is said in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from paramend.anatomy.documents import Document, document_of, place_of
from paramend.edits.plan import call
from paramend.errors import NoMatch, Unsupported
from paramend.formats.gguf.keys import nested
from paramend.formats.jsontext import CONFIG
from paramend.leaves.specs import BLOCKS, Spec
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
    "sliding_window": "attention.sliding_window",
    "vocab_size": "vocab_size",
}
# What these architectures are in llama.cpp, whatever a configuration says.
_FIXED = {"hidden_act": "silu", "partial_rotary_factor": 1.0, "mlp_bias": False}
# `general.file_type` by the dtype of most leaves.
_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}
_ROPE = ("rope_parameters", "rope_scaling")


def translated(checkpoint: Any, form: str) -> tuple[Any, tuple[str, ...]]:
    """A checkpoint as another format has its model, and what is to be said of that: from and to GGUF, leaves have the
    names and the order of rows that llama.cpp has, or transformers.

    Args:
        checkpoint: from `pm.open`.
        form: the name of the format that is written.
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
    general = {
        "general.architecture": kind,
        "general.name": Path(checkpoint.path).resolve().name,
        "general.file_type": _FILE_TYPES.get(_most(specs.values()), 0),
        "general.quantization_version": 2,
    }
    text = json.dumps(nested(general | _numbers(config, kind) | keys, every=True)).encode()
    return made.planned(made.plan.beside(Document(Path("keys"), b"", text, own=True))), said


def _numbers(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The keys of an architecture, from a configuration."""
    heads = config["num_attention_heads"]
    values = {"num_key_value_heads": heads, "rms_norm_eps": 1e-6, "rope_theta": 10000.0} | dict(config)
    values["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    rope: Mapping[str, Any] = next((config[key] for key in _ROPE if config.get(key)), {})
    values["rope_theta"] = float(rope.get("rope_theta") or values["rope_theta"])
    way = rope.get("rope_type", rope.get("type", "default"))
    wrong = [f"{key}={config[key]}" for key, usual in _FIXED.items() if config.get(key, usual) not in (usual, None)]
    wrong += [f"positions scaled by {way}"] if way not in ("default", "linear") else []
    if wrong:
        raise Unsupported(f"the configuration has {wrong[0]}, which is not translated to GGUF")
    found = {f"{kind}.{key}": values[name] for name, key in _NUMBERS.items() if values.get(name) is not None}
    found |= {f"{kind}.attention.value_length": values["head_dim"], f"{kind}.rope.dimension_count": values["head_dim"]}
    if way == "linear":
        found |= {f"{kind}.rope.scaling.type": way, f"{kind}.rope.scaling.factor": float(rope["factor"])}
    return found


def _from_gguf(checkpoint: Any, values: dict[str, Any]) -> tuple[Any, tuple[str, ...]]:
    names = {checkpoint.index.path(number): checkpoint.spec(number) for number in checkpoint.index.numbers}
    kind, coded = _value(values, "general.architecture"), next((n for n in names if names[n].dtype in BLOCKS), None)
    if coded is not None:
        raise Unsupported(
            f"{coded} is in {names[coded].dtype}, which GGUF alone holds",
            hint=f"paramend dequantize {checkpoint.path} --dtype float16 -o FLOATS.gguf, and convert that",
        )
    if kind not in _CLASSES:
        return checkpoint, (f"names stay those of llama.cpp: there is no layout for {kind}",) if kind else ()
    if "rope_freqs.weight" in names or _value(values, f"{kind}.rope.scaling.type") not in (None, "none"):
        raise Unsupported(f"{checkpoint.path} scales positions, which is not translated from GGUF")
    found = {name: _value(values, f"{kind}.{key}") for name, key in _NUMBERS.items()}
    found |= {f"{name}_token_id": _value(values, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    config = {"architectures": [_CLASSES[kind]], "model_type": kind, "hidden_act": _FIXED["hidden_act"]}
    config |= {name: value for name, value in found.items() if value is not None}
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("vocab_size", names["token_embd.weight"].shape[0])
    config["tie_word_embeddings"] = "output.weight" not in names
    config["dtype"] = _most(names.values())
    numbers = {key: config[key] for key in ("num_attention_heads", "num_key_value_heads") if kind == "llama"}
    made, _ = layout(f"hf_to_llama_cpp_{kind}").back(checkpoint, **numbers)
    text = json.dumps(config, indent=2).encode() + b"\n"
    plan = replace(made.plan, texts=(Document(Path(checkpoint.path).with_name(CONFIG), b"", text),))
    return made.planned(plan), ("the tokens stay in GGUF: take the tokenizer of the model that it was made of",)


def _value(values: dict[str, Any], key: str) -> Any:
    """The value of a key, None if there is none."""
    with suppress(NoMatch):
        part, last = place_of(values, key)
        return part.get(last)
    return None


def _most(specs: Iterable[Spec]) -> str:
    """The dtype of most matrices."""
    return Counter(spec.dtype for spec in specs if spec.ndim > 1).most_common(1)[0][0]
