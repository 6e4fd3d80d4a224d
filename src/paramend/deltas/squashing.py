"""Squashing: a delta and the one after it as one, which makes the outcome of both of the base of the first."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from paramend.deltas.manifest import FileChange, LeafRow, by_name
from paramend.deltas.payload import SPAN, Patched, Table, itemsize_of, whole_of
from paramend.errors import BadArgument, Unsupported
from paramend.leaves.specs import Spec
from paramend.reports import wording

if TYPE_CHECKING:
    from paramend.deltas.delta import Delta


def squashed(first: "Delta", later: "Delta") -> dict[str, Any]:
    """The attributes of both as one."""
    for name in ("checksum", "xor"):
        if getattr(first, name) != getattr(later, name) or first.slime or later.slime:
            hint = "apply them one after the other, then pm.delta(before, after)"
            raise Unsupported("only deltas of one encoding and checksum, and none of slime, become one", hint=hint)
    with closing(Table()) as table:
        work = _Squashing(first, later, table)
        found = {"rows": tuple(work.rows()), "files": tuple(work.files()), "payload": table.finish(xor=later.xor)}
        found |= {"checksum": later.checksum, "xor": later.xor, "separator": later.separator}
        return found | {"said": tuple(dict.fromkeys((*first.said, *later.said)))}


class _Squashing:
    def __init__(self, first: "Delta", later: "Delta", table: Table) -> None:
        self.first, self.later, self.table = first, later, table
        self._known: dict[tuple[str, str], int] = {}
        after, before = by_name(first.rows, "path"), by_name(later.rows, "was")
        wrong = [first.called(row) for name, row in after.items() if name not in before]
        wrong += [later.called(row) for name, row in before.items() if name not in after]
        wrong += [later.called(row) for n, row in before.items() if n in after and after[n].result != row.base]
        if wrong:
            differ = f"{wording.plural(len(wrong), 'leaf', 'leaves')} differ: {wording.listing(wrong, 4)}"
            hint = "paramend delta squash D1 D2 ..., in the order in which they were made"
            raise BadArgument(f"a delta is not for the outcome of the one before it: {differ}", hint=hint)
        self.mine = {row: after[name] for name, row in before.items()}

    def rows(self) -> Iterator[LeafRow]:
        for row in self.later.rows:
            old = self.mine.get(row)
            if row.path is not None:
                both = row if old is None else replace(row, was=old.was, before=old.before, base=old.base)
                yield self._held(both, row, old)
            elif old is not None and old.was is not None:
                yield replace(old, path=None, spec=None, result="", changed=0, held="", nbytes=0)
        yield from (row for row in self.first.rows if row.path is None)

    def _held(self, both: LeafRow, row: LeafRow, old: LeafRow | None) -> LeafRow:
        assert both.spec is not None
        before = "" if old is None else old.held
        if both.kind in ("kept", "renamed") or not (before or row.held):
            return replace(both, changed=0, held="", nbytes=0)
        nbytes = row.nbytes or (0 if old is None else old.nbytes)  # 0 where it is kept
        name, key = row.held or before, (before, row.held)
        if key not in self._known:  # of a leaf with several paths, what changes is held once
            if not (row.whole or (old is not None and old.whole)):
                self._known[key] = self._merged(name, both.spec, nbytes, row, old)
            elif both.whole:
                self._known[key] = self.table.whole(name, both.spec, self._contents(row, old))
            else:
                self._known[key] = self._again(name, both.spec, self._contents(row, old))
        return replace(both, changed=self._known[key], held=name, nbytes=nbytes)

    def _merged(self, name: str, spec: Spec, nbytes: int, row: LeafRow, old: LeafRow | None) -> int:
        width, changed = itemsize_of(spec), 0
        steps = [(delta, each.held) for delta, each in ((self.first, old), (self.later, row)) if each and each.held]
        changes = [delta.payload.changes(held, nbytes, width) for delta, held in steps]
        for start in range(0, nbytes, SPAN):
            values, mask = np.zeros((2, min(SPAN, nbytes - start)), np.uint8)
            for each in changes:
                each.put(values, start, mask)
            changed += self.table.window(name, start, values, mask[::width] > 0, spec.dtype, known=self.later.xor)
        return changed

    def _contents(self, row: LeafRow, old: LeafRow | None) -> Iterator[memoryview]:
        """All bytes of a leaf that one of the deltas holds whole."""
        if row.whole or old is None:
            return whole_of(self.later, row).contents()
        whole = whole_of(self.first, old)
        width = itemsize_of(whole.spec)
        return Patched(whole, self.later.payload.changes(row.held, whole.nbytes, width)).contents()

    def _again(self, name: str, spec: Spec, pieces: Iterator[memoryview]) -> int:
        """Of a leaf that had another spec in between, all bytes are new."""
        if self.later.xor:
            raise Unsupported(f"{name} had another spec in between, and then xor needs its values before")
        return self.table.dense(name, spec, pieces)

    def files(self) -> Iterator[FileChange]:
        sides = [{row.name: row for row in delta.files} for delta in (self.first, self.later)]
        for name in {**sides[0], **sides[1]}:
            one, two = (side.get(name) for side in sides)
            last, holder = (two, self.later) if two else (one, self.first)
            assert last is not None
            if one and two and one.result != two.base:
                raise BadArgument(f"a delta is not for the outcome of the one before it: {name} differs")
            row = replace(last, base=one.base if one else last.base)
            if row.base != row.result:
                content = holder.payload.bytes(f"file/{name}")
                self.table.add(f"file/{name}", Spec((row.nbytes,), "uint8"), [] if content is None else [content.data])
                yield row
