"""Flattened features: layers that take or make them, where one side has its channels first and the other last."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from paramend.mapping.steps import Step, read_step
from paramend.porting.forms import Shape
from paramend.porting.matching import Pair

_CONVOLUTIONS = ("conv", "conv_transpose")
_NORMS = ("norm", "batch_norm")
_OF_CHANNELS = ("2d", "3d", "GroupNorm")  # in the names of norms that never see flattened features


class Flat(NamedTuple):
    """Features that are (channels, places) on one side and (places, channels) on the other."""

    channels: int  # how many channels
    axis: int = 1  # 1 where a layer takes them, 0 where a dense layer makes them

    def steps(self, shape: Shape) -> list[Step]:
        """The steps from a matrix (outputs, inputs) or a vector with channels first to one with channels last."""
        at = self.axis if len(shape) == 2 else 0
        parts = (*shape[:at], self.channels, shape[at] // self.channels, *shape[at + 1 :])
        inner = {"reshape": {"shape": list(parts), "back": list(shape)}}
        outer = {"reshape": {"shape": list(shape[::-1]), "back": list(parts[::-1])}}
        return [*map(read_step, (inner, {"transpose": [*range(len(parts))[::-1]]}, outer))]


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer as the side with channels first holds it."""

    pair: Pair  # the layer, and the one that it is on the other side
    kind: str
    name: str  # the name of its class; "" if that is not known
    shape: Shape  # the shape of its first parameter
    groups: int = 1  # the groups of a convolution, 1 if they are not known

    @property
    def taken(self) -> int:
        return self.shape[1] * self.groups if self.kind == "conv" else self.shape[self.kind == "linear"]

    @property
    def made(self) -> int:
        return self.shape[1] * self.groups if self.kind == "conv_transpose" else self.shape[0]


@dataclass(frozen=True)
class Flattening:
    """Layers that take or make flattened features."""

    pairs: list[Pair]
    flat: Flat
    places: int
    doubt: bool  # whether the features may as well be others of their number
    certain: bool  # whether a class says so


def flattenings(layers: Sequence[Layer], classes: frozenset[str], *, ordered: bool) -> Iterator[Flattening]:
    """The flattenings that widths and order of layers, as they were made, speak for; if not `ordered`, the order may be
    that of their names. Of the `classes` of all modules `Flatten` and `Unflatten` leave no doubt."""
    dense = [layer for layer in layers if layer.kind == "linear" and len(layer.shape) == 2]
    before: Layer | None = None
    norms: list[Layer] = []
    makers: list[Layer] = []  # a dense layer, and the norms of what it makes
    left = list(dense)
    for layer in layers:
        if layer.kind in _CONVOLUTIONS:
            if makers and layer.taken > 1 and _places(makers[0].made, layer.taken) > 3:  # less: scales, shifts, q, k, v
                places = makers[0].made // layer.taken
                certain = "Unflatten" in classes
                doubt = not (certain or (ordered and _square(places, layer)))
                yield Flattening([each.pair for each in makers], Flat(layer.taken, 0), places, doubt, certain)
            before, norms, makers = layer, [], []
        elif layer.kind in _NORMS and len(layer.shape) == 1:
            norms.append(layer)
            makers += [layer] if makers and layer.made == makers[0].made else []
        elif layer.kind not in ("parameter", "prelu", *_NORMS):
            if layer in left and before is not None:
                left.remove(layer)
                between = [norm for norm in norms if norm.made == layer.taken]
                yield from _taken(layer, between, before, layers, classes, doubt=False)
            consumed = any(other.taken == layer.made for other in dense if other is not layer)
            makers = [layer] if layer in dense and not consumed else []
            before = None
    for layer in left:
        widths = [each.made for each in layers if each is not layer and each.kind not in _NORMS]
        known = {*widths, *(width / 2 for width in widths), *(a + b for a in widths for b in widths)}
        last = [each for each in layers if each.kind in _CONVOLUTIONS and _ends(each, layers)]
        fitting = {each.made: each for each in last if _places(layer.taken, each.made) > 1}
        if layer.taken not in known and fitting:
            first = next(iter(fitting.values()))
            yield from _taken(layer, [], first, layers, classes, doubt=len(fitting) > 1)


def _taken(
    layer: Layer, norms: list[Layer], before: Layer, layers: Sequence[Layer], classes: frozenset[str], doubt: bool
) -> Iterator[Flattening]:
    """The flattening between a convolution and a dense layer, with norms between them, if there may be one."""
    places = _places(layer.taken, before.made)
    if places < 2 or before.made == 1 or any(word in norm.name for norm in norms for word in _OF_CHANNELS):
        return
    alike = sum(each.kind in _CONVOLUTIONS and each.made == before.made for each in layers)
    doubt = doubt or not _square(places, before) or places <= alike or not all(norm.name for norm in norms)
    certain = "Flatten" in classes
    pairs = [each.pair for each in (*norms, layer)]
    yield Flattening(pairs, Flat(before.made), places, doubt and not certain, certain)


def _places(features: int, channels: int) -> int:
    """How many places channels have among features; 0 if these are no multiple."""
    return 0 if features % channels else features // channels


def _square(places: int, convolution: Layer) -> bool:
    space = len(convolution.shape) - 2
    return bool(round(places ** (1 / space)) ** space == places)


def _ends(layer: Layer, layers: Sequence[Layer]) -> bool:
    """Whether no convolution makes another number of channels of those that this one makes."""
    following = [each for each in layers if each.kind in _CONVOLUTIONS and each.taken == layer.made]
    return all(each.made == layer.made for each in following)
