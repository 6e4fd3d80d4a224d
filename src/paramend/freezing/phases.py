"""Phases: the sets of leaves that a schedule freezes together, and the one compiled step that serves them all."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramend.errors import BadArgument
from paramend.freezing.places import FrozenPlace, dtype_of
from paramend.freezing.schedules import Event, Window

LIMIT = 64
"""With more phases than this, compiling one step would take minutes."""


def passed_at(step: Any) -> Callable[[Event], Any]:
    """A function that tells whether an event has passed at this step: a bool, traced if the step is."""
    known: dict[Any, Any] = {}

    def passed(event: Event) -> Any:
        key = _key(event)
        if key in known:
            return known[key]
        found = jnp.asarray(event(step) if callable(event) else step >= event)
        if found.shape:
            raise BadArgument(
                f"the schedule {event!r} returns an array of shape {found.shape}, not one bool",
                hint="until=lambda step: step >= 1000",
            )
        found = found.astype(bool)
        known[key] = found if isinstance(found, jax.core.Tracer) else bool(found)
        return known[key]

    return passed


@dataclass(frozen=True)
class Phases:
    """The phases of some places."""

    windows: tuple[Window, ...]  # the windows of leaves that are frozen as a whole, for a while
    steps: tuple[int, ...]  # the steps at which a phase begins
    functions: tuple[Callable[[Any], Any], ...]  # the functions of the step that begin one
    patterns: tuple[tuple[bool, ...], ...]  # for each phase, which windows hold
    phase_of: np.ndarray[Any, Any]  # the phase by the number of steps passed and by which functions are true

    @classmethod
    def of(cls, places: list[FrozenPlace]) -> "Phases":
        """The phases in the order in which they come."""
        windows = tuple(dict.fromkeys(w for place in places if (w := place.window) is not None and not w.always))
        events = [event for window in windows for event in window.events]
        steps = tuple(sorted({event for event in events if not callable(event)}))
        functions = tuple({_key(event): event for event in events if callable(event)}.values())
        if (len(steps) + 1) * 2 ** min(len(functions), 30) > LIMIT:
            raise BadArgument(
                f"this schedule has {len(steps)} steps and {len(functions)} functions of the step: "
                f"more than {LIMIT} different sets of frozen leaves, each compiled separately",
                hint='how="updates" takes any number; or thaw several layers at a time, by step numbers',
            )
        found: dict[tuple[bool, ...], int] = {}
        phase_of = np.zeros((len(steps) + 1, *[2] * len(functions)), np.int32)
        for place in itertools.product(*map(range, phase_of.shape)):
            flags = dict(zip(map(_key, functions), map(bool, place[1:]), strict=True))
            flags |= {step: number < place[0] for number, step in enumerate(steps)}
            pattern = tuple(bool(window.holds(_said(flags))) for window in windows)
            phase_of[place] = found.setdefault(pattern, len(found))
        return cls(windows, steps, functions, tuple(found), phase_of)

    def run(
        self,
        run: Callable[[tuple[bool, ...]], Any],
        places: list[FrozenPlace],
        passed: Callable[[Event], Any],
        held: Any,
    ) -> Any:
        """The result of `run`, a function of a bool for each leaf, for those that are frozen as a whole now. `passed`
        tells whether an event has passed; `held` is the result where a leaf is frozen, for its structure and dtypes."""
        gone = [self._gone(pattern, places) for pattern in self.patterns]
        if len(gone) == 1:
            return run(gone[0])
        number: Any = sum((passed(step) * 1 for step in self.steps), 0)
        flags = [passed(function) for function in self.functions]
        if not any(isinstance(found, jax.core.Tracer) for found in (number, *flags)):
            # Outside a compiled step only the branch needed now runs; a switch would be compiled each time.
            return run(gone[int(self.phase_of[(int(number), *map(int, flags))])])
        phase = jnp.asarray(self.phase_of)[(number, *(flag * 1 for flag in flags))]
        return _switch(phase, [partial(run, flags) for flags in gone], gone, held)

    def _gone(self, pattern: tuple[bool, ...], places: list[FrozenPlace]) -> tuple[bool, ...]:
        holds = dict(zip(self.windows, pattern, strict=True))
        return tuple(place.always or holds.get(place.window, False) for place in places)  # type: ignore[arg-type]


def _said(flags: dict[Any, bool]) -> Callable[[Event], bool]:
    return lambda event: flags[_key(event)]


def _key(event: Event) -> Any:
    """A hashable key for an event: functions need not be hashable."""
    return (id(event),) if callable(event) else event


def _switch(phase: Any, branches: list[Callable[[], Any]], gone: list[tuple[bool, ...]], held: Any) -> Any:
    """The result of the branch of this phase, from a compiled switch. All branches of a switch must agree on dtypes,
    and a moment in bfloat16 becomes float32 when it is updated with a float32 gradient: so both become their common
    dtype, which holds either exactly."""
    left = {place for flags in gone for place, flag in enumerate(flags) if flag}
    seen: list[Any] = []
    voids: Any = None
    for flags, branch in sorted(zip(gone, branches, strict=True), key=lambda pair: sum(pair[0])):
        frozen = {place for place, flag in enumerate(flags) if flag}
        if not seen or left - frozen:
            specs = jax.eval_shape(branch)
            voids = jax.tree.map(_is_float0, specs)
            seen.append(_plain(specs))
            left &= frozen
    kinds = jax.tree.map(lambda *found: _Kind.common(found), *seen, _plain(held))

    def wrapped(branch: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: jax.tree.map(lambda x, kind: kind.cast(x), _plain(branch()), kinds)

    found = jax.lax.switch(phase, [wrapped(branch) for branch in branches])
    return jax.tree.map(lambda new, old, void: old if void else new, found, held, voids)


@dataclass(frozen=True)
class _Kind:
    """What all branches of a switch must agree on."""

    dtype: Any
    sharding: Any

    @classmethod
    def common(cls, found: Any) -> "_Kind":
        dtypes = [dtype_of(x) for x in found]
        dtype = dtypes[0] if len(set(dtypes)) == 1 else jnp.result_type(*dtypes)
        return cls(dtype, getattr(found[0], "sharding", None))

    def cast(self, x: Any) -> Any:
        if dtype_of(x) != self.dtype:
            x = jnp.asarray(x).astype(self.dtype)
        # The sharding is part of the type only on a mesh with explicit axes.
        if self.sharding is not None and jax.typeof(x).sharding != self.sharding:
            x = jax.sharding.reshard(x, self.sharding)
        return x


def _is_float0(x: Any) -> bool:
    return bool(dtype_of(x) == jax.dtypes.float0)


def _plain(tree: Any) -> Any:
    """The tree without float0, which a switch cannot return."""
    return jax.tree.map(lambda x: jnp.zeros([], bool) if _is_float0(x) else x, tree)
