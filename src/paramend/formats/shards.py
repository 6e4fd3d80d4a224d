"""`Shards`: a directory with a model in one file or several, as one source."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paramend.disk.urls import Url, opened_together
from paramend.errors import BadCheckpoint
from paramend.formats.index import ShardIndex, find_index, read_index
from paramend.formats.jsontext import bad
from paramend.formats.limits import shown
from paramend.formats.source import Few, Flat, Gathering, Overlapping, Source, release
from paramend.leaves.leaves import Index, separator_of, uncollected
from paramend.leaves.origins.stored import Stored
from paramend.leaves.outlines import Keys, Outline, Place, outline_of
from paramend.leaves.specs import Array
from paramend.reports import wording

_SHARD = re.compile(r"-\d+-of-(\d+)\.")


class Shards(Gathering):
    """A directory of weight files as one `Source`. Made by `open_directory`."""

    def __init__(self, path: Path, folder: Path, files: Sequence[Source], shard_index: ShardIndex | None) -> None:
        # The index beside them; None if there is none.
        # The directory, or the index file, as the user wrote it.
        self.path, self.folder, self.shard_index = path, folder, shard_index
        self.files: tuple[Any, ...] = tuple(files)  # the weight files in order, each a source
        self.format: str = self.files[0].format
        ties: dict[int, int] = {}
        self._homes: list[tuple[int, int]] = []
        self._few = Few()
        names: list[str] = []
        where: dict[str, int] = {}
        for place, file in enumerate(self.files):
            first = len(names)
            inner: dict[int, int] = {}
            for number, name in _names(file):
                other = where.setdefault(name, place)
                if other != place:
                    raise bad(
                        str(folder),
                        f"tensor {shown(name)}",
                        f"it is in two files, {self.files[other].path.name} and {file.path.name}",
                        hint=f"open one of them: {self.files[other].path}",
                    )
                inner[number] = first + len(inner)
                names.append(name)
                self._homes.append((place, number))
            ties |= {inner[number]: inner[one] for number, one in file.ties.items()}
        if shard_index is not None:
            self._check_index(shard_index, where)
        self.ties: Mapping[int, int] = ties
        self.index = Index.of_names(names, separator_of(names))
        self.metadata = self._together([file.metadata for file in self.files])

    def _together(self, metadata: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """The metadata of the files, where all agree."""
        first, *rest = metadata
        return {key: value for key, value in first.items() if all(each.get(key) == value for each in rest)}

    def outline(self) -> Outline:
        numbers = {home: number for number, home in enumerate(self._homes)}
        found: dict[Keys, Any] = {}
        containers: dict[Keys, Any] = {}
        for place, file in enumerate(self.files):
            inner = outline_of(file)
            for keys, value in inner.entries:
                if type(value) is Place:
                    number = numbers[place, value.number]
                    value = value._replace(number=number, like=number)
                found.setdefault(keys, value)
            containers |= inner.containers
        return Outline([*found.items()], containers, self.format)

    def __repr__(self) -> str:
        leaves = wording.plural(len(self._homes), "leaf", "leaves")
        return f"<{self.path}: {leaves} in {wording.plural(len(self.files), 'file')}>"

    def _check_index(self, shard_index: ShardIndex, where: Mapping[str, int]) -> None:
        for name, shard in shard_index.weight_map.items():
            place = where.get(name)
            if place is None or self.files[place].path.name != shard:
                found = "" if place is None else f"; it is in {self.files[place].path.name}"
                reason = f"{shard} does not hold it{found}"
                raise bad(str(shard_index.path), f"weight_map, {shown(name)}", reason)

    def home(self, number: int) -> tuple[int, int]:
        """Which of `files` holds a leaf, and the number of the leaf in it."""
        return self._homes[number]

    def origin(self, number: int) -> Stored:
        place, inner = self._homes[number]
        return Stored(self.files[place], inner)

    def _opened(self, number: int) -> Stored:
        """A leaf, ready to be read; the files read last stay open."""
        self._few.touch(self.files[self._homes[number][0]])
        return self.origin(number)

    @property
    def sources(self) -> Sequence[Any]:
        return self.files

    def overlaps(self, number: int) -> tuple[int, ...]:
        place, inner = self._homes[number]
        file = self.files[place]
        found = set(file.overlaps(inner)) if isinstance(file, Overlapping) else set()
        return tuple(n for n, (home, own) in enumerate(self._homes) if home == place and own in found) if found else ()

    def read(self, number: int) -> Array:
        return self._opened(number).read()

    def read_range(self, number: int, start: int, stop: int) -> Array:
        return self._opened(number).read_range(start, stop)


def open_directory(path: Path, opener: Callable[[Path], Source], weights: Callable[[str], bool]) -> Shards | None:
    """The model in a directory, or in that of an index file; None if the directory holds no weights: without an index,
    files of such names as `weights` takes."""
    folder, found = (path, None) if path.is_dir() else (path.parent, path)
    names = sorted(entry.name for entry in folder.iterdir())
    found = found or find_index(folder, names)
    shard_index = None if found is None else read_index(found)
    chosen = [name for name in names if weights(name)] if shard_index is None else shard_index.files
    if not chosen:
        return None
    if isinstance(folder, Url) and shard_index is None:
        _check_all(folder, chosen)
    missing = sorted(set(chosen) - set(names))
    if missing:
        assert shard_index is not None
        raise BadCheckpoint(
            f"{shard_index.path}: weight_map: {wording.plural(len(missing), 'file is', 'files are')} missing: "
            f"{wording.listing(missing, 3)}",
            hint="copy or download the model again",
        )
    files: list[Source] = []
    try:
        with uncollected():
            for place in opened_together([folder / name for name in chosen]):
                files.append(opener(place))
                release(files[-1])
            return Shards(path, folder, files, shard_index)
    except BaseException:
        for file in files:
            file.close()
        raise


def _check_all(folder: Path, names: Sequence[str]) -> None:
    """Raise for some of the shards of a model without its index, which is written last."""
    counts = [int(found[1]) for name in names if (found := _SHARD.search(name))]
    if counts and len(counts) < max(counts):
        raise BadCheckpoint(
            f"{folder}: it holds {len(counts)} of {max(counts)} shards, and no index: it is being written, or was not "
            "written to the end",
            hint=f"open one of them: {folder / names[0]}",
        )


def _names(file: Source) -> Iterable[tuple[int, str]]:
    """The leaf numbers of a file, each with its name. A flat file has its names without an index."""
    if isinstance(file, Flat):
        return enumerate(file.names)
    return ((number, file.index.name(number)) for number in file.index.numbers)
