"""One step of the demo, and its outcome."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paramend.demo.evidence import moved
from paramend.demo.patient import Patient
from paramend.edits.selection import at

# The folder in the code of the steps.
FOLDER = "paramend-demo"


@dataclass(frozen=True)
class Outcome:
    """What a step did."""

    changed: Sequence[str]  # the paths of the leaves whose bytes changed, of so many `leaves`
    leaves: int
    before: float  # the accuracy without it
    after: float  # the accuracy with it
    claims: Mapping[str, bool]  # what the step claims → whether it held
    detail: Sequence[str] = ()  # more lines of evidence


def outcome(
    before: Any, after: Any, accuracy: Callable[[Any], float], claims: Mapping[str, bool], detail: Sequence[str] = ()
) -> Outcome:
    """The outcome of an edit from one tree to another."""
    return Outcome(moved(before, after), len(at(after, "**")), accuracy(before), accuracy(after), claims, detail)


@dataclass(frozen=True)
class DemoStep:
    """One step: a name for programs, a title for people, the line that a user would type, and what performs it."""

    name: str
    title: str
    code: str
    run: Callable[[Patient], Outcome]

    def code_in(self, folder: Path) -> str:
        """The code for the folder that the files are in."""
        return command_in(self.code, folder)


def command_in(command: str, folder: Path) -> str:
    """A command for the demo's default folder, rewritten for another folder.

    >>> command_in("paramend show paramend-demo/digits.safetensors", Path("my demo"))
    "paramend show 'my demo'/digits.safetensors"
    """
    return command.replace(f"{FOLDER}/", f"{shlex.quote(str(folder))}/")
