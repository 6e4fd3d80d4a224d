"""Readings: what the matrices of a term mean for a leaf, told by shapes, and by family and version where these do not.

A reading gives the product to add, and the view of the leaf as matrices that it is for. `SpecMismatch` says what does
not fit, or what is not known.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from paramend.errors import SpecMismatch
from paramend.leaves.origins.combined import Product, View
from paramend.leaves.origins.moved import permute_axes, reshape, take
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Held
from paramend.leaves.specs import Spec
from paramend.merging.adapters import Adapter, Term
from paramend.merging.destinations import Destinations, Slot

Reading = tuple[Product, View]


def weight_reading(adapter: Adapter, term: Term, bases: Destinations, number: int) -> Reading:
    """A term as a product for the weight of a module: of a linear layer, a Conv1D, a convolution, an embedding."""
    spec = bases.leaves.spec(number)
    parts = {role: adapter.origin(at) for role, at in term.roles.items()}
    if spec.kind != "float":
        raise SpecMismatch(f"it is {spec}, not of floats")
    if {"rows A", "rows B"} <= parts.keys():
        a, b = parts["rows A"], parts["rows B"]
        u, v = permute_axes(a, (1, 0)), permute_axes(b, (1, 0))
        return _product(adapter, term, u, v, spec, a.spec.shape[0], "", along=1)
    if {"a", "b"} <= parts.keys():
        return _jax_reading(adapter, term, parts["a"], parts["b"], spec)
    if not {"A", "B"} <= parts.keys():
        raise SpecMismatch(f"it has {' and '.join(term.roles)}, and not both of A and B")
    a, b = parts["A"], parts["B"]
    plain = any(target.split(".")[-1] == "weight" for target in adapter.said("target_parameters", []))
    conv1d = not plain and bases.inputs_first(number, conv1d=bool(adapter.said("fan_in_fan_out")))
    return _matrix_reading(adapter, term, a, b, spec, conv1d=conv1d)


def _matrix_reading(
    adapter: Adapter, term: Term, a: Origin, b: Origin, spec: Spec, *, conv1d: bool, parameter: str = ""
) -> Reading:
    rank, outputs = a.spec.shape[0], b.spec.shape[0]
    inputs = a.spec.size // max(rank, 1)
    if b.spec.size != outputs * rank:
        why = ": convolutions in groups cannot be folded" if a.spec.ndim > 2 else ""
        raise SpecMismatch(f"A is {a.spec} and B is {b.spec}, which have no rank in common{why}")
    u, v = reshape(b, (outputs, rank)), reshape(a, (rank, inputs))
    first, rest = spec.shape[0], spec.shape[1:]
    fits = (outputs, _bare(a.spec.shape[1:])) == (first, _bare(rest))
    turned = spec.ndim == 2 and (inputs, outputs) == spec.shape
    if turned and (conv1d or not fits):
        u, v = permute_axes(v, (1, 0)), permute_axes(u, (1, 0))
        return _product(adapter, term, u, v, spec, rank, parameter, along=1)
    if not fits:
        groups = spec.ndim > 2 and outputs == first and inputs % max(math.prod(rest), 1) == 0
        why = ": convolutions in groups cannot be folded" if groups else ""
        raise SpecMismatch(f"it is {spec}, and A and B are {a.spec} and {b.spec}{why}")
    return _product(adapter, term, u, v, spec, rank, parameter)


def _bare(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """The inputs of a layer without the axes of a kernel that is one place wide."""
    return lengths[:1] if all(length == 1 for length in lengths[1:]) else lengths


def _product(
    adapter: Adapter, term: Term, u: Origin, v: Origin, spec: Spec, rank: int, parameter: str, along: int = 0
) -> Reading:
    """A product of two matrices for the whole of a leaf."""
    (rows, inner), (other, columns) = u.spec.shape, v.spec.shape
    if inner != other or rows * columns != spec.size or rows != spec.shape[0]:
        raise SpecMismatch(f"it is {spec}, and the matrices are {u.spec} and {v.spec}")
    _check_rank(adapter, term, rank, rank, parameter)
    magnitude = adapter.origin(term.roles["magnitude"]) if "magnitude" in term.roles else None
    if magnitude is not None and magnitude.spec.size != (columns if along else rows):
        raise SpecMismatch(f"it is {spec}, and the magnitudes are {magnitude.spec}")
    scale = adapter.scale(term, rank, parameter)
    product = Product(scale, _one(u), _one(v), magnitude=magnitude, along=along)
    return product, (1, rows, columns)


def _one(matrix: Origin) -> Origin:
    return reshape(matrix, (1, *matrix.spec.shape))


def _check_rank(adapter: Adapter, term: Term, length: int, rank: int, parameter: str) -> None:
    said = adapter.rank(term, rank, parameter)
    if said != rank:
        raise SpecMismatch(f"A has {length} ranks, and the configuration says {said}")


def _jax_reading(adapter: Adapter, term: Term, a: Origin, b: Origin, spec: Spec) -> Reading:
    """Matrices as JAX has them, (in, rank) and (rank, out), for a leaf (in, out), or for each layer of a stack."""
    rank, ins, outs = a.spec.shape[-1], a.spec.shape[:-1], b.spec.shape[1:]
    scale = adapter.scale(term, rank)
    if rank == b.spec.shape[0] and (ins + outs == spec.shape):
        u, v = reshape(a, (1, math.prod(ins), rank)), reshape(b, (1, rank, math.prod(outs)))
        return Product(scale, u, v), (1, math.prod(ins), math.prod(outs))
    if a.spec.ndim == b.spec.ndim == 3 and (*ins, b.spec.shape[2]) == spec.shape and b.spec.shape[:2] == (ins[0], rank):
        return Product(scale, a, b), (ins[0], ins[1], b.spec.shape[2])
    if a.spec.ndim == b.spec.ndim == 2 and rank == b.spec.shape[0] and outs + ins == spec.shape:  # of a torch base
        u, v = permute_axes(b, (1, 0)), permute_axes(a, (1, 0))
        return Product(scale, _one(u), _one(v)), (1, outs[0], ins[0])
    if a.spec.ndim == b.spec.ndim == 2 and (b.spec.shape[0], a.spec.shape[1]) == spec.shape:  # by a rule
        return Product(adapter.scale(term, a.spec.shape[0]), _one(b), _one(a)), (1, *spec.shape)
    raise SpecMismatch(f"it is {spec}, and A and B are {a.spec} and {b.spec}")


def bias_reading(adapter: Adapter, term: Term, spec: Spec, rank: int) -> Reading:
    """The bias of B, scaled like its products, as a product for a bias."""
    bias = adapter.origin(term.roles["bias"])
    if bias.spec.shape != spec.shape:
        raise SpecMismatch(f"it is {spec}, and the bias of B is {bias.spec}")
    u, v = reshape(bias, (1, 1, spec.size)), Held(np.ones((1, 1, 1), np.float32))
    return Product(adapter.scale(term, rank), v, u), (1, 1, spec.size)


# ---- experts ---------------------------------------------------------------------------------------------------------


def expert_reading(
    adapter: Adapter, term: Term, bases: Destinations, fused: tuple[int, int, int, int]
) -> tuple[Product, View]:
    """A term for a projection of one expert as a product for the rows, or columns, of the fused leaf that it is in."""
    number, expert, side, sides = fused
    spec = bases.leaves.spec(number)
    if spec.ndim != 3 or expert >= spec.shape[0]:
        raise SpecMismatch(f"it is {spec}, which has no expert {expert}")
    count, rows, columns = spec.shape
    ways = {}
    for last, outputs, inputs in ((False, rows, columns), (True, columns, rows)):
        with_sides = outputs // sides
        a, b = (adapter.origin(term.roles[role]) for role in ("A", "B"))
        if (b.spec.shape[0] * sides, a.spec.size) == (outputs, inputs * a.spec.shape[0]):
            ways[last] = Spec((with_sides, inputs), spec.dtype)
    chosen = next(iter(ways)) if len(ways) == 1 else bases.outputs_last
    if chosen is None or not ways:
        raise SpecMismatch(_told(spec, a.spec, b.spec, ways))
    product, _ = _matrix_reading(adapter, term, a, b, ways[chosen], conv1d=False)
    length = ways[chosen].shape[0]
    some = (
        range(side, sides * length, sides) if bases.interleaved(number) else range(side * length, (side + 1) * length)
    )
    if not chosen:
        return replace(product, first=expert, rows=some), (count, rows, columns)
    turned = replace(product, u=_turned(product.v), v=_turned(product.u), along=1, first=expert, columns=some)
    return turned, (count, rows, columns)


def _turned(matrices: Origin) -> Origin:
    return permute_axes(matrices, (0, 2, 1))


def parameter_readings(
    adapter: Adapter, term: Term, bases: Destinations, slot: Slot
) -> Iterator[tuple[int, Product, View]]:
    """A term as products for a parameter of a module, such as the fused experts: the leaves, each with its product."""
    a, b, spec = adapter.origin(term.roles["A"]), adapter.origin(term.roles["B"]), slot.spec
    if spec.kind != "float":
        raise SpecMismatch(f"it is {spec}, not of floats")
    if spec.ndim == 2:
        product, view = _matrix_reading(adapter, term, a, b, spec, conv1d=False, parameter=slot.name)
        yield slot.places[0][0], product, view
        return
    count = spec.shape[0]
    rank = a.spec.shape[0] // max(count, 1)
    _check_rank(adapter, term, a.spec.shape[0], rank, slot.name)
    # A has the ranks of the first expert first; in B those of all experts take turns.
    inner, outer = reshape(a, (count, rank, a.spec.shape[1])), reshape(b, (b.spec.shape[0], rank, count))
    ways = readings_of(a.spec, b.spec, spec)
    first = next(iter(ways)) if len(ways) == 1 else bases.experts_first(str(adapter.said("peft_version", "")))
    if not ways or first is None:
        raise SpecMismatch(_told(spec, a.spec, b.spec, ways))
    if first:
        u, v = _turned(inner), permute_axes(outer, (2, 1, 0))
    else:
        u, v = permute_axes(outer, (2, 0, 1)), inner
    scale = adapter.scale(term, rank, slot.name)
    for number, expert, rows in slot.places:
        if expert is None or rows is None:
            yield number, Product(scale, u, v), spec.shape  # type: ignore[misc]
        else:
            one = take(take(u, range(expert, expert + 1), 0), rows, 1)
            product = Product(scale, one, take(v, range(expert, expert + 1), 0))
            yield number, product, (1, len(rows), spec.shape[2])


def readings_of(a: Spec, b: Spec, spec: Spec) -> list[bool]:
    """How A and B can be read for fused experts: with the outputs first, as False, with the inputs first, as True."""
    count, rows, columns = spec.shape
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not count or a.shape[0] % count:
        return []
    sides = {False: (rows, columns), True: (columns, rows)}
    return [first for first, each in sides.items() if (b.shape[0], a.shape[1]) == each]


def _told(spec: Spec, a: Spec, b: Spec, ways: object) -> str:
    if not ways:
        return f"it is {spec}, and A and B are {a} and {b}"
    return (
        f"it is {spec}, and A and B, {a} and {b}, fit with its inputs first and with its outputs first: which is right "
        "is said by the model_type in the config.json of the base and the peft_version of the adapter, and they do not"
    )
