"""A command that runs somebody's code, in a process of its own and for a limited time."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from threading import Thread
from typing import IO

import click

from paramend.cli._ui import Refusal

# How long output may come after the process has ended: a child of it may hold its pipes.
_GRACE = 2


def run_limited(args: Sequence[str], seconds: float, *, doing: str) -> int:
    """The exit status of a command of Paramend, given without `paramend`, that runs in another process; what it prints
    is passed on. After some seconds it is killed, with the processes that it started and that did not leave its
    session; that, and its end by a signal, is a `Refusal`, which says what it was doing."""
    here = f"import sys; sys.path[:] = {sys.path!r}; from paramend.cli.main import main; main()"
    command = [sys.executable, "-c", here, *args]
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True)
    pipes = ((child.stdout, False), (child.stderr, True))
    readers = [Thread(target=_pass_on, args=each, daemon=True) for each in pipes]
    for reader in readers:
        reader.start()
    try:
        status = child.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Refusal(
            f"{doing} took longer than {seconds:g} s, and was stopped: is there a loop that does not end?\n\n"
            f"hint: --timeout {max(600, 2 * seconds):g} gives it more time"
        ) from None
    finally:
        if child.returncode is None:  # too slow, or this process is being stopped
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        for reader in readers:
            reader.join(_GRACE)
    if status < 0:
        raise Refusal(f"{doing}: its process was ended by {signal.Signals(-status).name}")
    return status


def _pass_on(stream: IO[bytes], err: bool) -> None:
    with contextlib.suppress(OSError, ValueError), stream:
        while data := os.read(stream.fileno(), 65536):
            click.echo(data, nl=False, err=err)
