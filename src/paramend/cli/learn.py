"""`paramend lesson`: list the lessons, show one or its solution, grade an answer."""

import contextlib
import copy
import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from threading import Thread
from typing import IO, Any

import click

from paramend.cli._ui import Refusal
from paramend.cli.options import takes
from paramend.lessons.grading import draw, grade, summary
from paramend.lessons.lesson import ROWS, Lesson, find, row_of
from paramend.lessons.observation import sketch
from paramend.lessons.solutions import load
from paramend.reports.tables import aligned


@click.command()
@click.argument("name", required=False)
@click.option(
    "--grade",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE.py",
    help="Grade the function `solve` of this file.",
)
@click.option("--solution", is_flag=True, help="Show the solution.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=300,
    show_default=True,
    metavar="SECONDS",
    help="How long grading may take, in a process of its own; 0: no limit, in this process.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the random inputs.")
@takes("json")
@click.pass_context
def lesson(
    context: click.Context,
    name: str | None,
    file: Path | None,
    solution: bool,
    timeout: float,
    seed: int,
    as_json: bool,
) -> None:
    """Learn the five surgeries: list the lessons, show one or its solution, or grade an answer.

    NAME is the name of a lesson, or its number. The file that --grade names runs with your rights: use only files you
    trust. It may take as long as --timeout says, and memory without a limit.

    Exit status: 0 done, or the answer passed; 1 the answer failed; 2 no such lesson, or a file that cannot be
    run, or not within the time.
    """
    if name is None:
        if file is not None or solution:
            option = "--solution" if solution else "--grade FILE.py"
            raise click.UsageError(f"Which lesson? Write paramend lesson NAME {option}")
        rows = [{"name": row.name, "title": row.title, "needs": list(row.needs), "extra": row.extra} for row in ROWS]
        _print(rows, as_json, _contents_text)
        return
    if file is not None and solution:
        raise click.UsageError("--grade and --solution are two commands: grade first, look later.")
    row = row_of(name)
    if file is None:
        shown = _shown(find(name), seed, solution=solution)
        _print(shown, as_json, _solution_text if solution else _shown_text)
        return
    if timeout:
        words = [row.name, "--grade", str(file), "--seed", str(seed), *["--json"] * as_json]
        context.exit(run_limited(["lesson", *words, "--timeout", "0"], timeout, doing=f"grading {file}"))
    chosen = find(name)
    with redirect_stdout(sys.stderr):  # only the verdict is data, not what the learner prints
        verdict = grade(chosen, load(file, chosen.parameters), seed=seed)
    _print(verdict.to_dict(), as_json, lambda _: str(verdict))
    context.exit(0 if verdict.passed else 1)


def _print(data: Any, as_json: bool, text: Any) -> None:
    click.echo(json.dumps(data, indent=2) if as_json else text(data))


def _contents_text(rows: list[dict[str, Any]]) -> str:
    cells = [(str(n), row["name"], f"{row['title']} ({', '.join(row['needs'])})") for n, row in enumerate(rows, 1)]
    command = f"paramend lesson {rows[0]['name']}"
    return "\n".join([*aligned(cells), "", command, f"{command} --grade FILE.py", f"{command} --solution"])


def _shown(lesson: Lesson, seed: int, *, solution: bool) -> dict[str, Any]:
    """The lesson as data, with a run of the reference on the first random input; the rest only with the solution."""
    case = draw(lesson, trials=1, seed=seed)[0]
    inputs = summary(lesson, case)
    result = lesson.reference(*copy.deepcopy(case.args))  # without the biases that the grader adds
    facts = dict(lesson.observe(lesson.reference, case).facts)
    shown: dict[str, Any] = {
        "name": lesson.name,
        "title": lesson.title,
        "text": lesson.text,
        "call": f"solve({', '.join(lesson.parameters)})",
        "run": {"inputs": inputs, "result": sketch(result), "facts": facts},
    }
    if solution:
        shown |= {
            "way": lesson.way,
            "reference": inspect.getsource(lesson.reference).rstrip(),
            "mistakes": [{"name": mistake.name, "why": mistake.why} for mistake in lesson.mistakes],
        }
    return shown


def _shown_text(shown: dict[str, Any]) -> str:
    inputs = "\n".join(f"    {name} = {text}" for name, text in shown["run"]["inputs"].items())
    facts = "\n".join(f"    {name}: {fact}" for name, fact in shown["run"]["facts"].items())
    command = f"    paramend lesson {shown['name']}"
    return "\n\n".join(
        [
            shown["title"],
            shown["text"],
            f"A run.\n\n{inputs}\n    result: {shown['run']['result']}\n\nWhat the grader sees of it.\n\n{facts}",
            f"Write {shown['call']} in a file, then:\n\n{command} --grade FILE.py",
            f"A solution, when you have tried:\n\n{command} --solution",
        ]
    )


def _solution_text(shown: dict[str, Any]) -> str:
    source = "\n".join(f"    {line}".rstrip() for line in shown["reference"].splitlines())
    return "\n\n".join([shown["title"], shown["way"], f"The reference.\n\n{source}"])


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
