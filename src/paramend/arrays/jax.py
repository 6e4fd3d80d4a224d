"""Verbs over JAX arrays, eager and traced, as `Backend` documents them. Imported only after jax was."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramend.arrays.places import Chosen, chosen
from paramend.errors import Unsupported
from paramend.leaves.specs import Spec, numpy_dtype


def owns(kind: type) -> bool:
    """Whether arrays of this type are JAX's."""
    return issubclass(kind, jax.Array | jax.core.Tracer | jax.ShapeDtypeStruct)


def spec(x: Any) -> Spec:
    return Spec(tuple(x.shape), x.dtype.name if isinstance(x.dtype, np.dtype) else str(x.dtype))


def refusal(x: Any) -> str:
    if isinstance(x, jax.ShapeDtypeStruct):
        return "it is abstract (a ShapeDtypeStruct) and has no values"
    return f"a PRNG key ({x.dtype}) is not a number" if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else ""


def abstract(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def traced(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)


def _placed(result: Any, x: Any) -> Any:
    """The result with the sharding of `x`, and the order of its axes in memory. Inside a transformation the compiler
    keeps them."""
    if isinstance(x, jax.core.Tracer) or isinstance(result, jax.core.Tracer):
        return result
    if result.ndim == x.ndim and (order := _order(x)) != _order(result):
        return jax.device_put(result, type(x.format)(type(x.format.layout)(order), x.sharding))
    return result if result.sharding == x.sharding else jax.device_put(result, x.sharding)


def _order(x: Any) -> tuple[int, ...] | None:
    """The axes from the slowest to the fastest in memory; None if this JAX, or this array, does not tell it."""
    layout = getattr(getattr(x, "format", None), "layout", None)
    return getattr(layout, "major_to_minor", None)


def zeros(x: Any) -> Any:
    return _placed(jnp.zeros_like(x), x)


def full(x: Any, value: Any) -> Any:
    return _placed(jnp.full_like(x, value), x)


def _own(value: Any) -> Any:
    """A copy of an array, in a buffer of its own: a step that donates it must not take another array away."""
    return value if isinstance(value, jax.core.Tracer) else jax.device_put(value, value.sharding, may_alias=False)


def like(value: Any, x: Any) -> Any:
    """The values as an array with the sharding and weak type of `x`, in a buffer of its own. A ShapeDtypeStruct may
    lack a sharding; the result may then share the memory of a numpy array."""
    given = isinstance(value, jax.Array | jax.core.Tracer)
    if isinstance(x, jax.ShapeDtypeStruct):
        if not given and x.sharding is not None and _far(x.sharding):
            value = _cut(value, x.sharding)
        elif not given:
            # Wait for the transfer, so that there is only one copy on the host at a time.
            value = jax.block_until_ready(jax.device_put(np.asarray(value), x.sharding))
        if x.weak_type and not value.weak_type:
            value = jnp.zeros_like(x).at[...].set(value)
        elif given:
            value = _own(value)
        return value if x.sharding is None else jax.device_put(value, x.sharding)
    if not given:
        # Placed directly, so that a large host array is never whole on one device.
        placed = None if isinstance(x, jax.core.Tracer) or not x.committed else x.sharding
        # JAX may take over the memory of a numpy array, which the user may change later.
        value = _cut(value, placed) if placed is not None else jnp.asarray(np.array(value))
    elif parted(x) and _apart(value, x):
        value = _cut(numpy(value), x.sharding)
    if getattr(x, "weak_type", False) and not value.weak_type:
        value = jnp.zeros_like(x).at[...].set(value)
    elif given:
        value = _own(value)
    if isinstance(x, jax.core.Tracer) or isinstance(value, jax.core.Tracer):
        return value
    if not x.committed and not value.committed:
        return value  # neither is bound to a device, so the result need not be
    return _placed(value, x)


def parted(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) and len(x.sharding.device_set) > 1


def _far(sharding: Any) -> bool:
    """Whether some devices are those of other processes."""
    return not sharding.is_fully_addressable


def _apart(value: Any, x: Any) -> bool:
    """Whether an array is bound to this process, and x is not: JAX does not compute with both."""
    return _far(x.sharding) and not isinstance(value, jax.core.Tracer) and not _far(value.sharding)


def _cut(value: Any, sharding: Any) -> Any:
    """A numpy array that every process has, in the parts of a sharding: each is copied on its own, nothing is sent."""
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda part: np.array(value[part]))


