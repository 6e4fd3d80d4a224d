"""`Tokenizer`: the tokens of a model, in the files beside its weights."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from paramend.anatomy.documents import Change, Document, document_of
from paramend.anatomy.sections import beside
from paramend.errors import BadCheckpoint, MissingExtra, Unsupported

JSON, CONFIG, _MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
# Other files that list the tokens: what `tokenizer.json` was made of.
_OTHERS = ("*.model", "*.tiktoken", "tekken.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
_DECODER = "added_tokens_decoder"


@dataclass(frozen=True)
class Tokenizer:
    """The tokens of a model."""

    files: Mapping[str, Document]  # by their names
    data: Mapping[str, Any]  # what `tokenizer.json` holds, with the tokens that other files add
    others: tuple[Path, ...] = ()  # further files that list the tokens, which go when these change

    @cached_property
    def ids(self) -> dict[str, int]:
        vocab = self.data["model"]["vocab"]
        words = vocab if isinstance(vocab, Mapping) else {piece: number for number, (piece, *_) in enumerate(vocab)}
        return {**words, **{entry["content"]: entry["id"] for entry in self.data["added_tokens"]}}

    @cached_property
    def size(self) -> int:
        """One more than the last number: that of the next token."""
        return max(self.ids.values(), default=-1) + 1

    @property
    def bytewise(self) -> bool:
        """Whether the characters of tokens stand for bytes."""
        return "ByteLevel" in json.dumps([self.data.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")])

    @property
    def texts(self) -> dict[int, bytes]:
        """The number of each token → what it stands for in a text."""
        added = {entry["content"] for entry in self.data["added_tokens"]}
        return {
            number: token.encode() if token in added else text_of(token, bytewise=self.bytewise)
            for token, number in self.ids.items()
        }

    def closed(self, ids: Iterable[int]) -> set[int]:
        """Tokens, with those that no tokenizer can be without, and those that all of them are made of."""
        data, model = self.data, self.data["model"]
        found = {*ids, *(entry["id"] for entry in data["added_tokens"] if entry.get("special"))}
        found |= {model["unk_id"]} if type(model.get("unk_id")) is int else set()
        tokens = [model.get("unk_token"), (data.get("padding") or {}).get("pad_token")]
        for name in (CONFIG, _MAP):
            tokens += _named(self.files[name].values) if name in self.files else []
        found |= {self.ids[token] for token in tokens if token in self.ids}

        def note(number: int) -> int:
            found.add(number)
            return number

        _processed(data.get("post_processor"), note)
        return closed(model, found, bytewise=self.bytewise)

    def cut(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens that texts consist of; `MissingExtra` if the package tokenizers is not installed."""
        try:
            from tokenizers import Tokenizer as Library  # optional, and slow to import
        except ImportError:
            raise MissingExtra("tokenizers is not installed, which cuts texts", hint="pip install tokenizers") from None
        library = Library.from_str(self.files[JSON].text.decode())
        return [library.encode(text, add_special_tokens=False).ids for text in texts]

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
        return self._with(data)

    def extended(self, tokens: Sequence[str]) -> list[Document]:
        """The files with more tokens, which get the next numbers."""
        more = [{"id": self.size + at, "content": token, **_PLAIN} for at, token in enumerate(tokens)]
        return self._with({**self.data, "added_tokens": [*self.data["added_tokens"], *more]})

    def _with(self, data: Mapping[str, Any]) -> list[Document]:
        """The files that change if `tokenizer.json` is to hold this."""
        lines = b"\n" in self.files[JSON].text.strip()
        text = json.dumps(data, ensure_ascii=False, indent=2 if lines else None)  # as tokenizers itself writes it
        files = [replace(self.files[JSON], text=text.encode())]
        if CONFIG in self.files and _DECODER in self.files[CONFIG].values:
            entries = {str(e["id"]): {key: e[key] for key in e if key != "id"} for e in data["added_tokens"]}
            files.append(self.files[CONFIG].holding({**self.files[CONFIG].values, _DECODER: entries}))
        counts = [str(len(each.ids)) for each in (self, replace(self, data=data))]
        files = [replace(each, shown=(Change(each.name, "tokens", *counts),)) for each in files]
        return [*files, *(Document(path, path.read_bytes(), b"") for path in self.others)]

    def instead_of(self, other: "Tokenizer") -> list[Document]:
        """Its files in the places of those of another tokenizer."""
        old = {path.name: b"" for path in other.others} | {name: each.text for name, each in other.files.items()}
        new = {path.name: path.read_bytes() for path in self.others} | {n: each.text for n, each in self.files.items()}
        shown = {JSON: (Change(JSON, "tokens", str(len(other.ids)), str(len(self.ids))),)}
        folder = other.files[JSON].file.parent
        every = sorted({*old, *new})
        return [Document(folder / n, old.get(n, b""), new.get(n, b""), shown=shown.get(n, ())) for n in every]


