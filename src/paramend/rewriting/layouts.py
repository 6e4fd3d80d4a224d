"""Layouts: the files of a rewrite and the content of each, byte by byte, before any is written."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from paramend.edits.plan import Plan
from paramend.errors import BadArgument, Unsupported
from paramend.formats.gathered import Gathered
from paramend.formats.registry import DEFAULT, FOREIGN_SUFFIXES, Format, format_for, format_of, writable
from paramend.formats.shards import Shards
from paramend.reports import wording
from paramend.rewriting.copies import edited_file, overlays
from paramend.rewriting.files import File, base_of, fresh_file, nbytes_of, ordered, text_file
from paramend.rewriting.folders import own_files, tree_within
from paramend.rewriting.shards import largest, new_shards, parse_size, same_shards
from paramend.rewriting.sidecars import sidecars


@dataclass(frozen=True, slots=True)
class Layout:
    """The files that a rewrite makes.

    Attributes:
        files: the files.
        folder: whether they go into a directory.
        format: the format.
        left_out: files of the source that are left out, each with the reason.
        tree: for a format whose checkpoints are directories, the folder in it that holds the tree; "" for all of it.
        fresh: whether the writer of the format fills that folder; if not, it is a copy with new chunks for edits.
        more: about how many bytes are written besides those of the files.
    """

    files: tuple[File, ...]
    folder: bool
    format: Format
    left_out: tuple[str, ...] = ()
    tree: str = ""
    fresh: bool = False
    more: int = 0

    @property
    def nbytes(self) -> int:
        """The bytes that will be written."""
        return self.more + sum(file.nbytes for file in self.files if not file.link)


def lay_out(
    made: Plan,
    out: str | os.PathLike[str],
    *,
    link: bool = False,
    max_shard_size: int | str | None = None,
) -> Layout:
    """The layout of a plan's result under a name.

    The suffix of the name selects the format; a name without one keeps that of the source, file or directory.

    Raises:
        Unsupported: the format cannot hold a leaf, or cannot be written.
        RenameClash: two leaves would have the same name in the file.
        BadArgument: a size is malformed, or is given for a single file.
    """
    source = base_of(made)
    wish = _wish(made, os.fspath(out), sized=max_shard_size is not None)
    if wish.format.folder:
        return _folder(made, source, wish, link=link)
    if wish.again:
        return _again(made, source, wish, link=link)
    return _fresh(made, source, wish, None if max_shard_size is None else parse_size(max_shard_size))


class _Wish(NamedTuple):
    """What a name implies: a format, a directory or a file, and whether to edit the files of the source."""

    format: Format
    folder: bool
    again: bool


def _wish(made: Plan, out: str, *, sized: bool) -> _Wish:
    source = base_of(made)
    own, named, several = format_of(source), format_for(Path(out)), isinstance(source, Shards)
    slash = out.endswith(os.sep)
    if named is not None and sized and (named.folder or not slash):
        if named.folder:
            raise BadArgument(f"{out}: {named.says} cannot have shards of a given size", hint="a directory: out/")
        raise BadArgument(
            f"{out} is the name of a single file, but max_shard_size needs a directory",
            hint=f"a directory: {out.removesuffix(Path(out).suffix)}/",
        )
    if named is None and not slash and not sized and Path(out).suffix.lower() in FOREIGN_SUFFIXES:
        raise _not_written(out, f"{Path(out).suffix} files")
    if named is not None and named.folder:
        return _Wish(named, True, own is named and source is made.leaves)
    if named is None and not slash and not sized:
        if own is not None and own.folder:
            return _Wish(own, True, source is made.leaves)
        form, folder = own or DEFAULT, several
    else:
        form, folder = (DEFAULT, True) if slash or sized or named is None else (named, False)
    again = not sized and form is own and folder == several and source is made.leaves
    if again and form is not DEFAULT and not form.structural and not overlays(made):
        again = False
    if not again and folder:
        form = DEFAULT
    if not form.writes:
        raise _not_written(out, form.says)
    return _Wish(form, folder, again)


def _not_written(out: str, what: str) -> Unsupported:
    names = wording.listing([row.suffixes[0] for row in writable()])
    return Unsupported(f"{out}: {what} cannot be written", hint=f"a name that ends in {names}, or a directory")


def _check(made: Plan, form: Format) -> None:
    """Raise for leaves that a new file in a format cannot hold. Some formats copy bytes of their own unchanged."""
    writer = form.writer()
    source: Any = made.leaves
    for row in made.rows:
        formats = source.formats(row.source) if isinstance(source, Gathered) else {source.format}
        copied = writer.copies_raw and not row.calls and formats == {form.name}
        why = "" if copied else writer.refusal(row.spec)
        if why:
            raise Unsupported(f"{row.path} cannot be written: {why}", hint="cast it, or delete it first")


def _lost(source: Any, form: Format, *, folder: bool) -> tuple[str, ...]:
    """The metadata of the source for which a new file in a format has no place."""
    own = format_of(source)
    keeps = own in (None, DEFAULT) or (own is form and not folder and not own.structural)
    return () if keeps else tuple(f"{key} (not a tensor)" for key in source.metadata)


def _folder(made: Plan, source: Any, wish: _Wish, *, link: bool) -> Layout:
    """A checkpoint that is a directory: a copy with other values, or a new one if leaves get other names or specs."""
    fresh = not wish.again or made.restructured or any(each.spec != each.before for each in made.rows)
    more = sum(nbytes_of(made, each) for each in made.rows if fresh or each.calls)
    if fresh:
        _check(made, wish.format)
    if not wish.again:
        own = format_of(source)
        lost = () if own in (None, DEFAULT) else tuple(f"{key} (not a tensor)" for key in source.metadata)
        return Layout((), True, wish.format, lost, fresh=True, more=more)
    files, left_out = own_files(source, link=link)
    inner = tree_within(source)
    tree = "" if inner == Path() else inner.as_posix()
    if fresh:
        files = [file for file in files if tree and not file.name.startswith(f"{tree}/")]
    return Layout(tuple(files), True, wish.format, tuple(left_out), tree, fresh, more)


def _again(made: Plan, source: Any, wish: _Wish, *, link: bool) -> Layout:
    """The files of the source, each with its remaining leaves."""
    if wish.format is DEFAULT:
        _check(made, wish.format)
    if not wish.folder:
        rows = [(row.source, row) for row in made.rows]
        return Layout((edited_file(made, source, rows, "", link=link),), False, wish.format)
    files, left_out = sidecars(source)
    return Layout((*same_shards(made, source, link=link), *files), True, wish.format, tuple(left_out))


def _fresh(made: Plan, source: Any, wish: _Wish, limit: int | None) -> Layout:
    """New files of a format, with the sidecars of a directory."""
    _check(made, wish.format)
    lost = _lost(source, wish.format, folder=wish.folder)
    if not wish.folder:
        file = fresh_file(made, ordered(made, wish.format), wish.format, "")
        return Layout((file,), False, wish.format, lost)
    files = new_shards(made, wish.format, largest(source) if limit is None else limit)
    beside, left_out = sidecars(source) if isinstance(source, Shards) else ([], [])
    if isinstance(made.leaves, Gathered):
        texts = made.leaves.texts
        beside = [file for file in beside if file.name not in texts]
        beside += [text_file(name, text) for name, text in texts.items()]
    return Layout((*files, *beside), True, wish.format, (*lost, *left_out))
