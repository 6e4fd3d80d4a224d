"""`ZipSource`: what the sources over one zip file share, which keep its checksums true when bytes change in place."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from paramend.formats.files import FileSource
from paramend.formats.zips.archive import Archive
from paramend.leaves.origins.origin import Extent


class ZipSource(FileSource):
    """A source over one zip file, an `archive` whose members are not compressed where they can be patched."""

    archive: Archive

    def patched_too(self, extents: Sequence[Extent]) -> list[Extent]:
        members = self.archive.touched(_ranges(extents))
        return [Extent(self.path, at, 4) for member in members for at in self.archive.offsets(member.name).crcs]

    def after_patch(self, extents: Sequence[Extent]) -> list[tuple[Path, int, bytes]]:
        """What to write, as (file, offset, bytes), so that checksums are true after these bytes of the file changed.

        The members concerned are read once, in chunks.
        """
        return [(self.path, at, data) for at, data in self.archive.checksums(_ranges(extents))]


def _ranges(extents: Sequence[Extent]) -> Iterator[tuple[int, int]]:
    return ((extent.start, extent.start + extent.nbytes) for extent in extents)
