"""`Note`: the record of a rewrite, made while the output is written."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from paramend.disk.failures import reason
from paramend.disk.io import put, release
from paramend.disk.permissions import create_file, settle
from paramend.disk.publishing import is_other, look, published, spare, there
from paramend.disk.urls import Url
from paramend.edits.plan import Plan
from paramend.errors import BadCheckpoint, CannotRead, CannotWrite, Unsupported
from paramend.formats.gathered import Gathered
from paramend.formats.registry import open_source
from paramend.formats.safetensors import MAX_HEADER, RECORD, annotated, framed
from paramend.formats.shards import Shards
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Stored
from paramend.leaves.origins.texts import quoted, shortened
from paramend.piecewise.rows import expression
from paramend.rewriting.accesses import Accesses
from paramend.rewriting.arrangement import base_of
from paramend.rewriting.files import Copy, with_header
from paramend.rewriting.filling import Digests
from paramend.rewriting.layouts import Layout
from paramend.rewriting.provenance import (
    FILE,
    MAX_TEXT,
    EditRecord,
    RecordedLeaf,
    beside,
    contents,
    digest_of,
    record_of,
    sidecar,
    text_of,
)

# The address in the repr of a function.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_BLANK = "0" * 64


class Note:
    """The record of a rewrite: a new one, that of the source unchanged, or none; `layout` has its place.

    Digests are computed from bytes on their way into the output. If the record is in a header, the header is written
    first with blank digests of the same length, and again when the digests are known.
    """

    def __init__(self, made: Plan, out: Path, layout: Layout, recipe: str | None) -> None:
        """Prepare the record of a plan that is about to be carried out. The recipe is "" if it is unknown, None for no
        new record. `BadCheckpoint` if the record of the source, which the new one contains, is damaged."""
        self._made, self._out = made, out
        self._where = "folder" if layout.folder else "header" if layout.format.name == "safetensors" else "beside"
        self._touched: dict[int, tuple[str, str, str]] = {}
        self.digests = Digests()
        self._record: EditRecord | None = None
        self._head = b""
        self._aside: Path | None = None
        self.layout = layout
        base = base_of(made)
        self._text = self._carried(base) if recipe is None else self._begun(base, recipe)
        if self._text is not None:
            self._place()

    @property
    def name(self) -> str:
        """The file that will hold the record; "" if there is none to write."""
        if self._text is None:
            return ""
        return str({"folder": self._out / FILE, "beside": beside(self._out)}.get(self._where, self._out))

    def _carried(self, base: Any) -> bytes | None:
        """The record of the source, if it is not copied with the files; None if there is nothing to write."""
        place = sidecar(base)
        held = getattr(base, "metadata", {}).get(RECORD)
        filed = place is not None and there(place)
        if not filed and (held is None or self._where == "header"):
            return None
        if self._where == "folder" and any(file.name == FILE for file in self.layout.files):
            return None
        try:
            return text_of(base)
        except (BadCheckpoint, CannotRead) as error:
            self.layout = replace(self.layout, left_out=(*self.layout.left_out, f"the record of edits ({error})"))
            return None

    def _begun(self, base: Any, recipe: str) -> bytes:
        from importlib.metadata import version  # slow to import

        before = record_of(base)
        self._touched = dict(_touched(self._made, _Texts(base)))
        self.digests = Digests(self._touched)
        leaves = self._made.by_number
        self._record = EditRecord(
            paramend=version("paramend"),
            time=datetime.now(UTC).replace(microsecond=0),
            source=_name_of(base),
            leaves=tuple(
                RecordedLeaf(self._made.name(leaves[number]), leaves[number].spec, _BLANK, *said)
                for number, said in self._touched.items()
            ),
            deleted=tuple(_deleted(self._made, before)),
            config=tuple(self._made.configured),
            recipe=recipe,
            earlier=() if before is None else (*before.earlier, replace(before, earlier=())),
        )
        return self._written()

    def _written(self) -> bytes:
        assert self._record is not None
        form: dict[str, Any] = {"separators": (",", ":")} if self._where == "header" else {"indent": 1}
        return json.dumps(self._record.to_dict(), ensure_ascii=False, **form).encode("utf-8", "replace")

    def _place(self) -> None:
        if self._where == "folder":
            kept = tuple(file for file in self.layout.files if file.name != FILE)
            self.layout = replace(self.layout, files=kept)
        elif self._where == "header":
            (file,) = self.layout.files
            first, *rest = file.pieces
            if isinstance(first, Copy):  # the header and the bytes after it are copied
                source: Any = self._made.leaves
                start = source.header.nbytes
                self._head = source.header.raw
                rest = [Copy(first.path, start, first.stop), *rest] if start < first.stop else rest
            else:
                assert isinstance(first, bytes)
                self._head = first[8:]
            self.layout = replace(self.layout, files=(with_header(file.name, self._header(), rest),))

    def _header(self) -> bytes:
        assert self._text is not None
        raw = annotated(self._head, RECORD, self._text.decode())
        if len(raw) > MAX_HEADER:
            raise Unsupported(
                f"{self._out}: with the record its header takes {len(raw):,} bytes; the limit is {MAX_HEADER:,}",
                hint=f"a directory: {self._out.with_suffix('')}/",
            )
        return raw

    @property
    def seals(self) -> bool:
        """Whether the record goes into the header when all leaves have been written."""
        return self._where == "header" and self._record is not None

    def finish(self, temporary: Path, accesses: Accesses) -> None:
        """Write the record into the output: a directory, or the header of a file."""
        if self._record is not None:
            self._complete(temporary)
        if self._text is None or self._where == "beside":
            return
        if self._where == "folder":
            access = accesses.of_all(FILE)
            release(create_file(temporary / FILE, access))
            _put(temporary / FILE, self._text)
            settle(temporary / FILE, access)
        elif self._record is not None:
            head = self.layout.files[0].pieces[0]
            assert isinstance(head, bytes)
            _put(temporary, framed(self._header(), len(head)))

    def _complete(self, temporary: Path) -> None:
        """Fill in the digests, including those of bytes that were not hashed on their way."""
        assert self._record is not None
        found = self.digests.found
        by_number = self._made.by_number
        for number in [number for number in self._touched if number not in found]:
            row = by_number[number]
            twin = next((each for each in self._made.twins(number) if each in found), None)
            if twin is not None:
                found[number] = found[twin]
            elif not row.spec.size:
                found[number] = digest_of(())
            else:
                origin = expression(self._made.leaves, row)
                if not row.calls or origin.extents is not None:  # copied by the kernel
                    found[number] = digest_of(contents(origin))
        back = [number for number in self._touched if number not in found]
        if back:  # chunks are not written in the order of elements; the copy has the numbers of the source
            with contextlib.closing(open_source(temporary)) as new:
                found |= {number: digest_of(contents(Stored(new, number))) for number in back}
        leaves = (
            replace(leaf, sha256=found[number]) for number, leaf in zip(self._touched, self._record.leaves, strict=True)
        )
        self._record = replace(self._record, leaves=tuple(leaves))
        self._text = self._written()

    @contextlib.contextmanager
    def beside(self, accesses: Accesses) -> Iterator[None]:
        """While it lasts, a file gets its name. Then the record beside it is its own, or that of the old file stays."""
        then = look(self._out)
        try:
            yield
        except BaseException as error:
            if is_other(self._out, then):
                try:
                    self._publish(accesses)
                except CannotWrite as second:
                    raise CannotWrite(f"{reason(error)}; its record was not written: {reason(second)}") from error
            elif self._aside is not None:
                place = beside(self._out)
                try:
                    self._aside.rename(place)
                except OSError:
                    said = f"{reason(error)}; the file is as it was, and its record is now {self._aside}"
                    raise CannotWrite(said, hint=f"mv {self._aside} {place}") from error
            raise
        try:
            self._publish(accesses)
        except CannotWrite as error:
            raise CannotWrite(f"{self._out} was written, but its record was not: {reason(error)}") from error

    def clear(self) -> None:
        """Put the record beside a file that is about to be replaced aside: no file ever has another's record."""
        if self._where == "beside" and there(self._out) and there(beside(self._out)):
            if isinstance(self._out, Url):  # where nothing can be renamed in one step
                beside(self._out).unlink()
            else:
                self._aside = beside(self._out).rename(spare(self._out))

    def _publish(self, accesses: Accesses) -> None:
        if self._aside is not None:
            with contextlib.suppress(OSError):  # the next writer sweeps it
                self._aside.unlink()
        if self._text is not None and self._where == "beside":
            with published(beside(self._out), force=True, access=accesses.of_all("")) as temporary:
                _put(temporary, self._text)