def tokenizer_of(leaves: Any) -> Tokenizer | None:
    """The tokenizer beside an opened checkpoint; None for other trees, and where there is none."""
    path = getattr(leaves, "path", None)
    if not isinstance(path, Path):
        return None
    files = {name: file for name in (JSON, CONFIG, _MAP) if (file := document_of(leaves, name)) is not None}
    folder, gone = beside(path).parent, {each.name for each in leaves.texts if not each.text}
    others = tuple(sorted(file for glob in _OTHERS for file in folder.glob(glob) if file.name not in gone))
    if JSON not in files:
        if others:
            raise Unsupported(
                f"{others[0].name} lists the tokens of {folder}, and there is no {JSON}",
                hint=f"transformers.AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})",
            )
        return None
    data = files[JSON].values
    try:
        added = files[CONFIG].values.get(_DECODER, {}) if CONFIG in files else {}
        entries = {int(number): {"id": int(number), **entry} for number, entry in added.items()}
        entries |= {entry["id"]: entry for entry in data.get("added_tokens") or ()}
        found = Tokenizer(files, {**data, "added_tokens": [entries[number] for number in sorted(entries)]}, others)
        _ = found.size, [pair_of(each) for each in (data["model"].get("merges") or ())[:1]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadCheckpoint(f"{files[JSON].file} is not a tokenizer: {error!r}") from None
    return found


def _stays(pair: tuple[str, str], prefix: str, vocab: Mapping[str, int]) -> bool:
    return all(each in vocab for each in (*pair, pair[0] + pair[1].removeprefix(prefix)))


def _named(values: Mapping[str, Any]) -> Iterator[Any]:
    for key, value in values.items():
        if key.endswith(("_token", "_special_tokens")):
            for each in value if isinstance(value, list) else [value]:
                yield each.get("content") if isinstance(each, Mapping) else each


def _processed(value: Any, new: Callable[[int], int]) -> Any:
    """A post-processor with other numbers of tokens."""
    if isinstance(value, list):
        return [_processed(each, new) for each in value]
    if not isinstance(value, Mapping):
        return value
    made = {key: _processed(each, new) for key, each in value.items()}
    made |= {key: [each[0], new(each[1])] for key, each in value.items() if key in ("sep", "cls")}
    return made | ({"ids": [*map(new, value["ids"])]} if "ids" in value else {})


_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# The characters that stand for bytes in vocabularies like that of GPT-2: those that can be seen stand for themselves.
_SEEN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(byte): byte for byte in _SEEN}
_BYTES |= {chr(256 + at): byte for at, byte in enumerate(sorted(set(range(256)) - set(_SEEN)))}


def text_of(token: str, *, bytewise: bool) -> bytes:
    """What a token stands for in a text; its characters stand for bytes if it is `bytewise`.

    >>> text_of("Ġfox", bytewise=True), text_of("▁fox", bytewise=False), text_of("<0x0A>", bytewise=False)
    (b' fox', b' fox', b'\\n')
    """
    if bytewise and all(letter in _BYTES for letter in token):
        return bytes(_BYTES[letter] for letter in token)
    return bytes([int(token[3:5], 16)]) if _BYTE.fullmatch(token) else token.replace("▁", " ").encode()


def closed(model: Mapping[str, Any], ids: Iterable[int], *, bytewise: bool) -> set[int]:
    """Tokens of the `model` of a `tokenizer.json`, or added to it, with those that they are made of.

    With them, whatever consists of the given tokens is cut as before: a greedy search finds no longer token than it
    did, merges come in the same order, and the best path through a text is among those that are left.
    """
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram
        return _characters(vocab, set(ids))
    bpe = Merges(model)
    kept, names = set(ids), {number: token for token, number in vocab.items()}
    for token, number in vocab.items():
        if _BYTE.fullmatch(token) or (bytewise and token[:1] in _BYTES and len(bpe.symbols(token)) == 1):
            kept.add(number)
    tokens = [names[number] for number in kept if number in names]
    return kept | {vocab[part] for token in tokens for part in bpe.parts(token) if part in vocab}


def _characters(vocab: Sequence[Sequence[Any]], kept: set[int]) -> set[int]:
    """Pieces with the characters in them, all bytes, and the piece of the lowest score, by which unknown characters
    are scored."""
    numbers = {piece: number for number, (piece, _) in enumerate(vocab)}
    letters = {letter for number in kept if number < len(vocab) for letter in vocab[number][0]}
    least = min(range(len(vocab)), key=lambda number: vocab[number][1], default=0)
    pieces = {number for piece, number in numbers.items() if piece in letters or _BYTE.fullmatch(piece)}
    return {*kept, least, *pieces}


class Merges:
    """The merges of a byte-pair encoding, in the order in which they are made; none of other models of words."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self.ranks = {pair: rank for rank, pair in enumerate(map(pair_of, model.get("merges") or ()))}
        self.prefix = model.get("continuing_subword_prefix") or ""
        self.suffix = model.get("end_of_word_suffix") or ""

    def symbols(self, token: str) -> list[str]:
        """What a token consists of before any merge."""
        end = self.suffix if self.suffix and token.endswith(self.suffix) else ""
        inner = bool(self.prefix) and token.startswith(self.prefix)
        letters = token[len(self.prefix) * inner : len(token) - len(end)]
        found = [(self.prefix if at or inner else "") + letter for at, letter in enumerate(letters)]
        return [*found[:-1], found[-1] + end] if found else [token]

    def parts(self, token: str) -> Iterator[str]:
        """Whatever is made on the way to a token, its symbols included."""
        symbols = self.symbols(token) if self.ranks else []
        yield from symbols
        while len(symbols) > 1:
            ranks = [self.ranks.get(pair, len(self.ranks)) for pair in pairwise(symbols)]
            at = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[at] == len(self.ranks):
                return
            symbols[at : at + 2] = [self.joined(*symbols[at : at + 2])]
            yield symbols[at]

    def joined(self, left: str, right: str) -> str:
        return left + right.removeprefix(self.prefix)


def pair_of(merge: str | Sequence[str]) -> tuple[str, str]:
    """The two parts of a merge, which older files write as one text."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right
