"""One step of the demo, and what came of it."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paramend.demo.evidence import moved
from paramend.demo.patient import Patient
from paramend.edits.selection import at

# The folder as it stands in the code of the steps.
FOLDER = "paramend-demo"


@dataclass(frozen=True)
class Outcome:
    """What a step did.

    Attributes:
        changed: the paths of the leaves whose bytes are others now.
        leaves: the number of leaves there are.
        before: the accuracy without it.
        after: the accuracy with it.
        claims: what the step shows, and whether it held.
        detail: lines of evidence for those who read on.
    """

    changed: Sequence[str]
    leaves: int
    before: float
    after: float
    claims: Mapping[str, bool]
    detail: Sequence[str] = ()


def outcome(
    before: Any,
    after: Any,
    accuracy: Callable[[Any], float],
    *,
    claims: Mapping[str, bool],
    detail: Sequence[str] = (),
) -> Outcome:
    """The outcome of an edit that turned one tree into another."""
    return Outcome(moved(before, after), len(at(after, "**")), accuracy(before), accuracy(after), claims, detail)


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: a short name, for programs.
        title: what is done, for people.
        code: the line that a user would type for it.
        run: does it.
    """

    name: str
    title: str
    code: str
    run: Callable[[Patient], Outcome]

    def code_in(self, folder: Path) -> str:
        """The code with the folder that the files are in."""
        return command_in(self.code, folder)


def command_in(command: str, folder: Path) -> str:
    """A command about the demo's own folder, said of another.

    >>> command_in("paramend show paramend-demo/digits.safetensors", Path("my demo"))
    "paramend show 'my demo'/digits.safetensors"
    """
    return command.replace(f"{FOLDER}/", f"{shlex.quote(str(folder))}/")
