"""`Paged`: a report that can be shown as a page, in a file, in a notebook or as a figure."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from paramend.disk.io import write_file
from paramend.disk.permissions import NEW_FILE, Access, access_of, access_of_paths
from paramend.disk.publishing import published, sync_file
from paramend.errors import CannotWrite
from paramend.pages.page import Page
from paramend.reports.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DOCTYPE = b"<!doctype html"


class Paged(Report):
    """A report that can be shown as a page."""

    _access: Access = NEW_FILE
    _names: tuple[str, ...] = ()
    _between = " ← "  # what stands between the names of what a page tells of

    def tells_of(self, *read: Sequence[Path]) -> None:
        """Note the files that were read, for each checkpoint its own path first: a page of the report bears their names
        and is as private as they are."""
        object.__setattr__(self, "_access", access_of_paths(path for each in read for path in each))
        if not self._names and all(read):
            object.__setattr__(self, "_names", told_apart([each[0] for each in read]))

    def _page(self) -> Page:
        """The page, with the names of what it tells of."""
        page, names = self.page(), self._names
        told = self._between.join(filter(None, (*names[:1], ", ".join(names[1:]))))
        return replace(page, of=told) if told else page

    def page(self) -> Page:
        """The contents of the page."""
        raise NotImplementedError

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The text of the report as one HTML file that needs no network.

        Args:
            path: where to write it, if given. An existing page is replaced, in one step; any other file is not. It is
                as private as the page that it replaces, and as the files that the report tells of, where these are
                known.

        Raises:
            CannotWrite: something else is there, or there is no such folder.
        """
        text = self._page().html()
        if path is not None:
            _write(Path(path), text, self._access)
        return text

    def plot(self) -> "Figure":
        """A matplotlib figure of the page's map: `report.plot().savefig("report.svg")`.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        from paramend.pages.drawing import draw  # most programs draw nothing

        return draw(self._page())

    def _repr_html_(self) -> str:
        return self._page().notebook()


def told_apart(paths: Sequence[Path]) -> tuple[str, ...]:
    """The names of files and folders, each with as many of the folders above as tell them apart; one name for each.

    >>> told_apart([Path("/runs/1/model.pt"), Path("/runs/2/model.pt"), Path("/runs/1/model.pt")])
    ('1/model.pt', '2/model.pt')
    """
    parts = [path.absolute().parts for path in dict.fromkeys(paths)]
    depth = next((n for n in range(1, 99) if len({each[-n:] for each in parts}) == len(parts)), 1)
    return tuple("/".join(each[-depth:]) for each in parts)


def check_page(path: Path) -> None:
    """Raise `CannotWrite` if a page cannot be written there: something else is there, or there is no such folder."""
    try:
        if not path.exists():
            if not path.parent.is_dir():
                raise CannotWrite(f"{path}: there is no folder {path.parent}", hint=f"mkdir -p {path.parent}")
            return
        with path.open("rb") as file:
            if file.read(len(_DOCTYPE)).lower() != _DOCTYPE:
                raise CannotWrite(f"{path} already exists and is not an HTML page", hint=f"{path}.html")
    except OSError as error:
        if isinstance(error, CannotWrite):
            raise
        raise CannotWrite(f"{path}: {error.strerror or error}") from None


def _write(path: Path, text: str, access: Access) -> None:
    check_page(path)
    access = access_of([], path.stat(), new=access) if path.exists() else access
    with published(path.resolve(), force=True, access=access) as temporary:
        write_file(temporary, text.encode())
        sync_file(temporary)