def _within(sharding: Any, shape: Sequence[int]) -> Any:
    """A sharding for an array of another shape: axes that its devices do not divide, and those that are no more, are
    whole; other shardings than those of a mesh are kept."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    cut = [
        name if length % _count(sharding.mesh, name) == 0 else None
        for name, length in zip(sharding.spec, shape, strict=False)
    ]
    return sharding if tuple(cut) == tuple(sharding.spec) else _named(sharding, cut)


def _named(sharding: Any, names: Sequence[Any]) -> Any:
    """The sharding of axes by these names of axes of the same mesh."""
    spec = jax.sharding.PartitionSpec(*names)
    return jax.sharding.NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def _count(mesh: Any, name: Any) -> int:
    """Into how many parts the names of mesh axes cut an axis."""
    names = name if isinstance(name, tuple) else (name,)
    return math.prod(mesh.shape[each] for each in names if each in mesh.shape)


def spread(x: Any) -> bool:
    given = isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct)
    return not given and not (x.is_fully_addressable or x.is_fully_replicated)


def gathered(x: Any) -> Any:
    if not spread(x):
        return x
    from jax.experimental import multihost_utils  # needed between processes alone

    return multihost_utils.process_allgather(x, tiled=True)


def parts(x: Any) -> list[tuple[Any, Any]]:
    if not parted(x):
        return [(tuple(map(range, x.shape)), x)]
    return list({_box(each.index, x): each.data for each in x.addressable_shards}.items())


def _box(index: Any, x: Any) -> tuple[range, ...]:
    """The places that a part of x has along each axis, from its slices."""
    return tuple(range(*each.indices(length)) for each, length in zip(index, x.shape, strict=True))


def filled(x: Any, read: Callable[[Any], Any]) -> Any:
    return jax.make_array_from_callback(x.shape, x.sharding, lambda index: read(_box(index, x)))


def from_numpy(array: Any) -> Any:
    """A copy on the default device; `Unsupported` if JAX lacks the dtype, or needs it enabled."""
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise Unsupported(f"JAX cannot hold {array.dtype}", hint='jax.config.update("jax_enable_x64", True)')
    return jnp.array(array)


def beside(values: Any, x: Any) -> Any:
    """The values with the sharding of x, along axes of its length; others are whole on each of its devices."""
    alike = [length if length == old else 1 for length, old in zip(values.shape, x.shape, strict=False)]
    return _spread(values, x, alike)


def resized(values: Any, x: Any) -> Any:
    return _spread(values, x, values.shape)


def _spread(values: Any, x: Any, lengths: Sequence[int]) -> Any:
    """The values with the sharding of x as far as it divides these lengths."""
    if isinstance(x, jax.core.Tracer) or not x.committed:
        return from_numpy(values)
    sharding = _within(x.sharding, lengths)
    if jax.dtypes.canonicalize_dtype(values.dtype) != values.dtype or not parted(x):
        return jax.device_put(from_numpy(values), sharding)  # which refuses a dtype that JAX lacks
    return _cut(values, sharding)


def _operand(value: Any, x: Any) -> Any:
    """A second operand that cannot promote x: Python scalars are weak already, arrays take the dtype of x."""
    if isinstance(value, bool | int | float | complex):
        return bool(value) if x.dtype == bool else value
    if parted(x) and (not isinstance(value, jax.Array) or _apart(value, x)):
        # A numpy array is on no device yet: JAX cuts it where x is.
        value = np.asarray(value)
        return value.astype(x.dtype)
    value = jnp.asarray(value)
    return value if value.dtype == x.dtype or value.weak_type else value.astype(x.dtype)


def add(x: Any, value: Any) -> Any:
    return _placed(x + _operand(value, x), x)


def multiply(x: Any, value: Any) -> Any:
    return _placed(x * _operand(value, x), x)


def matmul(x: Any, y: Any) -> Any:
    return jnp.matmul(x, y, precision="highest")


def clip(x: Any, lo: Any, hi: Any) -> Any:
    low, high = (None if bound is None else _operand(bound, x) for bound in (lo, hi))
    return _placed(jnp.clip(x, low, high), x)


def cast(x: Any, dtype: str) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, numpy_dtype(dtype), sharding=x.sharding)
    return _own(x) if x.dtype == dtype else _placed(x.astype(numpy_dtype(dtype)), x)


def _explicit(x: Any) -> Any:
    """The sharding that is part of the type of x (Explicit mesh axes), or None."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    return sharding if sharding is not None and any(axis is not None for axis in sharding.spec) else None


