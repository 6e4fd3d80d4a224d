"""Counts: what a configuration says of a whole model (layers, experts, dtype) against the leaves of an outcome."""

import copy
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from paramend.anatomy.sections import COUNTS, SIDES, part_at, parts_in, sections_of
from paramend.formats.jsontext import CONFIG
from paramend.leaves.paths import number_of
from paramend.reports import wording

Pieces = tuple[str, ...]
# Keys that count the experts of a layer.
EXPERTS = (
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"),
    "expert_count",
)
_DTYPES = ("torch_dtype", "dtype")
_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})


def miscounted(
    config: Mapping[str, Any], before: Iterable[Pieces], after: Iterable[Pieces], ends: Mapping[Pieces, int]
) -> list[str]:
    """What a configuration counts that the leaves of an outcome no longer have; `ends` as in `Index.layers`.

    >>> layers = [("layers", str(i), "w") for i in range(3)]
    >>> miscounted({"num_hidden_layers": 3}, layers, layers[:2], {})
    ['config.json still says num_hidden_layers: 3, and layers has 2']
    """
    old, new = numbered(before, ends), numbered(after, ends)
    said = []
    for parent, numbers in old.items():
        now = new.get(parent)
        if now is None or now == numbers or parent[-1:] == ("experts",):
            continue
        for place in sections_of(config, len(numbers), parent):
            part = part_at(config, place)
            keys = [key for key in (*COUNTS, *SIDES["encoder"], *SIDES["decoder"]) if part.get(key) == len(numbers)]
            if keys and numbers == set(range(len(numbers))):
                gaps = sorted(set(range(max(now) + 1)) - now)
                without = f", without {wording.listing(list(map(str, gaps)), 4)}" if gaps else ""
                said.append(_still((*place, keys[0]), len(numbers), f"{'.'.join(parent)} has {len(now)}{without}"))
    experts = {parent: numbers for parent, numbers in old.items() if parent[-1:] == ("experts",) and parent in new}
    counts = ((key, part.get(key)) for _, part in parts_in(config) for key in EXPERTS)
    for key, count in dict.fromkeys(pair for pair in counts if type(pair[1]) is int):
        changed = [parent for parent, numbers in experts.items() if len(numbers) == count != len(new[parent])]
        if changed:
            held = wording.listing(sorted({str(len(new[parent])) for parent in changed}), 3)
            has = f"{wording.plural(len(changed), 'layer has', 'layers have')} {held}"
            said.append(_still((key,), count, has))
    return said


def _still(path: Sequence[str], value: Any, has: str) -> str:
    return f"{CONFIG} still says {'.'.join(path)}: {value}, and {has}"


def numbered(paths: Iterable[Pieces], ends: Mapping[Pieces, int]) -> dict[Pieces, set[int]]:
    """Path → the numbers of the entries there, below those that `ends` says are no layers."""
    found: dict[Pieces, set[int]] = defaultdict(set)
    for path in paths:
        for depth, piece in enumerate(path[:-1]):
            number = number_of(piece)
            if number is not None and number < ends.get(path[:depth], number + 1):
                found[path[:depth]].add(number)
    return found


def retyped(config: Mapping[str, Any], before: Sequence[str], after: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """A new configuration after leaves got other dtypes, and what is to be said of it."""
    new = copy.deepcopy(dict(config))
    said: list[str] = []
    changed = Counter(now for was, now in zip(before, after, strict=True) if was != now)
    floats = {now for now in after if "float" in now}
    for path, value in _dtypes(config) if changed else ():
        if len(floats) == 1 and floats <= _FLOATS:
            wanted = floats.copy().pop()
            if value != wanted:
                part_at(new, path[:-1])[path[-1]] = wanted
                said.append(f"{CONFIG}: {'.'.join(path)}: {value} -> {wanted}")
        elif len(path) == 1:
            of = wording.plural(len(after), "leaf", "leaves")
            told = [f"{count} of {of} became {dtype}" for dtype, count in changed.items()]
            said.append(_still(path, value, wording.listing(told, 3)))
    return new, said


def _dtypes(part: Mapping[str, Any], path: Pieces = ()) -> Iterator[tuple[Pieces, str]]:
    for key, value in part.items():
        if key in _DTYPES and isinstance(value, str) and value in _FLOATS:
            yield (*path, key), value
        elif isinstance(value, Mapping) and key != "quantization_config":
            yield from _dtypes(value, (*path, key))
