"""Cases: the reasons against a graft, by kind, and the options that allow them."""

from dataclasses import dataclass

from paramend.resize.rules import Resize


@dataclass(frozen=True, slots=True)
class Case:
    """One reason against a graft: a key of `KINDS`, the path in the target and one that belongs to it, the details, and
    rules that would resize the leaf."""

    kind: str
    paths: tuple[str, ...]
    said: str = ""
    ways: tuple[Resize, ...] = ()


# One row per kind of case: the sentence above its list for one and for several, and the options that allow it, the
# gentlest first.
KINDS: dict[str, tuple[str, str, tuple[dict[str, str], ...]]] = {
    "only": ("`only` selects nothing", "", ()),
    "rule": ("a rule in `rename` does nothing", "{} rules in `rename` do nothing", ()),
    "place": ("a rule has no place in your model for a leaf", "rules have no place in your model for {} leaves", ()),
    "collision": ("a leaf of your model has several sources", "{} leaves of your model have several sources", ()),
    "tied": (
        "a leaf of your model, shared under several paths, would get different values",
        "{} leaves of your model, each shared under several paths, would get different values",
        (),
    ),
    "unfit": ("a leaf cannot take part", "{} leaves cannot take part", ()),
    "abstract": (
        "a leaf of your model has no value, and would get none",
        "{} leaves of your model have no values, and would get none",
        (),
    ),
    "choice": ("a selector selects nothing", "{} selectors select nothing", ()),
    "resize": ("a leaf cannot be resized", "{} leaves cannot be resized", ()),
    "layout": ("a leaf is stored in another layout", "{} leaves are stored in another layout", ()),
    "transposed": ("a leaf is transposed", "{} leaves are transposed", ({"mismatch": "keep"},)),
    "mismatch": (
        "a shape differs",
        "{} shapes differ",
        ({"mismatch": "resize"}, {"mismatch": "overlap"}, {"mismatch": "keep"}),
    ),
    "dtype": ("a dtype differs", "{} dtypes differ", ({"dtype": "target"},)),
    "unused": (
        "a leaf of the source goes nowhere in your model",
        "{} leaves of the source go nowhere in your model",
        ({"unused": "ok"},),
    ),
    "missing": (
        "a leaf of your model has nothing in the source",
        "{} leaves of your model have nothing in the source",
        ({"missing": "fresh"},),
    ),
    "nothing": ("no leaf of your model would take anything", "", ()),
}
