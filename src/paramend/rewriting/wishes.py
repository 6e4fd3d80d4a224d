"""What the name of an output asks for: a format, a file or a directory."""

import os
import re
from pathlib import Path
from typing import NamedTuple, TypedDict

from paramend.disk.urls import path_of
from paramend.edits.plan import Plan
from paramend.errors import BadArgument, Unsupported
from paramend.formats.registry import DEFAULT, FOREIGN_SUFFIXES, FORMATS, SUFFIXES, Format, format_for, format_of
from paramend.formats.shards import Shards
from paramend.formats.source import Tiled
from paramend.reports import wording
from paramend.rewriting.arrangement import base_of
from paramend.rewriting.copies import overlays

# What looks like the suffix of a format; others, as in model.v2 and step.100, belong to the name.
_WORD = re.compile(r"\.[a-z_]+")


class How(TypedDict, total=False):
    """How an output is written: with hard links to unchanged files, in files with at most so many bytes of tensors,
    and in the format of that name, if the name of the output need not say it."""

    link: bool
    max_shard_size: int | str | None
    to: str | None


class Wish(NamedTuple):
    """What a name implies: a format, a directory or a file, and whether to edit the files of the source."""

    format: Format
    folder: bool
    again: bool


def wish_of(made: Plan, out: str, *, sized: bool, to: str | None = None) -> Wish:
    """What the name of an output asks for.

    A directory if the most bytes of a file are given (`sized`). A suffix must not contradict the name of a format
    (`to`). If that is "", the suffix must say it; if it is None, a name without a suffix keeps the format of the
    source. `BadArgument` if the suffix is mistyped, `Unsupported` if such files cannot be written.
    """
    source = base_of(made)
    own, named, tiled = format_of(source), format_for(path_of(out)), isinstance(source, Tiled)
    several = isinstance(source, Shards) or tiled
    slash = out.endswith(os.sep)
    if named is None and not slash and not sized and not to:
        _check_suffix(out, strict=own is None, needed=to is not None)
    asked = next((row for row in FORMATS if row.name == to), None)
    if asked is not None:
        _check_asked(out, asked, named, files=slash or sized)
        named = asked
    if named is not None and sized and (named.folder or not slash):
        if named.folder:
            raise BadArgument(f"{out}: {named.says} cannot have shards of a given size", hint="a directory: out/")
        if asked is None:
            raise BadArgument(
                f"{out} is the name of a single file, but max_shard_size needs a directory",
                hint=f"a directory: {out.removesuffix(Path(out).suffix)}/",
            )
    if named is not None and named.folder:
        return Wish(named, True, own is named and source is made.leaves)
    if named is None and not slash and not sized:
        if own is not None and own.folder:
            return Wish(own, True, source is made.leaves)
        form, folder = own or DEFAULT, several
    else:
        parts = own if several and own is not None and own.name == "gguf" and not sized else DEFAULT
        form, folder = (parts, True) if slash or sized or named is None else (named, False)
    again = not sized and not tiled and form is own and folder == several and source is made.leaves
    if again and form is not DEFAULT and not form.structural and not overlays(made):
        again = False
    if not again and folder:
        if form.name == "gguf":
            raise Unsupported(
                f"{out}: new files of a model in several cannot be laid out", hint=f"{out.rstrip(os.sep)}.gguf"
            )
        form = DEFAULT
    return Wish(form, folder, again)


def named_format(out: str, *, sized: bool) -> Format:
    """The format of a tree in memory that is written under a name; without a suffix, the default."""
    named = format_for(path_of(out))
    return DEFAULT if named is None or (not named.folder and (sized or out.endswith(os.sep))) else named


def _check_suffix(out: str, *, strict: bool, needed: bool) -> None:
    """Raise for a suffix that is nearly that of a format, or that of a format that cannot be written; with `strict`
    also for any that is a word, with `needed` for a name without one, too."""
    suffix = Path(out).suffix.lower()
    words = [known[1:] for known in SUFFIXES]
    near = wording.closest(suffix[1:], words, limit=1) if _WORD.fullmatch(suffix) else []
    if suffix in FOREIGN_SUFFIXES:
        hint = f"a name that ends in {_suffixes()}, or a directory"
        raise Unsupported(f"{out}: {Path(out).suffix} files cannot be written", hint=hint)
    if near:
        raise BadArgument(
            f"{out}: {Path(out).suffix} is not the suffix of a format",
            hint=f"{out.removesuffix(Path(out).suffix)}.{near[0]}",
        )
    if needed or (strict and _WORD.fullmatch(suffix)):
        what = f"{Path(out).suffix} is not the suffix of a format" if suffix else "the name does not say which format"
        more = ", or --to FORMAT" if needed else ""
        raise BadArgument(f"{out}: {what}", hint=f"a name that ends in {_suffixes()}, or a directory: {out}/{more}")


def _check_asked(out: str, asked: Format, named: Format | None, *, files: bool) -> None:
    if named is not None and named is not asked:
        raise BadArgument(
            f"{out} is the name of one of the {named.says}, but the format is to be {asked.name}",
            hint=out.removesuffix(Path(out).suffix) + asked.suffixes[0],
        )
    if files and asked is not DEFAULT and not asked.folder:
        raise BadArgument(
            f"{out}: a directory holds files of {DEFAULT.name}, but the format is to be {asked.name}",
            hint=f"a file: {out.rstrip(os.sep)}{asked.suffixes[0]}",
        )


def _suffixes() -> str:
    return wording.listing([row.suffixes[0] for row in FORMATS])
