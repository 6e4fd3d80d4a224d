"""Methods of ablation: what replaces the values of an ablated leaf."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from paramend.anatomy import families
from paramend.arrays.initializers import Site, generator, normal
from paramend.arrays.registry import to_numpy
from paramend.edits.call import Call
from paramend.edits.ops import OPS
from paramend.errors import BadArgument, Unsupported
from paramend.growth import identities
from paramend.leaves.leaves import Index, Leaves
from paramend.leaves.specs import AnyArray, Array, numpy_dtype
from paramend.reports import wording
from paramend.selectors.patterns import parse


@dataclass(frozen=True, slots=True)
class Method:
    """One way to ablate a leaf."""

    says: str  # what becomes of the leaf, for the docs
    # (the values, a random generator for this leaf) → the new values; None if an op of the table does it
    run: Callable[[Array, np.random.Generator], Array] | None = None


METHODS: dict[str, Method] = {
    "zero": Method("every element becomes +0.0"),
    "mean": Method("every element becomes the mean of the leaf", lambda x, _: np.full(x.shape, x.mean(), x.dtype)),
    "noise": Method(
        "normal noise with the leaf's own mean and standard deviation replaces it",
        lambda x, rng: normal(rng, x.shape, "float64") * x.std() + x.mean(),
    ),
    "permuted": Method(
        "the elements are permuted at random", lambda x, rng: rng.permutation(x.reshape(-1)).reshape(x.shape)
    ),
    "identity": Method(
        "what a layer of a known family adds to the residual stream becomes 0: the layer passes its input through"
    ),
}

How: TypeAlias = Literal["zero", "mean", "noise", "permuted", "identity"] | Callable[[AnyArray], AnyArray]


def calls(leaves: Leaves, numbers: tuple[int, ...], how: How, seed: int) -> dict[int, Call]:
    """The edits that ablate some leaves; `BadArgument` if there is no such method. Random ones depend only on the seed
    and the path.

    >>> from paramend.edits.memory import Memory
    >>> tree = Memory({"w": np.array([1.0, 3.0])})
    >>> tree.edited(calls(tree, (0,), "mean", 0))
    {'w': array([2., 2.])}
    """
    if callable(how):
        return dict.fromkeys(numbers, Call(OPS["apply"], {"fn": how}))
    if how not in METHODS:
        near = wording.closest(str(how), METHODS, limit=1)
        raise BadArgument(
            f"how={how!r} is not a method of ablation",
            hint=f'how="{near[0]}"' if near else f"how= one of {', '.join(METHODS)}",
        )
    if how == "identity":
        return _identity(leaves, numbers)
    run = METHODS[how].run
    if run is None:
        return dict.fromkeys(numbers, Call(OPS["zero"]))
    return {n: Call(OPS["apply"], {"fn": _applied(run, Site(leaves.index.pieces(n)), seed)}) for n in numbers}


def _identity(leaves: Leaves, numbers: tuple[int, ...]) -> dict[int, Call]:
    """The edits that make one layer the identity, by the row of its family."""
    pieces = {number: leaves.index.pieces(number) for number in numbers}
    shared = next((at for at, keys in enumerate(zip(*pieces.values(), strict=False)) if len(set(keys)) > 1), 0)
    inner = {number: path[shared:] or path[-1:] for number, path in pieces.items()}
    config = getattr(getattr(leaves, "root", None), "config", None)
    try:
        family = families.find(families.modules_of(inner.values()), getattr(config, "model_type", None))
    except (BadArgument, Unsupported) as error:
        said = str(error).partition("\n\nhint:")[0]
        where = leaves.index.path(numbers[0])
        raise BadArgument(
            f'how="identity" at {where}: {said}',
            hint='how="zero", with targets that name what writes to the residual stream, such as '
            '"model.layers.<n>.{self_attn.o_proj,mlp.down_proj}.*"',
        ) from error
    index = Index.of_names(["/".join(path) for path in inner.values()], "/")
    order = list(inner)
    found: dict[int, Call] = {}
    for selector, value in families.values(family).items():
        found |= {order[place]: identities.call(value) for place in parse(selector).find(index.names)}
    return found


def _applied(run: Callable[[Array, np.random.Generator], Array], place: Site, seed: int) -> Callable[[Any], Array]:
    def fn(x: Any) -> Array:
        values = to_numpy(x)
        wide = values.astype(np.complex128 if values.dtype.kind == "c" else np.float64)
        with np.errstate(all="ignore"):
            found: Array = run(wide, generator(seed, place)).astype(numpy_dtype(values.dtype.name))
        return found

    return fn


def floating(leaves: Leaves, numbers: Mapping[int, Any] | tuple[int, ...]) -> tuple[int, ...]:
    """The leaves of floating or complex dtype; the others are step counts and random states."""
    return tuple(number for number in numbers if leaves.spec(number).kind in ("float", "complex"))
