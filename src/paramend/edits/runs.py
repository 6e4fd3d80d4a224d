"""The functions of edits that need more than one verb of an array's library."""

from typing import Any

from paramend.arrays import initializers
from paramend.arrays.backend import Backend
from paramend.arrays.initializers import Site
from paramend.arrays.registry import backend, backend_of
from paramend.edits.arguments import Args
from paramend.edits.checks import bounds, is_key
from paramend.errors import SpecMismatch, Unsupported
from paramend.leaves.origins.origin import Origin
from paramend.leaves.specs import dtype_name, numpy_dtype
from paramend.reports.wording import described


def native(library: Backend, value: Any) -> Any:
    """A value that this library can read: arrays of other libraries are converted through numpy, bit for bit."""
    if isinstance(value, Origin):
        value = value.read()
    found = backend_of(type(value))
    return value if found is None or found is library else found.numpy(value)


def set(library: Backend, x: Any, args: Args, place: Site) -> Any:
    """The array in place of the leaf."""
    return library.like(native(library, args["value"]), x)


def clip(library: Backend, x: Any, args: Args, place: Site) -> Any:
    """The leaf between two bounds."""
    lo, hi = bounds(library.spec(x), args)
    return (
        library.like(x, x) if lo is None and hi is None else library.clip(x, native(library, lo), native(library, hi))
    )


def apply(library: Backend, x: Any, args: Args, place: Site) -> Any:
    """The function's result, which must keep the spec unless told otherwise."""
    result = args["fn"](x)
    found = backend_of(type(result))
    if found is None:
        raise SpecMismatch(
            f"apply: the function returned {described(result)}, not an array, for {'/'.join(place.pieces)}"
        )
    before, after = library.spec(x), found.spec(result)
    if args.get("keep_spec", True) and before != after:
        raise SpecMismatch(
            f"apply: the function turned {before} into {after} at {'/'.join(place.pieces)}",
            hint=".apply(fn, keep_spec=False) allows it",
        )
    return library.like(result, x) if before == after else found.like(result, result)


def cast(library: Backend, x: Any, args: Args, place: Site) -> Any:
    """The leaf in another dtype."""
    dtype = dtype_name(args["dtype"])
    try:
        result = library.cast(x, dtype)
    except (AttributeError, TypeError) as error:
        raise Unsupported(f"{type(x).__name__} has no dtype {dtype}") from error
    if library.spec(result).dtype != dtype:
        raise Unsupported(
            f"JAX made {library.spec(result).dtype} of {dtype}", hint='jax.config.update("jax_enable_x64", True)'
        )
    return result


def noise(library: Backend, x: Any, args: Args, place: Site) -> Any:
    """The leaf with noise added."""
    spec, seed, std = library.spec(x), args.get("seed", 0), args["std"]
    if is_key(seed):
        keys: Any = backend(seed)
        return library.add(x, keys.normal(keys.fold(seed, place.number), spec.shape, spec.dtype) * std)
    values = initializers.normal(initializers.generator(int(seed), place), spec.shape, spec.dtype)
    return library.add(x, library.like((values * values.dtype.type(std)).astype(numpy_dtype(spec.dtype)), x))


def reinit(library: Backend, x: Any, args: Args, place: Site) -> Any:
    """The leaf drawn anew."""
    spec, seed, init = library.spec(x), args.get("seed", 0), args["init"]
    if callable(init):
        keys: Any = library
        if not hasattr(keys, "fold"):
            raise Unsupported(
                "an initializer function (key, shape, dtype) needs a JAX leaf", hint='.reinit("lecun_normal")'
            )
        key = seed if is_key(seed) else keys.key(int(seed))
        return set(library, x, {"value": init(keys.fold(key, place.number), spec.shape, x.dtype)}, place)
    if is_key(seed):
        keys = backend(seed)
        key = keys.fold(seed, place.number)
        values = keys.initialize(init, initializers.INITIALIZERS[init], key, spec, place.out_first)
        return library.like(values, x)
    rng = initializers.generator(int(seed), place)
    values = initializers.initialize(init, rng, spec, out_first=place.out_first)
    return library.like(values.astype(numpy_dtype(spec.dtype)), x)
