"""The one table of edits. A row gives the verb of `pm.at`, the command, the dry-run text and the docs table."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paramend.arrays import initializers
from paramend.arrays.backend import Backend
from paramend.arrays.initializers import Place
from paramend.arrays.registry import backend, backend_of
from paramend.edits.arguments import ARRAY, DEVIATION, DTYPE, INITIALIZER, NATURAL, NUMBER, OPERAND, Value
from paramend.errors import BadArgument, OutOfRange, SpecMismatch, Unsupported
from paramend.leaves.leaves import Stored
from paramend.leaves.specs import Spec, dtype_name, numpy_dtype

Args = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Op:
    """One edit.

    Attributes:
        name: the verb.
        says: what it does, for the docs table and `--help`.
        parameters: the names of its arguments.
        takes: what data may stand for each of them; none where only code can say them.
        optional: those that it can do without.
        also: other words for it, under which it may be looked for.
        check: (spec, args) → the spec after it; raises where the edit makes no sense.
        run: (backend, array, args, place) → a new array.
        slot: for edits that jax.numpy's `.at[index]` has too: args → (its method, its argument).
        reads: whether the old values matter; if not, an engine need not read them.
        keeps_spec: whether shape and dtype stay, so that the edit can be done in place.
        chunks: whether an array may be edited piece by piece, in order.
        arithmetic: whether leaves that are no numbers (PRNG keys) must be refused.
        placed: whether the outcome depends on where the leaf is.
    """

    name: str
    says: str
    parameters: tuple[str, ...]
    check: Callable[[Spec, Args], Spec]
    run: Callable[[Backend, Any, Args, Place], Any]
    slot: Callable[[Args], tuple[str, Any]] | None = None
    reads: bool = True
    keeps_spec: bool = True
    chunks: bool = True
    arithmetic: bool = True
    placed: bool = False
    takes: tuple[Value, ...] = ()
    optional: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    @property
    def checks(self) -> bool:
        """Whether `check` may refuse anything."""
        return self.check is not _same

    def __reduce__(self) -> tuple[Callable[[str], "Op"], tuple[str]]:
        return _row, (self.name,)  # there is one of each


@dataclass(frozen=True, slots=True)
class Call:
    """An op with its arguments, and the slice of the leaf that it is about (None: all of it)."""

    op: Op
    args: Args = field(default_factory=dict)
    index: Any = None

    def __str__(self) -> str:
        from_args = ", ".join(_short(self.args[name]) for name in self.op.parameters if name in self.args)
        return f"{self.op.name}({from_args})"

    def spec(self, spec: Spec) -> Spec:
        """The spec after the call.

        Raises:
            SpecMismatch: the arguments do not fit the leaf.
            OutOfRange: the slice does not.
        """
        if self.index is None:
            return self.op.check(spec, self.args)
        inner = Spec(sliced_shape(spec.shape, self.index), spec.dtype)
        if self.op.check(inner, self.args) != inner:
            raise SpecMismatch(f"{self} changes the spec, and a slice of a leaf must keep it")
        return spec

    def run(self, x: Any, place: Place) -> Any:
        """A new array: the edit of x. `spec` has been asked before."""
        library = backend(x)
        if self.index is None:
            return self.op.run(library, x, self.args, place)
        if self.op.slot is not None:
            verb, value = self.op.slot(self.args)
            return library.put(x, self.index, verb, _native(library, value))
        part = self.op.run(library, library.get(x, self.index), self.args, place)
        return library.put(x, self.index, "set", part)


def _short(value: Any) -> str:
    if backend_of(type(value)) is None:
        return repr(value)
    spec = backend(value).spec(value)
    return str(spec) if spec.ndim else "scalar"


def sliced_shape(shape: tuple[int, ...], index: Any) -> tuple[int, ...]:
    """The shape of a slice of an array.

    Raises:
        OutOfRange: an integer is beyond an axis, or the axes are too few.

    >>> sliced_shape((12, 4, 8), -1), sliced_shape((12, 4), (slice(0, 3), 0))
    ((4, 8), (3,))
    """
    parts = index if isinstance(index, tuple) else (index,)
    if any(
        part is not None and not isinstance(part, int | slice | type(...) | list | np.ndarray | np.integer)
        for part in parts
    ):
        try:
            index = tuple(np.asarray(p) if backend_of(type(p)) is not None else p for p in parts)
        except Exception as error:
            raise BadArgument(
                "a slice must be known before the edit runs; this one holds a traced value",
                hint="x.at[i] of jax.numpy takes traced indices",
            ) from error
    # A view of one scalar: numpy checks the index and no memory is taken.
    blank = np.broadcast_to(np.empty(()), shape)
    try:
        inner: tuple[int, ...] = blank[index].shape
    except IndexError as error:
        raise OutOfRange(f"the slice does not fit a leaf of shape {shape}: {error}") from None
    return inner


# ---- checks ----------------------------------------------------------------------------------------------------


def _is_scalar(value: Any) -> bool:
    return isinstance(value, bool | int | float | complex | np.generic) or getattr(value, "shape", None) == ()


def _concrete(value: Any) -> Any:
    """A scalar as numpy has it, or None while it is traced."""
    try:
        return np.asarray(value if backend_of(type(value)) is None else backend(value).numpy(value))
    except Exception:
        return None  # a tracer: its value is not known yet


_RANK = {"bool": 0, "int": 1, "float": 2, "complex": 3}


def _fits(value: Any, spec: Spec, what: str) -> None:
    """Refuses a scalar that the dtype cannot hold."""
    number = _concrete(value)
    if number is None or spec.kind == "other":
        return
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", np.exceptions.ComplexWarning)
        try:
            stored = number.astype(numpy_dtype(spec.dtype))
        except (TypeError, ValueError) as error:
            raise SpecMismatch(f"{what} takes a number, and {value!r} is none") from error
        except OverflowError as error:  # an int of Python beyond 64 bits
            raise SpecMismatch(f"{what}: {spec.dtype} cannot hold {value!r}") from error
    exact = number if spec.kind in ("bool", "int") else np.isfinite(number.astype(np.complex128))
    held = stored.astype(number.dtype) if spec.kind in ("bool", "int") else np.isfinite(stored.astype(np.complex128))
    lost = exact != held
    if spec.kind == "float":
        lost &= exact  # what is infinite stays so
    if spec.kind != "complex" and np.iscomplexobj(number):
        lost |= number.imag != 0
    if lost.any():
        raise SpecMismatch(
            f"{what}: {spec.dtype} cannot hold {value if number.ndim == 0 else number[lost].reshape(-1)[0]!r}",
            hint='cast the leaf first: pm.at(tree, selector).cast("float32")',
        )


def fitted(value: Any, spec: Spec) -> np.ndarray[Any, Any]:
    """Numbers that stand in text, as an array of a leaf's dtype.

    Raises:
        SpecMismatch: the dtype cannot hold one of them.

    >>> fitted([1, 0.5], Spec((2,), "float16"))
    array([1. , 0.5], dtype=float16)
    """
    _fits(value, spec, "the array")
    return np.asarray(value).astype(numpy_dtype(spec.dtype))


def _check_zero(spec: Spec, args: Args) -> Spec:
    if spec.dtype == "float8_e8m0fnu":  # a format of powers of two
        raise SpecMismatch("float8_e8m0fnu has no zero")
    return spec


def _check_fill(spec: Spec, args: Args) -> Spec:
    value = args["value"]
    if not _is_scalar(value):
        raise SpecMismatch(
            f"fill takes a scalar, and this is {type(value).__name__} of shape {getattr(value, 'shape', '?')}",
            hint="pm.at(tree, selector).set(array)",
        )
    _fits(value, spec, "fill")
    return spec


def _check_set(spec: Spec, args: Args) -> Spec:
    value = args["value"]
    library = backend_of(type(value))
    if library is None and _is_scalar(value):
        raise SpecMismatch(
            f"set takes an array of spec {spec}, and {value!r} is a scalar",
            hint=f"pm.at(tree, selector).fill({value!r})",
        )
    given = library.spec(value) if library is not None else _spec_of_list(value)
    if given == spec:
        return spec
    if given.shape != spec.shape:
        transposed = given.shape == spec.shape[::-1] and given.ndim > 1
        raise SpecMismatch(
            f"the leaf is {spec}, and the array is {given}",
            hint=".set(array.T)" if transposed else f"an array of shape {spec.shape}",
        )
    raise SpecMismatch(
        f"the leaf is {spec}, and the array is {given}",
        hint=f'.set(array.astype("{spec.dtype}")), or cast the leaf first: .cast("{given.dtype}")',
    )


def _spec_of_list(value: Any) -> Spec:
    if isinstance(value, Stored):
        return value.spec
    try:
        array = np.asarray(value)
    except Exception as error:
        raise SpecMismatch(f"set takes an array, and this is {type(value).__name__}") from error
    if array.dtype == object:
        raise SpecMismatch(f"set takes an array, and this is {type(value).__name__}")
    return Spec(array.shape, array.dtype.name)


def _check_arithmetic(spec: Spec, args: Args) -> Spec:
    value = args["value"]
    if spec.kind == "bool":
        raise SpecMismatch("a bool leaf has no sums and products", hint=".fill(True) or .set(array)")
    if _is_scalar(value):
        _fits(value, spec, "the operand")
        return spec
    library = backend_of(type(value))
    given = library.spec(value) if library is not None else _spec_of_list(value)
    try:
        shape = np.broadcast_shapes(spec.shape, given.shape)
    except ValueError:
        shape = ()
    if shape != spec.shape:
        raise SpecMismatch(f"an operand of shape {given.shape} does not broadcast to the leaf, {spec}")
    if _RANK.get(given.kind, 9) > _RANK.get(spec.kind, -1):
        raise SpecMismatch(
            f"an operand of dtype {given.dtype} would change the leaf, {spec}", hint=".cast(...) it first"
        )
    return spec


def _check_float(spec: Spec, args: Args) -> Spec:
    if spec.kind != "float":
        raise SpecMismatch(f"random values are floats, and the leaf is {spec}", hint='pm.sel(...).where(dtype="float")')
    return spec


def _check_noise(spec: Spec, args: Args) -> Spec:
    if _concrete(args["std"]) is not None and float(args["std"]) < 0:
        raise BadArgument(f"std={args['std']!r} is negative")
    return _check_float(spec, args)


def _check_reinit(spec: Spec, args: Args) -> Spec:
    if not callable(args["init"]):
        initializers.check_initializer(args["init"], spec)
    return _check_float(spec, args)


def _check_cast(spec: Spec, args: Args) -> Spec:
    dtype = dtype_name(args["dtype"])
    after = Spec(spec.shape, dtype)
    if spec.kind == "other" or after.kind == "other":
        raise SpecMismatch(f"{spec} cannot be cast to {dtype}")
    if spec.kind == "complex" and after.kind != "complex":
        raise SpecMismatch(
            f"a cast from {spec.dtype} to {dtype} drops the imaginary part",
            hint=".apply(fn, keep_spec=False)",
        )
    return after


# ---- runs ------------------------------------------------------------------------------------------------------


def _native(library: Backend, value: Any) -> Any:
    """A value that this library can read: arrays of another one pass through numpy, bit for bit."""
    if isinstance(value, Stored):
        value = value.read()
    found = backend_of(type(value))
    return value if found is None or found is library else found.numpy(value)


def _run_set(library: Backend, x: Any, args: Args, place: Place) -> Any:
    return library.like(_native(library, args["value"]), x)


def _run_apply(library: Backend, x: Any, args: Args, place: Place) -> Any:
    result = args["fn"](x)
    found = backend_of(type(result))
    if found is None:
        raise SpecMismatch(
            f"apply: the function gave {type(result).__name__}, not an array, for {'/'.join(place.pieces)}"
        )
    before, after = library.spec(x), found.spec(result)
    if args.get("keep_spec", True) and before != after:
        raise SpecMismatch(
            f"apply: the function turned {before} into {after} at {'/'.join(place.pieces)}",
            hint=".apply(fn, keep_spec=False) allows it",
        )
    return library.like(result, x) if before == after else result


def _run_cast(library: Backend, x: Any, args: Args, place: Place) -> Any:
    dtype = dtype_name(args["dtype"])
    try:
        result = library.cast(x, dtype)
    except (AttributeError, TypeError) as error:
        raise Unsupported(f"{type(x).__name__} has no dtype {dtype}") from error
    if library.spec(result).dtype != dtype:
        raise Unsupported(
            f"JAX made {library.spec(result).dtype} of {dtype}",
            hint='jax.config.update("jax_enable_x64", True)',
        )
    return result


def _is_key(seed: Any) -> bool:
    library = backend_of(type(seed))
    return library is not None and bool(getattr(library, "is_key", lambda x: False)(seed))


def _run_noise(library: Backend, x: Any, args: Args, place: Place) -> Any:
    spec, seed, std = library.spec(x), args.get("seed", 0), args["std"]
    if _is_key(seed):
        keys: Any = backend(seed)
        return library.add(x, keys.normal(keys.fold(seed, place.number), spec.shape, spec.dtype) * std)
    values = initializers.normal(initializers.generator(int(seed), place), spec.shape, spec.dtype)
    return library.add(x, library.like((values * values.dtype.type(std)).astype(numpy_dtype(spec.dtype)), x))


def _run_reinit(library: Backend, x: Any, args: Args, place: Place) -> Any:
    spec, seed, init = library.spec(x), args.get("seed", 0), args["init"]
    if callable(init):
        keys: Any = library
        if not hasattr(keys, "fold"):
            raise Unsupported(
                "an initializer function (key, shape, dtype) needs a JAX leaf", hint='.reinit("lecun_normal")'
            )
        key = seed if _is_key(seed) else keys.key(int(seed))
        return _run_set(library, x, {"value": init(keys.fold(key, place.number), spec.shape, x.dtype)}, place)
    if _is_key(seed):
        keys = backend(seed)
        key = keys.fold(seed, place.number)
        values = keys.initialize(init, initializers.INITIALIZERS[init], key, spec, place.out_first)
        return library.like(values, x)
    rng = initializers.generator(int(seed), place)
    values = initializers.initialize(init, rng, spec, out_first=place.out_first)
    return library.like(values.astype(numpy_dtype(spec.dtype)), x)


def _same(spec: Spec, args: Args) -> Spec:
    return spec


def _row(name: str) -> Op:
    return OPS[name]


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            "zero",
            "every element becomes +0.0",
            (),
            _check_zero,
            lambda library, x, args, place: library.zeros(x),
            slot=lambda args: ("set", 0),
            reads=False,
        ),
        Op(
            "fill",
            "every element becomes the scalar",
            ("value",),
            _check_fill,
            lambda library, x, args, place: library.full(x, _native(library, args["value"])),
            slot=lambda args: ("set", args["value"]),
            takes=(NUMBER,),
            reads=False,
        ),
        Op(
            "set",
            "the leaf becomes the array, of the same shape and dtype",
            ("value",),
            _check_set,
            _run_set,
            slot=lambda args: ("set", args["value"]),
            takes=(ARRAY,),
            also=("replace", "assign"),
            reads=False,
            chunks=False,
            arithmetic=False,
        ),
        Op(
            "add",
            "the operand is added, in the dtype of the leaf",
            ("value",),
            _check_arithmetic,
            lambda library, x, args, place: library.add(x, _native(library, args["value"])),
            slot=lambda args: ("add", args["value"]),
            takes=(OPERAND,),
        ),
        Op(
            "multiply",
            "every element is multiplied, in the dtype of the leaf",
            ("value",),
            _check_arithmetic,
            lambda library, x, args, place: library.multiply(x, _native(library, args["value"])),
            slot=lambda args: ("multiply", args["value"]),
            takes=(OPERAND,),
            also=("scale", "mul"),
        ),
        Op(
            "apply",
            "the leaf becomes fn(leaf)",
            ("fn", "keep_spec"),
            _same,
            _run_apply,
            optional=("keep_spec",),
            chunks=False,
            arithmetic=False,
            placed=True,
        ),
        Op(
            "cast",
            "the leaf takes another dtype",
            ("dtype",),
            _check_cast,
            _run_cast,
            keeps_spec=False,
            takes=(DTYPE,),
            also=("astype", "convert"),
        ),
        Op(
            "noise",
            "normal noise of a standard deviation is added",
            ("std", "seed"),
            _check_noise,
            _run_noise,
            placed=True,
            takes=(DEVIATION, NATURAL),
            optional=("seed",),
        ),
        Op(
            "reinit",
            "the leaf is drawn anew by an initializer",
            ("init", "seed"),
            _check_reinit,
            _run_reinit,
            optional=("seed",),
            reads=False,
            chunks=False,
            placed=True,
            takes=(INITIALIZER, NATURAL),
            also=("init", "initialize"),
        ),
    )
}
