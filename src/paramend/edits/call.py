"""A call: one edit of the table with its arguments, checked against specs and then run on an array."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, TypeVar

import numpy as np

from paramend.arrays.backend import Backend
from paramend.arrays.initializers import Site
from paramend.arrays.lowrank import LowRank, Product
from paramend.arrays.registry import backend, backend_of, to_numpy
from paramend.edits.arguments import Args, Value, shown
from paramend.edits.checks import check_scalar
from paramend.edits.damage import Losses
from paramend.edits.runs import native
from paramend.errors import NoMatch, OutOfRange, SpecMismatch, Unsupported
from paramend.leaves.codecs.encoding import Misfit
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Stored
from paramend.leaves.origins.texts import shortened
from paramend.leaves.specs import BLOCKS, Spec

T = TypeVar("T")
Run = Callable[[Backend, Any, Args, Site], Any]
Check = Callable[[Spec, Args], Spec]
Moves = Callable[[Origin, Args], Origin]


@dataclass(frozen=True, slots=True, repr=False)
class Op:
    """One edit. `edits.ops` is the table of them."""

    name: str  # the verb
    says: str  # what it does, for the docs table and `--help`
    parameters: tuple[str, ...]  # the names of its arguments
    run: Run  # (backend, array, args, place) → a new array
    # (spec, args) → the spec after it; raises if the edit makes no sense. None if it always does.
    check: Check | None = None
    # For edits that jax.numpy's `.at[index]` has too: args → (its method, its argument), or None.
    slot: Callable[[Args], tuple[str, Any] | None] | None = None
    losses: Losses | None = None  # for edits that a dtype may be too narrow for: how many values it could not hold
    reads: bool = True  # whether the result depends on the old values; if not, an engine need not read them
    keeps_spec: bool = True  # whether shape and dtype stay, so that the edit can be done in place
    chunks: bool = True  # whether an array may be edited piece by piece, in order
    arithmetic: bool = True  # whether leaves that are not numbers (PRNG keys) must be refused
    placed: bool = False  # whether the result depends on where the leaf is
    takes: tuple[Value, ...] = ()  # the kind of each argument as data; empty if arguments can only be code
    optional: Args = field(default_factory=dict)  # the optional arguments and their defaults
    aliases: tuple[str, ...] = ()  # other names for it on the command line
    also: tuple[str, ...] = ()  # other words that users may search for
    # For edits that only move elements: (origin, args) → the origin after it, whose bytes are copied.
    moves: Moves | None = None
    # For edits that add a product of low rank: (spec, args) → the product, or None.
    product: Callable[[Spec, Args], Product | None] | None = None

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    @property
    def words(self) -> tuple[str, ...]:
        return (*self.aliases, *self.also)

    @property
    def code(self) -> bool:
        """Whether its arguments can only be code: then it is neither a command nor a step of a recipe."""
        return bool(self.parameters) and not self.takes

    @property
    def arguments(self) -> dict[str, Value]:
        """The kind of each argument by its name; empty if arguments can only be code."""
        return {} if self.code else dict(zip(self.parameters, self.takes, strict=True))

    @property
    def array(self) -> str:
        """The name of the argument that may be an array, also from a file; "" if there is none."""
        return next((name for name, value in self.arguments.items() if value.array), "")

    @property
    def checks(self) -> bool:
        """Whether `after` may refuse anything."""
        return self.check is not None or any(value.scalar for value in self.takes)

    def after(self, spec: Spec, args: Args) -> Spec:
        """The spec after the edit; `SpecMismatch` if the arguments do not fit the leaf."""
        for name, value in zip(self.parameters, self.takes, strict=False):
            if value.scalar and name in args:
                check_scalar(self.name, name, args[name])
        return spec if self.check is None else self.check(spec, args)


@dataclass(frozen=True, slots=True)
class Coding:
    """What was asked of a quantised weight, and how the leaves that it is stored in do it."""

    path: str  # the weight
    before: Spec  # its shape and dtype
    spec: Spec  # those after the edits
    scheme: str  # what it is stored in, such as "fp8-block"
    asked: tuple["Call", ...]  # the edits, first to last
    how: tuple[str, ...]  # "codes of 0", "its scale", "encoded anew, ..." for each of them
    misfit: Misfit | None = None  # how far codes that were made anew are from what was asked; None if all is exact
    serial: int = field(default_factory=count().__next__, compare=False)  # its place among others

    @property
    def said(self) -> str:
        """How it is done, and how far off it is where that is known."""
        said = ["; ".join(dict.fromkeys(self.how)), str(self.misfit or "")]
        return f"{self.scheme}: {', '.join(filter(None, said))}"

    def then(self, later: "Coding") -> "Coding":
        """Both, one after the other, of one weight."""
        how, asked = (*self.how, *later.how), (*self.asked, *later.asked)
        return replace(later, before=self.before, asked=asked, how=how, misfit=later.misfit or self.misfit)

    def told(self) -> "Coding":
        """The same for a report, without arrays."""
        return replace(self, asked=tuple(each.told() for each in self.asked))

    def to_dict(self) -> dict[str, Any]:
        """What it adds to the row of a report."""
        found: dict[str, Any] = {"scheme": self.scheme, "how": list(self.how)}
        return found | (self.misfit.to_dict() if self.misfit else {})


@dataclass(frozen=True, slots=True, repr=False)
class Call:
    """An op with its arguments, and the slice of the leaf that it edits (None for the whole leaf)."""

    op: Op
    args: Args = field(default_factory=dict)
    index: Any = None
    # The edit of a quantised weight that this is a part of; None if it is one of the leaf itself.
    coding: Coding | None = None

    def __post_init__(self) -> None:
        value = self.args.get("value")
        if type(value) is tuple and len(value) == 2 and all(getattr(each, "ndim", 0) > 1 for each in value):
            object.__setattr__(self, "args", {**self.args, "value": LowRank(*value)})

    def __str__(self) -> str:
        given = {name: self.args[name] for name in self.op.parameters if name in self.args}
        default = {name for name, value in given.items() if value is None and name in self.op.optional}
        rule = given.pop("requantize", "amax")
        said = [_short(value) for name, value in given.items() if name not in default]
        return f"{self.op.name}({', '.join([*said, *([] if rule == 'amax' else [f'requantize={rule!r}'])])})"

    def __repr__(self) -> str:
        return f"<call {self}>"

    def told(self) -> "Call":
        """The call for a report, with arrays and functions replaced by their descriptions."""
        args = {name: value if isinstance(value, _PLAIN) else _Said(_short(value)) for name, value in self.args.items()}
        return replace(self, args=args, coding=self.coding and self.coding.told())

    def spec(self, spec: Spec) -> Spec:
        """The spec after the call; `SpecMismatch` or `OutOfRange` if arguments or slice do not fit the leaf."""
        if spec.dtype in BLOCKS and self.op.moves is None and self.op.name not in ("zero", "fill", "set"):
            raise SpecMismatch(
                f"{self} is for values, and {spec.dtype} are blocks of codes and scales", hint="raw=False"
            )
        if self.index is None:
            return self.op.after(spec, self.args)
        inner = Spec(sliced_shape(spec.shape, self.index), spec.dtype)
        if self.op.after(inner, self.args) != inner:
            raise SpecMismatch(f"{self} changes the spec, and a slice of a leaf must keep it")
        return spec

    def run(self, x: Any, place: Site) -> Any:
        """The edited array, a new one. `spec` must have checked the call before."""
        library = backend(x)
        if self.index is None:
            return self.op.run(library, x, self.args, place)
        slot = self.op.slot and self.op.slot(self.args)
        if slot:
            verb, value = slot
            return library.put(x, self.index, verb, native(library, value))
        part = self.op.run(library, library.get(x, self.index), self.args, place)
        return library.put(x, self.index, "set", part)


_PLAIN = (bool, int, float, complex, str, type(None))


class _Said(str):
    """The description of a value."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _short(value: Any) -> str:
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, LowRank):
        return " @ ".join(map(_short, value))
    if isinstance(value, Origin):  # a leaf of another file, or one that is made
        return str(value.spec) if isinstance(value, Stored) else shortened(str(value))
    if backend_of(type(value)) is None:
        return repr(value) if callable(value) else shown(value)
    spec = backend(value).spec(value)
    return str(spec) if spec.ndim else "scalar"


