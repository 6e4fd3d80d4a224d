"""Which leaves a command is about: those of its SELECTORs, without those of `--except`."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from paramend.edits.weights import chosen as met
from paramend.errors import NoMatch
from paramend.reports import wording
from paramend.selectors.messages import quoted
from paramend.selectors.selector import Selector, resolve, sel

# What click is told of the option `--except`.
EXCEPT: dict[str, Any] = {
    "metavar": "SELECTOR",
    "multiple": True,
    "help": "Leave out the leaves that SELECTOR matches; may be repeated.",
}


@dataclass(frozen=True)
class Chosen:
    """Leaves that any of several selectors matches, except those that others match. Each must match something.

    >>> print(Chosen(("**/w", "head"), ("head/w",)))
    **/w, head except head/w
    """

    texts: tuple[str, ...]
    excepts: tuple[str, ...] = ()

    @property
    def named(self) -> Selector:
        return sel(list(self.texts))

    @property
    def selector(self) -> str | Selector:
        """The selector that means the same in Python; text if text is enough."""
        if self.excepts:
            return self.named & ~sel(list(self.excepts))
        return self.named if len(self.texts) > 1 else self.texts[0]

    @property
    def typed(self) -> str:
        return " ".join([*map(shlex.quote, self.texts), *(f"--except {shlex.quote(text)}" for text in self.excepts)])

    def numbers(self, leaves: Any) -> Sequence[int]:
        """The numbers of the chosen leaves, in the order of the tree; `NoMatch` if a selector matches nothing."""
        found = met(self.named, leaves)
        if not self.excepts:
            return found
        resolve(sel(list(self.excepts)), leaves)
        try:
            return met(self.selector, leaves)
        except NoMatch:
            count = wording.plural(len(found), "leaf", "leaves")
            named, spared = (" or ".join(map(quoted, texts)) for texts in (self.texts, self.excepts))
            raise NoMatch(f"nothing is left: {spared} excepts the {count} that {named} matches") from None

    def to_dict(self) -> dict[str, Any]:
        """The keys of a step of a recipe that choose the same leaves."""
        given = {"at": self.texts, "except": self.excepts}
        return {key: texts[0] if len(texts) == 1 else list(texts) for key, texts in given.items() if texts}

    def __str__(self) -> str:
        spared = f" except {', '.join(self.excepts)}" if self.excepts else ""
        return ", ".join(self.texts) + spared


def chosen(texts: Iterable[str], excepts: Iterable[str]) -> Chosen:
    """The choice of what was typed; without a selector all leaves."""
    return Chosen(tuple(texts) or ("**",), tuple(excepts))
