"""Jobs done by Ray: on a cluster that is there, or on one that is started here for the time being."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from typing import Any

from paramend._optional import need
from paramend.disk.failures import reason
from paramend.errors import CannotWrite, Unsupported
from paramend.rewriting.jobs import Done, Hand, Order, Task
from paramend.rewriting.workers import hand_for, sendable

# Seconds until a cluster answers.
_PATIENCE = 10
# The hand for the order at work, in a worker of Ray.
_hands: dict[str, Hand] = {}


class Ray:
    """An engine of workers of Ray. Their machines see the files under the same paths."""

    def __init__(self, order: Order, engine: str, count: int | None) -> None:
        self._ray: Any = need("ray", extra="ray", to="do jobs on many machines")
        self._own = not self._ray.is_initialized()
        if self._own:
            address = engine if engine.startswith("ray://") else os.environ.get("RAY_ADDRESS", "local")
            _check_answers(address)
            here = {"num_cpus": count, "include_dashboard": False} if address == "local" else {}
            self._ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **here)
        self._count = count or max(int(self._ray.cluster_resources().get("CPU", 1)), 1)
        sent = self._ray.cloudpickle.dumps(order)
        self._name, self._order = sha256(sent).hexdigest(), self._ray.put(sent)
        self._do = self._ray.remote(max_retries=0)(do)
        self._busy: dict[Any, Task] = {}

    @property
    def idle(self) -> bool:
        return len(self._busy) < self._count

    def start(self, task: Task) -> None:
        self._busy[self._do.remote(self._name, [self._order], task)] = (
            task  # in a list, it is fetched when it is needed
        )

    def wait(self) -> Iterator[tuple[Task, Done | BaseException | str]]:
        ready: list[Any] = []
        while not ready:  # by the second, so that a signal is heeded
            ready, _ = self._ray.wait(list(self._busy), timeout=1)
        for each in ready:
            task = self._busy.pop(each)
            try:
                found: Done | BaseException | str = self._ray.get(each)
            except self._ray.exceptions.RayTaskError as error:
                found = Unsupported(f"a worker of Ray cannot do its job: {error.cause or error}")
            except self._ray.exceptions.RayError as error:
                found = str(error).partition("\n")[0]
            yield task, found

    def close(self) -> None:
        for each in self._busy:
            with suppress(Exception):
                self._ray.cancel(each, force=True)
        if self._own:
            self._ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise if nothing answers at an address: Ray would try again for minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if port.isdecimal():
        try:
            socket.create_connection((host, int(port)), _PATIENCE).close()
        except OSError as error:
            raise CannotWrite(f"no cluster of Ray answers at {address}: {reason(error)}", hint="ray status") from None


def do(name: str, order: list[Any], task: Task) -> Done | Exception:
    """What is known of a job when it is done, or its error; in a worker of Ray."""
    try:
        if name not in _hands:
            import ray

            _hands.clear()
            _hands[name] = hand_for(ray.get(order[0]))
        return _hands[name].do(task)
    except Exception as error:
        return sendable(error)
