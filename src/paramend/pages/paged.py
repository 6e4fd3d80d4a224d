"""`Paged`: a report that can be shown as a page, in a file, in a notebook or as a figure."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from paramend.disk.io import write_file
from paramend.errors import CannotWrite
from paramend.pages.page import Page
from paramend.reports.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DOCTYPE = b"<!doctype html"


class Paged(Report):
    """A report that can be shown as a page."""

    def page(self) -> Page:
        """The contents of the page."""
        raise NotImplementedError

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The text of the report as one HTML file that needs no network.

        Args:
            path: where to write it, if given. An existing page is replaced; any other file is not.

        Raises:
            CannotWrite: something else is there, or there is no such folder.
        """
        text = self.page().html()
        if path is not None:
            _write(Path(path), text)
        return text

    def plot(self) -> "Figure":
        """A matplotlib figure of the page's map: `report.plot().savefig("report.svg")`.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        from paramend.pages.drawing import draw  # most programs draw nothing

        return draw(self.page())

    def _repr_html_(self) -> str:
        return self.page().notebook()


def check_page(path: Path) -> None:
    """Raise if a page cannot be written there.

    Raises:
        CannotWrite: something else is there, or there is no such folder.
    """
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


def _write(path: Path, text: str) -> None:
    check_page(path)
    from paramend.disk.publishing import published  # most programs write no page

    mode = path.stat().st_mode & 0o777 if path.exists() else 0o666
    with published(path, force=True, mode=mode) as temporary:
        write_file(temporary, text.encode())
