"""What an array library must offer so that every edit works on its arrays."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from paramend.leaves.specs import Spec


class Backend(Protocol):
    """The verbs over the arrays of one library. Each file of this folder with the name of a library is one. Only
    `assign` changes its argument, and no result shares memory with one. Results keep what the library attaches to the
    first argument: device, sharding, weak type, memory format, `requires_grad`."""

    def spec(self, x: Any) -> Spec:
        """Shape and dtype."""

    def refusal(self, x: Any) -> str:
        """Why arithmetic on this array makes no sense ("a PRNG key is not a number"), or ""."""

    def abstract(self, x: Any) -> bool:
        """Whether there is a spec and nothing else: no values, and perhaps no device."""

    def traced(self, x: Any) -> bool:
        """Whether its values will be known only when a compiled function runs."""

    def zeros(self, x: Any) -> Any:
        """+0.0 in every element."""

    def full(self, x: Any, value: Any) -> Any:
        """The scalar in every element."""

    def like(self, value: Any, x: Any) -> Any:
        """The values of an array of any library, with the spec of `x`, as an array like `x`."""

    def beside(self, values: Any, x: Any) -> Any:
        """A numpy array as one of the library, on the devices of x, for which it may have another shape and dtype."""

    def resized(self, values: Any, x: Any) -> Any:
        """A numpy array as one that takes the place of x, cut along each axis as x is where the new length allows."""

    def gathered(self, x: Any) -> Any:
        """An array with all values on the host or a device of it; where they are spread over processes, each of them
        must call this."""

    def parted(self, x: Any) -> bool:
        """Whether each of several devices or processes holds a part."""

    def spread(self, x: Any) -> bool:
        """Whether some of its values may be in other processes."""

    def parts(self, x: Any) -> Sequence[tuple[Any, Any]]:
        """What this process holds of an array: (places along each axis, a part of it), each part once."""

    def filled(self, x: Any, read: Callable[[Any], Any]) -> Any:
        """An array like x whose parts are read: (places along each axis) → their values as a numpy array."""

    def from_numpy(self, array: Any) -> Any:
        """A copy of a numpy array in this library, on its default device."""

    def add(self, x: Any, value: Any) -> Any:
        """x + value, in the dtype of x."""

    def multiply(self, x: Any, value: Any) -> Any:
        """x * value, in the dtype of x."""

    def matmul(self, x: Any, y: Any) -> Any:
        """x @ y, in the precision of its dtype on every device."""

    def clip(self, x: Any, lo: Any, hi: Any) -> Any:
        """x clipped to two scalar bounds, in the dtype of x; None for no bound. NaN stays."""

    def cast(self, x: Any, dtype: str) -> Any:
        """The array in another dtype."""

    def get(self, x: Any, index: Any) -> Any:
        """x[index], a copy."""

    def put(self, x: Any, index: Any, verb: str, value: Any) -> Any:
        """A new array in which the value is "set" in, "add"ed to or "multiply"-ed into the slice."""

    def stack(self, arrays: Any, axis: int) -> Any:
        """The arrays along a new axis, counted from the front."""

    def concat(self, arrays: Any, axis: int) -> Any:
        """The arrays one after the other along an axis."""

    def take(self, x: Any, positions: Sequence[int], axis: int) -> Any:
        """A new array of the slices of x at these positions along an axis, in this order."""

    def transpose(self, x: Any, axes: Sequence[int]) -> Any:
        """A new array with the axes in another order."""

    def reshape(self, x: Any, shape: Sequence[int]) -> Any:
        """A new array with the elements, in C order, in another shape."""

    def numpy(self, x: Any) -> "np.ndarray[Any, Any]":
        """The values on the host, bit for bit, with ml_dtypes for what numpy lacks; `Unsupported` if some of them are
        with other processes."""

    def local(self, x: Any) -> bool:
        """Whether the host can read the values that this process has without a transfer."""

    def mutable(self, x: Any) -> bool:
        """Whether the values can change in place."""

    def memory(self, x: Any) -> "tuple[str, np.ndarray[Any, Any]] | None":
        """The device, and the elements as memory that another array may share; None if no other array can change it."""

    def assign(self, x: Any, value: Any) -> None:
        """Write the value into x itself."""
