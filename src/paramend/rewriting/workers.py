"""Workers: processes of their own that do jobs. They know of this one only what it sends them, and end with it."""

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from paramend.errors import ParamendError, Unsupported
from paramend.rewriting.jobs import Done, Hand, Task

# Not by `multiprocessing`, which would run the program's own file again in each of them.
_PROGRAM = "import sys; sys.path[:] = {path!r}; from paramend.rewriting.workers import serve; serve({number}, {parent})"
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class _Worker:
    def __init__(self, sent: bytes) -> None:
        self.pipe, theirs = Pipe()
        number = theirs.fileno()
        program = _PROGRAM.format(path=sys.path, number=number, parent=os.getpid())
        command, null = [sys.executable, "-c", program], subprocess.DEVNULL
        # In a group of its own, Ctrl-C does not reach it, not even while it starts: the program that began it decides.
        self.process = subprocess.Popen(command, stdin=null, pass_fds=[number], process_group=0)
        theirs.close()
        self.task: Task | None = None
        self._sent = sent

    def start(self, task: Task) -> None:
        self.task = task
        with suppress(OSError):  # one that was killed shows when its answer is awaited
            if self._sent:
                self.pipe.send_bytes(self._sent)
                self._sent = b""
            self.pipe.send(task)

    def answer(self) -> Done | BaseException | str:
        """What became of its job."""
        try:
            found: Done | BaseException = self.pipe.recv()
        except (EOFError, OSError):
            code = self.process.wait()
            return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        self.task = None
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


class Processes:
    """An engine of processes on this machine."""

    def __init__(self, sent: bytes, count: int) -> None:
        self._sent, self._count = sent, count
        self._workers = [_Worker(sent) for _ in range(count)]

    @property
    def idle(self) -> bool:
        return len(self._workers) < self._count or any(worker.task is None for worker in self._workers)

    def start(self, task: Task) -> None:
        worker = next((worker for worker in self._workers if worker.task is None), None)
        if worker is None:
            self._workers.append(worker := _Worker(self._sent))
        worker.start(task)

    def wait(self) -> Iterator[tuple[Task, Done | BaseException | str]]:
        busy: dict[Any, _Worker] = {worker.pipe: worker for worker in self._workers if worker.task is not None}
        for pipe in wait(list(busy)):
            worker = busy[pipe]
            task, found = worker.task, worker.answer()
            assert task is not None
            if isinstance(found, str):
                self._workers.remove(worker)
                worker.close()
            yield task, found

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


# ---- in the worker -----------------------------------------------------------------------------------------------


def serve(number: int, parent: int) -> None:
    """Do the jobs that come through a pipe, until it is closed."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    pipe = Connection(number)
    hand: Hand | None = None
    with suppress(EOFError, ConnectionError):
        sent = pipe.recv_bytes()
        while os.getppid() == parent:
            task: Task = pipe.recv()
            try:
                hand = hand or hand_for(sent)
                pipe.send(hand.do(task))
            except Exception as error:
                pipe.send(sendable(error))


def hand_for(sent: bytes) -> Hand:
    """Who does the jobs of an order; `Unsupported` if it needs what is not here."""
    try:
        order = pickle.loads(sent)
    except (AttributeError, ImportError) as error:
        raise Unsupported(
            f"a worker cannot load the edits: {error}",
            hint="functions at the top level of a module that workers can import, or pip install cloudpickle",
        ) from error
    with suppress(OSError):
        os.chdir(order.folder)
    return Hand(order)


def sendable(error: Exception) -> Exception:
    """An error as it goes to the process that began it; of an unexpected one, it says where it was raised."""
    if not isinstance(error, ParamendError | OSError):
        error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error
