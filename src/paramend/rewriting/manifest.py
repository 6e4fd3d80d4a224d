"""`Manifest`: what of an unpublished output is done, so that a later run can go on from there."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from paramend.disk.io import put, release
from paramend.disk.publishing import manifest_of
from paramend.edits.plan import Plan
from paramend.errors import CannotWrite
from paramend.reports import wording
from paramend.rewriting.files import Copy, File, sources
from paramend.rewriting.fingerprints import fingerprint, seen
from paramend.rewriting.jobs import Done, Job
from paramend.rewriting.layouts import Layout

_SEAL = 17  # bytes before the text of a line
_ANEW = "without --resume, or resume=True, it begins anew"


class Manifest:
    """Lines of JSON beside the temporary of an output, each after the digest of all so far. From the first one on that
    is damaged, they do not count.

    The first one says what is written: by which plan, from which files, and the size of each file. Then there is one
    for each job that is done, with the digest of its bytes.
    """

    def __init__(self, out: Path, plan: str, files: Sequence[File], sources: Mapping[Path, os.stat_result]) -> None:
        self._out = out
        self._sources = {str(path.absolute()): seen(status) for path, status in sources.items()}
        self._head = {
            "paramend": version("paramend"),
            "plan": plan,
            "sources": self._sources,
            "files": {file.name: file.nbytes for file in files},
        }
        self._done: dict[tuple[str, int, int], Done] = {}
        self._descriptor = -1
        self._digest, self._nbytes = hashlib.sha256(), 0

    @classmethod
    def of(cls, made: Plan, out: Path, asked: Layout, layout: Layout, recipe: str | None) -> "Manifest":
        """The manifest of a plan, from its layout without and with a record."""
        stats = {path: status for source in sources(made) for path, status in source.stats.items()}
        copied = {piece.path for file in asked.files for piece in file.pieces if isinstance(piece, Copy)}
        stats |= {path: path.stat() for path in copied - set(stats)}
        return cls(out, fingerprint(made, asked, recipe), layout.files, stats)

    def takes_up(self, temporary: Path) -> bool:
        """Whether what is done in a temporary is known, and is a part of this output.

        Raises:
            CannotWrite: it is a part of another one.
        """
        entries, digest, nbytes = _sound(manifest_of(temporary).read_bytes())
        if not entries:
            return False
        head, *rest = entries
        for path, now in self._sources.items():
            if head["sources"].get(path, now) != now:
                raise CannotWrite(f"{self._out}: {path} has changed since this was begun", hint=_ANEW)
        if head != self._head:
            names = [name for name in ("paramend", "plan", "sources", "files") if head.get(name) != self._head[name]]
            said = {"paramend": "another version of Paramend", "sources": "other sources"}
            what = wording.listing(list(dict.fromkeys(said.get(name, "other edits or options") for name in names)))
            raise CannotWrite(f"{self._out}: what was begun here has {what}", hint=_ANEW)
        self._done, self._digest, self._nbytes = dict(map(_read, rest)), digest, nbytes
        return True

    def begin(self, temporary: Path) -> None:
        """Write down what is made in a temporary, or go on with what is written there."""
        path, flags = manifest_of(temporary), os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        if path.exists():
            self._descriptor = os.open(path, flags)
            os.truncate(self._descriptor, self._nbytes)
        else:
            self._descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            self._put(self._head)

    def known(self, job: Job) -> Done | None:
        """What is known of a job that was done before."""
        return self._done.get((job.name, job.start, job.stop))

    def enter(self, job: Job, done: Done) -> None:
        """Write down that a job is done."""
        data = {name: getattr(done, name) for name in ("sha256", "leaves", "measured", "copied", "computed", "shared")}
        self._put({"file": job.name, "start": job.start, "stop": job.stop} | data)

    def _put(self, data: Mapping[str, Any]) -> None:
        put(self._descriptor, _sealed(json.dumps(data, separators=(",", ":")).encode() + b"\n", self._digest))

    def close(self) -> None:
        """Close its file."""
        if self._descriptor >= 0:
            release(self._descriptor)


def _sealed(line: bytes, digest: Any) -> bytes:
    digest.update(line)
    return bytes(digest.hexdigest()[: _SEAL - 1] + " ", "ascii") + line


def _sound(raw: bytes) -> tuple[list[Any], Any, int]:
    """What the lines say that are as they were written, the digest of them, and the bytes that they take."""
    found, digest, nbytes = [], hashlib.sha256(), 0
    for line in raw.splitlines(keepends=True):
        then = digest.copy()
        if line != _sealed(line[_SEAL:], then):
            break
        found.append(json.loads(line[_SEAL:]))
        digest, nbytes = then, nbytes + len(line)
    return found, digest, nbytes


def _read(entry: Mapping[str, Any]) -> tuple[tuple[str, int, int], Done]:
    leaves, measured = ({int(number): each for number, each in entry[name].items()} for name in ("leaves", "measured"))
    copied, computed, shared = (int(entry[name]) for name in ("copied", "computed", "shared"))
    done = Done(entry["sha256"], leaves, measured, copied, computed, shared)
    return (entry["file"], entry["start"], entry["stop"]), done
