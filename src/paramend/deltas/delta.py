"""`Delta`: what is different in one model, which makes it of another: in memory, and as a directory."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from paramend.deltas import manifest
from paramend.deltas.manifest import FileChange, LeafRow, name_of
from paramend.deltas.payload import FILE, Payload, copy_all
from paramend.disk.io import reading, release
from paramend.disk.permissions import NEW_FILE, Access, create_file, of_folder, settle
from paramend.disk.publishing import exists, published, there
from paramend.disk.urls import Url, path_of
from paramend.errors import BadCheckpoint, CannotRead, CannotWrite, Unsupported
from paramend.formats.files import near
from paramend.journal.store import PUT
from paramend.reports import wording
from paramend.reports.fields import data_of, picked
from paramend.reports.progress import Progress
from paramend.reports.report import Line, Report, Section

T = TypeVar("T")

KINDS = "changed", "respecified", "renamed", "added", "deleted"


@dataclass(frozen=True, repr=False)
class Delta(Report):
    """What is different in a model that was made of another, its base. It is true if anything is.

    Attributes:
        rows: the leaves of the outcome in order, then those that are deleted.
        files: the files beside the weights that differ.
        checksum: what the checksums of leaves are.
        xor: whether it holds what old and new bytes differ in, instead of the new ones.
        separator: what stands between keys in the names of leaves.
        said: what differs and is not in it.
        slime: whether it is a directory of slime, which says nothing of the base.
        payload: the new values.
    """

    rows: tuple[LeafRow, ...]
    files: tuple[FileChange, ...]
    checksum: str
    xor: bool
    separator: str
    said: tuple[str, ...]
    payload: Payload = field(compare=False)
    slime: bool = False
    access: Access = field(default=NEW_FILE, compare=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Delta":
        """A delta that was saved, its digests checked; or one that slime wrote.

        Raises:
            BadCheckpoint: it is damaged, or no delta.
            CannotRead: there is no such directory.
        """
        folder = path_of(path)
        if not folder.is_dir():
            raise CannotRead(f"{folder}: there is no such directory", hint=near(folder))
        if (folder / manifest.NAME).is_file():
            return cls(**manifest.read(folder))
        from paramend.deltas.slime import metadata_of, read  # most deltas are our own

        if metadata_of(folder) is None:
            hint = f"paramend show {folder}"
            raise BadCheckpoint(f"{folder}: it holds no delta: there is no {manifest.NAME}", hint=hint)
        return cls(**read(folder), slime=True)

    def save(
        self, out: str | os.PathLike[str], *, force: bool = False, slime: bool = False, progress: Progress | None = None
    ) -> Path:
        """Write the delta into a directory, and return its path. If it raises, nothing was written.

        Args:
            out: the directory to write.
            force: whether a delta that is there already is replaced, in one step.
            slime: whether it is written as slime has it: `weight_v000007` is version 7 of a model, for version 6.
            progress: called with an `Event` as bytes are written for slime.

        Raises:
            CannotWrite: something is there, or there is no folder to write it into.
            Unsupported: slime cannot express it.
        """
        out = path_of(out)
        if self.slime:
            raise Unsupported("a delta of slime is a directory already", hint=f"cp -r, to {out}")
        if there(out) and not force:
            raise exists(out)
        if there(out) and not (_is_delta(out) or (out.is_dir() and not any(out.iterdir()))):
            raise CannotWrite(f"{out} is not a delta, and its content would be lost", hint="write to another name")
        if not isinstance(out, Url) and not out.parent.is_dir():
            raise CannotWrite(f"{out}: {out.parent} does not exist", hint=f"mkdir -p {out.parent}")
        with published(out, force=force, access=of_folder(self.access), folder=True) as temporary:
            if slime:
                from paramend.deltas.slime import write  # as above

                write(self, temporary, out.name, progress)
            else:
                self._write(temporary)
            for file in temporary.iterdir():
                settle(file, self.access)
        return out

    def _write(self, folder: Path) -> None:
        with reading(self.payload.source.path) as source:
            target = create_file(folder / FILE, self.access)
            copy_all(source, target, self.payload.source.path)
            release(target)
        table = {
            "checksum": self.checksum,
            "encoding": "xor" if self.xor else "overwrite",
            "separator": self.separator,
            "leaves": [row.to_dict() for row in self.rows],
            "files": data_of(self.files),
            "said": list(self.said),
        }
        manifest.write(folder, table)

    def apply(self, tree: T, *, progress: Progress | None = None) -> T:
        """The outcome: the base with what is different. A tree that is the outcome already is returned as it is.

        All checksums of the base are compared first. On a checkpoint it is lazy like any edit: `.save(out)` writes it,
        and `pm.patch(path, delta.apply)` changes the files themselves.

        Args:
            tree: the base: a tree, or a checkpoint opened by `pm.open`, of any format.
            progress: called with an `Event` as bytes of the base are read.

        Raises:
            UnexpectedChange: it is not the base; `changes` says which leaves are not.
            BadCheckpoint: the delta asks for what is not there.

        >>> import numpy as np
        >>> change = pm.delta({"w": np.zeros(3), "b": np.ones(1)}, {"w": np.array([0.0, 5.0, 0.0]), "b": np.ones(1)})
        >>> change.apply({"w": np.zeros(3), "b": np.ones(1)})
        {'w': array([0., 5., 0.]), 'b': array([1.])}
        """
        from paramend.deltas.applying import applied  # a delta may be made, or looked at, alone

        found: T = applied(self, tree, progress)
        return found

    def then(self, later: "Delta") -> "Delta":
        """This delta and a later one, for its outcome, as one.

        Raises:
            BadArgument: the later one is for another base.
            Unsupported: they are of different kinds.
        """
        from paramend.deltas.squashing import squashed  # most deltas stay alone

        return Delta(**squashed(self, later), access=self.access.within(later.access.mode))

    # ---- what it is ------------------------------------------------------------------------------------------

    def __bool__(self) -> bool:
        return bool(self.files) or any(row.kind != "kept" for row in self.rows)

    @property
    def restructures(self) -> bool:
        """Whether leaves or files come, go, or get another name or spec, so that new files are needed."""
        return any(row.kind not in ("kept", "changed") for row in self.rows) or not all(map(_is_json, self.files))

    def of_kind(self, kind: str) -> list[LeafRow]:
        """The rows of a kind: "changed", "respecified", "renamed", "added", "deleted" or "kept"."""
        return [row for row in self.rows if row.kind == kind]

    def called(self, row: LeafRow) -> str:
        """The name of a leaf."""
        keys = row.path if row.path is not None else row.was
        return name_of(keys or (), self.separator)

    def headline(self) -> str:
        if not self:
            return "\n".join((f"nothing differs in {wording.plural(len(self.rows), 'leaf', 'leaves')}", *self.said))
        counts = [f"{count:,} {kind}" for kind in (*KINDS, "kept") if (count := len(self.of_kind(kind)))]
        new = wording.plural(sum(row.changed for row in self.rows), "element")
        files = f"; {wording.listing([row.name for row in self.files], 4)}" if self.files else ""
        more = "" if self.slime else f": {new}, {wording.size(self.nbytes)}"
        return "\n".join((f"{', '.join(counts)}{more}{files}", *self.said))

    @property
    def summary(self) -> str:
        """What is different, in one line."""
        return self.headline()

    @property
    def nbytes(self) -> int:
        """The bytes of the new values and their positions."""
        return self.payload.nbytes

    def sections(self) -> list[Section]:
        return [Section(kind, [Line((self.called(row),), _cells(row)) for row in self.of_kind(kind)]) for kind in KINDS]

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"checksum": self.checksum, "encoding": "xor" if self.xor else "overwrite"}
        for kind in KINDS:
            found[kind] = [row.to_dict() | {"path": self.called(row)} for row in self.of_kind(kind)]
        return found | {"kept": len(self.of_kind("kept"))} | picked(self, "files", "nbytes as bytes", "said")


def _cells(row: LeafRow) -> tuple[str, ...]:
    if row.kind == "changed" and row.spec is not None:
        return str(row.spec), f"{row.changed:,} of {row.spec.size:,}"
    specs = [str(spec) for spec in (row.before, row.spec) if spec is not None]
    was = (f"from {'/'.join(row.was or ())}",) if row.kind == "renamed" else ()
    return " -> ".join(dict.fromkeys(specs)), *was


def _is_json(row: FileChange) -> bool:
    """Whether a file stays, and a patch may put it there."""
    return bool(row.result and PUT.fullmatch(row.name))


def _is_delta(folder: Path) -> bool:
    """Whether there is a delta, damaged or not."""
    if (folder / manifest.NAME).is_file():
        return True
    from paramend.deltas.slime import metadata_of  # most deltas are our own

    return metadata_of(folder) is not None
