"""Tokens: how many a configuration counts, and which of them it names by their numbers."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from paramend.anatomy.sections import parts_in, senses

# Old number of a token → its new one; None if it is gone.
New: TypeAlias = Callable[[int], int | None]

_SIZES = re.compile(r"(?!type_)(?:\w+_)?vocab_size(?:_per_layer_input)?|n_vocab|n_words")
_OFFSET = "vocab_offset"  # the first token of a part of a model, which has rows of its own
_IDS = re.compile(r"(?:\w+_)?token_(?:ids?|index|indices)|lang_to_id|task_to_id")
# Tokens that are never to come: those that are gone never do.
_NEVER = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
_FORCED = "forced_decoder_ids"  # pairs of a position and a token


def sizes_of(config: Mapping[str, Any]) -> Iterator[int]:
    """The sizes of vocabularies that a configuration has, outermost first."""
    for place, part in parts_in(config):
        yield from () if senses(place) else _counted(part)


def _counted(part: Mapping[str, Any]) -> Iterator[int]:
    return (value for key, value in part.items() if type(value) is int and _SIZES.fullmatch(key))


def named_ids(config: Mapping[str, Any], sizes: Iterable[int]) -> set[int]:
    """The tokens that a configuration names, if tables have so many rows: where texts begin and end, padding, images.

    >>> sorted(named_ids({"eos_token_id": [2, 7], "pad_token_id": -1, "suppress_tokens": [5]}, [8]))
    [2, 7]
    """
    found: set[int] = set()

    def note(token: int) -> int:
        found.add(token)
        return token

    renumbered({key: each for key, each in config.items() if key not in _NEVER}, note, {size: size for size in sizes})
    return found


def names_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys by which a configuration names tokens, with their values."""
    return {key: value for key, value in config.items() if _IDS.fullmatch(key) and value is not None}


def renumbered(config: Mapping[str, Any], new: New, sizes: Mapping[int, int] | None) -> dict[str, Any]:
    """A configuration after tokens got other numbers, and tables with `sizes` of rows other ones; a part for which
    these are None, or that counts others, has tokens of its own.

    >>> renumbered({"vocab_size": 8, "eos_token_id": [2, 7], "bad_words_ids": [[5]]}, {2: 0, 7: 1}.get, {8: 2})
    {'vocab_size': 2, 'eos_token_id': [0, 1], 'bad_words_ids': []}
    """

    def changed(key: str, value: Any) -> Any:
        if key == _OFFSET:
            return _moved(value, new)
        if isinstance(value, Mapping) and not _IDS.fullmatch(key):
            counted = {*_counted(value)}
            apart = senses((key,)) or (bool(counted) and counted.isdisjoint(sizes or ()))
            return renumbered(value, new, None if apart else sizes)
        if sizes is None:
            return value
        if _SIZES.fullmatch(key):
            return sizes.get(value, value)
        if key == _FORCED and isinstance(value, list):
            moved = [(at, token, _moved(token, new)) for at, token in value]
            return [[at, after] for at, token, after in moved if after is not None or token is None]
        return _moved(value, new) if _IDS.fullmatch(key) or key in _NEVER else value

    return {key: changed(key, value) for key, value in config.items()}


def _moved(value: Any, new: New, *, inner: bool = False) -> Any:
    """A number of a token, or what holds some: without those that are gone; a word of several goes as a whole."""
    if type(value) is int:
        return new(value) if value >= 0 else value
    if isinstance(value, Mapping):
        return {key: _moved(each, new) for key, each in value.items()}
    if not isinstance(value, list):
        return value
    found = [_moved(each, new, inner=True) for each in value]
    return None if inner and None in found else [each for each in found if each is not None]
