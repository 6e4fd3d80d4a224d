"""The checks of the table of edits: from specs and arguments alone, before any value is read."""

import math
import warnings
from typing import Any

import numpy as np

from paramend.arrays import initializers
from paramend.arrays.lowrank import LowRank
from paramend.arrays.registry import backend, backend_of
from paramend.edits.arguments import Args, shown
from paramend.errors import BadArgument, SpecMismatch
from paramend.leaves.origins.origin import Origin
from paramend.leaves.specs import BITS, Spec, dtype_name, numpy_dtype
from paramend.reports.wording import described


def _is_scalar(value: Any) -> bool:
    return isinstance(value, bool | int | float | complex | np.generic) or getattr(value, "shape", None) == ()


def concrete(value: Any) -> Any:
    """A number or an array as one of numpy; None while it is traced."""
    try:
        return np.asarray(value if backend_of(type(value)) is None else backend(value).numpy(value))
    except Exception:
        return None  # a tracer: its value is not known yet


_RANK = {"bool": 0, "int": 1, "float": 2, "complex": 3}


def _fits(value: Any, spec: Spec, what: str) -> None:
    number = concrete(value)
    if number is None or spec.kind == "other":
        return
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", np.exceptions.ComplexWarning)
        try:
            stored = number.astype(numpy_dtype(spec.dtype))
        except (TypeError, ValueError) as error:
            raise SpecMismatch(f"{what} takes a number, and {value!r} is not one") from error
        except OverflowError as error:  # a Python int beyond 64 bits
            raise SpecMismatch(f"{what}: {spec.dtype} cannot hold {value!r}") from error
    exact = number if spec.kind in ("bool", "int") else np.isfinite(number.astype(np.complex128))
    held = stored.astype(number.dtype) if spec.kind in ("bool", "int") else np.isfinite(stored.astype(np.complex128))
    lost = exact != held
    if spec.kind == "float":
        lost &= exact  # infinite values stay infinite
    if spec.kind != "complex" and np.iscomplexobj(number):
        lost |= number.imag != 0
    if lost.any():
        raise SpecMismatch(
            f"{what}: {spec.dtype} cannot hold {value if number.ndim == 0 else number[lost].reshape(-1)[0]!r}",
            hint='cast the leaf first: pm.at(tree, selector).cast("float32")',
        )


def fitted(value: Any, spec: Spec) -> np.ndarray[Any, Any]:
    """Numbers from text as an array of a leaf's dtype; `SpecMismatch` if it cannot hold one of them.

    >>> fitted([1, 0.5], Spec((2,), "float16"))
    array([1. , 0.5], dtype=float16)
    """
    _fits(value, spec, "the array")
    return np.asarray(value).astype(numpy_dtype(spec.dtype))


def check_zero(spec: Spec, args: Args) -> Spec:
    """The dtype must have a zero."""
    if spec.dtype == "float8_e8m0fnu":  # a format of powers of two
        raise SpecMismatch("float8_e8m0fnu has no zero")
    return spec


def check_scalar(verb: str, name: str, value: Any) -> None:
    """Raise if a value is not one number."""
    if _is_scalar(value) and not isinstance(value, np.flexible):
        return
    shape = getattr(value, "shape", None) or (np.shape(value) if isinstance(value, list | tuple) else ())
    if shape:
        instead = "pm.at(tree, selector).set(array)" if verb == "fill" else ""
        raise SpecMismatch(f"{verb} takes a scalar, and {name} is an array of shape {tuple(shape)}", hint=instead)
    raise SpecMismatch(f"{verb} takes a number, and {name} is {shown(value)}, of type {type(value).__name__}")


def check_fill(spec: Spec, args: Args) -> Spec:
    """The scalar must fit."""
    _fits(args["value"], spec, "fill")
    return spec


