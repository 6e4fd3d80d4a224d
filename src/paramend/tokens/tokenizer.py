"""`Tokenizer`: the tokens of a model, in all the files beside its weights that list them."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from paramend.anatomy.documents import Change, Document, document_of
from paramend.anatomy.sections import beside
from paramend.errors import BadCheckpoint, MissingExtra, Unsupported
from paramend.tokens.closure import closed, pair_of

JSON, CONFIG = "tokenizer.json", "tokenizer_config.json"
_MAP, _ADDED, _WORDS, _MERGES, _LINES = (
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
_FILES = (JSON, CONFIG, _MAP, _ADDED, _WORDS, _MERGES, _LINES)
# Files in formats of their own, from which the others were made.
_BINARY = ("*.model", "*.tiktoken", "tekken.json")
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}

Data = Mapping[str, Any]


@dataclass(frozen=True)
class Tokenizer:
    """The tokens of a model.

    Attributes:
        files: name → file, of those beside the weights that list tokens.
        data: what a `tokenizer.json` holds, with the added tokens of all files; made of the others if there is none.
        stale: the files in other formats, which go when tokens change.
    """

    files: Mapping[str, Document]
    data: Data
    stale: tuple[Path, ...] = ()

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token → its number."""
        vocab = self.data["model"]["vocab"]
        words = vocab if isinstance(vocab, Mapping) else {piece: number for number, (piece, *_) in enumerate(vocab)}
        return {**words, **{entry["content"]: entry["id"] for entry in self.data["added_tokens"]}}

    @cached_property
    def size(self) -> int:
        """One more than the last number: that of the next token."""
        return max(self.ids.values(), default=-1) + 1

    def closed(self, ids: Iterable[int]) -> set[int]:
        """Tokens, with those that no tokenizer can be without, and those that all of them are made of."""
        data, model = self.data, self.data["model"]
        found = {*ids, *(entry["id"] for entry in data["added_tokens"] if entry.get("special"))}
        found |= {model["unk_id"]} if type(model.get("unk_id")) is int else set()

        def note(number: int) -> int:
            found.add(number)
            return number

        _processed(data.get("post_processor"), note)
        tokens = [model.get("unk_token"), (data.get("padding") or {}).get("pad_token")]
        for name in (CONFIG, _MAP):
            tokens += _named(self.files[name].values) if name in self.files else []
        found |= {self.ids[token] for token in tokens if token in self.ids}
        coding = json.dumps([data.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")])
        return closed(model, found, bytewise=_WORDS in self.files or "ByteLevel" in coding)

    def cut(self, text: str) -> list[int]:
        """The tokens that a text consists of.

        Raises:
            Unsupported: there is no `tokenizer.json`, which says how texts are cut.
            MissingExtra: the package tokenizers is not installed.
        """
        if JSON not in self.files:
            raise Unsupported(f"texts are cut as {JSON} says, and there is none")
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def _library(self) -> Any:
        try:
            from tokenizers import Tokenizer as Library  # optional, and slow to import
        except ImportError:
            raise MissingExtra("tokenizers is not installed, which cuts texts", hint="pip install tokenizers") from None
        return Library.from_str(self.files[JSON].text.decode())

    def renumbered(self, new: Mapping[int, int]) -> list[Document]:
        """The files after tokens got other numbers; those without one are gone."""
        model, vocab = dict(self.data["model"]), self.data["model"]["vocab"]
        if isinstance(vocab, list):
            model["vocab"] = [entry for number, entry in enumerate(vocab) if number in new]
        else:
            model["vocab"] = {token: new[number] for token, number in vocab.items() if number in new}
        if type(model.get("unk_id")) is int:
            model["unk_id"] = new[model["unk_id"]]
        if model.get("merges"):
            prefix = model.get("continuing_subword_prefix") or ""
            model["merges"] = [each for each in model["merges"] if _stays(pair_of(each), prefix, model["vocab"])]
        data = {**self.data, "model": model}
        data["added_tokens"] = [{**e, "id": new[e["id"]]} for e in data["added_tokens"] if e["id"] in new]
        if data.get("padding"):
            data["padding"] = {**data["padding"], "pad_id": new[data["padding"]["pad_id"]]}
        if data.get("post_processor"):
            data["post_processor"] = _processed(data["post_processor"], new.__getitem__)
        return self._written(replace(self, data=data))

    def extended(self, tokens: Sequence[str]) -> list[Document]:
        """The files with more tokens, which get the next numbers."""
        more = [{"id": self.size + at, "content": token, **_PLAIN} for at, token in enumerate(tokens)]
        return self._written(replace(self, data={**self.data, "added_tokens": [*self.data["added_tokens"], *more]}))

    def _written(self, new: "Tokenizer") -> list[Document]:
        """The files that change."""
        counts = str(len(self.ids)), str(len(new.ids))
        found = [Document(path, path.read_bytes(), b"") for path in self.stale]
        for name, document in self.files.items():
            text = _text(document, new)
            if text != document.text:
                found.append(replace(document, text=text, shown=(Change(name, "tokens", *counts),)))
        return found


def tokenizer_of(leaves: Any) -> Tokenizer | None:
    """The tokenizer beside an opened checkpoint; None for other trees, and where there is none.

    Raises:
        BadCheckpoint: one of its files is damaged.
        Unsupported: it is there in another format alone.
    """
    files = {name: file for name in _FILES if (file := document_of(leaves, name)) is not None and file.text}
    path = getattr(leaves, "path", None)
    folder = beside(path).parent if isinstance(path, Path) else None
    stale = tuple(sorted(file for glob in _BINARY if folder for file in folder.glob(glob)))
    try:
        data = _read(files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadCheckpoint(f"{folder}: the tokenizer cannot be understood: {error!r}") from None
    if data is None and stale:
        raise Unsupported(
            f"{stale[0].name} is a tokenizer in a format of its own, and there is no {JSON}",
            hint=f"transformers.AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})",
        )
    return None if data is None else Tokenizer(files, data, stale)


def _read(files: Mapping[str, Document]) -> dict[str, Any] | None:
    """What a `tokenizer.json` holds; without one, what it would, as far as the other files say it."""
    values = {name: file.values for name, file in files.items() if name.endswith(".json")}
    lines = {name: file.text.decode().split("\n") for name, file in files.items() if name not in values}
    if JSON in values:
        data = values[JSON]
    elif _WORDS in values:
        merges = [line for line in lines.get(_MERGES, ()) if line and not line.startswith("#version")]
        suffix = "</w>" if any(line.endswith("</w>") for line in merges) else ""
        data = {"model": {"vocab": values[_WORDS], "merges": merges, "end_of_word_suffix": suffix}}
    elif _LINES in lines:
        words = lines[_LINES][:-1] if lines[_LINES][-1] == "" else lines[_LINES]
        data = {"model": {"vocab": {word.removesuffix("\r"): number for number, word in enumerate(words)}}}
    else:
        return None
    added = {number: {"content": token, **_PLAIN} for token, number in values.get(_ADDED, {}).items()}
    added |= {int(number): each for number, each in values.get(CONFIG, {}).get("added_tokens_decoder", {}).items()}
    added |= {entry["id"]: entry for entry in data.get("added_tokens") or ()}
    return {**data, "added_tokens": [{"id": number, **added[number]} for number in sorted(added)]}


def _text(document: Document, new: Tokenizer) -> bytes:
    """The text of a file for other tokens."""
    name, model, added = document.name, new.data["model"], new.data["added_tokens"]
    if name in (_MERGES, _LINES):
        head = [line for line in document.text.decode().split("\n", 1)[:1] if line.startswith("#version")]
        words = {number: word for word, number in model["vocab"].items()}
        count = max(words, default=-1) + 1
        lines = (
            map(" ".join, map(pair_of, model["merges"]))
            if name == _MERGES
            else (words.get(n, "") for n in range(count))
        )
        return "".join(f"{line}\n" for line in (*head, *lines)).encode()
    values = document.values
    if name == JSON:
        values = dict(new.data)
    elif name == _WORDS:
        values = model["vocab"]
    elif name == _ADDED:
        values = {entry["content"]: entry["id"] for entry in added if entry["content"] not in model["vocab"]}
    elif name == CONFIG and added and ("added_tokens_decoder" in values or JSON not in new.files):
        decoder = {str(e["id"]): {key: value for key, value in e.items() if key != "id"} for e in added}
        values = {**values, "added_tokens_decoder": decoder}
    return document.holding(values).text


def _stays(pair: tuple[str, str], prefix: str, vocab: Mapping[str, int]) -> bool:
    return all(each in vocab for each in (*pair, pair[0] + pair[1].removeprefix(prefix)))


def _named(values: Data) -> Iterator[Any]:
    """The tokens that a file names by their roles."""
    for key, value in values.items():
        if key.endswith(("_token", "_special_tokens")):
            for each in value if isinstance(value, list) else [value]:
                yield each.get("content") if isinstance(each, Mapping) else each


def _processed(value: Any, new: Callable[[int], int]) -> Any:
    """A post-processor with other numbers of tokens."""
    if isinstance(value, Mapping):
        return {
            key: [*map(new, each)]
            if key == "ids"
            else [each[0], new(each[1])]
            if key in ("sep", "cls")
            else _processed(each, new)
            for key, each in value.items()
        }
    return [_processed(each, new) for each in value] if isinstance(value, list) else value
