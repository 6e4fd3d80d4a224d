"""Selectors: which leaves. Text first, and values that print as what rebuilds them."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from paramend import _text
from paramend.errors import BadArgument, NoMatch, OutOfRange
from paramend.leaves import Index, Leaves, unique
from paramend.paths import text_of, write_piece
from paramend.patterns import AnyPieces, Literal, Names, Pattern, Piece, parse
from paramend.specs import Spec, dtype_name


class Selector:
    """A choice of leaves, made by `pm.sel` and combined with `|`, `&`, `~`, `.where(...)` and a slice `[...]`."""

    def __or__(self, other: Any) -> "Selector":
        return Union((self, sel(other)))

    def __ror__(self, other: Any) -> "Selector":
        return Union((sel(other), self))

    def __and__(self, other: Any) -> "Selector":
        return Both(self, sel(other))

    def __rand__(self, other: Any) -> "Selector":
        return Both(sel(other), self)

    def __invert__(self) -> "Selector":
        return Rest(self)

    def __getitem__(self, index: Any) -> "Selector":
        return Sliced(self, index)

    def where(
        self,
        *,
        ndim: int | None = None,
        dtype: Any = None,
        shape: tuple[int, ...] | None = None,
        min_size: int | None = None,
        max_size: int | None = None,
    ) -> "Selector":
        """The selected leaves whose specs fit.

        Args:
            ndim: the number of axes.
            dtype: a dtype, its name, or a kind: "float", "int", "bool", "complex".
            shape: the exact shape.
            min_size: the least number of scalars.
            max_size: the greatest number of scalars.

        >>> sel("**").where(ndim=2, dtype="float32")
        pm.sel("**").where(ndim=2, dtype="float32")
        """
        if dtype is not None and dtype not in ("float", "int", "bool", "complex"):
            dtype = dtype_name(dtype)
        return Where(self, ndim, dtype, None if shape is None else tuple(shape), min_size, max_size)

    def find(self, leaves: Leaves) -> set[int]:
        """The leaf numbers, possibly none; of a leaf with several paths, any of its numbers."""
        raise NotImplementedError


@dataclass(frozen=True)
class Text(Selector):
    """Leaves whose path matches a pattern."""

    text: str
    pattern: Pattern

    def __repr__(self) -> str:
        return f"pm.sel({_quote(self.text)})"

    def find(self, leaves: Leaves) -> set[int]:
        index = leaves.index
        found = index.found.get(self.text)
        if found is None:
            try:
                found = tuple(index.ordered(self.pattern.find(index.names)))
            except OutOfRange as error:
                raise OutOfRange(f"{_quote(self.text)}: {error}") from None
            if not found:
                raise _nothing(self.text, self.pattern, leaves)
            index.found[self.text] = found
        return set(found)


@dataclass(frozen=True)
class Regex(Selector):
    """Leaves whose whole path, as printed, matches a regular expression."""

    expression: re.Pattern[str]

    def __repr__(self) -> str:
        flags = f", {self.expression.flags & ~re.UNICODE}" if self.expression.flags & ~re.UNICODE else ""
        return f"pm.sel(re.compile({self.expression.pattern!r}{flags}))"

    def find(self, leaves: Leaves) -> set[int]:
        index = leaves.index
        found = {n for n in index.numbers if self.expression.fullmatch(index.path(n))}
        if not found:
            searched = [index.path(n) for n in index.numbers if self.expression.search(index.path(n))]
            raise NoMatch(
                f"{self!r} matches none of {_count(leaves)}"
                + (f"; it occurs within {_text.listing(searched, 3)}, but a match is of the whole path" if searched else ""),
                hint=f're.compile(r".*{self.expression.pattern}.*")' if searched else _examples(leaves),
                near=searched[:3],
            )
        return found


@dataclass(frozen=True)
class Held(Selector):
    """Leaves held by instances of a class of modules or containers, at any depth below them."""

    kind: type

    def __repr__(self) -> str:
        return f"pm.sel({self.kind.__module__}.{self.kind.__qualname__})"

    def find(self, leaves: Leaves) -> set[int]:
        spans = leaves.index.spans
        numbers = leaves.index.numbers
        found = {n for kind, start, stop in spans if issubclass(kind, self.kind) for n in numbers[start:stop]}
        if not found:
            kinds = sorted({kind.__name__ for kind, start, stop in spans if stop > start})
            raise NoMatch(
                f"no leaf is held by an instance of {self.kind.__qualname__}; this tree has {_text.listing(kinds)}",
                hint=_examples(leaves),
            )
        return found


@dataclass(frozen=True)
class Predicate(Selector):
    """Leaves for which `f(path, spec)` is true."""

    function: Callable[[str, Spec], Any]

    def __repr__(self) -> str:
        return f"pm.sel({getattr(self.function, '__qualname__', repr(self.function))})"

    def find(self, leaves: Leaves) -> set[int]:
        return {n for n in leaves.index.numbers if self.function(leaves.index.path(n), leaves.spec(n))}


@dataclass(frozen=True, eq=False)
class Mask(Selector):
    """Leaves at which a tree of bools, of the same structure or a prefix of it, is true."""

    tree: Any

    def __repr__(self) -> str:
        return f"pm.sel({self.tree!r})"

    def find(self, leaves: Leaves) -> set[int]:
        flags = dict(_flags(self.tree, ()))
        found: set[int] = set()
        used: set[tuple[str, ...]] = set()
        for number in leaves.index.numbers:
            path = leaves.index.pieces(number)
            place = next((path[:i] for i in range(len(path), -1, -1) if path[:i] in flags), None)
            if place is None:
                raise BadArgument(
                    f"the tree of bools says nothing of {leaves.index.path(number)}",
                    hint="pm.at(tree, selector).mask() gives a tree of bools of the right structure",
                )
            used.add(place)
            if flags[place]:
                found.add(number)
        extra = [path for path in flags if path not in used and flags[path]]
        if extra:
            raise BadArgument(f"the tree of bools names {'/'.join(extra[0])}, which is no leaf of this tree")
        return found


@dataclass(frozen=True)
class Union(Selector):
    """Leaves that any of several selectors chooses; each of them must choose something."""

    parts: tuple[Selector, ...]

    def __repr__(self) -> str:
        return " | ".join(map(_bracketed, self.parts))

    def find(self, leaves: Leaves) -> set[int]:
        return set().union(*(_some(part, leaves) for part in self.parts))


@dataclass(frozen=True)
class Both(Selector):
    """Leaves that two selectors both choose."""

    left: Selector
    right: Selector

    def __repr__(self) -> str:
        return f"{_bracketed(self.left)} & {_bracketed(self.right)}"

    def find(self, leaves: Leaves) -> set[int]:
        return _whole(self.left, leaves) & _whole(self.right, leaves)


@dataclass(frozen=True)
class Rest(Selector):
    """Leaves that a selector does not choose."""

    part: Selector

    def __repr__(self) -> str:
        return f"~{_bracketed(self.part)}"

    def find(self, leaves: Leaves) -> set[int]:
        return set(leaves.index.numbers) - _whole(self.part, leaves)


@dataclass(frozen=True)
class Where(Selector):
    """Chosen leaves whose specs fit."""

    part: Selector
    ndim: int | None
    dtype: str | None
    shape: tuple[int, ...] | None
    min_size: int | None
    max_size: int | None

    def __repr__(self) -> str:
        given = {name: getattr(self, name) for name in ("ndim", "dtype", "shape", "min_size", "max_size")}
        said = ", ".join(
            f"{name}={_quote(value) if isinstance(value, str) else value}"
            for name, value in given.items()
            if value is not None
        )
        return f"{_bracketed(self.part)}.where({said})"

    def fits(self, spec: Spec) -> bool:
        """Whether a spec passes every condition."""
        return (
            (self.ndim is None or spec.ndim == self.ndim)
            and (self.dtype is None or self.dtype in (spec.dtype, spec.kind))
            and (self.shape is None or spec.shape == self.shape)
            and (self.min_size is None or spec.size >= self.min_size)
            and (self.max_size is None or spec.size <= self.max_size)
        )

    def find(self, leaves: Leaves) -> set[int]:
        return {number for number in self.part.find(leaves) if self.fits(leaves.spec(number))}


@dataclass(frozen=True, eq=False)
class Sliced(Selector):
    """A slice of each chosen leaf, as `pm.sel("layers/mlp/wo/kernel")[:4]`."""

    part: Selector
    index: Any

    def __repr__(self) -> str:
        return f"{_bracketed(self.part)}[{write_index(self.index)}]"

    def find(self, leaves: Leaves) -> set[int]:
        return self.part.find(leaves)


def sel(what: Any) -> Selector:
    """A selector value from text, a regular expression, a class, a predicate, a tree of bools, or a list of these.

    Args:
        what: `"**/kernel"` (see the grammar in `paramend.patterns`); `re.compile(...)`, matched against the whole path;
            a module class such as `torch.nn.Linear` or `nnx.Linear`; `f(path, spec) -> bool`; a tree of bools; or a
            list of selectors, each of which must match something.

    Returns:
        A selector that `pm.at`, `pm.freeze` and all others take; combine with `|`, `&`, `~`, `.where(...)`, `[...]`.

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
    if isinstance(what, list | tuple) and what and all(_is_selector(part) for part in what):
        return Union(tuple(map(sel, what)))
    if _is_mask(what):
        return Mask(what)
    if callable(what):
        return Predicate(what)
    raise BadArgument(
        f"{what!r} is no selector",
        hint='text such as "**/kernel", re.compile(...), a module class, f(path, spec), a tree of bools, or a list of these',
    )


