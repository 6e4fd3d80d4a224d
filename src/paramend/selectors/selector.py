"""Selectors: which leaves. Mostly text, and values that print as the code that makes them."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NoReturn, TypeAlias, TypeGuard

import numpy as np

from paramend.errors import BadArgument, NoMatch, OutOfRange, Unsupported
from paramend.leaves.leaves import Explained, Leaves, unique
from paramend.leaves.names import Alone, bound, by_name, called
from paramend.leaves.nested import unexhausted
from paramend.leaves.paths import text_of
from paramend.leaves.specs import DtypeLike, Slice, Spec, dtype_name
from paramend.reports import wording
from paramend.selectors.dialects import captures, from_keys, from_keystr, keys_in
from paramend.selectors.masks import masked
from paramend.selectors.messages import absent, count_of, examples, nothing, out_of_range, quoted
from paramend.selectors.patterns import Pattern, parse
from paramend.selectors.slices import plain_slice, read_slice, write_index


class Selector:
    """A choice of leaves, made by `pm.sel` and combined with `|`, `&`, `~`, `.where(...)` and a slice `[...]`."""

    def __or__(self, other: "SelectorLike") -> "Selector":
        return Union((*_parts(self), *_parts(sel(other))))

    def __ror__(self, other: "SelectorLike") -> "Selector":
        return sel(other) | self

    def __and__(self, other: "SelectorLike") -> "Selector":
        return Both(self, sel(other))

    def __rand__(self, other: "SelectorLike") -> "Selector":
        return sel(other) & self

    def __invert__(self) -> "Selector":
        return Rest(self)

    def __getitem__(self, index: Slice) -> "Selector":
        return Sliced(self, read_slice(index))

    def where(
        self,
        *,
        ndim: int | None = None,
        dtype: DtypeLike | None = None,
        shape: tuple[int, ...] | None = None,
        min_size: int | None = None,
        max_size: int | None = None,
    ) -> "Selector":
        """The selected leaves whose specs fit.

        Args:
            ndim: the number of axes.
            dtype: a dtype, its name, or a kind: "float", "int", "bool" or "complex".
            shape: the exact shape.
            min_size: the least number of scalars.
            max_size: the greatest number of scalars.

        >>> sel("**").where(ndim=2, dtype="float32")
        pm.sel("**").where(ndim=2, dtype="float32")
        """
        # A dtype of numpy equals the text "float" too, where it is that of float64.
        kind = isinstance(dtype, str) and dtype in ("float", "int", "bool", "complex")
        name = str(dtype) if kind else None if dtype is None else dtype_name(dtype)
        return Where(self, ndim, name, None if shape is None else tuple(shape), min_size, max_size)

    __iter__ = None  # or a loop over a selector would slice it forever

    def __call__(self, path: object, value: object) -> NoReturn:
        """Raise if used as a filter of Flax NNX, which passes one Variable at a time: that cannot tell the last one."""
        raise Unsupported(
            "a selector needs the whole model, and NNX calls its filters with one Variable at a time",
            hint=f"nnx.state(model, pm.nnx_filter(model, {self!r}))",
        )

    def _find(self, leaves: Leaves) -> set[int]:
        """The leaf numbers, possibly empty; for a leaf with several paths, any of its numbers."""
        raise NotImplementedError


_One: TypeAlias = str | re.Pattern[str] | type | Callable[[str, Spec], object] | Selector
_Bools: TypeAlias = bool | np.bool_ | Mapping[Any, Any]
# What `sel` takes: one of these, a tree of bools, or a list of them. A tree of bools that is neither a mapping nor a
# list, such as an Equinox module, is typed as its own library has it: `pm.at(...).mask()` gives it as `AnyTree`.
SelectorLike: TypeAlias = _One | _Bools | Sequence[_One | _Bools | Sequence[Any]]


@dataclass(frozen=True)
class Text(Selector):
    """Leaves whose path matches a pattern."""

    text: str
    pattern: Pattern

    def __reduce__(self) -> tuple[Any, ...]:
        return _text_selector, (self.text,)

    def __repr__(self) -> str:
        return f"pm.sel({quoted(self.text)})"

    def _find(self, leaves: Leaves) -> set[int]:
        index = leaves.index
        found = index.found.get(self.text)
        if found is None:
            try:
                found = tuple(index.ordered(self.pattern.find(index.names)))
            except OutOfRange as error:
                raise out_of_range(self.text, error, index) from None
            if not found:
                told = leaves.absence(self.text) if isinstance(leaves, Explained) else None
                raise nothing(self.text, self.pattern, index) if told is None else absent(self.text, index, *told)
            index.found[self.text] = found
        return set(found)


@dataclass(frozen=True)
class Keys(Text):
    """The leaf at a path given key by key, as in flattened dicts; or, if there is none, at each of several paths."""

    keys: tuple[str | int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return sel, (self.keys,)

    def __repr__(self) -> str:
        return f"pm.sel({self.keys!r})"

    def _find(self, leaves: Leaves) -> set[int]:
        try:
            return super()._find(leaves)
        except NoMatch:
            paths = [key for key in self.keys if isinstance(key, str)]
            first = next(iter(self.keys))
            within = {text_of(label) for label, child in leaves.index.names.items() if type(child) is not int}
            one = len(paths) < len(self.keys) or first in within
            if one and not any(any(char in path for char in "*/.[{") for path in paths):
                raise
            return Union(tuple(map(_text_selector, paths)))._find(leaves)


@dataclass(frozen=True)
class Regex(Selector):
    """Leaves whose whole path, as it is printed, matches a regular expression."""

    expression: re.Pattern[str]

    def __repr__(self) -> str:
        return f"pm.sel({self._written(self.expression.pattern)})"

    def _written(self, pattern: str) -> str:
        flags = re.RegexFlag(self.expression.flags & ~re.UNICODE)
        return f"re.compile({pattern!r}{f', {flags!r}' if flags else ''})"

    def _find(self, leaves: Leaves) -> set[int]:
        index = leaves.index
        found = {n for n in index.numbers if self.expression.fullmatch(index.path(n))}
        if not found:
            searched = [index.path(n) for n in index.numbers if self.expression.search(index.path(n))]
            within = f"; it occurs within {wording.listing(searched, 3)}, but must match the whole path"
            raise NoMatch(
                f"{self!r} matches none of {count_of(leaves.index)}{within if searched else ''}",
                hint=self._written(f".*{self.expression.pattern}.*") if searched else examples(leaves.index),
                near=searched[:3],
            )
        return found


@dataclass(frozen=True)
class Held(Alone, Selector):
    """Leaves held by instances of a class of modules or containers, at any depth below them."""

    kind: type

    def __reduce__(self) -> tuple[Any, ...]:
        return Held, (by_name(self.kind, "this selector"),)

    def __repr__(self) -> str:
        return f"pm.sel({self.kind.__module__}.{self.kind.__qualname__})"

    def _find(self, leaves: Leaves) -> set[int]:
        spans = leaves.index.spans
        numbers = leaves.index.numbers
        found = {n for kind, start, stop in spans if issubclass(kind, self.kind) for n in numbers[start:stop]}
        if not found:
            kinds = sorted({kind.__name__ for kind, start, stop in spans if stop > start})
            raise NoMatch(
                f"no leaf is held by an instance of {self.kind.__qualname__}; this tree has {wording.listing(kinds)}",
                hint=examples(leaves.index),
            )
        return found


@dataclass(frozen=True, eq=False)
class Predicate(Alone, Selector):
    """Leaves for which `f(path, spec)` is true."""

    function: Callable[[str, Spec], object]

    def __eq__(self, other: object) -> bool:
        return bound(self.function) == bound(other.function) if isinstance(other, Predicate) else NotImplemented

    def __hash__(self) -> int:
        return hash(bound(self.function)[0])

    def __reduce__(self) -> tuple[Any, ...]:
        return Predicate, (by_name(self.function, "this selector"),)

    def __repr__(self) -> str:
        return f"pm.sel({called(self.function)})"

    def _find(self, leaves: Leaves) -> set[int]:
        return {n for n in leaves.index.numbers if self.function(leaves.index.path(n), leaves.spec(n))}


@dataclass(frozen=True, eq=False)
class Mask(Selector):
    """Leaves at which a tree of bools, of the same structure or a prefix of it, is true."""

    tree: Any

    def __eq__(self, other: object) -> bool:
        return bool(self.tree == other.tree) if isinstance(other, Mask) else NotImplemented

    def __hash__(self) -> int:
        return hash(Mask)  # the tree may change, and has no hash

    def __repr__(self) -> str:
        return f"pm.sel({self.tree!r})"

    def _find(self, leaves: Leaves) -> set[int]:
        if leaves.children(self.tree) is None and callable(self.tree):  # a callable object, not a tree
            return Predicate(self.tree)._find(leaves)
        return masked(self.tree, leaves)


@dataclass(frozen=True)
class Union(Selector):
    """Leaves that any of several selectors selects; each of them must match something."""

    parts: tuple[Selector, ...]

    def __repr__(self) -> str:
        return " | ".join(map(_bracketed, self.parts))

    def _find(self, leaves: Leaves) -> set[int]:
        return set().union(*(_some(part, leaves) for part in self.parts))


@dataclass(frozen=True)
class Both(Selector):
    """Leaves that two selectors both select."""

    left: Selector
    right: Selector

    def __repr__(self) -> str:
        return f"{_bracketed(self.left)} & {_bracketed(self.right)}"

    def _find(self, leaves: Leaves) -> set[int]:
        return _whole(self.left, leaves) & _whole(self.right, leaves)


@dataclass(frozen=True)
class Rest(Selector):
    """Leaves that a selector does not select."""

    part: Selector

    def __repr__(self) -> str:
        return f"~{_bracketed(self.part)}"

    def _find(self, leaves: Leaves) -> set[int]:
        return set(leaves.index.numbers) - _whole(self.part, leaves)


@dataclass(frozen=True)
class Where(Selector):
    """Selected leaves whose specs fit."""

    part: Selector
    ndim: int | None
    dtype: str | None
    shape: tuple[int, ...] | None
    min_size: int | None
    max_size: int | None

    def __repr__(self) -> str:
        given = {name: getattr(self, name) for name in ("ndim", "dtype", "shape", "min_size", "max_size")}
        said = ", ".join(
            f"{name}={quoted(value) if isinstance(value, str) else value}"
            for name, value in given.items()
            if value is not None
        )
        return f"{_tight(self.part)}.where({said})"

    def fits(self, spec: Spec) -> bool:
        return (
            (self.ndim is None or spec.ndim == self.ndim)
            and (self.dtype is None or self.dtype in (spec.dtype, spec.kind))
            and (self.shape is None or spec.shape == self.shape)
            and (self.min_size is None or spec.size >= self.min_size)
            and (self.max_size is None or spec.size <= self.max_size)
        )

    def _find(self, leaves: Leaves) -> set[int]:
        return {number for number in self.part._find(leaves) if self.fits(leaves.spec(number))}


@dataclass(frozen=True, eq=False)
class Sliced(Selector):
    """A slice of each selected leaf, as `pm.sel("layers/mlp/wo/kernel")[:4]`."""

    part: Selector
    index: Any

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sliced):
            return NotImplemented
        return self.part == other.part and plain_slice(self.index) == plain_slice(other.index)

    def __hash__(self) -> int:
        return hash((self.part, plain_slice(self.index)))

    def __repr__(self) -> str:
        return f"{_tight(self.part)}[{write_index(self.index)}]"

    def _find(self, leaves: Leaves) -> set[int]:
        raise BadArgument(
            f"{self!r} is a slice of leaves, and whole leaves are needed here",
            hint="slice last, after combining selectors: pm.at(tree, (a | b)[:4])",
        )


def sel(what: SelectorLike) -> Selector:
    """A selector value from text, a regular expression, a class, a predicate, a tree of bools, or a list of these.

    Args:
        what: `"**/kernel"` (see the grammar in `paramend.selectors.grammar`); `re.compile(...)`, matched against the
            whole path; a module class such as `torch.nn.Linear` or `nnx.Linear`; `f(path, spec) -> bool`; a tree of
            bools; or a list of selectors, each of which must match something. Paths may also be written as by
            `jax.tree_util.keystr`, or be tuples of keys as in flattened dicts.

    Returns:
        A selector that `pm.at`, `pm.freeze` and all other verbs take, to be combined with `|`, `&`, `~`,
        `.where(...)` and `[...]`.

    Raises:
        SelectorError: the text breaks the grammar.

    >>> sel("**/kernel") & ~sel("head/**")
    pm.sel("**/kernel") & ~pm.sel("head/**")
    """
    if isinstance(what, str):
        return _text_selector(what)
    if isinstance(what, Selector):
        return what
    if isinstance(what, re.Pattern):
        return Regex(what)
    if isinstance(what, type):
        return Held(what)
    if _is_function(what):
        return Predicate(what)
    keys = keys_in(what)
    if keys is not None and (len(keys) > 1 or not isinstance(what[0], str)):  # type: ignore[index]
        text = from_keys(keys)
        return Keys(text, parse(text), keys)
    if isinstance(what, list | tuple) and any(_is_selector(each) or keys_in(each) for each in what):
        return Union(tuple(map(sel, what)))
    number = isinstance(what, int | float | complex | bytes) and not isinstance(what, bool)
    if what is None or number or (isinstance(what, list | tuple) and not what):
        raise BadArgument(
            f"{what!r} is not a selector",
            hint='text such as "**/kernel", re.compile(...), a module class, f(path, spec), or a tree of bools',
        )
    return Mask(what)


@lru_cache(maxsize=4096)
def _text_selector(text: str) -> Text:
    text = from_keystr(text) or text
    return Text(text, captures(text))


@unexhausted("the selector")
def resolve(selector: SelectorLike, leaves: Leaves) -> tuple[int, ...]:
    """The numbers of the selected leaves in tree order, one for each however many paths it has; `NoMatch` for none."""
    return unique(leaves, resolve_paths(selector, leaves))


def resolve_paths(selector: SelectorLike, leaves: Leaves) -> Sequence[int]:
    """The numbers of the selected leaves in tree order, one for each path that is matched; `NoMatch` for none."""
    selector = sel(selector)
    key = selector.text if isinstance(selector, Text) else None
    known = leaves.index.found.get(key) if key is not None else None
    return leaves.index.ordered(_some(selector, leaves)) if known is None else known


def slice_of(selector: SelectorLike) -> tuple[Selector, Any]:
    """A selector without its slice, and the slice, or None."""
    selector = sel(selector)
    return (selector.part, selector.index) if isinstance(selector, Sliced) else (selector, None)


def _is_function(what: object) -> TypeGuard[Callable[[str, Spec], object]]:
    return inspect.isroutine(what) or isinstance(what, partial)


def _is_selector(what: Any) -> bool:
    return isinstance(what, str | Selector | re.Pattern | type) or _is_function(what)


def _some(selector: Selector, leaves: Leaves) -> set[int]:
    found = selector._find(leaves)
    if not found:
        raise NoMatch(f"{selector!r} matches none of {count_of(leaves.index)}", hint=examples(leaves.index))
    return found


def _whole(selector: Selector, leaves: Leaves) -> set[int]:
    """The leaves that a selector finds, under all their paths, so that set algebra is over leaves, not paths."""
    found = selector._find(leaves)
    if leaves.ties:
        ones = {leaves.ties.get(number, number) for number in found}
        found = found | {number for number, one in leaves.ties.items() if one in ones}
    return found


def _parts(selector: Selector) -> tuple[Selector, ...]:
    return selector.parts if isinstance(selector, Union) else (selector,)


def _tight(selector: Selector) -> str:
    """A selector as it is written before a dot or a bracket."""
    return f"({selector!r})" if isinstance(selector, Rest) else _bracketed(selector)


def _bracketed(selector: Selector) -> str:
    return f"({selector!r})" if isinstance(selector, Union | Both) else repr(selector)
