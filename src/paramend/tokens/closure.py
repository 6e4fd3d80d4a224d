"""Closure: the tokens without which a tokenizer would cut texts of the others in another way."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

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
    return {
        *kept,
        least,
        *(numbers[letter] for letter in letters if letter in numbers),
        *(number for piece, number in numbers.items() if _BYTE.fullmatch(piece)),
    }


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
        """What a merge makes."""
        return left + right.removeprefix(self.prefix)


def pair_of(merge: str | Sequence[str]) -> tuple[str, str]:
    """The two parts of a merge, which older files write as one text."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right
