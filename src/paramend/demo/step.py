"""One step of the demo, and its outcome."""

import hashlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paramend.arrays.registry import to_numpy
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


def command_in(command: str, folder: Path) -> str:
    """A command for the demo's default folder, rewritten for another folder."""
    return command.replace(f"{FOLDER}/", f"{shlex.quote(str(folder))}/")


# ---- what changed between two trees, determined from their bytes -------------------------------------------------


def moved(before: Any, after: Any) -> list[str]:
    """The paths of the leaves whose bytes differ."""
    new = at(after, "**").get()
    return [path for path, leaf in at(before, "**") if digest(leaf) != digest(new[path])]


def touched(before: Any, after: Any) -> list[str]:
    """The paths of the leaves that are different objects, whatever they hold."""
    new = at(after, "**").get()
    return [path for path, leaf in at(before, "**") if leaf is not new[path]]


def digest(leaf: Any) -> str:
    """The first half of the SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(to_numpy(leaf)).tobytes()).hexdigest()[:32]


def data_digest(file: Path) -> str:
    """The same digest of the tensors of a safetensors file, without its header."""
    raw = file.read_bytes()
    return hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()[:32]