def _put(path: Path, data: bytes) -> None:
    """Overwrite the first bytes of a file, durably."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        put(descriptor, data, 0)
        os.fsync(descriptor)
    finally:
        release(descriptor)


def _name_of(source: Any) -> str:
    """The name of a checkpoint in a record, without folders of this machine."""
    path = source.folder if isinstance(source, Shards) else source.path
    return str((path.name or path.resolve().name).encode("utf-8", "replace").decode())


class _Texts:
    """The expressions of a record. A leaf of another file than the source stands after the name of its file."""

    def __init__(self, base: Any) -> None:
        self._base, self._room = base, MAX_TEXT
        self._files = {base.path.resolve(): ""}

    def of(self, origin: Origin) -> str:
        """The expression of a leaf; "" if it does not say all, is a leaf of the source, or there is no room for it."""
        if not origin.moves or (isinstance(origin, Stored) and origin.source is self._base):
            return ""
        text = origin.text(self.named)
        if len(text) > self._room:
            return ""
        self._room -= len(text)
        return text

    def named(self, leaf: Origin) -> str:
        if not isinstance(leaf, Stored):
            return leaf.says
        place, name = leaf.source.path.resolve(), quoted(leaf.source.index.name(leaf.number))
        if place not in self._files:
            own, known = _name_of(leaf.source), {_name_of(self._base), *self._files.values()}
            names = (own, *(f"{own}#{number}" for number in range(2, len(known) + 2)))
            self._files[place] = next(each for each in names if each not in known)
        return f"{quoted(self._files[place])}:{name}" if self._files[place] else name


def _touched(made: Plan, texts: _Texts) -> Iterator[tuple[int, tuple[str, str, str]]]:
    """For each leaf that differs from the source's leaf of its name: its number, (what was done, its earlier path,
    what it is made of)."""
    leaves: Any = made.leaves
    names = {made.name(row) for row in made.rows}
    for row in made.rows:
        edit, was = _ADDRESS.sub("", row.edit), leaves.index.name(row.source) if row.was else ""
        if isinstance(leaves, Gathered):
            origin, name = leaves.origins[row.source], made.name(row)
            said = shortened(origin.text(texts.named))
            if isinstance(origin, Stored):
                said = origin.source.index.name(origin.number)
                if origin.source is leaves.base:
                    was = said if said not in names else ""
                    said = "" if said == name else f"from {said}"
                else:
                    other = _name_of(origin.source)
                    said = f"from {other}" if said == name else f"from {other}: {said}"
            edit = ", ".join(filter(None, (said, edit)))
        if edit:
            yield row.source, (edit, was, texts.of(expression(leaves, row)))


def _deleted(made: Plan, before: EditRecord | None) -> list[str]:
    """The paths of leaves that are gone; those that others are made of only if an earlier record expects them."""
    leaves: Any = made.leaves
    gone = [leaves.index.name(row.source) for row in made.deleted]
    if isinstance(leaves, Gathered) and leaves.base is not None:
        index = leaves.base.index
        stored = (part for origin in leaves.origins for part in origin.stored() if isinstance(part, Stored))
        used = {part.number for part in stored if part.source is leaves.base}
        known = {made.name(row) for row in made.rows}
        expected = {} if before is None else before.standing
        gone += [
            name
            for number in index.numbers
            if (name := index.name(number)) not in known and (number not in used or name in expected)
        ]
    return gone
