"""The tokens of a model as keys of GGUF, from `tokenizer.json` and the files beside it."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from paramend.anatomy.documents import document_of
from paramend.anatomy.sections import beside

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
    tokens = {number: token for token, number in model["vocab"].items()} | {
        n: one["content"] for n, one in added.items()
    }
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
    return {_PREFIX + key: value for key, value in keys.items()} | dict(
        _special(checkpoint, config, options, tokens)
    ), ()


def _kind(token: str | None, added: Mapping[str, Any] | None, model: Mapping[str, Any], *, pieces: bool) -> int:
    if token is None:
        return _UNUSED
    if pieces and token == model.get("unk_token"):
        return _UNKNOWN
    if added is not None:
        return _CONTROL if added.get("special") else _GIVEN
    return _BYTE if pieces and len(token) == 6 and token.startswith("<0x") else _NORMAL


def _cut(table: Mapping[str, Any]) -> str:
    """The name that llama.cpp has for how a text is cut."""
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
