"""Choices: the settings of a merge as they are given, checked and completed."""

import math
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np

from paramend.errors import BadArgument
from paramend.merging.methods import METHODS, Method, method_of
from paramend.merging.settings import Convention, Settings
from paramend.reports import wording

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