def check_set(spec: Spec, args: Args) -> Spec:
    """Shape and dtype must be those of the leaf."""
    value = args["value"]
    if backend_of(type(value)) is None and _is_scalar(value):
        raise SpecMismatch(
            f"set takes an array of spec {spec}, and {value!r} is a scalar",
            hint=f"pm.at(tree, selector).fill({value!r})",
        )
    given = _spec_of(value, "set takes an array")
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


def _spec_of(value: Any, takes: str) -> Spec:
    if isinstance(value, Origin):
        return value.spec
    library = backend_of(type(value))
    if library is not None:
        return library.spec(value)
    try:
        array = np.asarray(value)
    except Exception as error:
        raise SpecMismatch(f"{takes}, and this is {type(value).__name__}") from error
    if array.dtype.kind not in "biufc":
        raise SpecMismatch(f"{takes}, and this is {shown(value)}, of type {type(value).__name__}")
    return Spec(array.shape, array.dtype.name)


def check_arithmetic(spec: Spec, args: Args) -> Spec:
    """The operand must broadcast to the leaf, and must not change its dtype."""
    value = args["value"]
    if isinstance(value, LowRank):
        return _check_product(spec, value)
    if spec.kind == "bool":
        raise SpecMismatch("a bool leaf cannot be added to or multiplied", hint=".fill(True) or .set(array)")
    if _is_scalar(value):
        _fits(value, spec, "the operand")
        return spec
    given = _spec_of(value, "the operand is a number or an array")
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


def _check_product(spec: Spec, factors: LowRank) -> Spec:
    """The product must have the shape of the leaf, which must hold floats."""
    b, a = (_spec_of(each, "a factor is an array") for each in factors)
    try:
        batch = np.broadcast_shapes(b.shape[:-2], a.shape[:-2])
    except ValueError:
        batch = (-1,)
    if b.shape[-1] != a.shape[-2] or (*batch, b.shape[-2], a.shape[-1]) != spec.shape:
        raise SpecMismatch(f"the leaf is {spec}, and {b} @ {a} has not its shape")
    if spec.kind != "float" or {b.kind, a.kind} - {"float", "int"}:
        raise SpecMismatch(
            f"a product of low rank is added to floats, and {b} @ {a} would be added to {spec}",
            hint='pm.sel(...).where(dtype="float")',
        )
    return spec


def _check_float(spec: Spec, args: Args) -> Spec:
    if spec.kind != "float":
        raise SpecMismatch(f"random values are floats, and the leaf is {spec}", hint='pm.sel(...).where(dtype="float")')
    return spec


def check_noise(spec: Spec, args: Args) -> Spec:
    """The leaf must hold floats, `std` must not be negative, and the seed must be one."""
    if concrete(args["std"]) is not None and float(args["std"]) < 0:
        raise BadArgument(f"std={args['std']!r} is negative")
    _check_seed(args.get("seed", 0))
    return _check_float(spec, args)


def check_reinit(spec: Spec, args: Args) -> Spec:
    """The leaf must hold floats that the initializer can fill, and the seed must be one."""
    if not callable(args["init"]):
        if not isinstance(args["init"], str):
            given = shown(args["init"])
            raise BadArgument(f"reinit takes the name of an initializer or a function, and this is {given}")
        initializers.check_initializer(args["init"], spec)
    _check_seed(args.get("seed", 0))
    return _check_float(spec, args)


def is_key(seed: Any) -> bool:
    """Whether a seed is a key of JAX."""
    return bool(getattr(backend_of(type(seed)), "is_key", lambda x: False)(seed))


def _check_seed(seed: Any) -> None:
    whole = isinstance(seed, int | np.integer) or (np.shape(seed) == () and hasattr(seed, "__index__"))
    if not whole and not is_key(seed):
        raise BadArgument(f"seed={shown(seed)} is not a seed", hint="seed=0 or another whole number, or a JAX PRNG key")


def check_apply(spec: Spec, args: Args) -> Spec:
    """The argument must be a function."""
    if not callable(args["fn"]):
        given = described(args["fn"])
        raise BadArgument(f"apply takes a function of an array, and this is {given}", hint=".set(array)")
    return spec