@lru_cache(maxsize=4096)
def _text_selector(text: str) -> Text:
    return Text(text, parse(text))


def resolve(selector: Any, leaves: Leaves) -> tuple[int, ...]:
    """The numbers of the chosen leaves in the order of the tree, one for each leaf however many paths it has.

    Raises:
        NoMatch: nothing is chosen; the message names what comes close.
        OutOfRange: a position in the selector does not exist.
    """
    selector = sel(selector)
    key = selector.text if isinstance(selector, Text) else None
    known = leaves.index.found.get(key) if key is not None else None
    return unique(leaves, leaves.index.ordered(_some(selector, leaves)) if known is None else known)


def slice_of(selector: Any) -> tuple[Selector, Any]:
    """A selector without its slice, and the slice, or None."""
    selector = sel(selector)
    return (selector.part, selector.index) if isinstance(selector, Sliced) else (selector, None)


def write_index(index: Any) -> str:
    """A slice as it is typed between brackets.

    >>> write_index((slice(None, 4), -1))
    ':4, -1'
    """
    if isinstance(index, tuple):
        return ", ".join(map(write_index, index))
    if isinstance(index, slice):
        step = "" if index.step is None else f":{index.step}"
        return f"{'' if index.start is None else index.start}:{'' if index.stop is None else index.stop}{step}"
    return "..." if index is Ellipsis else repr(index)


