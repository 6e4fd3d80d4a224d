"""When a leaf is frozen: `since` and `until`, read into windows of training steps."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, SupportsIndex, TypeAlias, cast

from paramend.errors import BadArgument
from paramend.leaves.specs import AnyArray
from paramend.selectors.selector import Selector, SelectorLike, sel, slice_of

# A point of a training run: a step, or a function of the step, which may be traced, that becomes true.
Event: TypeAlias = int | Callable[[AnyArray], AnyArray]
# An event for all leaves that are chosen, or one for each selector.
_At: TypeAlias = SupportsIndex | Callable[[AnyArray], AnyArray]
When: TypeAlias = _At | Mapping[Any, _At]


@dataclass(frozen=True)
class Window:
    """The steps at which a leaf is frozen."""

    since: Event | None = None  # when it is frozen; None means from the beginning
    until: Event | None = None  # when it is thawed; None means never

    @property
    def always(self) -> bool:
        """Whether it is frozen at every step."""
        return self.since is None and self.until is None

    @property
    def events(self) -> tuple[Event, ...]:
        """The events that it depends on."""
        return tuple(event for event in (self.since, self.until) if event is not None)

    def holds(self, passed: Callable[[Event], Any]) -> Any:
        """Whether it is frozen, given which events have passed (as bools, traced or not)."""
        if self.since is None:
            return True if self.until is None else passed(self.until) ^ True
        if self.until is None:
            return passed(self.since)
        begun, open_still = passed(self.since), passed(self.until) ^ True
        assert isinstance(self.since, int)
        assert isinstance(self.until, int)
        return begun & open_still if self.since < self.until else begun | open_still


@dataclass(frozen=True)
class Clause:
    """One entry of `until=` or `since=`: which leaves, which slice of them, and when."""

    selector: Selector | None
    index: Any
    event: Event


@dataclass(frozen=True)
class Schedule:
    """Which leaves are frozen, as they were written, and when."""

    selector: Selector | None  # the leaves; None means those that the clauses select
    index: Any  # the slice of them, or None
    until: tuple[Clause, ...] = ()  # when they are thawed
    since: tuple[Clause, ...] = ()  # when they are frozen

    @property
    def timed(self) -> bool:
        """Whether anything depends on the step."""
        return bool(self.until or self.since)


def read_schedule(selector: SelectorLike | None, until: When | None, since: When | None) -> Schedule:
    """The schedule that arguments of `freeze` describe."""
    whole, index = (None, None) if selector is None else slice_of(sel(selector))
    schedule = Schedule(whole, index, _clauses("until", until), _clauses("since", since))
    clauses = schedule.until + schedule.since
    if selector is None and not (clauses and all(clause.selector for clause in clauses)):
        raise BadArgument(
            "neither a selector nor a mapping in until= or since= says which leaves to freeze",
            hint='pm.freeze(tx, "**/Dense_0/**"), or pm.freeze(tx, until={"**/Dense_0/**": 1000})',
        )
    if schedule.until and schedule.since and any(callable(clause.event) for clause in clauses):
        raise BadArgument(
            "until= and since= together take steps, not functions: the order of functions is unknown",
            hint="one function says it all: until=lambda step: (step < 100) | (step >= 200)",
        )
    for thaw in schedule.until:
        for stop in schedule.since:
            if thaw.event == stop.event and isinstance(thaw.event, int):
                raise BadArgument(
                    f"until and since are both {thaw.event}, so nothing ever thaws",
                    hint=f"since={stop.event}, until={thaw.event + 100} freezes for 100 steps",
                )
    return schedule


def _clauses(name: str, given: Any) -> tuple[Clause, ...]:
    if given is None:
        return ()
    if not isinstance(given, Mapping):
        return (Clause(None, None, _event(name, given)),)
    if not given:
        raise BadArgument(
            f"{name}={{}} selects no leaves", hint=f'{name}={{"**/Dense_0/**": 1000}}, or leave out {name}='
        )
    return tuple(Clause(*slice_of(sel(key)), _event(name, event)) for key, event in given.items())


def _event(name: str, given: object) -> Event:
    if callable(given) and not isinstance(given, type):
        return given
    try:
        step = -1 if isinstance(given, bool) else operator.index(cast(SupportsIndex, given))
    except TypeError:
        step = -1
    if step < 0:
        raise BadArgument(
            f"{name}={given!r} is not a step: an int from 0 on, or a function of the step",
            hint=f'{name}=1000, {name}={{"**/Dense_0/**": 1000}} or {name}=lambda step: step >= 1000',
        )
    return step
