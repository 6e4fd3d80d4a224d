"""The base of a delta: whether a tree is it, or the outcome already, by the checksums of its leaves."""

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from paramend.deltas.checksums import bytes_of, hasher
from paramend.deltas.patched import whole_of
from paramend.deltas.payload import itemsize_of
from paramend.deltas.rows import LeafRow, by_name
from paramend.errors import BadCheckpoint, UnexpectedChange
from paramend.evidence.pairing import Name, named
from paramend.evidence.streams import stream_of
from paramend.leaves.leaves import Editable
from paramend.leaves.specs import Spec
from paramend.reports import wording
from paramend.reports.progress import Meter, Progress

if TYPE_CHECKING:
    from paramend.deltas.delta import Delta

# A row, and the leaf of the base that it is for; None if it adds one.
Task = tuple[LeafRow, int | None]


class Base:
    """What a delta is applied to: is it its base, or its outcome?"""

    def __init__(self, delta: "Delta", leaves: Editable, progress: Progress | None) -> None:
        self.delta, self.leaves = delta, leaves
        self.numbers = named(leaves)
        self.before, self.after = (by_name(delta.rows, side) for side in ("was", "path"))
        self.meter = Meter(progress, sum(map(leaves.nbytes, self.numbers.values())))
        self._turn = threading.Lock()

    def tasks(self) -> list[Task]:
        """What is to be done; nothing if it was done."""
        as_base, as_result = self._fits(self.before), self._fits(self.after)
        if not as_base and not as_result:
            raise self._other(self._names())
        rows = self.before if as_base else self.after
        tasks: list[Task] = [(row, self.numbers[name]) for name, row in rows.items()]
        with ThreadPoolExecutor(2, thread_name_prefix="paramend") as pool:
            sums = list(pool.map(self._sums, tasks))
        pairs = list(zip(tasks, sums, strict=True))
        done = [found == row.result and self._is(number, row.spec) for (row, number), (found, _) in pairs]
        if as_result and all(done):
            return []
        left, wrong = list[tuple[Task, str]](), dict[str, str]()
        for ((row, number), (found, made)), there in zip(pairs, done, strict=True):
            is_base = made == row.result if self.delta.slime else found == row.base and self._is(number, row.before)
            is_done = there and row.kind == "changed"
            if not as_base or not (is_base or is_done):
                wrong[self.delta.called(row)] = "its bytes differ"
            left += [((row, number), made)] if row.kind != "kept" and not is_done else []
        if wrong:
            raise self._other(wrong)
        added: list[Task] = [(row, None) for row in self.delta.rows if row.was is None]
        left += [(task, self._sums(task)[1]) for task in added]
        for (row, _), made in left:
            if made not in ("", row.result):
                raise BadCheckpoint(f"{self.delta.called(row)}: the delta does not make what it says")
        return [task for task, _ in left]

    def _fits(self, rows: Mapping[Name, LeafRow]) -> bool:
        """Whether the leaves have the names of these rows, which are all for a delta that is not of slime."""
        names = self.numbers.keys()
        return rows.keys() <= names if self.delta.slime else rows.keys() == names

    def _is(self, number: int | None, spec: Spec | None) -> bool:
        return number is not None and spec in (None, self.leaves.spec(number))

    def _sums(self, task: Task) -> tuple[str, str]:
        """The checksum that a leaf has, and the one that it would have; "" where there is none, or nothing changes."""
        row, number = task
        old, new = hasher(self.delta.checksum), hasher(self.delta.checksum)
        for whole in whole_of(self.delta, row).contents() if row.whole else ():
            new.update(whole)
        if number is None:
            return "", new.hexdigest()
        nbytes, itemsize = self.leaves.nbytes(number), itemsize_of(self.leaves.spec(number))
        changes = self.delta.payload.changes(row.held, nbytes, itemsize) if row.held and not row.whole else None
        stream = stream_of(self.leaves, number)
        with self._turn if stream.source is not None else nullcontext():  # a decompressor serves one reader
            for start, piece in bytes_of(stream):
                old.update(piece.data)
                self.meter.advance(len(piece))
                if changes is not None:
                    changed = piece.copy()
                    changes.put(changed, start)
                    new.update(changed.data)
        return old.hexdigest(), new.hexdigest() if row.held else ""

    @property
    def rows(self) -> dict[int, LeafRow]:
        """The rows by the leaves of the base that they are for."""
        return {self.numbers[name]: row for name, row in self.before.items()}

    def untied(self) -> set[int]:
        """The leaves with several paths that get other values under each."""
        found: dict[int, set[tuple[str, Any]]] = {}
        for number, row in self.rows.items():
            if number in self.leaves.ties:
                found.setdefault(self.leaves.ties[number], set()).add((row.result, row.spec))
        return {n for n, one in self.leaves.ties.items() if len(found.get(one, ())) > 1}

    def _names(self) -> dict[str, str]:
        more = [] if self.delta.slime else [n for name, n in self.numbers.items() if name not in self.before]
        absent = {self.delta.called(row): "there is none" for n, row in self.before.items() if n not in self.numbers}
        return absent | {self.leaves.index.path(number): "it is not in the base" for number in more}

    def _other(self, changes: Mapping[str, str]) -> UnexpectedChange:
        lines = [f"  {path}: {why}" for path, why in list(changes.items())[:20]]
        lines += [f"  and {len(changes) - 20:,} more"] if len(changes) > 20 else []
        path = str(getattr(self.leaves, "path", "")) or "the tree"
        count = wording.plural(len(changes), "leaf", "leaves")
        said = f"{path} is not the base of the delta, nor its outcome: {count}"
        return UnexpectedChange("\n".join([said, *lines]), changes=changes, hint="apply it to what it was made from")
