"""The functions of edits that need more than one verb of an array's library."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from paramend.arrays import initializers, numpy as numpy_backend
from paramend.arrays.backend import Backend
from paramend.arrays.initializers import Site
from paramend.arrays.lowrank import LowRank, added_to, product_of, widened
from paramend.arrays.origins import Spread
from paramend.arrays.registry import backend, backend_of
from paramend.edits.arguments import Args
from paramend.edits.checks import bounds, concrete, is_key
from paramend.edits.directions import along, projection
from paramend.errors import SpecMismatch, Unsupported
from paramend.leaves.origins.boxes import ends
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.reduced import Reduced
from paramend.leaves.origins.stored import Held
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
    value = args["value"]
    if isinstance(value, Reduced) and value.how.elementwise and library.spread(x):
        arrays = [part.array for part in value.parts if isinstance(part, Spread) and backend(part.array) is library]
        if len(arrays) == len(value.parts):
            return _reduced(library, x, value, arrays)
    return library.like(native(library, value), x)


def _reduced(library: Backend, x: Any, value: Reduced, arrays: Sequence[Any]) -> Any:
    """What arrays over several processes are reduced to: each process computes what it holds."""
    dtype = numpy_dtype(library.spec(x).dtype)
    arrays = [library.like(each, library.cast(x, library.spec(each).dtype)) for each in arrays]
    made = {}
    for (box, _), *parts in zip(*map(library.parts, (x, *arrays)), strict=True):
        held = tuple(Held(library.numpy(part)) for _, part in parts)
        made[tuple(map(ends, box))] = replace(value, parts=held).read().astype(dtype)
    return library.filled(x, lambda box: made[tuple(map(ends, box))])


def add(library: Backend, x: Any, args: Args, place: Site) -> Any:
    """The leaf with the operand added."""
    value = args["value"]
    if not isinstance(value, LowRank):
        return library.add(x, native(library, value))
    if library is numpy_backend:
        factors = LowRank(*(native(library, each) for each in value))
        return library.like(added_to(x, product_of(factors, library.spec(x))), x)
    wide, b, a = _wide(library, x, *value)
    return library.like(library.cast(wide + library.matmul(b, a), library.spec(x).dtype), x)


def project_out(library: Backend, x: Any, args: Args, place: Site) -> Any:
    """The leaf without its share along a direction."""
    spec = library.spec(x)
    if library is numpy_backend:
        return library.like(added_to(x, projection(spec, args)), x)
    unit, axis = along(spec, args)
    wide, r = _wide(library, x, unit.reshape(-1, *[1] * (spec.ndim - 1 - axis)))
    share = native(library, args.get("strength", 1.0)) * (wide * r).sum(axis, keepdims=True)
    return library.like(library.cast(wide - r * share, spec.dtype), x)


def _wide(library: Backend, x: Any, *operands: Any) -> list[Any]:
    """The leaf and operands, beside it, in the dtype in which they are computed with."""
    dtype = widened(library.spec(x).dtype)
    known = [(each, concrete(each)) for each in operands]  # traced ones are not known
    here = (each if held is None else library.beside(held.astype(dtype), x) for each, held in known)
    return [library.cast(each, dtype) for each in (x, *here)]


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
