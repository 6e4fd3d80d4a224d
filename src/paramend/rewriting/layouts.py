"""Layouts: the files of a rewrite and the content of each, byte by byte, before any is written."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paramend.disk.failures import ELSEWHERE
from paramend.disk.urls import path_of, text_of
from paramend.edits.plan import Plan, Row
from paramend.errors import Unsupported
from paramend.formats.registry import DEFAULT, Format
from paramend.formats.source import Relabelled, Tiled
from paramend.leaves.origins.origin import Partly
from paramend.leaves.origins.stored import Stored
from paramend.piecewise.rows import expression
from paramend.reports import wording
from paramend.rewriting.arrangement import base_of, lost
from paramend.rewriting.configurations import followed_files, left_behind
from paramend.rewriting.copies import edited_file, overlays
from paramend.rewriting.files import File, fresh_file, nbytes_of, ordered, text_file
from paramend.rewriting.shards import grown_shards, largest, new_shards, parse_size, same_shards
from paramend.rewriting.sidecars import own_files, sidecars, tree_within
from paramend.rewriting.wishes import Wish, wish_of


@dataclass(frozen=True, slots=True)
class Layout:
    """The files that a rewrite makes.

    `folder` says whether they go into a directory, `left_out` which files of the source do not, each with the reason.
    For a format whose checkpoints are directories, `tree` is the folder in it that holds the tree, "" for all of it; if
    it is `fresh`, the writer of the format fills it, else it is a copy with new chunks for edits. `more` is about how
    many bytes are written besides those of the files, `said` what is to be said of files beside the weights.
    """

    files: tuple[File, ...]
    folder: bool
    format: Format
    left_out: tuple[str, ...] = ()
    tree: str = ""
    fresh: bool = False
    more: int = 0
    said: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.more + sum(file.nbytes for file in self.files if not file.link)


def lay_out(
    made: Plan,
    out: str | os.PathLike[str],
    *,
    link: bool = False,
    max_shard_size: int | str | None = None,
    to: str | None = None,
) -> Layout:
    """The layout of a plan's result under a name.

    The suffix of the name selects the format; a name without one keeps that of the source, file or directory, unless
    the format is given: see `wish_of`. `Unsupported` if the format cannot hold a leaf, `RenameClash` if two leaves
    would have the same name in the file.
    """
    source = base_of(made)
    wish = wish_of(made, text_of(out), sized=max_shard_size is not None, to=to)
    kept = wish.format.name == source.format  # what its own file says of a model
    asked = [document.name for document in made.texts if document.asked and not (document.own and kept)]
    if asked and (wish.format.folder or not wish.folder):
        raise Unsupported(
            f"{asked[0]} is edited, and {text_of(out)} would hold the weights alone",
            hint=f"a directory: {path_of(out).with_suffix('')}/",
        )
    if wish.format.folder:
        return _folder(made, source, wish, link=link)
    if wish.again:
        return _again(made, source, wish, link=link)
    return _fresh(made, source, wish, None if max_shard_size is None else parse_size(max_shard_size), link=link)


def lay_in_place(made: Plan) -> tuple[list[File], list[tuple[str, str]]]:
    """What a plan that adds leaves to its source, or lengthens its keys, changes in the folder of it: the files that
    are new there or replace others, and (old name, new name) of those that get another name. `Unsupported` if leaves of
    the source go or move, or it has no place for further files."""
    source = base_of(made)
    if any(document.own for document in made.texts):
        from paramend.rewriting import gguf  # most programs use no GGUF files

        return gguf.in_place(made, source), []
    files = grown_shards(made, source, link=False, splits=True)
    if files is None:
        raise Unsupported(
            f"{source.path}: in place, values can change and leaves can be added; added leaves go into a file of their "
            "own, which readers find only in a folder with model.safetensors or its shards, and others keep their name",
            hint=ELSEWHERE,
        )
    _check(made, DEFAULT)
    own = {file.path for file in source.files}
    stay = {each.origin: each.name for each in files if each.origin in own}
    new = [each for each in files if each.origin not in own]
    for path in own:
        if path not in stay and path.name not in {each.name for each in new}:
            raise Unsupported(
                f"{path}: it would both change and become the first of several files, with another name",
                hint="two patches: one that edits, one that inserts",
            )
    new += [each for each in _beside(made, source)[0] if each.origin is None]
    return new, [(path.name, stay[path]) for path in own if stay.get(path, path.name) != path.name]


def _check(made: Plan, form: Format) -> None:
    """Raise for leaves that a new file in a format cannot hold. Some formats copy bytes of their own unchanged."""
    writer = form.writer()
    for row in made.rows:
        if row.spec.dtype.startswith("key<"):
            raise Unsupported(
                f"{row.path} is typed PRNG keys ({row.spec}), and {form.says} hold plain numbers",
                hint="jax.random.key_data(key) in its place, or a name that ends in .orbax",
            )
        if not form.single and not made.name(row):
            raise Unsupported(
                f"{form.says} hold arrays under names, and this is a single one", hint='pm.save({"w": array}, path)'
            )
        why = writer.refusal(row.spec)
        if why and not (writer.copies_raw and _is_copied(made, row, form)):
            raise Unsupported(f"{row.path} cannot be written: {why}", hint="cast it, or delete it first")


def _is_copied(made: Plan, row: Row, form: Format) -> bool:
    """Whether the bytes of a leaf are those of files of a format."""
    origin = expression(made.leaves, row)
    formats = {each.source.format if isinstance(each, Stored) else "" for each in origin.stored()}
    return formats == {form.name} and (not row.calls or isinstance(origin, Stored | Partly))


def _folder(made: Plan, source: Any, wish: Wish, *, link: bool) -> Layout:
    """A checkpoint that is a directory: a copy with other values, or a new one if leaves get other names or specs."""
    if wish.again and isinstance(source, Relabelled) and not any(each.calls for each in made.rows):
        return _relabelled(made, source, wish, link=link)
    fresh = not wish.again or made.restructured or any(each.spec != each.before for each in made.rows)
    tiles = isinstance(source, Tiled)  # all its files are known
    fresh = fresh or tiles
    more = sum(nbytes_of(made, each) for each in made.rows if fresh or each.calls)
    if fresh:
        _check(made, wish.format)
    if not wish.again:
        return Layout((), True, wish.format, lost(source, wish.format), fresh=True, more=more)
    files, left_out = own_files(source, link=link)
    inner = tree_within(source)
    tree = "" if inner == Path() else inner.as_posix()
    if fresh:
        files = [file for file in files if file.origin not in source.stats and (tiles or _is_outside(file, tree))]
    return Layout(tuple(files), True, wish.format, tuple(left_out), tree, fresh, more)


def _is_outside(file: File, tree: str) -> bool:
    return bool(tree) and not file.name.startswith(f"{tree}/")


def _relabelled(made: Plan, source: Any, wish: Wish, *, link: bool) -> Layout:
    """A copy whose leaves get other names, or go, by another file of metadata; files of nothing but what goes, go."""
    _check(made, wish.format)
    files, left_out = own_files(source, link=link)
    stays = {row.source for row in made.rows}
    kept = {each.source.path for number in stays for each in source.tiles(number)}
    gone = {each.source.path for row in made.deleted for each in source.tiles(row.source)} - kept - source.objects
    table, _, text = source.relabelled({row.source: made.name(row) for row in made.rows})
    files = [file for file in files if file.origin != table and file.origin not in gone]
    return Layout((*files, text_file(table.name, text)), True, wish.format, tuple(left_out))


def _again(made: Plan, source: Any, wish: Wish, *, link: bool) -> Layout:
    """The files of the source, each with its remaining leaves."""
    if wish.format is DEFAULT or wish.format.name == "gguf":
        _check(made, wish.format)
    if wish.format.name == "gguf" and wish.folder:
        from paramend.rewriting import gguf  # most programs use no GGUF files

        files = gguf.same_parts(made, source, link=link)
        return Layout(tuple(files), True, wish.format, said=left_behind(made, source))
    if wish.format.name == "gguf" and not overlays(made):
        file = fresh_file(made, made.rows, wish.format, "")
        return Layout((file,), False, wish.format, said=left_behind(made, source))
    if not wish.folder:
        rows = [(row.source, row) for row in made.rows]
        file = edited_file(made, source, rows, "", link=link)
        return Layout((file,), False, wish.format, said=left_behind(made, source))
    beside, left_out, said = _beside(made, source)
    return Layout((*same_shards(made, source, link=link), *beside), True, wish.format, tuple(left_out), said=said)


def _beside(made: Plan, source: Any) -> tuple[Sequence[File], list[str], tuple[str, ...]]:
    """The files beside the weights, what is left out, and what is to be said of them."""
    files, left_out, weights = (
        sidecars(source) if hasattr(source, "shard_index") and source.format != "gguf" else ([], [], [])
    )
    changed = {document.name: document.text for document in made.texts if not document.own}
    files = [file for file in files if file.name not in changed]
    files += [text_file(name, text) for name, text in changed.items() if text]
    left_out += [f"{name} (no longer true)" for name, text in changed.items() if not text]
    beside, said = followed_files(made, files)
    said += [line for document in made.texts for line in document.said]
    said += [f"copied as they are, with weights of their own: {wording.listing(weights, 4)}"] if weights else []
    return beside, left_out, tuple(said)


def _fresh(made: Plan, source: Any, wish: Wish, limit: int | None, *, link: bool) -> Layout:
    """New files of a format, with the sidecars of a directory. Where leaves only come, the old files stay."""
    _check(made, wish.format)
    gone = lost(source, wish.format)
    if not wish.folder:
        file = fresh_file(made, ordered(made, wish.format), wish.format, "")
        return Layout((file,), False, wish.format, gone, said=left_behind(made, source))
    files = grown_shards(made, source, link=link, splits=link) if limit is None else None
    files = files or new_shards(made, wish.format, largest(source) if limit is None else limit)
    beside, left_out, said = _beside(made, source)
    return Layout((*files, *beside), True, wish.format, (*gone, *left_out), said=said)
