"""Checking a checkpoint against its record: the bytes that it has, and those that the sources of its leaves give."""

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from paramend.disk.urls import path_of
from paramend.errors import BadArgument, CannotRead, ParamendError, SpecMismatch, UnexpectedChange
from paramend.formats.jsontext import bad
from paramend.formats.registry import open_source
from paramend.journal.history import HistoryRow
from paramend.journal.undo import history, recover
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.reading import read_origin
from paramend.leaves.origins.stored import Stored
from paramend.leaves.origins.texts import shortened
from paramend.reports import wording
from paramend.reports.progress import Meter, Progress
from paramend.rewriting.provenance import EditRecord, RecordedLeaf, alike, contents, digest_of, record_of

# The most differing leaves that a message names; `changes` has all.
_SHOWN = 40
# Where the files are that leaves are made of: paths, or names in the record → paths.
PathLike: TypeAlias = str | os.PathLike[str]
Places: TypeAlias = PathLike | Mapping[str, PathLike] | Iterable[PathLike]


class Verified(NamedTuple):
    """What was found in a checkpoint that is as its record says: its recorded leaves, those that were made again from
    their sources and are the same, and source that is not there → the leaves that are made of it."""

    leaves: list[str]
    remade: list[str]
    lacking: dict[str, list[str]]


def verify_record(path: PathLike, *, sources: Places | None = None, progress: Progress | None = None) -> list[str]:
    """The paths of the leaves in a checkpoint's record, if each is as it was written.

    Of several records the latest that contains a leaf counts. A leaf that was made of others, by `concat` or a layout
    for example, is also made again and compared bit for bit, in bounded memory, if the files that it was made of are
    beside the checkpoint, or in `sources`.

    Args:
        path: a file or a directory.
        sources: the files that leaves were made of: paths, or a map from their names in the record. With it, each of
            them must be there.
        progress: called with an `Event` as bytes are read.

    Raises:
        UnexpectedChange: leaves have another shape, dtype or bytes, are missing, or are not what their sources give
            now; `changes` names them.
        CannotRead: the checkpoint carries no record, or `sources` is given and one of them is missing or another model.
        BadCheckpoint: the checkpoint or its record is damaged.

    >>> import tempfile
    >>> import numpy as np
    >>> from paramend.checkpoints.checkpoint import open
    >>> from paramend.checkpoints.whole import save
    >>> from paramend.mapping.joining import concat
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = save({"a": np.ones(2), "b": np.zeros(2)}, folder / "model.safetensors")
    >>> with open(folder / "model.safetensors") as model:
    ...     _ = concat(model, ["a", "b"], into="ab").save(folder / "new.safetensors", record=True)
    >>> verify_record(folder / "new.safetensors")
    ['ab']
    >>> (folder / "model.safetensors").unlink()
    >>> verify_record(folder / "new.safetensors", sources=[])
    Traceback (most recent call last):
    paramend.errors.CannotRead: model.safetensors, which 1 leaf is made of, is not there, or is another model
    <BLANKLINE>
    hint: sources={"model.safetensors": path}, or --source PATH
    """
    return verified(path, sources, progress=progress).leaves


def verified(path: PathLike, sources: Places | None, *, progress: Progress | None = None) -> Verified:
    """What `verify_record` finds, which see."""
    recover(path)
    changes: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(contextlib.closing(open_source(path)))
        record = record_of(source)
        if record is None:
            raise CannotRead(
                f"{path} carries no record of edits", hint="checkpoint.save(out, record=True), or --record, writes one"
            )
        leaves, find = record.standing, _finder(source)
        found = Verified(list(leaves), [], {})
        origins = _Sources(path_of(path), sources or (), stack).origins(record, found.lacking)
        for name, gone in found.lacking.items() if sources is not None else ():
            raise CannotRead(lacks(name, gone), hint=f'sources={{"{name}": path}}, or --source PATH')
        there = {name: find(name) for name in leaves}
        nbytes = sum(source.nbytes(number) for number in there.values() if number is not None)
        meter = Meter(progress, nbytes + sum(origin.nbytes for origin in origins.values()))
        for name, leaf in leaves.items():
            number, origin = there[name], origins.get(name)
            if number is None:
                changes[name] = "it is gone"
            elif source.spec(number) != leaf.spec:
                changes[name] = f"it is {source.spec(number)}, but {leaf.spec} was written"
            elif digest_of(contents(Stored(source, number)), meter) != leaf.sha256:
                changes[name] = "its bytes differ"
            elif origin is not None and digest_of(contents(origin), meter) != leaf.sha256:
                changes[name] = f"{shortened(leaf.origin)} is something else: what it is made of has changed since"
            elif origin is not None:
                found.remade.append(name)
    if changes:
        raise _not_as_written(path_of(path), changes, len(leaves))
    return found


