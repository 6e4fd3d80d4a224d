"""The table of merge methods: what each takes, what it must know of a whole leaf first, and how it reduces."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from paramend.errors import BadArgument
from paramend.leaves.specs import Array
from paramend.merging import blends
from paramend.merging.settings import Settings
from paramend.reports import wording

Base = Literal["needed", "taken", "refused"]
Keep = Literal["all", "largest", "random", "ranked"]
_MANY = 1 << 16


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method."""

    name: str
    says: str  # what it does, and where it comes from
    base: Base = "needed"  # whether it needs the model that the others come from
    models: tuple[int, int] = (1, _MANY)  # the least and the most number of other models
    # The settings that mean something to it, with their defaults; None: it must be given.
    takes: Mapping[str, Any] = field(default_factory=dict)
    # How much of each model a leaf gets, by the angles between them; None: elements are merged one by one.
    blends: Callable[[Array, Settings], Array] | None = None
    keep: Keep = "all"  # which changes stay; it changes a base then
    elect: bool = False  # whether of the changes of an element only those with the sign of their sum count
    divides: bool = False  # whether sums are divided by those of the weights
    swaps: bool = False  # whether elements move towards the other model, each by so much at most

    def __reduce__(self) -> tuple[Any, ...]:
        return method_of, (self.name,)

    def divided(self, settings: Settings) -> bool:
        """Whether sums are divided by those of the weights; mergekit does not do so for DARE."""
        if settings.divide is not None:
            return settings.divide
        return self.divides and not (settings.convention == "mergekit" and self.name == "dare_ties")


_WEIGHED: dict[str, Any] = {"weights": 1.0}
_CHANGES = _WEIGHED | {"scale": 1.0}
_LARGEST = _CHANGES | {"density": None, "gamma": 0.01}
_RANDOM = _CHANGES | {"density": None, "seed": 0}
_RANKED = _CHANGES | {"density": None, "epsilon": 0.15, "seed": 0}
METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method("linear", "the weighted mean (arXiv:2203.05482)", "refused", takes=_WEIGHED, divides=True),
        Method("task_arithmetic", "the base with the weighted sum of all changes (arXiv:2212.04089)", takes=_CHANGES),
        Method(
            "slerp",
            "along the arc between two models (Shoemake 1985)",
            "refused",
            (2, 2),
            {"t": 0.5},
            blends=blends.slerp,
        ),
        Method(
            "ties",
            "the largest changes, and of those of an element the ones of one sign (arXiv:2306.01708)",
            takes=_CHANGES | {"density": 0.2},
            keep="largest",
            elect=True,
            divides=True,
        ),
        Method(
            "dare", "changes left out at random, the others larger (arXiv:2311.03099)", takes=_RANDOM, keep="random"
        ),
        Method("dare_ties", "dare, then the signs of ties", takes=_RANDOM, keep="random", elect=True, divides=True),
        Method(
            "breadcrumbs",
            "neither the largest changes nor the small ones (arXiv:2312.06795)",
            takes=_LARGEST,
            keep="largest",
        ),
        Method("breadcrumbs_ties", "breadcrumbs, then the signs of ties", takes=_LARGEST, keep="largest", elect=True),
        Method(
            "della",
            "changes left out at random, small ones more often, then the signs of ties (arXiv:2406.11617)",
            takes=_RANKED,
            keep="ranked",
            elect=True,
            divides=True,
        ),
        Method("della_linear", "della without signs", takes=_RANKED, keep="ranked"),
        Method(
            "model_stock",
            "from the base towards the mean, by the angle between changes (arXiv:2403.19522)",
            models=(2, _MANY),
            blends=blends.model_stock,
        ),
        Method(
            "karcher", "the mean on the sphere (arXiv:2603.04972)", "refused", takes=_WEIGHED, blends=blends.karcher
        ),
        Method(
            "multislerp",
            "a barycentre on the sphere, as in mergekit",
            "taken",
            takes=_WEIGHED,
            blends=blends.multislerp,
        ),
        Method(
            "nearswap",
            "the base, moved towards the other model by `t` at most in each element, as in mergekit",
            models=(1, 1),
            takes={"t": None},
            swaps=True,
        ),
    )
}


def method_of(how: str) -> Method:
    """The row of a method; `BadArgument` if there is none."""
    if how not in METHODS:
        near = wording.closest(how, METHODS, limit=1)
        raise BadArgument(
            f"{how!r} is not a merge method: {', '.join(METHODS)}", hint=f'how="{(near or ["linear"])[0]}"'
        )
    return METHODS[how]
