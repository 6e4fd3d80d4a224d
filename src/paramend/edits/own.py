"""Weights by a rule of the user's, a `Codec`: decoded and encoded whole, by functions on arrays of the tree itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np

from paramend.arrays.initializers import Site
from paramend.arrays.registry import backend, backend_of, to_numpy
from paramend.edits.arguments import shown
from paramend.edits.call import Call, Coding, Op, explained
from paramend.edits.memory import Memory
from paramend.edits.quantized import refusal
from paramend.errors import BadArgument, SpecMismatch
from paramend.leaves.codecs.encoding import Misfit
from paramend.leaves.groups import Group
from paramend.leaves.leaves import Editable
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Made
from paramend.leaves.rules import Codec
from paramend.leaves.specs import Array, Spec
from paramend.leaves.weights import Weight


@dataclass(frozen=True, eq=False)
class Own:
    """A weight by a rule of the user's, as `leaves.weights.Weight` is one by a scheme."""

    path: str
    group: Group  # its leaves
    rule: Codec  # how they make it
    leaves: Editable  # what holds them
    parts: ClassVar[Mapping[str, Origin]] = {}

    @property
    def scheme(self) -> str:
        """The name of the rule."""
        return self.rule.name

    @cached_property
    def spec(self) -> Spec:
        """Its shape and dtype, as `decode` gives them."""
        values = self.read()
        return backend(values).spec(values)

    def read(self) -> Any:
        """Its values, an array of the library of the leaves; of a checkpoint, of numpy."""
        values = self.decoded([self.leaves.read(number) for number in self.group.numbers])
        return values if isinstance(self.leaves, Memory) else to_numpy(values)

    def decoded(self, given: Sequence[Any], dtype: str = "") -> Any:
        """The values of some leaves, rounded to a dtype."""
        values = decoded_by(self.rule, given, self.path)
        return backend(values).cast(values, dtype) if dtype else values

    def origin(self, dtype: str = "") -> Origin:
        """Its values as an origin."""
        spec = Spec(self.spec.shape, dtype or self.spec.dtype)
        return Made(spec, partial(self._values, dtype))

    def _values(self, dtype: str) -> Array:
        return to_numpy(self.decoded([self.leaves.read(number) for number in self.group.numbers], dtype))

    def coded(self, call: Call, place: Site, set_: Op) -> dict[int, Call]:
        """What a call is in the leaves: number → call that sets the leaf. `Quantized` if the rule does not encode."""
        explained(self.path, call.spec, self.spec)
        asked = call.args.get("requantize", "amax")
        if self.rule.encode is None or asked != "amax":
            why = f"{self.scheme} encodes in its own way alone" if self.rule.encode else f"{self.scheme} has no encode"
            ways = ["tree, report = pm.dequantize(tree, selector) makes floats of it first"]
            raise refusal(self.leaves, [self.group], f"{self.path} cannot take {call}: {why}", ways)
        misfit = Misfit(blocks=1)
        found: dict[int, Any]
        if isinstance(self.leaves, Memory):
            found = self._encoded(call, place)
        else:
            later = _Later(self.leaves, partial(self._encoded, call, place, misfit))
            found = {n: Made(self.leaves.spec(n), partial(later, n)) for n in self.group.numbers}
        said = Coding(self.path, self.spec, self.spec, self.scheme, (call,), ("encoded by its codec",), misfit)
        return {number: Call(set_, {"value": value}, coding=said) for number, value in found.items()}

    def _encoded(self, call: Call, place: Site, misfit: Misfit | None = None) -> dict[int, Any]:
        """The leaves after a call."""
        given = [self.leaves.read(number) for number in self.group.numbers]
        before = decoded_by(self.rule, given, self.path)
        after = call.run(before, place)
        if backend(after).spec(after) != self.spec:
            raise SpecMismatch(f"{self.path}: {call} gives {backend(after).spec(after)}, and the weight is {self.spec}")
        numbers = dict(zip(self.rule.leaves, self.group.numbers, strict=True))
        new = {numbers[name]: value for name, value in encoded_by(self.rule, after, given, self.path).items()}
        for number, value in new.items():
            spec, here = backend(value).spec(value), self.leaves.spec(number)
            if spec != here:
                path = self.leaves.index.path(number)
                raise SpecMismatch(f"encode of {self.scheme} gives {spec} for {path}, which is {here}")
        every = {n: new.get(n, old) for n, old in zip(self.group.numbers, given, strict=True)}
        if misfit is None:
            return new
        wanted, got = (
            to_numpy(each).astype(np.float32) for each in (after, decoded_by(self.rule, [*every.values()], ""))
        )
        misfit.measure((0,), wanted, got, 1)
        return every


class _Later:
    """Makes a leaf when it is asked for. Smaller ones, which are made with it, are kept until they are."""

    def __init__(self, leaves: Editable, encoded: Callable[[], dict[int, Any]]) -> None:
        self._leaves, self._encoded = leaves, encoded
        self._kept: dict[int, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _Later, (self._leaves, self._encoded)

    def __call__(self, number: int) -> Array:
        if number not in self._kept:
            size = self._leaves.nbytes(number)
            self._kept |= {n: each for n, each in self._encoded().items() if self._leaves.nbytes(n) <= size}
        return to_numpy(self._kept.pop(number))


def floats(weight: Weight | Own, given: Sequence[Any], dtype: str = "") -> Any:
    """A weight as one leaf like those given, in which it is stored: an origin, or an array of their library."""
    if isinstance(given[0], Origin):
        return weight.origin(dtype)
    if isinstance(weight, Own):
        return weight.decoded(given, dtype)
    return backend(given[0]).resized(weight.origin(dtype).read(), given[0])


def decoded_by(rule: Codec, given: Sequence[Any], path: str) -> Any:
    """What `decode` makes of some leaves, an array; what it raises names the weight, too."""
    values = _called(rule.decode, given, f"decode of {rule.name}", path)
    if backend_of(type(values)) is None:
        raise BadArgument(f"decode of {rule.name} gives {shown(values)} for {path}, which is no array")
    return values


def encoded_by(rule: Codec, weight: Any, given: Sequence[Any], path: str) -> dict[str, Any]:
    """What `encode` makes of a weight, by name of the leaf: arrays, of leaves that the rule has."""
    assert rule.encode is not None
    names, found = rule.leaves, _called(rule.encode, (weight, *given), f"encode of {rule.name}", path)
    wrong = (
        "no dict" if not isinstance(found, Mapping) else next((str(name) for name in found if name not in names), "")
    )
    wrong = wrong or next((f"no array for {n}" for n, each in found.items() if backend_of(type(each)) is None), "")
    if wrong:
        raise BadArgument(
            f"encode of {rule.name} gives {wrong} for {path}; the leaves are {', '.join(names)}",
            hint=f"return {{{', '.join(f'{name!r}: ...' for name in names)}}}",
        )
    return dict(found)


def _called(function: Callable[..., Any], args: Sequence[Any], said: str, path: str) -> Any:
    try:
        return explained(path, function, *args)
    except Exception as error:
        error.add_note(f"{said}, for {path}")
        raise
