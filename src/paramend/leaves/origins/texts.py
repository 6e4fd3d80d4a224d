"""How the text of an origin writes places, many parts, and names: short, and so that it can be read."""

import json
import re
from collections.abc import Iterator, Sequence

import numpy as np

from paramend.leaves.origins.boxes import Places
from paramend.leaves.origins.origin import Namer, Origin

# What stands in a text without quotes.
CHARACTERS = r"\w./+@~#-"
_bare = re.compile(f"[{CHARACTERS}]+").fullmatch
_numbers = re.compile(r"(?<![0-9])([0-9]{1,15})(?![0-9])").split
_HOLE = "\0leaf\0"
# Fewer names, and fewer places, are written one by one.
_FEW = 4


def quoted(name: str) -> str:
    """A name as it stands in a text.

    >>> quoted("layers.0.w"), quoted("a b")
    ('layers.0.w', '"a b"')
    """
    return name if _bare(name) else json.dumps(name)


def written(places: Places) -> str:
    """Places along an axis, as an index.

    >>> written(range(5, -1, -2)), written(np.array([7, 2, 3, 4, 5, 0]))
    ('5::-2', '[7, 2:6, 0]')
    """
    if isinstance(places, range):
        start, stop, step = places.start, places.stop, places.step
        if len(places) == 1:
            return f"{start}:{start + 1}"
        return f"{start}:{stop if stop >= 0 else ''}{f':{step}' if step != 1 else ''}"
    ends = [*(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
    first, each = 0, places.tolist()
    found: list[str] = []
    for end in ends:
        run = each[first:end]
        found += [f"{run[0]}:{run[-1] + 1}"] if len(run) >= _FEW else map(str, run)
        first = end
    return f"[{', '.join(found)}]"


def listed(parts: Sequence[Origin], name: Namer) -> Iterator[str]:
    """The texts of parts; those that differ in a number of their leaf, which counts up, as one: `experts.{0..7}.w`."""
    found = [_apart(part, name) for part in parts]
    at = 0
    while at < len(found):
        form, leaf = found[at]
        count, shared = _counted(found, at)
        yield form.replace(_HOLE, shared if count >= _FEW else leaf)
        at += count if count >= _FEW else 1


def _apart(part: Origin, name: Namer) -> tuple[str, str]:
    """The text of a part without the name of its only leaf, and that name; "" if it is made of several."""
    bottom = part
    while len(bottom.children) == 1 and not hasattr(bottom, "parts"):  # which count up names of their own
        bottom = bottom.children[0]
    leaf = "" if bottom.children else name(bottom)
    return (part.text(lambda _: _HOLE), leaf) if _bare(leaf.replace(":", "")) else (part.text(name), "")


def _counted(found: Sequence[tuple[str, str]], at: int) -> tuple[int, str]:
    """How many parts from one on have the same text but for a number that counts up, and what their name is then."""
    form, leaf = found[at]
    words, others = (_numbers(name) for _, name in found[at : at + 2]) if at + 1 < len(found) else ([], [])
    differ = [place for place, pair in enumerate(zip(words, others, strict=False)) if pair[0] != pair[1]]
    if len(differ) != 1 or not differ[0] % 2:
        return 1, leaf
    before, number, after = "".join(words[: differ[0]]), int(words[differ[0]]), "".join(words[differ[0] + 1 :])
    count = 0
    while found[at + count : at + count + 1] == [(form, f"{before}{number + count}{after}")]:
        count += 1
    return count, f"{before}{{{number}..{number + count - 1}}}{after}"


def shortened(text: str) -> str:
    """An expression without its middle where it is long."""
    return text if len(text) <= 80 else f"{text[:60]}...{text[-17:]}"
