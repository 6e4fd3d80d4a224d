"""Fingerprints: whether two plans, perhaps of two programs, write the same bytes, as far as can be told unread."""

import copyreg
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

import numpy as np

from paramend.edits.call import Op
from paramend.edits.damage import Damage
from paramend.edits.plan import Plan
from paramend.formats.gathered import Gathered
from paramend.formats.registry import Format
from paramend.formats.source import Opened
from paramend.leaves.codecs.encoding import Misfit
from paramend.piecewise.rows import expression
from paramend.rewriting.files import Computed, sources
from paramend.rewriting.layouts import Layout

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
            return self._all(*(path if path in known else (path, *seen(status)) for path, status in stats.items()))
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


def seen(status: os.stat_result) -> list[int]:
    """What tells a file that changed, or was replaced, from what it was."""
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def _hash(*parts: bytes | str) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()
