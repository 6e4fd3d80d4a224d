"""A slow matcher that is right at a glance, written from the description of the selector language alone.

It shares no code with `paramend.selectors.patterns`: no regular expressions, no states, no caches. A tree here is
nested dicts and lists whose array leaves are whatever `is_leaf` says.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """One piece of a key, as it reads. Keys that read the same are kept apart by the key itself."""

    text: str
    before: str  # the separator before it inside its key, "" at the key's start
    closes: bool  # whether the key ends here
    key: Any = None  # the key, at its end


@dataclass(frozen=True)
class Leaf:
    steps: tuple[Step, ...]
    value: Any


class OutOfRange(Exception):
    """An integer position that is not there."""


def read_key(key: Any) -> list[Step]:
    """`mlp/~/w` is read as mlp, ~, w; a key with empty pieces cannot be read so and stays whole."""
    texts, separators = [""], [""]
    for char in str(key):
        if char in "/.":
            texts.append("")
            separators.append(char)
        else:
            texts[-1] += char
    if len(texts) == 1 or "" in texts:
        return [Step(str(key), "", True, (type(key), key))]
    last = len(texts) - 1
    return [
        Step(text, before, at == last, (type(key), key) if at == last else None)
        for at, (text, before) in enumerate(zip(texts, separators, strict=True))
    ]


def read_tree(tree: Any, is_leaf: Any, above: tuple[Step, ...] = ()) -> list[Leaf]:
    """All array leaves, each with the steps that lead to it."""
    if is_leaf(tree):
        return [Leaf(above, tree)]
    if isinstance(tree, dict):
        entries = list(tree.items())
    elif isinstance(tree, list | tuple):
        entries = list(enumerate(tree))
    else:
        return []
    return [leaf for key, child in entries for leaf in read_tree(child, is_leaf, (*above, *read_key(key)))]


# ---- reading a selector


def split(text: str) -> list[str]:
    """The segments: split at separators that are neither quoted nor escaped."""
    segments, at, quoted = [""], 0, False
    while at < len(text):
        char = text[at]
        if char == "\\":
            segments[-1] += text[at : at + 2]
            at += 2
            continue
        if char == '"':
            quoted = not quoted
        if char in "/." and not quoted:
            segments.append("")
        else:
            segments[-1] += char
        at += 1
    return segments


def unescape(text: str) -> str:
    out, at = "", 0
    while at < len(text):
        at += text[at] == "\\"
        out += text[at]
        at += 1
    return out


def exact_key(segment: str) -> str | None:
    """The key that a quoted segment names, or one with an escaped separator."""
    if segment.startswith('"'):
        return unescape(segment[1:-1])
    if "\\/" in segment or "\\." in segment:
        return unescape(segment)
    return None


def tokens(segment: str) -> list[Any]:
    """Characters, and "*", {options}, <n> and [positions] as what they are."""
    out: list[Any] = []
    at = 0
    while at < len(segment):
        char = segment[at]
        if char == "\\":
            out.append(segment[at + 1])
            at += 2
        elif char == "*":
            out.append(("star",))
            at += 1
        elif char in "{<[":
            end = closing(segment, at, {"{": "}", "<": ">", "[": "]"}[char])
            inside = segment[at + 1 : end]
            if char == "{":
                out.append(("either", [tokens(option) for option in split_options(inside)]))
            elif char == "<":
                out.append(("number",))
            else:
                out.append(("positions", inside))
            at = end + 1
        else:
            out.append(char)
            at += 1
    return out


def closing(text: str, at: int, char: str) -> int:
    while text[at] != char:
        at += 2 if text[at] == "\\" else 1
    return at


def split_options(inside: str) -> list[str]:
    options, at = [""], 0
    while at < len(inside):
        if inside[at] == "\\":
            options[-1] += inside[at : at + 2]
            at += 2
        elif inside[at] == ",":
            options.append("")
            at += 1
        else:
            options[-1] += inside[at]
            at += 1
    return options


# ---- matching one piece


def fits(pattern: list[Any], text: str) -> bool:
    return len(text) in ends(pattern, text, 0)


def ends(pattern: list[Any], text: str, at: int) -> set[int]:
    """Where a match that begins at `at` may end."""
    if not pattern:
        return {at}
    first, rest = pattern[0], pattern[1:]
    if isinstance(first, str):
        after = {at + 1} if text[at : at + 1] == first else set()
    elif first[0] == "star":
        after = set(range(at, len(text) + 1))
    elif first[0] == "either":
        after = {end for option in first[1] for end in ends(option, text, at)}
    else:
        after = {end for start, end in digit_runs(text) if start == at}
    return {end for place in after for end in ends(rest, text, place)}


def digit_runs(text: str) -> list[tuple[int, int]]:
    """The numbers in a text, each from its first to its last digit; longer than 18 digits is no number."""
    runs = []
    start = None
    for at, char in enumerate([*text, ""]):
        if char != "" and char in "0123456789":
            start = at if start is None else start
        elif start is not None:
            runs.append((start, at))
            start = None
    return [(start, end) for start, end in runs if end - start <= 18]


def is_number(text: str) -> bool:
    return digit_runs(text) == [(0, len(text))]


# ---- matching a tree


def select(text: str, leaves: list[Leaf]) -> list[Leaf]:
    """The leaves that a selector chooses.

    Raises:
        OutOfRange: an integer position that is not there, where the rest of the selector would match.
    """
    hits, bad = find(split(text), leaves, 0)
    if bad:
        raise OutOfRange
    return [leaf for leaf in leaves if leaf in hits]


def find(segments: list[str], leaves: list[Leaf], depth: int) -> tuple[list[Leaf], bool]:
    """Leaves below one node whose steps from `depth` on match; whether some position is not there.

    All of `leaves` agree in their first `depth` steps: that is the node.
    """
    if not segments:
        return [leaf for leaf in leaves if len(leaf.steps) == depth], False
    first, rest = segments[0], segments[1:]
    children: dict[Step, list[Leaf]] = {}
    for leaf in leaves:
        if len(leaf.steps) > depth:
            children.setdefault(leaf.steps[depth], []).append(leaf)
    if first == "**":
        found = [find(rest, leaves, depth), *(find(segments, below, depth + 1) for below in children.values())]
        return joined(found)
    key = exact_key(first)
    if key is not None:
        wanted = [(step.text, step.before, step.closes) for step in read_key(key)]
        here = [
            leaf
            for leaf in leaves
            if [(s.text, s.before, s.closes) for s in leaf.steps[depth : depth + len(wanted)]] == wanted
        ]
        groups: dict[tuple[Step, ...], list[Leaf]] = {}
        for leaf in here:
            groups.setdefault(leaf.steps[: depth + len(wanted)], []).append(leaf)
        return joined([find(rest, below, depth + len(wanted)) for below in groups.values()])
    atoms = tokens(first)
    place = next((at for at, atom in enumerate(atoms) if atom[0] == "positions"), None)
    if place is None:
        return joined([find(rest, below, depth + 1) for step, below in children.items() if fits(atoms, step.text)])
    return find_positions(atoms[:place], atoms[place][1], atoms[place + 1 :], rest, children, depth)


def find_positions(
    head: list[Any], inside: str, tail: list[Any], rest: list[str], children: dict[Step, list[Leaf]], depth: int
) -> tuple[list[Leaf], bool]:
    # A family: a name, and for each number the groups of leaves below, with the depth at which they go on.
    families: dict[Any, dict[int, list[tuple[list[Leaf], int]]]] = {}
    if head and not tail:  # layers[-1]: the numbered children of `layers`
        for step, below in children.items():
            if fits(head, step.text):
                for leaf in below:
                    if len(leaf.steps) > depth + 1 and is_number(leaf.steps[depth + 1].text):
                        inner = leaf.steps[depth + 1]
                        group = [other for other in below if other.steps[depth + 1 : depth + 2] == (inner,)]
                        members = families.setdefault(step.text, {}).setdefault(int(inner.text), [])
                        if (group, depth + 2) not in members:
                            members.append((group, depth + 2))
    if not families:  # Dense_[-1]: the numbered siblings Dense_<n>
        for step, below in children.items():
            for start, end in digit_runs(step.text):
                before, after = step.text[:start], step.text[end:]
                if fits(head, before) and fits(tail, after):
                    family = families.setdefault((before, after), {})
                    family.setdefault(int(step.text[start:end]), []).append((below, depth + 1))
    found: list[tuple[list[Leaf], bool]] = []
    for family in families.values():
        numbers = sorted(family)
        chosen: list[int] = []
        for item in inside.split(","):
            parts = [int(part) if part.strip() else None for part in item.split(":")]
            if len(parts) > 1:
                chosen += numbers[slice(*parts)]
            elif -len(numbers) <= parts[0] < len(numbers):
                chosen.append(numbers[parts[0]])
            else:
                everyone = [find(rest, *group) for number in numbers for group in family[number]]
                found.append(([], any(hits or bad for hits, bad in everyone)))
        found += [find(rest, *group) for number in chosen for group in family[number]]
    return joined(found)


def joined(found: list[tuple[list[Leaf], bool]]) -> tuple[list[Leaf], bool]:
    return [leaf for hits, _ in found for leaf in hits], any(bad for _, bad in found)