def explained(path: str, check: Callable[..., T], *args: Any) -> T:
    """What a check of a leaf gives; its error names the path."""
    try:
        return check(*args)
    except (SpecMismatch, NoMatch, Unsupported) as error:
        error.args = (f"{path}: {error}",)
        raise


def settled(edit: Call) -> Call:
    """A call whose result a plan can know, with numpy arrays in place of those of other libraries."""
    if edit.op.name == "apply" and not edit.args.get("keep_spec", True):
        raise Unsupported(
            "the spec of a function's result is known only when it runs, and a plan must know it before",
            hint="keep_spec=True, with a .cast(...) before or after",
        )
    if edit.op.name == "reinit" and callable(edit.args.get("init")):
        raise Unsupported(
            "an initializer function (key, shape, dtype) needs a JAX leaf, and leaves on disk are numpy arrays",
            hint='.reinit("lecun_normal")',
        )
    arrays = {name: edit.args[name] for name in ("value", "direction") if name in edit.args}
    held = {name: _held(value, lazy=name == "value") for name, value in arrays.items()}
    return replace(edit, args={**edit.args, **held})


def _held(value: Any, lazy: bool = False) -> Any:
    """A value with numpy arrays in place of those of other libraries and, unless it is lazy, of leaves of files."""
    if isinstance(value, LowRank):
        return LowRank(*map(_held, value))
    if isinstance(value, Stored):
        return value if lazy else value.read()
    return value if type(value) is np.ndarray or backend_of(type(value)) is None else to_numpy(value)


def sliced_shape(shape: tuple[int, ...], index: Any) -> tuple[int, ...]:
    """The shape of a slice of an array; `OutOfRange` if an integer is beyond an axis, or the axes are too few.

    >>> sliced_shape((12, 4, 8), -1), sliced_shape((12, 4), (slice(0, 3), 0))
    ((4, 8), (3,))
    """
    # A view of one scalar: numpy checks the index without allocating memory.
    blank = np.broadcast_to(np.empty(()), shape)
    try:
        inner: tuple[int, ...] = blank[index].shape
    except IndexError as error:
        raise OutOfRange(f"the slice does not fit a leaf of shape {shape}: {error}") from None
    return inner
