"""The options of a graft: checked, changed, written as a call; with the reasons against a graft that they overrule."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal as OneOf, get_args

from paramend.errors import BadArgument
from paramend.reports import wording
from paramend.reports.report import Line, fold, table
from paramend.resize.rules import Resize
from paramend.selectors.selector import sel

Renames = Mapping[str, str | None]
Mismatch = OneOf["error", "keep", "overlap", "resize"]
Place = OneOf["corner", "center", "tile"]
Unused = OneOf["error", "ok"]
Missing = OneOf["fresh", "error"]
Dtype = OneOf["target", "source", "error"]


@dataclass(frozen=True)
class Options:
    """What a graft allows, as `pm.graft` takes it."""

    rename: Renames | None = None
    only: Any = "**"
    mismatch: str | Mapping[Any, str] = "error"
    place: str | Mapping[Any, str] = "corner"
    resize: Mapping[Any, Resize] | None = None
    unused: str = "error"
    missing: str = "fresh"
    dtype: str = "target"
    in_place: bool = False
    raw: bool = False

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            given = getattr(self, name)
            for choice in given.values() if isinstance(given, Mapping) and name in BY_LEAF else [given]:
                _check(name, choice, get_args(kind))
        rules = {} if self.resize is None else self.resize
        if not isinstance(rules, Mapping) or not all(isinstance(rule, Resize) for rule in rules.values()):
            why = f"resize={rules!r} is not a mapping of selectors to rules of pm.resize"
            raise BadArgument(why, hint='resize={"**/pos_embed": pm.resize.positions()}')
        if self.place != "corner" and isinstance(self.place, str) and not self._overlaps(self.mismatch):
            why = f"place={self.place!r} says where leaves overlap, and mismatch= does not allow overlap"
            raise BadArgument(why, hint=f'mismatch="overlap", place="{self.place}"')

    def _overlaps(self, mismatch: str | Mapping[Any, str]) -> bool:
        return "overlap" in (mismatch.values() if isinstance(mismatch, Mapping) else [mismatch])

    def changed(self, **changes: Any) -> "Options":
        """The options with some of them changed. New choices for single leaves come before the earlier ones."""
        if "mismatch" in changes and isinstance(self.mismatch, Mapping):
            changes["mismatch"] = {**self.mismatch, "**": changes["mismatch"]}
        for name in ("mismatch", "resize"):
            leaves = changes.pop(f"{name}_of", None)
            if leaves:
                rest = changes.get(name, getattr(self, name)) or {}
                rest = rest if isinstance(rest, Mapping) else {"**": rest}
                changes[name] = leaves | {key: value for key, value in rest.items() if key not in leaves}
        if isinstance(self.place, str) and not self._overlaps(changes.get("mismatch", self.mismatch)):
            changes["place"] = "corner"
        return replace(self, **changes)

    def given(self) -> dict[str, Any]:
        """The options that differ from the defaults, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "in_place"}
        usual = {name for name, value in found.items() if isinstance(value, str) and value == getattr(_DEFAULTS, name)}
        return {name: value for name, value in found.items() if value and name not in usual}

    def call(self, **changes: Any) -> str:
        """The call with these options and some changes, as code."""
        after = self.changed(**changes)
        given = after.given()
        if not isinstance(after.only, str):
            given["only"] = sel(after.only)  # a tree of bools is a mapping, but not of options
        verb = "pm.graft_(module" if after.in_place else "pm.graft(target"
        return f"{verb}, {', '.join(['source', *(f'{name}={_code(value)}' for name, value in given.items())])})"


_CHOICES = {"mismatch": Mismatch, "place": Place, "unused": Unused, "missing": Missing, "dtype": Dtype}
# Options that may be given for single leaves, as a mapping of selectors.
BY_LEAF = ("mismatch", "place", "resize")


# What other libraries call the choices.
_MEANT: dict[str, dict[Any, str]] = {
    "mismatch": dict.fromkeys(("skip", "ignore", "drop", "leave", "fresh", "ok", True), "keep")
    | dict.fromkeys(("crop", "slice", "truncate", "pad", "partial", "copy"), "overlap")
    | dict.fromkeys(("interpolate", "rescale"), "resize"),
    "unused": dict.fromkeys(("ignore", "skip", "drop", "allow", "keep", "warn", True), "ok"),
    "missing": dict.fromkeys(("ok", "ignore", "skip", "keep", "allow", "init", True), "fresh"),
    "dtype": dict.fromkeys(("keep", "cast", "same"), "target"),
}


def _check(name: str, given: Any, known: Sequence[str]) -> None:
    if isinstance(given, str) and given in known:
        return
    meant = _MEANT.get(name, {}).get(given) if isinstance(given, str | bool) else None
    near = [meant] if meant else wording.closest(str(given), known, 1)
    if not near and name == "dtype":  # float32, "bfloat16", jnp.float16 ...
        hint = 'dtype="target" casts to that of your model; pm.at(model, "**").cast("bfloat16") changes it first'
    else:
        default = getattr(_DEFAULTS, name)
        other = ", the default" if meant == default else f", or {quoted(default)}, the default"
        hint = f"{name}={quoted((near or known)[0])}{other if meant else ''}"
    why = f"{name}={given!r} is not one of {wording.listing([repr(choice) for choice in known])}"
    raise BadArgument(why, hint=hint)


def _code(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_code(key)}: {_code(choice)}' for key, choice in value.items())}}}"
    if value is None or isinstance(value, Resize | bool):
        return repr(value)
    return quoted(value) if isinstance(value, str) else repr(sel(value))


_DEFAULTS = Options()


def quoted(text: str) -> str:
    """Text as code."""
    return json.dumps(text, ensure_ascii=False)


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


def listed(kind: str, lines: Sequence[Line]) -> str:
    """Cases of one kind below the sentence that tells how many there are."""
    one, many, _ = KINDS[kind]
    title = one if len(lines) == 1 else many.format(f"{len(lines):,}")
    return f"{title}:\n{table(fold(lines))}"