# ---- the parts -------------------------------------------------------------------------------------------------


def _is_selector(what: Any) -> bool:
    return isinstance(what, str | Selector | re.Pattern | type) or (callable(what) and not _is_mask(what))


def _is_mask(what: Any) -> bool:
    if isinstance(what, bool | np.bool_):
        return True
    children = _children(what)
    return children is not None and all(_is_mask(child) for _, child in children)


def _children(node: Any) -> list[tuple[str, Any]] | None:
    if isinstance(node, Mapping):
        return [(str(key), child) for key, child in node.items()]
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return list(zip(node._fields, node, strict=True))
    if isinstance(node, list | tuple):
        return [(str(i), child) for i, child in enumerate(node)]
    return None


def _flags(node: Any, path: tuple[str, ...]) -> Iterable[tuple[tuple[str, ...], bool]]:
    children = _children(node)
    if children is None:
        yield path, bool(node)
    for key, child in children or ():
        yield from _flags(child, (*path, *map(text_of, parse_key(key))))


def parse_key(key: str) -> Iterable[Any]:
    """The labels of a key."""
    from paramend.paths import labels

    return labels(key)


def _some(selector: Selector, leaves: Leaves) -> set[int]:
    found = selector.find(leaves)
    if not found:
        raise NoMatch(f"{selector!r} matches none of {_count(leaves)}", hint=_examples(leaves))
    return found


def _whole(selector: Selector, leaves: Leaves) -> set[int]:
    """What a selector finds, with all paths of each leaf, so that set algebra is over leaves, not paths."""
    found = selector.find(leaves)
    if leaves.ties:
        ones = {leaves.ties.get(number, number) for number in found}
        found = found | {number for number, one in leaves.ties.items() if one in ones}
    return found


def _bracketed(selector: Selector) -> str:
    return f"({selector!r})" if isinstance(selector, Union | Both) else repr(selector)


def _quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\") + "'" if '"' in text else '"' + text.replace("\\", "\\\\") + '"'


def _count(leaves: Leaves) -> str:
    return _text.plural(len(leaves.index.numbers), "leaf", "leaves")


def _examples(leaves: Leaves) -> str:
    index = leaves.index
    if not index.numbers:
        return "the tree holds no arrays"
    return f"this tree has {_text.listing([index.path(n) for n in index.numbers[:4]], 3)}"


