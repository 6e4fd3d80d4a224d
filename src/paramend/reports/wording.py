"""Words for messages: similar names, counts, sizes, short lists."""

import difflib
import heapq
from collections.abc import Iterable, Sequence

_LONGEST, _MOST = 200, 20_000  # characters of a name, and of the word times the number of names


def closest(word: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The names most like `word`, best first; names that differ only in case come first."""
    known = list(dict.fromkeys(known))
    same = [name for name in known if name.casefold() == word.casefold() and name != word]
    likely = _likely(word, known) if len(word) <= _LONGEST else []
    near = difflib.get_close_matches(word, likely, n=limit + len(same), cutoff=0.6)
    return list(dict.fromkeys([*same, *near]))[:limit]


def _likely(word: str, known: Sequence[str]) -> Sequence[str]:
    """The names worth a comparison, which takes long: of very many, those that share most runs of three letters."""
    known = [name for name in known if len(name) <= _LONGEST]
    most = _MOST // max(len(word), 20)
    if len(known) <= most:
        return known
    wanted = {word[at : at + 3].casefold() for at in range(max(len(word) - 2, 1))}

    def shared(name: str) -> float:
        folded = name.casefold()
        return sum(part in folded for part in wanted) / (len(name) + 9)

    return heapq.nlargest(most, known, key=shared)


def plural(count: int, noun: str, many: str | None = None) -> str:
    """A count with its noun."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def listing(names: Sequence[str], limit: int = 8) -> str:
    """Names joined by commas; beyond `limit` the rest is counted."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, and {len(names) - limit:,} more"


def size(nbytes: int) -> str:
    """A number of bytes for people, in powers of 1000 like disks and Hugging Face.

    >>> size(999), size(1_500), size(2_000_000_000)
    ('999 B', '1.5 kB', '2.0 GB')
    """
    amount = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def described(subject: object) -> str:
    """The type of something, with an article, for a message about an argument of the wrong type."""
    kind = subject if isinstance(subject, type) else type(subject)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"the class {name}" if isinstance(subject, type) else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