def check_clip(spec: Spec, args: Args) -> Spec:
    """The leaf must hold real numbers, and the dtype must have values between the bounds."""
    if spec.kind not in ("int", "float"):
        raise SpecMismatch(
            f"clip needs ordered numbers, and the leaf is {spec}", hint='pm.sel(...).where(dtype="float")'
        )
    lo, hi = _number(args["lo"], "lo"), _number(args["hi"], "hi")
    if lo is not None and hi is not None and lo > hi:
        raise BadArgument(f"clip: lo={args['lo']!r} is above hi={args['hi']!r}", hint=f".clip({hi!r}, {lo!r})")
    bounds(spec, args)
    return spec


def _number(value: Any, name: str) -> int | float | None:
    """A bound as a Python number; None if there is none, or while it is traced."""
    if value is None:
        return None
    check_scalar("clip", name, value)
    array = concrete(value)
    if array is None:
        return None
    if np.iscomplexobj(array):
        raise SpecMismatch(f"clip: {name}={value!r} is complex, and complex numbers have no order")
    number = int(array) if array.dtype.kind in "biuO" else float(array)
    if number != number:
        raise BadArgument(f"clip: {name} is NaN", hint=f"{name}=None clips nothing on that side")
    return number


def bounds(spec: Spec, args: Args) -> tuple[Any, Any]:
    """The bounds of a clip that the dtype can hold; None on a side where every value of the dtype is within.

    >>> bounds(Spec((2,), "int8"), {"lo": -0.5, "hi": 1e6}), bounds(Spec((2,), "float16"), {"lo": -1e6, "hi": 1})
    ((0, None), (None, 1))
    """
    lo, hi = _number(args["lo"], "lo"), _number(args["hi"], "hi")
    held = _int_bounds if spec.kind == "int" else _float_bounds
    low, high = held(spec.dtype, lo, hi)
    # Traced bounds pass as they are; so do Python numbers, which do not promote a JAX leaf.
    return (args["lo"] if lo is None else low), (args["hi"] if hi is None else high)


def _int_bounds(dtype: str, lo: float | None, hi: float | None) -> tuple[int | None, int | None]:
    bits, unsigned = BITS[dtype], dtype.startswith("uint")
    least, most = (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    low = least if lo is None or lo == -math.inf else most + 1 if lo == math.inf else math.ceil(lo)
    high = most if hi is None or hi == math.inf else least - 1 if hi == -math.inf else math.floor(hi)
    if max(low, least) > min(high, most):
        raise SpecMismatch(f"clip: no {dtype} lies between {lo} and {hi}")
    return (low if low > least else None), (high if high < most else None)


def _float_bounds(dtype: str, lo: float | None, hi: float | None) -> tuple[float | None, float | None]:
    return _float_bound(dtype, lo, -1), _float_bound(dtype, hi, 1)


def _float_bound(dtype: str, bound: float | None, side: int) -> float | None:
    """A bound, or None if it is beyond the range of the dtype; `side` is -1 for the lower one."""
    if bound is None:
        return None
    with np.errstate(all="ignore"):
        try:
            held = np.isfinite(np.float64(bound).astype(numpy_dtype(dtype)).astype(np.float64))
        except OverflowError:  # a Python int beyond float64
            held = np.False_
    if held:
        return bound
    if (1 if bound > 0 else -1) == side:
        return None
    raise SpecMismatch(f"clip: {dtype} cannot hold {bound!r}")


def check_cast(spec: Spec, args: Args) -> Spec:
    """The dtype must keep the meaning of the numbers."""
    dtype = dtype_name(args["dtype"])
    after = Spec(spec.shape, dtype)
    if spec.kind == "other" or after.kind == "other":
        raise SpecMismatch(f"{spec} cannot be cast to {dtype}")
    if spec.kind == "complex" and after.kind != "complex":
        raise SpecMismatch(
            f"a cast from {spec.dtype} to {dtype} drops the imaginary part", hint=".apply(fn, keep_spec=False)"
        )
    return after