def _with_sharding(value: Any, x: Any, sharding: Any) -> Any:
    """A value resharded to a sharding of `x`, traced or not."""
    if isinstance(x, jax.core.Tracer) or isinstance(value, jax.core.Tracer):
        return jax.sharding.reshard(value, sharding)
    return jax.device_put(value, jax.sharding.NamedSharding(x.sharding.mesh, sharding.spec))


def get(x: Any, index: Any) -> Any:
    """x[index], a copy; the slice of an array with Explicit sharding is replicated."""
    sharding = _explicit(x)
    if sharding is not None:
        x = _with_sharding(x, x, sharding.update(spec=jax.sharding.PartitionSpec()))
    found = x[index]
    return _own(found) if found.size == x.size else found  # JAX gives the array itself for `x[...]`


def put(x: Any, index: Any, verb: str, value: Any) -> Any:
    if not math.prod(np.broadcast_to(np.empty(()), x.shape)[index].shape):
        return _own(x)
    sharding = _explicit(x)
    if sharding is None:
        found = chosen(index, x.shape) if parted(x) else None
        if found is not None:
            return _placed(_put_where(x, found, verb, _operand(value, x)), x)
        parts = index if isinstance(index, tuple) else (index,)
        if verb != "set" and any(isinstance(part, np.ndarray) for part in parts):  # which may name an element twice
            value = getattr(jnp, verb)(x[index], _operand(value, x)).astype(x.dtype)
            verb = "set"
        return _placed(getattr(x.at[index], verb)(_operand(value, x)), x)
    # A scatter is ambiguous on Explicit axes; a selection between arrays with the same sharding is not.
    inside = np.zeros(x.shape, bool)
    inside[index] = True
    spread = _operand(value, x)
    if jnp.ndim(spread):
        spread = _with_sharding(jnp.zeros(x.shape, x.dtype).at[index].set(spread), x, sharding)
    changed = spread if verb == "set" else getattr(jnp, verb)(x, spread)
    return _placed(jnp.where(_with_sharding(jnp.asarray(inside), x, sharding), changed, x).astype(x.dtype), x)


def _put_where(x: Any, found: Chosen, verb: str, value: Any) -> Any:
    """A value in a slice, as a choice between two arrays that are cut in one way: a scatter would gather the axis."""
    inside: Any = np.ones((1,) * x.ndim, bool)
    value = found.spread(value) if jnp.ndim(value) else value
    for axis, (length, places) in enumerate(zip(x.shape, found.places, strict=True)):
        line = [-1 if at == axis else 1 for at in range(x.ndim)]
        here, source = np.zeros(length, bool), np.zeros(length, np.int32)
        here[places], source[places] = True, np.arange(places.size).reshape(places.shape)
        inside = inside if here.all() else inside & here.reshape(line)
        if jnp.ndim(value) and value.shape[axis] != 1 and not np.array_equal(places, np.arange(length)):
            value = (np if isinstance(value, np.ndarray) else jnp).take(value, source, axis)
    changed = value if verb == "set" else getattr(jnp, verb)(x, value)
    return jnp.where(inside, changed, x).astype(x.dtype)


def _moved(move: Callable[..., Any], *arrays: Any) -> Any:
    """What a move makes of arrays; of abstract ones an abstract one, whose sharding is not known."""
    return jax.eval_shape(move, *arrays) if any(map(abstract, arrays)) else move(*arrays)


def stack(arrays: Any, axis: int) -> Any:
    """The arrays along a new axis, which is not sharded; the other axes are sharded like the first array's."""
    first, result = arrays[0], _moved(lambda *each: jnp.stack(each, axis), *arrays)
    nowhere = jax.core.Tracer, jax.ShapeDtypeStruct
    sharding = None if isinstance(result, nowhere) or isinstance(first, nowhere) else first.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return result
    names = [*sharding.spec, *[None] * (first.ndim - len(sharding.spec))]
    names.insert(axis, None)
    return jax.device_put(result, _named(sharding, names))


