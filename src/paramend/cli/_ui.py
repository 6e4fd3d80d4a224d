"""The terminal: data goes to stdout; other messages, progress and errors go to stderr."""

import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

import click

from paramend.errors import ParamendError, masked, printable
from paramend.reports.progress import Event, Progress

# Shorter tasks show no bar: it would only flicker.
_PATIENCE = 0.3


class Refusal(click.ClickException):
    """An expected error as the command line reports it: exit status 2, no traceback. `paramend explain` knows its code,
    which an error of the system lacks."""

    exit_code = 2

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code

    def show(self, file: IO[Any] | None = None) -> None:
        label = f"error[{self.code}]:" if self.code else "error:"
        label = click.style(label, fg="red", bold=True) if _colour(sys.stderr) else label
        lines = "\n".join(map(printable, masked(self.message).split("\n")))
        click.echo(f"{label} {lines}", file=file, err=True)


def message_of(error: Exception) -> str:
    """What to say of an exception of the library or of the system."""
    if isinstance(error, ParamendError) or not isinstance(error, OSError):
        return str(error)
    name = "" if error.filename is None else f"{error.filename}: "
    return f"{name}{error.strerror or error}"


def emit(data: Any) -> None:
    """Print data as JSON. Numbers that JSON lacks become the strings "NaN", "Infinity" and "-Infinity"."""
    click.echo(json.dumps(_jsonable(data), indent=2, allow_nan=False))


def tell(report: Any, *paths: Path, page: Path | None, as_json: bool) -> None:
    """Print a report on checkpoints as a table or as JSON, and write it as an HTML page if `page` is given."""
    if page is not None:
        report.tells_of(*([path] for path in paths))
    if as_json:
        emit(report.to_dict())
    else:
        show_lines(str(report).split("\n"))
    write_page(report, page)


def check_page(page: Path | None) -> None:
    """Raise if a page is wanted and cannot be written, before any work is done."""
    if page is not None:
        from paramend.cli.fates import Outputs  # imports numpy
        from paramend.pages.paged import check_page

        check_page(page)
        watch(Outputs([page]))


def write_page(report: Any, page: Path | None) -> None:
    """Write a report as an HTML page, if a page is wanted, and say so: last, when all else has been said."""
    if page is not None:
        report.to_html(page)
        say(f"wrote {page}")


def show_lines(lines: Sequence[str], *, header: bool = False) -> None:
    """Print lines of data; the first may be a table's header."""
    if header and lines and _colour(sys.stdout):
        lines = [click.style(lines[0], bold=True), *lines[1:]]
    for at in range(0, len(lines), 1000):  # no second copy of a hundred thousand lines
        click.echo("\n".join(lines[at : at + 1000]))


def say(text: str) -> None:
    """Print a message that is not data to stderr."""
    click.echo(printable(text), err=True)


stopped: list[int] = []
_fate: list[Callable[[], str]] = []


def watch(fate: Callable[[], str]) -> None:
    """From here on the command writes; if it is stopped, `fate` says what became of its output."""
    _fate[:] = [fate]


def stop(number: int, frame: object) -> None:
    """End the program on a signal, by an exception, so that half-done work is undone on the way out. Ctrl-C is no
    KeyboardInterrupt: where one passes through an `exec` of text, as when a dataclass is being made, CPython ends by
    the signal later, whatever status the program asked for."""
    stopped.append(number)
    _heed()


def end_stopped() -> NoReturn:
    """End a stopped program, when everything half-done has been undone: say what became of the output."""
    said = "; ".join(fate() for fate in _fate) or "nothing was written"
    say(f"stopped by {signal.Signals(stopped[0]).name}: {said}")
    raise SystemExit(128 + stopped[0])


def _heed(event: Event | None = None) -> None:
    """Raise the exception of a signal, again if a compiled module lost it while being imported."""
    if stopped:
        raise SystemExit(128 + stopped[0])


@contextmanager
def bar(what: str) -> Iterator[Progress]:
    """A listener that draws a progress bar where stderr is a terminal."""
    if not sys.stderr.isatty():
        yield _heed
        return
    drawn: Any = None
    task: Any = None

    def listen(event: Event) -> None:
        nonlocal drawn, task
        _heed()
        if drawn is None:
            if event.seconds < _PATIENCE:
                return
            drawn = _rich_bar()
            task = drawn.add_task(printable(what), total=event.total)
            drawn.start()
        drawn.update(task, completed=event.done, total=event.total)

    try:
        yield listen
    finally:
        if drawn is not None:
            drawn.stop()


def _rich_bar() -> Any:
    # Imported only when there is something to draw: most runs end sooner.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress as Bar,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Bar(*columns, console=Console(stderr=True), transient=True)


def _colour(stream: IO[str]) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _jsonable(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _jsonable(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_jsonable(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    return data


def nobody_reads() -> None:
    """Let the program end quietly after the reader of stdout has closed it, as in `paramend show f | head`."""
    # Otherwise Python complains at exit that it cannot flush what is still buffered.
    with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
