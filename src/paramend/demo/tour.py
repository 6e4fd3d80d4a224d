"""The demo from start to end: the steps in order, a report, and the folder that all files are written to, or none."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paramend.demo.patient import prepare
from paramend.demo.step import DemoStep, Outcome, command_in
from paramend.demo.steps import STEPS
from paramend.errors import CannotWrite
from paramend.reports import wording
from paramend.reports.fields import picked

EPOCHS = 30
_HINT = "paramend demo --out DIR"
NEXT = (
    "paramend lesson",
    "paramend show paramend-demo/digits.safetensors '**/kernel' --stats",
    "paramend scale paramend-demo/deeper.safetensors '**/Dense_[-1]/*' 0.5 -o paramend-demo/scaled.safetensors",
)


@dataclass(frozen=True)
class TourRow:
    """A step that was run, numbered from 1; `code` is the line that a user would type."""

    number: int
    step: DemoStep
    code: str
    outcome: Outcome
    seconds: float

    @property
    def held(self) -> bool:
        """Whether all claims of the step held."""
        return all(self.outcome.claims.values())

    def to_dict(self) -> dict[str, Any]:
        did = "number", "step.name", "step.title", "code", "outcome.changed", "outcome.leaves"
        accuracy = {"accuracy": picked(self.outcome, "before", "after")}
        held = picked(self, "outcome.claims", "held", "outcome.detail")
        return picked(self, *did) | accuracy | held | {"seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class Report:
    """What the demo did, and the files that it wrote to the folder."""

    folder: Path
    seed: int
    rows: Sequence[TourRow]
    files: Sequence[str]
    seconds: float

    @property
    def held(self) -> bool:
        """Whether all claims held."""
        return all(row.held for row in self.rows)

    @property
    def next(self) -> list[str]:
        """Commands to try on the files."""
        return [command_in(command, self.folder) for command in NEXT]

    def to_dict(self) -> dict[str, Any]:
        rows = picked(self, "seed", "held", "rows as steps", "files", "next")
        return {"folder": str(self.folder), **rows, "seconds": round(self.seconds, 3)}


def tour(
    folder: Path,
    *,
    seed: int = 0,
    force: bool = False,
    epochs: int = EPOCHS,
    steps: Sequence[DemoStep] = STEPS,
    progress: Callable[[TourRow], object] | None = None,
) -> Report:
    """Train a classifier, run the steps on it, write all files to the folder at the end, and return the report.
    `progress` is called with each row when its step is done. `CannotWrite` if the folder holds files and not `force`,
    or cannot be written to: then nothing was done."""
    began = time.monotonic()
    rows: list[TourRow] = []
    with workplace(folder, force=force) as place:
        patient = prepare(place, epochs=epochs, seed=seed)
        for number, step in enumerate(steps, start=1):
            started = time.monotonic()
            outcome = step.run(patient)
            rows.append(TourRow(number, step, command_in(step.code, folder), outcome, time.monotonic() - started))
            if progress is not None:
                progress(rows[-1])
        files = sorted(file.name for file in place.iterdir())
    return Report(folder, seed, rows, files, time.monotonic() - began)


@contextlib.contextmanager
def workplace(folder: Path, *, force: bool = False) -> Iterator[Path]:
    """An empty folder inside `folder`. At the end its files move up; on an exception they are deleted. `CannotWrite` if
    it holds files. With `force` it may, and those with the names of new ones are replaced."""
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    place = None
    try:
        place = _opened(folder, force=force)
        yield place
        for file in sorted(place.iterdir()):
            file.replace(folder / file.name)
        place.rmdir()
    except BaseException:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
        raise


def _opened(folder: Path, *, force: bool) -> Path:
    if os.path.lexists(folder) and not folder.is_dir():
        raise CannotWrite(f"{folder} is not a folder", hint=_HINT)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if names and not force:
        raise CannotWrite(
            f"{folder} already exists and holds {wording.listing(names, 3)}",
            hint=f"{_HINT}, or --force, which replaces only the files of an earlier demo",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
    except OSError as error:
        raise CannotWrite(f"{folder}: {error.strerror}", hint=_HINT) from error
