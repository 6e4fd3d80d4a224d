"""Crews: who does the jobs of a rewrite: this process, several processes here, or those of Ray on many machines."""

import pickle
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

from paramend.errors import BadArgument, CannotWrite, ParamendError, Unsupported
from paramend.rewriting.jobs import Done, Hand, Job, Order, Task
from paramend.rewriting.manifest import Manifest

# How often a job is begun whose workers are killed.
_TRIES = 3


class Engine(Protocol):
    """What does jobs, several at a time."""

    @property
    def idle(self) -> bool:
        """Whether it takes a further job at once."""

    def start(self, task: Task) -> None:
        """Begin a job."""

    def wait(self) -> Iterator[tuple[Task, "Done | BaseException | str"]]:
        """Jobs that have ended: what is known of each that is done, its error, or how its worker was lost."""

    def close(self) -> None:
        """Stop all work."""


class Crew(NamedTuple):
    """How many workers make an output, by which engine, and whether they go on with what an earlier run left."""

    workers: int | None = None
    engine: str = "processes"
    resume: bool = False

    @property
    def alone(self) -> bool:
        """Whether this process makes the files whole, one after the other, and keeps no manifest."""
        return self.workers is None and self.engine == "processes" and not self.resume

    @property
    def here(self) -> bool:
        """Whether this process does the jobs."""
        return self.engine == "processes" and (self.workers or 1) == 1

    def check(self) -> None:
        """Raise `BadArgument` for an engine that does not exist, and a number of workers that is not one."""
        if self.engine not in ("processes", "ray") and not self.engine.startswith("ray://"):
            raise BadArgument(f"engine={self.engine!r} is not an engine", hint='"processes", "ray", "ray://HOST:PORT"')
        if self.workers is not None and (type(self.workers) is not int or self.workers < 1):
            raise BadArgument(f"workers={self.workers!r} is not a number of workers", hint="workers=4")

    def engine_for(self, order: Order) -> Engine:
        """The engine, ready to begin; `MissingExtra` for Ray if it is not installed."""
        if self.here:
            return _Here(order)
        count = None if self.workers is None else min(self.workers, max(len(order.jobs), 1))
        if self.engine == "processes":
            from paramend.rewriting.workers import Processes  # starts other programs

            return Processes(_sent(order), count or 1)
        from paramend.rewriting.ray import Ray  # imports ray

        return Ray(order, self.engine, count)


ALONE = Crew()


def carried_out(
    order: Order, tasks: Sequence[Task], crew: Crew, manifest: Manifest, out: Path
) -> Iterator[tuple[Job, Done]]:
    """The jobs of an order, each as soon as it is done, and written down in the manifest."""
    engine = crew.engine_for(order)
    try:
        for task, done in _done(engine, order, tasks, out):
            job = order.jobs[task.number]
            known = manifest.known(job) if done.kept else None
            if known is None:
                manifest.enter(job, done)
            yield job, known or done
    finally:
        engine.close()


def _done(engine: Engine, order: Order, tasks: Sequence[Task], out: Path) -> Iterator[tuple[Task, Done]]:
    """The jobs, each as soon as it is done. One whose worker is killed is done again; `CannotWrite` if it was killed
    each of several times."""
    waiting, tries, busy = deque(tasks), Counter[int](), 0
    while waiting or busy:
        while waiting and engine.idle:
            engine.start(waiting.popleft())
            busy += 1
        for task, found in engine.wait():
            busy -= 1
            if isinstance(found, Done):
                yield task, found
            elif isinstance(found, BaseException):
                raise found
            else:
                tries[task.number] += 1
                if tries[task.number] == _TRIES:
                    name = order.jobs[task.number].name or out.name
                    raise CannotWrite(
                        f"{out}: {_TRIES} workers were lost while they made the same part of {name}: {found}; nothing "
                        "was written",
                        hint="fewer workers, if there was too little memory",
                    )
                waiting.appendleft(replace(task, fresh=False))


class _Here:
    """This process, one job after the other."""

    def __init__(self, order: Order) -> None:
        self._hand = Hand(order)
        self._task: Task | None = None

    @property
    def idle(self) -> bool:
        return self._task is None

    def start(self, task: Task) -> None:
        self._task = task

    def wait(self) -> Iterator[tuple[Task, Done]]:
        assert self._task is not None
        task, self._task = self._task, None
        yield task, self._hand.do(task)

    def close(self) -> None:
        self._hand.close()


def _sent(order: Order) -> bytes:
    """An order on its way to other processes; functions of the program itself go along where cloudpickle is there."""
    try:
        from cloudpickle import dumps  # not a dependency, but often there
    except ImportError:
        dumps = pickle.dumps
    try:
        sent: bytes = dumps(order)
    except ParamendError:
        raise
    except Exception as error:
        raise Unsupported(f"the edits cannot be sent to other processes: {error}", hint="workers=1") from error
    return sent