def lacks(source: str, leaves: Sequence[str]) -> str:
    """That a source of some leaves is not there."""
    made = wording.plural(len(leaves), "leaf is", "leaves are")
    return f"{source}, which {made} made of, is not there, or is another model"


def _not_as_written(path: Path, changes: Mapping[str, str], count: int) -> UnexpectedChange:
    said = f"{path}: {len(changes):,} of {wording.plural(count, 'recorded leaf', 'recorded leaves')} "
    lines = [f"{said}{'is' if len(changes) == 1 else 'are'} not as written"]
    lines += [f"  {name}: {what}" for name, what in islice(changes.items(), _SHOWN)]
    if len(changes) > _SHOWN:
        lines.append(f"  and {len(changes) - _SHOWN:,} more")
    patches: list[HistoryRow] = []
    with contextlib.suppress(ParamendError):  # faults of the leaves matter more than faults of an undo record
        patches = history(path)
    if patches:
        since = "one patch was" if len(patches) == 1 else f"{len(patches):,} patches were"
        lines.append(f"{since} made in place and can be undone, the last: {patches[-1].edit}")
    return UnexpectedChange("\n".join(lines), changes=changes, hint=f"paramend undo {path}" if patches else "")


def _finder(source: Any) -> Callable[[str], int | None]:
    index = source.index
    numbers = {alike(index.name(number)): number for number in index.numbers}
    numbers |= {index.name(number): number for number in index.numbers}
    return lambda name: numbers.get(name, numbers.get(alike(name)))


class _Gone(Exception):
    """A source, or a leaf of one, is not there."""


class _Sources:
    """The files that leaves are made of, by their names in a record: those given, and those beside a checkpoint."""

    def __init__(self, path: Path, given: Places, stack: contextlib.ExitStack) -> None:
        self._path, self._stack = path, stack
        given = [given] if isinstance(given, str | os.PathLike) else given
        self._given = dict(given) if isinstance(given, Mapping) else {path_of(each).name: each for each in given}
        self._open: dict[str, tuple[Any, Callable[[str], int | None]]] = {}

    def origins(self, record: EditRecord, lacking: dict[str, list[str]]) -> dict[str, Origin]:
        """The origins of the leaves that a record expects, and what is lacking for others."""
        found: dict[str, Origin] = {}
        expected = record.standing
        for each in (*record.earlier, record):
            for leaf in each.leaves:
                if leaf.origin and expected.get(leaf.path) is leaf:
                    try:
                        found[leaf.path] = self._origin(leaf, each.source)
                    except _Gone as gone:
                        lacking.setdefault(str(gone), []).append(leaf.path)
        return found

    def _origin(self, leaf: RecordedLeaf, base: str) -> Origin:
        file = base

        def find(name: str, key: str) -> Origin:
            nonlocal file
            file = name or base
            source, number_of = self._open.get(file) or self._open.setdefault(file, self._opened(file))
            number = number_of(key)
            if number is None:
                raise _Gone(file)
            return Stored(source, number)

        try:
            origin = read_origin(leaf.origin, find)
        except SpecMismatch:
            raise _Gone(file) from None
        except BadArgument as error:
            raise bad(str(self._path), f"record, the origin of {leaf.path}", str(error)) from None
        if origin.spec != leaf.spec:
            raise _Gone(file)
        return origin

    def _opened(self, name: str) -> tuple[Any, Callable[[str], int | None]]:
        place = path_of(self._given.get(name, self._path.absolute().parent / name))
        try:
            if name not in self._given and (place.name != name or not place.exists() or place.samefile(self._path)):
                raise _Gone(name)
            recover(place)
            source = self._stack.enter_context(contextlib.closing(open_source(place)))
        except (ParamendError, OSError):  # such as a name in the record that is too long for a file
            if name in self._given:
                raise
            raise _Gone(name) from None
        return source, _finder(source)
