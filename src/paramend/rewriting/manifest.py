"""`Manifest`: what of an unpublished output is done, so that a later run can go on from there.

It can if both write the same bytes, as far as fingerprints of their plans tell it unread.
"""

import copyreg
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

import numpy as np

from paramend.disk.io import put, release
from paramend.disk.publishing import manifest_of
from paramend.edits.call import Op
from paramend.edits.damage import Damage
from paramend.edits.plan import Plan
from paramend.errors import CannotWrite
from paramend.formats.gathered import Gathered
from paramend.formats.registry import Format
from paramend.formats.source import Opened
from paramend.leaves.codecs.encoding import Misfit
from paramend.piecewise.rows import expression
from paramend.reports import wording
from paramend.rewriting.files import Computed, Copy, File, sources
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
        self._sources = {str(path.absolute()): _seen(status) for path, status in sources.items()}
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
        """Whether what is done in a temporary is known, and is a part of this output; `CannotWrite` if it is a part of
        another one."""
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


def _seen(status: os.stat_result) -> list[int]:
    """What tells a file that changed, or was replaced, from what it was."""
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def _read(entry: Mapping[str, Any]) -> tuple[tuple[str, int, int], Done]:
    leaves, measured = ({int(number): each for number, each in entry[name].items()} for name in ("leaves", "measured"))
    copied, computed, shared = (int(entry[name]) for name in ("copied", "computed", "shared"))
    done = Done(entry["sha256"], leaves, measured, copied, computed, shared)
    return (entry["file"], entry["start"], entry["stop"]), done


_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...))


def fingerprint(made: Plan, layout: Layout, recipe: str | None) -> str:
    """The digest of all that a rewrite depends on but the content of its sources: what each file is made of."""
    walk = _Walk(made)
    return walk.of((layout.files, layout.folder, layout.format, recipe)).hex()


class _Walk:
    """Digests of values by their content, of each object once; the order of sets, and what is kept of data, is left
    out. A source counts by the paths of its files, and what an edit reads beside those, such as a delta, also by what
    the files were when it was opened."""

    def __init__(self, made: Plan) -> None:
        self._made = made
        self._paths = {path for source in sources(made) for path in source.stats}
        self._known: dict[int, tuple[bytes, Any]] = {}  # by id, and what keeps the id from being another's

    def of(self, value: Any) -> bytes:
        """The digest of a value."""
        if isinstance(value, _PLAIN):
            return _hash("plain", type(value).__name__, repr(value))
        if id(value) not in self._known:
            self._known[id(value)] = b"", value  # of what refers to itself
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            self._known[id(value)] = _hash(kind, *self._parts(value)), value
        return self._known[id(value)][0]

    def _parts(self, value: Any) -> Sequence[bytes | str]:
        if isinstance(value, np.ndarray | np.generic):
            data = np.ascontiguousarray(value).reshape(-1).view(np.uint8).tobytes()
            return [str(value.dtype), str(value.shape), data]
        if isinstance(value, Path):
            return [str(value.absolute())]
        if isinstance(value, Computed):
            row = value.row
            return self._all(row.path, row.spec, expression(self._made.leaves, row), value.start, value.stop)
        if isinstance(value, Damage | Misfit):  # found out while it is written
            return []
        if isinstance(value, Op | Format):
            return [value.name]
        if isinstance(value, type | BuiltinFunctionType):
            return [value.__module__ or "", value.__qualname__]
        if isinstance(value, FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            return self._all(value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__, cells)
        if isinstance(value, CodeType):
            return self._all(value.co_code, value.co_consts, value.co_names)
        if isinstance(value, Opened) and not isinstance(value, Gathered) and (stats := getattr(value, "stats", {})):
            known = self._paths
            return self._all(*(path if path in known else (path, *_seen(status)) for path, status in stats.items()))
        if isinstance(value, Mapping):
            return [part for item in value.items() for part in self._all(*item)]
        if isinstance(value, Set):
            return sorted(map(self.of, value))
        if isinstance(value, list | tuple):
            return self._all(*value)
        if is_dataclass(value):
            return self._all(*(getattr(value, field.name) for field in fields(value) if field.compare))
        return self._reduced(value)

    def _reduced(self, value: Any) -> Sequence[bytes | str]:
        """What a pickle of a value holds; of what cannot be pickled, only its name counts."""
        try:
            known = copyreg.dispatch_table.get(type(value))
            made = value.__reduce_ex__(4) if known is None else known(value)
        except TypeError:
            return [getattr(value, "__qualname__", "")]
        if isinstance(made, str):
            return [made]
        return self._all(*(list(part) if isinstance(part, Iterator) else part for part in made[1:]))

    def _all(self, *values: Any) -> list[bytes]:
        return list(map(self.of, values))


def _hash(*parts: bytes | str) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()
