"""`paramend lesson`: list the lessons, show one, grade an answer."""

import copy
import inspect
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from paramend.errors import ParamendError
from paramend.lessons.catalogue import ROWS, find
from paramend.lessons.grading import draw, grade, summary
from paramend.lessons.lesson import Lesson
from paramend.lessons.observation import sketch
from paramend.lessons.solutions import load


@click.command()
@click.argument("name", required=False)
@click.option(
    "--grade",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE.py",
    help="Grade the function `solve` of this file.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the random inputs.")
@click.option("--json", "as_json", is_flag=True, help="Print data as JSON.")
@click.pass_context
def lesson(context: click.Context, name: str | None, file: Path | None, seed: int, as_json: bool) -> None:
    """Learn the five surgeries: list the lessons, show one, or grade an answer.

    Exit status: 0 done, or the answer passed; 1 the answer failed; 2 no such lesson, or a file that cannot be
    run.
    """
    if name is None:
        if file is not None:
            raise click.UsageError("--grade needs the name of a lesson: paramend lesson NAME --grade FILE.py")
        _print(_contents(), as_json, _contents_text)
        return
    try:
        chosen = find(name)
        if file is None:
            _print(_shown(chosen, seed), as_json, _shown_text)
            return
        with redirect_stdout(sys.stderr):  # only the verdict is data, not what the learner prints
            verdict = grade(chosen, load(file, chosen.parameters), seed=seed)
    except ParamendError as error:
        click.echo(f"error: {error}", err=True)
        context.exit(2)
    _print(verdict.to_dict(), as_json, lambda _: str(verdict))
    context.exit(0 if verdict.passed else 1)


def _print(data: Any, as_json: bool, text: Any) -> None:
    click.echo(json.dumps(data, indent=2) if as_json else text(data))


def _contents() -> list[dict[str, Any]]:
    return [{"name": row.name, "title": row.title, "needs": list(row.needs), "extra": row.extra} for row in ROWS]


def _contents_text(rows: list[dict[str, Any]]) -> str:
    width = max(len(row["name"]) for row in rows)
    lines = [f"{row['name']:<{width}}  {row['title']} ({', '.join(row['needs'])})" for row in rows]
    return "\n".join(
        [
            *lines,
            "",
            f"paramend lesson {rows[0]['name']}",
            f"paramend lesson {rows[0]['name']} --grade FILE.py",
        ]
    )


def _shown(lesson: Lesson, seed: int) -> dict[str, Any]:
    """The lesson as data, with a run of the reference on the first random input."""
    case = draw(lesson, trials=1, seed=seed)[0]
    inputs = summary(lesson, case)
    result = lesson.reference(*copy.deepcopy(case.args))  # without the biases that the grader adds
    facts = dict(lesson.observe(lesson.reference, case).facts)
    return {
        "name": lesson.name,
        "title": lesson.title,
        "text": lesson.text.strip(),
        "call": f"solve({', '.join(lesson.parameters)})",
        "reference": inspect.getsource(lesson.reference).rstrip(),
        "run": {"inputs": inputs, "result": sketch(result), "facts": facts},
        "mistakes": [{"name": mistake.name, "why": mistake.why} for mistake in lesson.mistakes],
    }


def _shown_text(shown: dict[str, Any]) -> str:
    inputs = "\n".join(f"    {name} = {text}" for name, text in shown["run"]["inputs"].items())
    facts = "\n".join(f"    {name}: {fact}" for name, fact in shown["run"]["facts"].items())
    source = "\n".join(f"    {line}".rstrip() for line in shown["reference"].splitlines())
    return "\n\n".join(
        [
            shown["title"],
            shown["text"],
            f"The reference.\n\n{source}",
            f"A run.\n\n{inputs}\n    result: {shown['run']['result']}\n\nWhat the grader sees of it.\n\n{facts}",
            f"Write {shown['call']} in a file, then:\n\n    paramend lesson {shown['name']} --grade FILE.py",
        ]
    )
