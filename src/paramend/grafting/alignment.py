"""Alignment: the renames that would make the names of one tree agree with those of another, guessed by shape and order.

The guesses come best first; the caller tries each before showing it.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from paramend.errors import ParamendError
from paramend.leaves.leaves import Index
from paramend.leaves.paths import common, write_piece
from paramend.selectors.renames import pieces, rename

Path = tuple[str, ...]
Shapes = Mapping[Path, tuple[int, ...]]
Rules = dict[str, str]

_NUMBER = re.compile(r"(?<![0-9])[0-9]{1,18}(?![0-9])")
_MOST_FAMILIES = 200


def propose(source: Shapes, target: Shapes) -> Iterator[Rules]:
    """Renames, `{source pattern: target template}`, that may make the source fit the target; each at most once.

    >>> source = {("h", str(i), "w"): (4, 4) for i in range(3)}
    >>> target = {("layers", str(i), "kernel"): (4, 4) for i in range(3)}
    >>> next(propose(source, target))
    {'h/**/w': 'layers/**/kernel'}
    >>> next(propose({("module", *path): shape for path, shape in source.items()}, source))
    {'module/**': '**'}
    """
    seen: list[Rules] = []
    for rules in (*_outer_levels(source, target), *_by_families(source, target), _last_to_last(source, target)):
        if rules and rules not in seen:
            seen.append(rules)
            yield rules


def _outer_levels(source: Shapes, target: Shapes) -> list[Rules]:
    """Outer levels removed, added or exchanged where that makes names agree; those that fit most names first."""
    prefixes, others = _prefixes(source), _prefixes(target)
    found: list[tuple[int, int, Rules]] = []
    for old in ((), *prefixes):
        for new in ((), *others):
            if old != new and not (old and new and (old[0] == new[0] or old[-1] == new[-1])):
                moved = ((new + path[len(old) :], shape) for path, shape in source.items() if path[: len(old)] == old)
                fits = sum(target.get(path) == shape for path, shape in moved)
                found.append((-fits, len(old) + len(new), {_under(old): _under(new)}))
    return [rules for fits, _, rules in sorted(found, key=lambda row: row[:2])[:3] if fits]


def _prefixes(paths: Shapes) -> list[Path]:
    """The outer levels that may be superfluous: the first keys, and what all paths have in common."""
    tops = list(dict.fromkeys(path[:1] for path in paths if len(path) > 1))
    if len(tops) == 1:
        shared = common([path[:-1] for path in paths])
        return [shared[:size] for size in range(1, len(shared) + 1)]
    return tops[:8]


def _under(prefix: Path) -> str:
    return "/".join((*map(write_piece, prefix), "**"))


def _last_to_last(source: Shapes, target: Shapes) -> Rules:
    """The last numbered layer to the last one, where the trees have different depths: the head of a model."""
    theirs = {family.texts: family.numbers for family in _families(target)}
    rules: Rules = {}
    for family in _families(source):
        place = next((i for i, text in enumerate(family.texts) if "\0" in text), None)
        numbers = theirs.get(family.texts)
        if place is None or not numbers or max(numbers[0]) == max(family.numbers[0]):
            continue
        head, tail = family.texts[place].split("\0", 1)
        above, below = family.texts[:place], family.texts[place + 1 :]
        if not head and not tail and above:
            above, head = above[:-1], above[-1]
        if head and "\0" not in tail:
            layer = f"{write_piece(head)}[-1]{tail and write_piece(tail)}"
            text = "/".join((*map(write_piece, above), layer, *["**"] * bool(below)))
            rules[text] = text
    return rules


@dataclass(frozen=True)
class _Family:
    """Leaves whose paths differ only in numbers: the path with "\\0" for each of these, and what occurs."""

    texts: Path
    members: tuple[Path, ...]
    numbers: tuple[frozenset[int], ...]
    shapes: frozenset[tuple[int, ...]]


@dataclass(frozen=True)
class _Pair:
    """A family of the source, and the family of the target that it seems to be; each slot shifted by a number."""

    old: Path
    new: Path
    shifts: tuple[int, ...]
    members: tuple[Path, ...]

    def rule(self, old: int = 0, new: int = 0, size: int = 0) -> tuple[str, str]:
        """The rename of this pair, with `**` for so many pieces from a place in the old path, and one in the new."""
        plain = (0,) * len(self.shifts)
        mine, theirs = range(old, old + size), range(new, new + size)
        return _written(self.old, plain, mine), _written(self.new, self.shifts, theirs)

    def wanted(self, path: Path) -> Path:
        """The name that a leaf of the old family should have."""
        if not self.shifts:
            return self.new
        numbers = [int(number) for piece in path for number in _NUMBER.findall(piece)]
        shifted = iter([number + shift for number, shift in zip(numbers, self.shifts, strict=True)])
        return tuple(re.sub("\0", lambda _: str(next(shifted)), text) for text in self.new)


def _written(texts: Path, shifts: Sequence[int], stretch: range) -> str:
    """A path as one side of a rename: `<n>` for each number, `**` for a stretch of pieces."""
    slots = zip("nmkijlpqrs", shifts, strict=False)
    out: list[str] = []
    for place, text in enumerate(texts):
        first, *parts = text.split("\0")
        written = first and write_piece(first)
        for part in parts:
            name, shift = next(slots)
            written += f"<{name}{f'{shift:+d}' if shift else ''}>{part and write_piece(part)}"
        if place not in stretch:
            out.append(written)
        elif place == stretch.start:
            out.append("**")
    return "/".join(out)


def _by_families(source: Shapes, target: Shapes) -> list[Rules]:
    """Renames by pairing families: first with as few and as general rules as possible, then with one per family."""
    if any("/" in piece or "." in piece or not piece for path in (*source, *target) for piece in path):
        return []
    homeless = {path: shape for path, shape in source.items() if path not in target}
    empty = {path: shape for path, shape in target.items() if path not in source}
    pairs = _paired(_families(homeless), _families(empty))
    pairs += _in_order(homeless, empty, pairs)
    if not pairs:
        return []
    wanted = {path: path for path in source if path in target}
    wanted |= {path: pair.wanted(path) for pair in pairs for path in pair.members}
    exact = dict(pair.rule() for pair in pairs)
    return [_generalised(pairs, source, target, wanted), exact]


def _families(leaves: Shapes) -> list[_Family]:
    members: dict[Path, list[Path]] = {}
    for path in leaves:
        members.setdefault(tuple(_NUMBER.sub("\0", piece) for piece in path), []).append(path)
    families: list[_Family] = []
    for texts, paths in members.items():
        rows = [[int(number) for piece in path for number in _NUMBER.findall(piece)] for path in paths]
        columns = tuple(frozenset(column) for column in zip(*rows, strict=True))
        families.append(_Family(texts, tuple(paths), columns, frozenset(leaves[path] for path in paths)))
    return families


def _paired(old: list[_Family], new: list[_Family]) -> list[_Pair]:
    """Families that may be the same: those with equal shapes; the most similar names first, then by order."""
    if max(len(old), len(new)) > _MOST_FAMILIES:
        return []
    scores: list[tuple[float, int, int, int]] = []
    for i, a in enumerate(old):
        for j, b in enumerate(new):
            if len(a.numbers) == len(b.numbers) <= 10 and a.shapes & b.shapes:
                scores.append((-_likeness(a, b), abs(i - j), i, j))
    pairs: list[_Pair] = []
    left, right = set(range(len(old))), set(range(len(new)))
    for _, _, i, j in sorted(scores):
        if i in left and j in right:
            left.discard(i)
            right.discard(j)
            shifts = tuple(map(_shift, old[i].numbers, new[j].numbers))
            pairs.append(_Pair(old[i].texts, new[j].texts, shifts, old[i].members))
    return pairs


def _likeness(a: _Family, b: _Family) -> float:
    words = SequenceMatcher(None, "/".join(a.texts), "/".join(b.texts), autojunk=False).ratio()
    return words + (a.texts[-1] == b.texts[-1]) + (a.shapes == b.shapes) + (a.numbers == b.numbers)


def _shift(old: frozenset[int], new: frozenset[int]) -> int:
    return 0 if old <= new or new <= old else min(new) - min(old)


def _in_order(homeless: Shapes, empty: Shapes, pairs: Sequence[_Pair]) -> list[_Pair]:
    """The leaves left on both sides, paired one by one, if they have the same shapes in the same order."""
    members = {path for pair in pairs for path in pair.members}
    taken = {pair.wanted(path) for pair in pairs for path in pair.members}
    old = [path for path in homeless if path not in members]
    new = [path for path in empty if path not in taken]
    if len(old) > _MOST_FAMILIES or [homeless[path] for path in old] != [empty[path] for path in new]:
        return []
    return [_Pair(a, b, (), (a,)) for a, b in zip(old, new, strict=True)]


def _generalised(pairs: Sequence[_Pair], source: Shapes, target: Shapes, wanted: Mapping[Path, Path]) -> Rules:
    """Rules that each cover many families, after an exact rule for every family that they would send astray."""
    chosen: Rules = {}
    for (old, new), _ in Counter(map(_general, pairs)).most_common():
        chosen.setdefault(old, new)
    order = sorted(chosen.items(), key=lambda rule: -sum(key != "**" for key in rule[0].split("/")))
    names = list(source)
    index = Index.of_names(["/".join(path) for path in names], "/")
    found: dict[Path, Path] = {}
    for old, new in order:
        try:
            moved = rename(old, new).over(index)
        except ParamendError:
            return {}
        for number, path in moved.items():
            found.setdefault(names[number], pieces(path))
    astray = {p for p, new in found.items() if wanted.get(p, new) != new or (p not in wanted and new in target)}
    first = dict(pair.rule() for pair in pairs if any(path in astray or path not in found for path in pair.members))
    astray -= {path for pair in pairs for path in pair.members}
    # No exact rule keeps a leaf that already agrees and would be sent astray.
    return {} if astray else {**first, **dict(order)}


def _general(pair: _Pair) -> tuple[str, str]:
    """The rule of a pair, with `**` for the longest stretch that both sides have in common."""
    same, slots = 0, len(pair.shifts)
    for a, b in zip(reversed(pair.old), reversed(pair.new), strict=False):
        within = slots - a.count("\0")
        if a != b or any(pair.shifts[within:slots]):
            break
        same, slots = same + 1, within
    if same:
        return pair.rule(len(pair.old) - same, len(pair.new) - same, same)
    match = SequenceMatcher(None, pair.old, pair.new, autojunk=False).find_longest_match()
    return pair.rule() if any(pair.shifts) else pair.rule(match.a, match.b, match.size)