def concat(arrays: Any, axis: int) -> Any:
    """The arrays one after the other, sharded like the first as far as the new length allows it."""
    first, *rest = arrays
    if not parted(first):
        return _moved(lambda *each: jnp.concatenate(each, axis), *arrays)
    rest = [beside(numpy(each), first) if _apart(each, first) else each for each in rest]
    result = jnp.concatenate([first, *rest], axis)
    return jax.device_put(result, _within(first.sharding, result.shape))


def take(x: Any, positions: Sequence[int], axis: int) -> Any:
    """A new array of slices of x, with its order of axes in memory, sharded like x if the new length allows it."""
    result = _moved(lambda x: jnp.take(x, np.asarray(positions, np.int64), axis=axis), x)
    if isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct):
        return result
    return jax.device_put(result, _within(x.sharding, result.shape)) if parted(x) else _placed(result, x)


def transpose(x: Any, axes: Sequence[int]) -> Any:
    """A new array with the axes in another order, sharded as they were."""
    return _moved(lambda x: jnp.array(jnp.transpose(x, axes)), x)


def reshape(x: Any, shape: Sequence[int]) -> Any:
    """A new array in another shape; XLA finds its sharding."""
    return _moved(lambda x: jnp.array(jnp.reshape(x, shape)), x)


def numpy(x: Any) -> np.ndarray[Any, Any]:
    if spread(x):
        raise Unsupported(
            f"{x.dtype}[{', '.join(map(str, x.shape))}] is spread over processes, and its values are not here",
            hint="jax.experimental.multihost_utils.process_allgather(x, tiled=True); Orbax writes parts",
        )
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def local(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer) and all(device.platform == "cpu" for device in x.devices())


def mutable(x: Any) -> bool:
    """False: JAX arrays never change."""
    return False


def memory(x: Any) -> None:
    """None: JAX arrays never change."""


def assign(x: Any, value: Any) -> None:
    """Raise: JAX arrays never change."""
    raise TypeError("JAX arrays never change")


def is_key(x: Any) -> bool:
    """Whether x is a PRNG key, typed or the old pair of uint32."""
    return bool(jnp.issubdtype(x.dtype, jax.dtypes.prng_key)) or (x.dtype == jnp.uint32 and x.shape == (2,))


def key(seed: int) -> Any:
    return jax.random.key(seed)


def fold(key: Any, number: int) -> Any:
    """The key of one path, from the user's key and the number of the path."""
    return jax.random.fold_in(key, number & 0xFFFFFFFF)


def normal(key: Any, shape: tuple[int, ...], dtype: str) -> Any:
    return jax.random.normal(key, shape, numpy_dtype(dtype))


def initialize(name: str, row: tuple[float, str, str], key: Any, spec: Spec, out_first: bool) -> Any:
    """Fresh values by JAX's own initializers, in the layout of the leaf."""
    scale, fan, distribution = row
    axes = (1, 0) if out_first else (-2, -1)
    mode = {"in": "fan_in", "average": "fan_avg"}[fan]
    kind = "truncated_normal" if distribution == "truncated" else distribution
    make = jax.nn.initializers.variance_scaling(scale, mode, kind, in_axis=axes[0], out_axis=axes[1])
    return make(key, spec.shape, numpy_dtype(spec.dtype))


def key_numbers(x: Any) -> tuple[str, str, Any]:
    """The implementation, the device and the numbers of an array of typed PRNG keys."""
    return str(jax.random.key_impl(x)), str(next(iter(x.devices()))), jax.random.key_data(x)


def key_dtype(implementation: str) -> str:
    """The dtype of typed PRNG keys, such as "key<fry>"."""
    return str(jax.eval_shape(lambda: jax.random.key(0, impl=implementation)).dtype)


def typed_keys(numbers: Any, implementation: str) -> Any:
    """Typed PRNG keys made from their numbers."""
    return jax.random.wrap_key_data(jnp.asarray(numbers), impl=implementation)
