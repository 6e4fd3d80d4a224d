"""Verbs over JAX arrays, eager and traced, as `Backend` documents them. Imported only after jax was."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    return value if isinstance(value, jax.core.Tracer) else jax.device_put(value, may_alias=False)


def like(value: Any, x: Any) -> Any:
    """The values as an array with the sharding and weak type of `x`, in a buffer of its own. A ShapeDtypeStruct may
    lack a sharding; the result may then share the memory of a numpy array."""
    given = isinstance(value, jax.Array | jax.core.Tracer)
    if isinstance(x, jax.ShapeDtypeStruct):
        if not given:
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
        value = jax.device_put(np.array(value), placed) if placed is not None else jnp.asarray(np.array(value))
    if getattr(x, "weak_type", False) and not value.weak_type:
        value = jnp.zeros_like(x).at[...].set(value)
    elif given:
        value = _own(value)
    if isinstance(x, jax.core.Tracer) or isinstance(value, jax.core.Tracer):
        return value
    if not x.committed and not value.committed:
        return value  # neither is bound to a device, so the result need not be
    return _placed(value, x)


def from_numpy(array: Any) -> Any:
    """A copy on the default device; `Unsupported` if JAX lacks the dtype, or needs it enabled."""
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise Unsupported(f"JAX cannot hold {array.dtype}", hint='jax.config.update("jax_enable_x64", True)')
    return jnp.array(array)


def beside(values: Any, x: Any) -> Any:
    """The values with the sharding of x; whole on each of its devices if they have another shape."""
    value, named = from_numpy(values), jax.sharding.NamedSharding
    if isinstance(x, jax.core.Tracer) or not x.committed:
        return value
    whole = value.shape != x.shape and isinstance(x.sharding, named)
    return jax.device_put(value, named(x.sharding.mesh, jax.sharding.PartitionSpec()) if whole else x.sharding)


def _operand(value: Any, x: Any) -> Any:
    """A second operand that cannot promote x: Python scalars are weak already, arrays take the dtype of x."""
    if isinstance(value, bool | int | float | complex):
        return bool(value) if x.dtype == bool else value
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
    spec = jax.sharding.PartitionSpec(*names)
    return jax.device_put(result, jax.sharding.NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind))


def concat(arrays: Any, axis: int) -> Any:
    return _moved(lambda *each: jnp.concatenate(each, axis), *arrays)


def take(x: Any, positions: Sequence[int], axis: int) -> Any:
    """A new array of slices of x, sharded like x if the new length allows it."""
    result = _moved(lambda x: jnp.take(x, np.asarray(positions, np.int64), axis=axis), x)
    if isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct):
        return result
    try:
        x.sharding.shard_shape(result.shape)
    except ValueError:  # the layers are spread over devices, which no longer divide their number
        return result
    return _placed(result, x)


def transpose(x: Any, axes: Sequence[int]) -> Any:
    """A new array with the axes in another order, sharded as they were."""
    return _moved(lambda x: jnp.array(jnp.transpose(x, axes)), x)


def reshape(x: Any, shape: Sequence[int]) -> Any:
    """A new array in another shape; XLA finds its sharding."""
    return _moved(lambda x: jnp.array(jnp.reshape(x, shape)), x)


def numpy(x: Any) -> np.ndarray[Any, Any]:
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
