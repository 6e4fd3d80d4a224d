"""Readings: what the matrices of a term mean for leaves, told by shapes; by family and version where these do not."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from paramend.errors import SpecMismatch
from paramend.leaves.origins.combined import Product, View
from paramend.leaves.origins.moved import permute_axes, reshape, take
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Held
from paramend.leaves.specs import Spec
from paramend.merging.adapters import Adapter, Term
from paramend.merging.destinations import Destinations, Fused, Slot
from paramend.reports import wording

# The number of a leaf, what is added to it, and as which matrices it is seen.
Placed: TypeAlias = tuple[int, Product, View]


class Reading:
    """A term, and the base that it is for. Its methods raise `SpecMismatch` for what does not fit or is not known."""

    def __init__(self, adapter: Adapter, term: Term, bases: Destinations) -> None:
        self.adapter, self.term, self.bases = adapter, term, bases
        self.parts = {role: adapter.origin(number) for role, number in term.roles.items()}
        for role in ("A", "B", "a", "b", "rows A", "rows B"):
            if role in self.parts and self.parts[role].spec.ndim < 2:
                raise SpecMismatch(f"{role} is {self.parts[role].spec}, which is not a matrix")

    def _both(self, one: str, other: str) -> tuple[Origin, Origin]:
        if not {one, other} <= self.parts.keys():
            raise SpecMismatch(f"there is {' and '.join(self.parts)}, and not both of {one} and {other}")
        return self.parts[one], self.parts[other]

    def of_weight(self, number: int) -> Iterator[Placed]:
        """The product for the weight of a module, which may be a linear layer, a Conv1D, a convolution or an embedding;
        and the bias of B for that of the module."""
        spec = self.bases.leaves.spec(number)
        if spec.kind != "float":
            raise SpecMismatch(f"it is {spec}, not of floats")
        if "rows A" in self.parts:
            a, b = self._both("rows A", "rows B")
            yield number, *self._whole(_turned(a), _turned(b), spec, a.spec.shape[0], along=1)
        elif "a" in self.parts:
            yield number, *self._of_jax(*self._both("a", "b"), spec)
        else:
            name, said = ".".join(("", *self.term.module, "weight")), self.adapter.said("target_parameters", [])
            plain = any(name.endswith(f".{each}") for each in said)
            conv1d = not plain and self.bases.inputs_first(number, conv1d=bool(self.adapter.said("fan_in_fan_out")))
            yield number, *self._of_torch(spec, "weight" if plain else "", conv1d=conv1d)
        if "bias" in self.parts:
            bias, own = self.parts["bias"], self.bases.modules[self.bases.leaves.index.pieces(number)[:-1]].get("bias")
            if own is None or bias.spec.shape != self.bases.leaves.spec(own).shape:
                raise SpecMismatch(f"B has a bias, {bias.spec}, and the base has none of its shape")
            one, scale = Held(np.ones((1, 1, 1), np.float32)), self._scale(self.parts["A"].spec.shape[0], "")
            yield own, Product(scale, one, reshape(bias, (1, 1, bias.spec.size))), (1, 1, bias.spec.size)

    def _of_torch(self, spec: Spec, parameter: str = "", *, conv1d: bool = False) -> tuple[Product, View]:
        """The product of matrices as torch has them, A (rank, in) and B (out, rank), kernels of convolutions too."""
        a, b = self._both("A", "B")
        rank, outputs, shape = a.spec.shape[0], b.spec.shape[0], spec.shape
        inputs = a.spec.size // max(rank, 1)
        if b.spec.size == outputs * rank:
            v, u = reshape(a, (rank, inputs)), reshape(b, (outputs, rank))
            fits = (outputs, _bare(a.spec.shape[1:])) == (shape[0], _bare(shape[1:]))
            if (inputs, outputs) == shape and (conv1d or not fits):
                return self._whole(_turned(v), _turned(u), spec, rank, parameter, along=1)
            if fits:
                return self._whole(u, v, spec, rank, parameter)
        why = "; convolutions in groups cannot be folded" if spec.ndim > 2 else ""
        raise SpecMismatch(f"it is {spec}, and A and B are {a.spec} and {b.spec}{why}")

    def _of_jax(self, a: Origin, b: Origin, spec: Spec) -> tuple[Product, View]:
        """The product of matrices as JAX has them, (in, rank) and (rank, out), for a leaf (in, out) or a stack."""
        rank, ins, outs = a.spec.shape[-1], a.spec.shape[:-1], b.spec.shape[1:]
        scale, stacked = self._scale(rank, ""), a.spec.ndim == b.spec.ndim == 3
        if rank == b.spec.shape[0] and ins + outs == spec.shape:
            rows, columns = math.prod(ins), math.prod(outs)
            return Product(scale, reshape(a, (1, rows, rank)), reshape(b, (1, rank, columns))), (1, rows, columns)
        if stacked and b.spec.shape[:2] == (ins[0], rank) and (*ins, b.spec.shape[2]) == spec.shape:
            return Product(scale, a, b), (ins[0], ins[1], b.spec.shape[2])
        if a.spec.ndim == b.spec.ndim == 2 and rank == b.spec.shape[0] and outs + ins == spec.shape:  # of a torch base
            return Product(scale, _one(_turned(b)), _one(_turned(a))), (1, outs[0], ins[0])
        if a.spec.ndim == b.spec.ndim == 2 and (b.spec.shape[0], a.spec.shape[1]) == spec.shape:  # by a rule, as torch
            return Product(self._scale(a.spec.shape[0], ""), _one(b), _one(a)), (1, *spec.shape)
        raise SpecMismatch(f"it is {spec}, and A and B are {a.spec} and {b.spec}")

    def _whole(
        self, u: Origin, v: Origin, spec: Spec, rank: int, parameter: str = "", along: int = 0
    ) -> tuple[Product, View]:
        """A product of two matrices for all of a leaf."""
        rows, columns, magnitude = u.spec.shape[0], v.spec.shape[1], self.parts.get("magnitude")
        if u.spec.shape[1] != v.spec.shape[0] or rows * columns != spec.size or rows != spec.shape[0]:
            raise SpecMismatch(f"it is {spec}, and the matrices are {u.spec} and {v.spec}")
        if self.adapter.said("use_dora") and magnitude is None:
            raise SpecMismatch("the configuration says DoRA, and there is no lora_magnitude_vector")
        if magnitude is not None and magnitude.spec.size != (columns if along else rows):
            raise SpecMismatch(f"it is {spec}, and the magnitudes are {magnitude.spec}")
        product = Product(self._scale(rank, parameter), _one(u), _one(v), magnitude=magnitude, along=along)
        return product, (1, rows, columns)

    def _scale(self, rank: int, parameter: str) -> float:
        said = self.adapter.rank(self.term, rank, parameter)
        if said != rank or not rank:
            raise SpecMismatch(f"A has {rank} ranks, and the configuration says {said}")
        return self.adapter.scale(self.term, rank, parameter)

    def of_expert(self, fused: Fused) -> Placed:
        """The product for a projection of one expert, in the rows or columns of the fused leaf that hold it."""
        a, b = self._both("A", "B")
        spec = self.bases.leaves.spec(fused.number)
        if spec.ndim != 3 or fused.expert >= spec.shape[0]:
            raise SpecMismatch(f"it is {spec}, which has no expert {fused.expert}")
        view: View = spec.shape  # type: ignore[assignment]
        outputs, inputs = b.spec.shape[0], a.spec.size // max(a.spec.shape[0], 1)
        sides = {False: view[1:], True: view[:0:-1]}  # whether inputs come first → (outputs, inputs)
        ways = [first for first, each in sides.items() if (outputs * fused.sides, inputs) == each]
        first = ways[0] if len(ways) == 1 else self.bases.stored_inputs_first
        if first is None or not ways:
            raise _unknown(spec, a.spec, b.spec, ways)
        product, _ = self._of_torch(Spec((outputs, inputs), spec.dtype))
        start, step = (fused.side, fused.sides) if self.bases.interleaved(fused.number) else (fused.side * outputs, 1)
        some = range(start, start + outputs * step, step)
        if not first:
            return fused.number, replace(product, first=fused.expert, rows=some), view
        u, v = (permute_axes(each, (0, 2, 1)) for each in (product.v, product.u))
        return fused.number, replace(product, u=u, v=v, along=1, first=fused.expert, columns=some), view

    def fits(self, slot: Slot) -> bool:
        """Whether the term may be one for a parameter."""
        if not {"A", "B"} <= self.parts.keys():
            return False
        a, b = self.parts["A"].spec, self.parts["B"].spec
        return bool(_ways(a, b, slot.spec)) if slot.spec.ndim == 3 else (b.shape[0], a.shape[1]) == slot.spec.shape

    def of_parameter(self, slot: Slot) -> Iterator[Placed]:
        """The products for a parameter, such as all experts as one: for the leaves that hold it."""
        (a, b), spec = self._both("A", "B"), slot.spec
        if spec.kind != "float":
            raise SpecMismatch(f"it is {spec}, not of floats")
        if spec.ndim == 2:
            yield slot.places[0][0], *self._of_torch(spec, slot.name)
            return
        count, ways = spec.shape[0], _ways(a.spec, b.spec, spec)
        first = ways[0] if len(ways) == 1 else self.bases.experts_first(str(self.adapter.said("peft_version", "")))
        if first is None or not ways:
            raise _unknown(spec, a.spec, b.spec, ways)
        rank = a.spec.shape[0] // count
        # A has the ranks of the first expert first; in B those of all experts take turns.
        inner, outer = reshape(a, (count, rank, a.spec.shape[1])), reshape(b, (b.spec.shape[0], rank, count))
        u = permute_axes(inner, (0, 2, 1)) if first else permute_axes(outer, (2, 0, 1))
        v = permute_axes(outer, (2, 1, 0)) if first else inner
        scale = self._scale(rank, slot.name)
        for number, expert, rows in slot.places:
            if expert is None:
                yield number, Product(scale, u, v), spec.shape  # type: ignore[misc]
            else:
                only = range(expert, expert + 1)
                product = Product(scale, take(take(u, only, 0), rows, 1), take(v, only, 0))
                yield number, product, (1, len(rows), spec.shape[2])


def of_parameters(readings: Sequence[Reading], slots: Sequence[Slot]) -> Iterator[tuple[Term, Placed]]:
    """The products of all terms of a module without a weight: each is for the only parameter that its shapes fit."""
    rest, free = list(readings), list(slots)
    while rest:
        fitting = [(each, [slot for slot in free if each.fits(slot)]) for each in rest]
        sure = next(((each, found[0]) for each, found in fitting if len(found) == 1), None)
        if sure is None:
            held = wording.listing([f"{slot.name} {slot.spec}" for slot in free]) or "nothing more"
            of = wording.listing([slot.name for _, found in fitting for slot in found]) or "none of it"
            raise SpecMismatch(f"it has {held}, and a term of the adapter fits {of}")
        reading, slot = sure
        rest.remove(reading)
        free.remove(slot)
        yield from ((reading.term, placed) for placed in reading.of_parameter(slot))


def _bare(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """The inputs of a layer, without the axes of a kernel that is one place wide."""
    return lengths[:1] if all(length == 1 for length in lengths[1:]) else lengths


def _one(matrix: Origin) -> Origin:
    return reshape(matrix, (1, *matrix.spec.shape))


def _turned(matrix: Origin) -> Origin:
    if matrix.spec.ndim != 2:
        raise SpecMismatch(f"{matrix.spec} is not a matrix")
    return permute_axes(matrix, (1, 0))


def _ways(a: Spec, b: Spec, spec: Spec) -> list[bool]:
    """Whether fused experts may have their inputs first: both, one, or none of the two."""
    count, rows, columns = spec.shape
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not count or a.shape[0] % count:
        return []
    sides = {False: (rows, columns), True: (columns, rows)}
    return [first for first, each in sides.items() if (b.shape[0], a.shape[1]) == each]


def _unknown(spec: Spec, a: Spec, b: Spec, ways: Sequence[bool]) -> SpecMismatch:
    here = f"it is {spec}, and A and B are {a} and {b}"
    which = ", which fit with inputs first and with outputs first: only the model_type in the config.json of the base"
    return SpecMismatch(f"{here}{which} and the peft_version of the adapter tell which is right" if ways else here)
