"""Models of transformers as the GGUF files that llama.cpp reads, and back: leaves by a layout, keys by a configuration.

What a key means is said in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from paramend.anatomy.documents import Document, document_of, place_of
from paramend.anatomy.sections import beside
from paramend.edits.plan import call
from paramend.errors import NoMatch, Unsupported
from paramend.formats.gguf.keys import nested
from paramend.formats.jsontext import CONFIG
from paramend.leaves.specs import BLOCKS, Spec
from paramend.mapping.layout import layout

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
    """A checkpoint as the format that is written has models, and what is to be said of that: from and to GGUF,
    leaves have the names and the order of rows that llama.cpp has, or transformers."""
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
        why = f"how llama.cpp stores models of {kind} is not known here"
        raise Unsupported(why, hint=f"{', '.join(_ARCHITECTURES)} are")
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
    return Counter(spec.dtype for spec in specs if spec.ndim > 1).most_common(1)[0][0]


_PREFIX = "tokenizer.ggml."
# Kinds of tokens.
_NORMAL, _UNKNOWN, _CONTROL, _GIVEN, _UNUSED, _BYTE = range(1, 7)
# How a text is cut before merges, by a part of the pattern that a tokenizer has for it.
_CUTS = (("\\p{Lu}", "tekken"), ("\\p{N}{1,3}", "llama-bpe"), ("(?i:", "qwen2"), ("", "gpt-2"))
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def tokens_of(checkpoint: Any, config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The keys that tell tokens, and what is to be said; without a `tokenizer.json` of byte pairs there are none."""
    files = {name: document_of(checkpoint, name) for name in ("tokenizer.json", "tokenizer_config.json")}
    table, options = (found.values if found else {} for found in files.values())
    model = table.get("model") or {}
    if model.get("type") != "BPE":
        what = f"its model is {model.get('type')}, not BPE" if table else "there is no tokenizer.json"
        return {}, (f"no tokens are written: {what}",)
    added = {entry["id"]: entry for entry in table.get("added_tokens") or ()}
    tokens = {number: token for token, number in model["vocab"].items()}
    tokens |= {number: each["content"] for number, each in added.items()}
    size = max([config.get("vocab_size") or 0, *(number + 1 for number in tokens)])
    merges = [each if isinstance(each, str) else " ".join(each) for each in model.get("merges") or ()]
    pieces = bool(model.get("byte_fallback"))  # as sentencepiece has them, with bytes as tokens of their own
    kinds = [_kind(tokens.get(number), added.get(number), model, pieces=pieces) for number in range(size)]
    keys: dict[str, Any] = {
        "model": "llama" if pieces else "gpt2",
        "tokens": [tokens.get(number, f"[PAD{number}]") for number in range(size)],
        "token_type": kinds,
    }
    if pieces:
        rank = {merge.replace(" ", ""): -float(place) for place, merge in reversed([*enumerate(merges)])}
        keys["scores"] = [
            rank.get(token, -1e6 if kind == _NORMAL else 0.0) for token, kind in zip(keys["tokens"], kinds, strict=True)
        ]
        keys["add_space_prefix"] = "Prepend" in json.dumps(table.get("normalizer")) or "first" in json.dumps(
            table.get("pre_tokenizer")
        )
    else:
        keys |= {"pre": _cut(table), "merges": merges}
    keys = {_PREFIX + key: value for key, value in keys.items()}
    return keys | dict(_special(checkpoint, config, options, tokens)), ()


def _kind(token: str | None, added: Mapping[str, Any] | None, model: Mapping[str, Any], *, pieces: bool) -> int:
    if token is None:
        return _UNUSED
    if pieces and token == model.get("unk_token"):
        return _UNKNOWN
    if added is not None:
        return _CONTROL if added.get("special") else _GIVEN
    return _BYTE if pieces and len(token) == 6 and token.startswith("<0x") else _NORMAL


def _cut(table: Mapping[str, Any]) -> str:
    pattern = json.dumps(table.get("pre_tokenizer"), ensure_ascii=False).replace("\\\\", "\\")
    return next(name for part, name in _CUTS if part in pattern)


def _special(
    checkpoint: Any, config: Mapping[str, Any], options: Mapping[str, Any], tokens: Mapping[int, str]
) -> Iterator[tuple[str, Any]]:
    """The numbers of special tokens, whether they are added, and the template of a chat."""
    numbers: dict[str, Any] = {token: number for number, token in tokens.items()}
    for name, key in _SPECIAL.items():
        said = options.get(f"{name}_token")
        text = said.get("content") if isinstance(said, dict) else said
        known = config.get(f"{name}_token_id")
        number: Any = numbers.get(str(text), known[0] if isinstance(known, list) and known else known)
        if type(number) is int:
            yield f"{_PREFIX}{key}_token_id", number
    for name in ("bos", "eos"):
        if type(options.get(f"add_{name}_token")) is bool:
            yield f"{_PREFIX}add_{name}_token", options[f"add_{name}_token"]
    file = beside(checkpoint.path, "chat_template.jinja")
    template = file.read_text() if file.is_file() else options.get("chat_template")
    if isinstance(template, str):
        yield "tokenizer.chat_template", template