# ---- near misses -----------------------------------------------------------------------------------------------


def _nothing(text: str, pattern: Pattern, leaves: Leaves) -> NoMatch:
    """The error for a pattern that matches nothing, with selectors near it that do match."""
    index = leaves.index
    below = _try(f"{text}/**", index)
    if below:
        return NoMatch(
            f"{_quote(text)} names a subtree of {_text.plural(below, 'leaf', 'leaves')}, and a selector names leaves",
            hint=f"write {_quote(text + '/**')}",
            near=[f"{text}/**"],
        )
    near = [candidate for candidate in _candidates(text, pattern, index) if _try(candidate, index)]
    near = list(dict.fromkeys(near))[:3]
    hint = _examples(leaves)
    if near:
        hint = f"did you mean {_quote(near[0])} ({_text.plural(_try(near[0], index), 'leaf', 'leaves')})?"
    return NoMatch(f"{_quote(text)} matches none of {_count(leaves)}", hint=hint, near=near)


def _try(text: str, index: Index) -> int:
    try:
        return len(parse(text).find(index.names))
    except (OutOfRange, ValueError):
        return 0


def _candidates(text: str, pattern: Pattern, index: Index) -> Iterable[str]:
    """Selectors near the text, most likely first. Only those that match are offered."""
    tops = [write_piece(text_of(label)) for label in index.names]
    yield from (f"{top}/{text}" for top in tops[:8])
    if isinstance(pattern.segments[0], Piece) and len(pattern.segments) > 1:
        yield str(replace(pattern, segments=pattern.segments[1:]))
    yield from _repairs(pattern, index)
    yield f"**/{text}"
    paths = [index.path(number) for number in index.numbers]
    yield from _text.closest(text, paths)


def _repairs(pattern: Pattern, index: Index) -> Iterable[str]:
    """The pattern with each segment that leads nowhere replaced by a key that is there."""
    segments = list(pattern.segments)
    for at, segment in enumerate(segments):
        if isinstance(segment, AnyPieces) or _leads(Pattern(tuple(segments[: at + 1])), index):
            continue
        known = _keys_after(Pattern(tuple(segments[:at])) if at else None, index)
        word = "".join(atom.text if isinstance(atom, Literal) else "*" for atom in getattr(segment, "atoms", ()))
        for near in _text.closest(word or str(segment), known):
            repaired = list(segments)
            if isinstance(segment, Piece) and any(not isinstance(atom, Literal) for atom in segment.atoms):
                repaired[at] = _same_shape(segment, near)
            else:
                repaired[at] = parse(write_piece(near)).segments[0]
            fixed = Pattern(tuple(repaired))
            yield str(fixed)
            yield f"{fixed}/**"
            if _leads(Pattern(tuple(repaired[: at + 1])), index) and at + 1 < len(segments):
                yield from _repairs(fixed, index)
        return


def _same_shape(segment: Piece, near: str) -> Piece:
    """A segment such as `dense_[-1]` with its text taken from a key such as `Dense_3`."""
    first = segment.atoms[0]
    if isinstance(first, Literal) and near.casefold().startswith(first.text.casefold()):
        return Piece((Literal(near[: len(first.text)]), *segment.atoms[1:]))
    head = near.rstrip("0123456789")
    return Piece((Literal(head), *segment.atoms[1:])) if head else segment


def _leads(pattern: Pattern, index: Index) -> bool:
    """Whether anything lies at or below what the pattern names."""
    below = Pattern((*pattern.segments, AnyPieces()))
    try:
        return bool(below.find(index.names))
    except OutOfRange:
        return True


def _keys_after(pattern: Pattern | None, index: Index) -> list[str]:
    """The keys that may stand where a pattern ends."""
    if pattern is None:
        return [text_of(label) for label in index.names]
    if any(isinstance(segment, AnyPieces) for segment in pattern.segments):
        seen: dict[str, None] = {}

        def visit(names: Names) -> None:
            for label, child in names.items():
                seen[text_of(label)] = None
                if type(child) is not int:
                    visit(child)

        visit(index.names)
        return list(seen)
    depth = len(pattern.segments)
    try:
        below = Pattern((*pattern.segments, AnyPieces())).find(index.names)
    except OutOfRange:
        return []
    return list(dict.fromkeys(index.pieces(n)[depth] for n in below if len(index.pieces(n)) > depth))
