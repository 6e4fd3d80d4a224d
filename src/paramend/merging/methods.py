"""The table of merge methods: what each takes, completed and checked as it is given, and how it reduces."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from paramend.errors import BadArgument
from paramend.leaves.specs import Array
from paramend.merging.blends import karcher, model_stock, multislerp, slerp
from paramend.merging.settings import Convention, Settings
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
_LARGEST: dict[str, Any] = {"keep": "largest", "takes": _CHANGES | {"density": None, "gamma": 0.01}}
_DRAWN: dict[str, Any] = {"keep": "random", "takes": _CHANGES | {"density": None, "seed": 0}}
_RANKED: dict[str, Any] = {"keep": "ranked", "takes": _CHANGES | {"density": None, "epsilon": 0.15, "seed": 0}}
METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method("linear", "the weighted mean (arXiv:2203.05482)", "refused", takes=_WEIGHED, divides=True),
        Method("task_arithmetic", "the base with the weighted sum of all changes (arXiv:2212.04089)", takes=_CHANGES),
        Method("slerp", "along the arc between two models (Shoemake 1985)", "refused", (2, 2), {"t": 0.5}, slerp),
        Method(
            "ties",
            "the largest changes, and of those of an element the ones of one sign (arXiv:2306.01708)",
            takes=_CHANGES | {"density": 0.2},
            keep="largest",
            elect=True,
            divides=True,
        ),
        Method("dare", "changes left out at random, the others larger (arXiv:2311.03099)", **_DRAWN),
        Method("dare_ties", "dare, then the signs of ties", **_DRAWN, elect=True, divides=True),
        Method("breadcrumbs", "neither the largest changes nor the small ones (arXiv:2312.06795)", **_LARGEST),
        Method("breadcrumbs_ties", "breadcrumbs, then the signs of ties", **_LARGEST, elect=True),
        Method(
            "della",
            "changes left out at random, small ones more often, then the signs of ties (arXiv:2406.11617)",
            **_RANKED,
            elect=True,
            divides=True,
        ),
        Method("della_linear", "della without signs", **_RANKED),
        Method(
            "model_stock",
            "from the base towards the mean, by the angle between changes (arXiv:2403.19522)",
            models=(2, _MANY),
            blends=model_stock,
        ),
        Method("karcher", "the mean on the sphere (arXiv:2603.04972)", "refused", takes=_WEIGHED, blends=karcher),
        Method("multislerp", "a barycentre on the sphere, as in mergekit", "taken", takes=_WEIGHED, blends=multislerp),
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
        near = wording.closest(how, METHODS, limit=1) or ["linear"]
        raise BadArgument(f"{how!r} is not a merge method: {', '.join(METHODS)}", hint=f'how="{near[0]}"')
    return METHODS[how]


# What has an entry for each model.
_EACH = ("weights", "density", "gamma", "epsilon")
_FREE = ("how", "convention", "divide", "rescale")


def settings_of(given: Mapping[str, Any], count: int) -> Settings:
    """The settings for so many models, of those that are given and not None.

    >>> settings_of({"how": "ties", "density": 0.5}, 2)
    Settings(how='ties', weights=(1.0, 1.0), t=0.5, density=(0.5, 0.5), gamma=(), ...)
    """
    given = {name: value for name, value in given.items() if value is not None}
    method = method_of(given.get("how", "linear"))
    known = (*_FREE, *method.takes)
    for name in given:
        if name not in known:
            takes = wording.listing([*method.takes]) or "none"
            raise BadArgument(f"{name} means nothing to {method.name}, which takes {takes}", hint=f"leave {name} out")
    mine: dict[str, Any] = {"how": method.name, "weights": 1.0} | given
    for name, default in method.takes.items():
        if name == "density" and given.get("convention") == "mergekit":
            default = 1.0
        if mine.setdefault(name, default) is None:
            raise BadArgument(f"{method.name} needs {name}=", hint=f"{name}=0.5")
    for name in (name for name in _EACH if name in mine):
        mine[name] = _each(name, mine[name], count)
    return _checked(method, Settings(**mine))


def changed(settings: Settings, given: Mapping[str, Any], count: int) -> Settings:
    """Settings with others in the place of some; those that mean nothing to another method go."""
    if not isinstance(given, Mapping):
        raise BadArgument(f"{given!r} is not a map of settings", hint='at={"**/mlp/**": {"weights": [1, 2]}}')
    method = method_of(given.get("how", settings.how))
    stay = {name: getattr(settings, name) for name in (*_FREE[1:], *METHODS[settings.how].takes)}
    stay = {name: value for name, value in stay.items() if name in (*_FREE, *method.takes)}
    return settings_of({"how": method.name, **stay, **given}, count)


def _each(name: str, value: Any, count: int) -> tuple[float, ...]:
    try:
        values = [float(each) for each in (value if np.ndim(value) else [value] * count)]
    except (TypeError, ValueError):
        values = [math.nan] * count
    if isinstance(value, str) or not all(map(math.isfinite, values)):
        raise BadArgument(f"{name}={value!r} is neither a number nor a list of numbers", hint=f"{name}=[0.3, 0.7]")
    if len(values) != count:
        models = wording.plural(count, "model")
        raise BadArgument(f"{name} has {len(values)} numbers for {models}", hint=f"{name}={[0.5] * count}")
    return tuple(values)


def _checked(method: Method, settings: Settings) -> Settings:
    """The settings, if all of them are in their ranges."""
    if settings.convention not in get_args(Convention):
        known = ", ".join(get_args(Convention))
        raise BadArgument(f"{settings.convention!r} is not a convention: {known}", hint='convention="paper"')
    for name in ("t", "scale"):
        value = getattr(settings, name)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise BadArgument(f"{name}={value!r} is not a number", hint=f"{name}=0.5")
    if type(settings.seed) is not int or settings.seed < 0:
        raise BadArgument(f"seed={settings.seed!r} is not a whole number from 0 on", hint="seed=0")
    for name in ("density", "gamma"):
        for value in getattr(settings, name):
            if not 0 <= value <= 1 or (name == "density" and not value):
                raise BadArgument(f"{name}={value:g} is not a share of all changes", hint=f"{name}=0.5")
    for density, epsilon in zip(settings.density, settings.epsilon, strict=False):
        if density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            chances = f"{density - epsilon:g} to {density + epsilon:g}"
            raise BadArgument(
                f"density={density:g} and epsilon={epsilon:g} make chances from {chances}, not from above 0 to below 1",
                hint=f"epsilon={min(density, 1 - density) / 2:g}",
            )
    divided = method.divided(settings) or method.name in ("karcher", "multislerp")
    if divided and abs(math.fsum(settings.weights)) < 1e-12:
        raise BadArgument(f"weights={list(settings.weights)} have the sum 0, by which {method.name} divides")
    if not any(settings.weights):
        raise BadArgument(f"weights={list(settings.weights)}: no model counts")
    return settings
