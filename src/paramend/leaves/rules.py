"""`Codec`: a rule of the user's, by which leaves that stand beside each other are one weight."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from paramend.errors import BadArgument
from paramend.leaves.specs import AnyArray


@dataclass(frozen=True, slots=True)
class Codec:
    """A way to store a weight in several leaves, for `codec=` of `pm.at`, `pm.dequantize`, `pm.quantize` and others.

    Leaves with these names beside each other are one, called as the first of them; where one of them is missing, the
    others are ordinary leaves. The functions get the arrays of the tree itself, so that they work inside `jax.jit` if
    they are made for it; of a checkpoint they get arrays of numpy, whole leaves.

    Args:
        name: what messages and reports call it.
        leaves: the names. `*` is the name of the weight, as in `("*_codes", "*_scale")`.
        decode: from the leaves, in this order, to the weight.
        encode: from a weight and the leaves as they are, to a dict of new leaves by name; those that it leaves out stay
            what they are. `pm.quantize` gives None for leaves, and wants all of them. Without it edits are refused.

    Raises:
        BadArgument: `leaves` are no names, or one of them twice; a function is none.

    >>> import paramend as pm
    >>> halves = Codec("halves", ("kernel", "scale"), lambda kernel, scale: kernel * scale)
    >>> params = {"fc": {"kernel": np.array([[1, 2]], "int8"), "scale": np.float32(0.5)}}
    >>> pm.at(params, "fc/kernel", codec=halves).one()
    array([[0.5, 1. ]], dtype=float32)
    """

    name: str
    leaves: Sequence[str]
    decode: Callable[..., AnyArray]
    encode: Callable[..., Mapping[str, AnyArray]] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.leaves, str) or not self.leaves or len({*self.leaves}) < len(self.leaves):
            raise BadArgument(f"leaves={self.leaves!r} are not names", hint='leaves=("kernel", "scale")')
        if not callable(self.decode) or not (self.encode is None or callable(self.encode)):
            raise BadArgument("decode and encode are functions", hint="decode=lambda kernel, scale: kernel * scale")
        object.__setattr__(self, "leaves", tuple(self.leaves))

    def called(self, weight: str) -> Sequence[str]:
        """The names of the leaves of a weight of some name; empty if it cannot have that name."""
        if "*" in self.leaves[0]:
            return tuple(each.replace("*", weight) for each in self.leaves)
        return self.leaves if weight == self.leaves[0] else ()
