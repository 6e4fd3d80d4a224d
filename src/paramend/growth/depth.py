"""Orders of layers: for each new layer the old layer that it is made of, and which become the identity."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from paramend.errors import BadArgument
from paramend.reports import wording


@dataclass(frozen=True)
class Order:
    """Which old layer each new layer is made of, and which new layers become the identity.

    Attributes:
        sources: for each new layer the old layer that it is a copy of, from 0.
        identity: the new layers that return their input unchanged.
        of: how many layers the old model has; by default one more than the highest source.

    >>> print(Order((0, 1, 1, 2), (2,), of=3))
    0 1 1* 2
    >>> Order((0, 1, 1, 2), (2,), of=3).new
    (2,)
    """

    sources: tuple[int, ...]
    identity: tuple[int, ...] = ()
    of: int = 0

    def __post_init__(self) -> None:
        sources = tuple(map(int, self.sources))
        object.__setattr__(self, "sources", sources)
        object.__setattr__(self, "identity", tuple(sorted(set(map(int, self.identity)))))
        object.__setattr__(self, "of", int(self.of) or max(sources, default=-1) + 1)
        if not sources:
            raise BadArgument("the order is empty", hint="order=[0, 1], or pm.depth.drop(12, layers=[3, 4])")
        wrong = [source for source in sources if not 0 <= source < self.of]
        if wrong:
            why = f"the order names layer {wrong[0]}, and the layers are 0 to {self.of - 1}"
            raise BadArgument(why, hint=f"order={[min(max(source, 0), self.of - 1) for source in sources]}")
        beyond = [target for target in self.identity if not 0 <= target < len(sources)]
        if beyond:
            why = f"identity names the new layer {beyond[0]}, and the new layers are 0 to {len(sources) - 1}"
            raise BadArgument(why, hint="identity counts in the new model: pm.depth.Order([0, 1, 1], identity=[2])")

    @cached_property
    def kept(self) -> dict[int, int]:
        """Old layer → the new layer that it becomes: the first one made of it that is not an identity."""
        kept: dict[int, int] = {}
        for target, source in enumerate(self.sources):
            if target not in self.identity:
                kept.setdefault(source, target)
        return kept

    @cached_property
    def new(self) -> tuple[int, ...]:
        """The new layers that are not old ones: identities and further copies."""
        return tuple(target for target, source in enumerate(self.sources) if self.kept.get(source) != target)

    @property
    def dropped(self) -> tuple[int, ...]:
        """The old layers that no new layer keeps."""
        return tuple(source for source in range(self.of) if source not in self.kept)

    def each(self, size: int) -> "Order":
        """The order for blocks of `size` numbered layers each; the last layer of an identity block is zeroed.

        Flax numbers the two Dense layers of a residual block consecutively:

        >>> print(blocks(1, count=1).each(2))
        0 1 0 1*
        """
        sources = tuple(size * source + i for source in self.sources for i in range(size))
        return Order(sources, tuple(size * target + size - 1 for target in self.identity), of=size * self.of)

    def __len__(self) -> int:
        return len(self.sources)

    def __str__(self) -> str:
        return " ".join(f"{s}{'*' * (target in self.identity)}" for target, s in enumerate(self.sources))

    def __repr__(self) -> str:
        return f"pm.depth.Order({list(self.sources)}, identity={list(self.identity)}, of={self.of})"


def order_of(what: "Order | Iterable[int]", count: int) -> Order:
    """The order that a user gave, for a model of `count` layers; negative numbers count from the end.

    >>> order_of([0, -1], 3)
    pm.depth.Order([0, 2], identity=[], of=3)
    """
    if not isinstance(what, Order):
        try:
            sources = [int(source) for source in what]
        except (TypeError, ValueError):
            why = f"{what!r} is not an order of layers"
            raise BadArgument(why, hint="order=[0, 1, 1, 2], or pm.depth.blocks(12, count=4)") from None
        return Order(tuple(s + count if -count <= s < 0 else s for s in sources), of=count)
    if what.of != count:
        fix = Order(what.sources, what.identity, of=count) if what.of < count else blocks(count, count=1)
        why = f"the order is for a model of {wording.plural(what.of, 'layer')}, and this one has {count}"
        raise BadArgument(why, hint=f"order={fix!r}")
    return what


def blocks(n: int, *, count: int | None = None, every: int | None = None) -> Order:
    """The order of a block expansion (LLaMA-Pro, arXiv:2401.02415): identity copies spread evenly among n layers.

    Args:
        n: how many layers the model has.
        count: how many copies; the last one is at the end.
        every: instead of `count`: one copy after every `every` layers.

    Raises:
        BadArgument: both are given, or neither, or one is not positive.

    >>> print(blocks(4, count=2))
    0 1 1* 2 3 3*
    >>> print(blocks(5, every=2))
    0 1 1* 2 3 3* 4
    """
    if (count is None) == (every is None):
        raise BadArgument("blocks takes one of count= and every=", hint=f"pm.depth.blocks({n}, count=2)")
    _positive(n=n)
    if every is not None:
        _positive(every=every)
        after = range(every, n + 1, every)
        if not after:
            raise BadArgument(f"every={every} puts no copy among {n} layers", hint=f"every={n}")
        ends = list(after)
    else:
        assert count is not None
        _positive(count=count)
        ends = [-(-(i + 1) * n // count) for i in range(count)]
    sources: list[int] = []
    identity: list[int] = []
    for layer in range(n):
        sources.append(layer)
        for _ in range(ends.count(layer + 1)):
            identity.append(len(sources))
            sources.append(layer)
    return Order(tuple(sources), tuple(identity), of=n)


def stack(n: int, times: int = 2) -> Order:
    """The order that puts the whole stack on top of itself (G_stack, arXiv:2405.15319). The function changes.

    >>> print(stack(3))
    0 1 2 0 1 2
    """
    _positive(n=n, times=times)
    return Order(tuple(range(n)) * times, of=n)


def interleave(n: int, times: int = 2) -> Order:
    """The order that repeats each layer in place (interpolation). The function changes.

    >>> print(interleave(3))
    0 0 1 1 2 2
    """
    _positive(n=n, times=times)
    return Order(tuple(layer for layer in range(n) for _ in range(times)), of=n)


def overlap(n: int, drop: int) -> Order:
    """The order of SOLAR's depth up-scaling (arXiv:2312.15166): all but the last `drop`, then all but the first `drop`.

    >>> print(overlap(6, drop=2))
    0 1 2 3 2 3 4 5
    """
    _positive(n=n)
    if not 0 <= drop < n:
        raise BadArgument(f"drop={drop} leaves nothing of {n} layers", hint=f"drop={max(n // 4, 0)}")
    return Order((*range(n - drop), *range(drop, n)), of=n)


def splice(n: int, *, at: int, count: int = 1) -> Order:
    """The order with `count` identity layers inserted before layer `at`, copies of the layer that they follow.

    >>> print(splice(3, at=1))
    0 0* 1 2
    >>> print(splice(3, at=3, count=2))
    0 1 2 2* 2*
    """
    _positive(n=n, count=count)
    if not 0 <= at <= n:
        raise BadArgument(f"at={at} is not between 0 and {n}", hint=f"at=0, before the first layer, or at={n}, the end")
    sources = (*range(at), *[max(at - 1, 0)] * count, *range(at, n))
    return Order(sources, tuple(range(at, at + count)), of=n)


def drop(n: int, *, layers: Iterable[int]) -> Order:
    """The order without some layers. The function changes.

    >>> print(drop(5, layers=[1, -1]))
    0 2 3
    """
    _positive(n=n)
    gone = [layer + n if layer < 0 else layer for layer in layers]
    wrong = [layer for layer in gone if not 0 <= layer < n]
    if wrong:
        raise BadArgument(f"there is no layer {wrong[0]} among {n}", hint=f"layers=[{n - 1}]")
    return Order(tuple(layer for layer in range(n) if layer not in gone), of=n)


def _positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BadArgument(f"{name}={value!r} is not a positive integer", hint=f"{name}=2")
