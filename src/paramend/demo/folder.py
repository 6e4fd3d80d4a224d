"""The folder that the demo writes its files to: all of them, or none."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from paramend.errors import CannotWrite
from paramend.reports import wording


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


_HINT = "paramend demo --out DIR"
