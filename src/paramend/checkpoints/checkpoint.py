"""`Checkpoint`: a model on disk, whose leaves are read on demand and whose edits are computed when it is saved."""

import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from paramend.anatomy.beside import absent_head, mark_blocks
from paramend.anatomy.documents import Document
from paramend.anatomy.quantization import quantization_of
from paramend.arrays.initializers import NOWHERE, Site
from paramend.arrays.registry import backend
from paramend.checkpoints.copies import copied
from paramend.disk.urls import Url, path_of
from paramend.edits.call import Call
from paramend.edits.damage import Damage
from paramend.edits.plan import Plan
from paramend.edits.quantized import check_calls, check_renamed, check_whole
from paramend.edits.selection import at
from paramend.edits.weights import chosen, weighed
from paramend.errors import BadArgument, Unsupported, printable
from paramend.formats.gathered import leaf_of
from paramend.formats.registry import home_of, open_source
from paramend.formats.source import Source
from paramend.leaves.leaves import Editable, Group, Index
from paramend.leaves.origins.origin import Origin
from paramend.leaves.paths import labels, text_of
from paramend.leaves.specs import Array, Slice, Spec, numpy_dtype
from paramend.reports import wording
from paramend.reports.progress import Progress
from paramend.selectors.selector import Selector

if TYPE_CHECKING:
    from paramend.rewriting.rewrite import RewriteReport

L = TypeVar("L")


# What `dir` shows.
_PUBLIC = {
    *("close", "format", "items", "keys", "metadata", "path", "paths"),
    *("plan", "recipe", "save", "source", "values"),
}


class Checkpoint(Editable):
    """A checkpoint as a tree: `pm.at(checkpoint, selector)` takes it like any other. Made by `pm.open`.

    Like a dict it has `len`, `in`, `[path]`, `.keys()`, `.values()` and `.items()`; leaves are read one at a time. A
    quantised weight is one leaf, decoded as it is read, unless the checkpoint was opened `raw`.

    An edit returns a new checkpoint with a longer plan; leaves are read on demand, and nothing is written before
    `.save(out)`. The files themselves never change. It is a context manager; `close()` closes its files.

    Attributes:
        source: what was opened.
        plan: what the edits so far will do; its text is the table of a dry run.
        recipe: the recipe that the plan comes from, as YAML; "" if it does not come from one alone.
        raw: whether leaves are taken as they are stored, also the codes and scales of quantised weights.

    >>> import tempfile
    >>> from paramend.checkpoints.whole import save
    >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
    >>> _ = save({"fc": {"weight": np.ones((2, 2), "float32"), "bias": np.ones(2, "float32")}}, path)
    >>> checkpoint = open(path)
    >>> checkpoint
    <.../model.safetensors: 2 leaves>
    >>> checkpoint["fc.bias"].tolist()
    [1.0, 1.0]
    """

    def __init__(self, source: Source, plan: Plan | None = None, recipe: str = "", *, raw: bool = False) -> None:
        self.source = source
        self.recipe = recipe
        self.raw = raw
        self._plan = plan

    @property
    def plan(self) -> Plan:
        """What the edits so far will do; its text is the table of a dry run."""
        if self._plan is None:
            self._plan = Plan.of(self.source)
        return self._plan

    @property
    def texts(self) -> tuple[Document, ...]:
        """The files beside the weights that edits change."""
        return () if self._plan is None else self._plan.texts

    @property
    def path(self) -> Path:
        """The path, as given by the user."""
        return path_of(self.source.path)

    @property
    def untouched(self) -> bool:
        """Whether no edit was planned."""
        return self._plan is None

    @property
    def format(self) -> str:
        """The name of the format in the table of formats."""
        return str(self.source.format)

    @cached_property
    def quantization(self) -> Mapping[str, object] | None:
        """What the configuration beside the weights says of their quantisation; None if it says nothing."""
        return None if self.configuration is not None else quantization_of(self.path, self.texts)

    @property
    def configuration(self) -> bytes | None:
        """The configuration that its own file holds, as JSON; None for formats whose files hold none."""
        source: Any = self.source
        found: bytes | None = getattr(getattr(source, "base", source), "configuration", None)
        return found

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The metadata of the file."""
        return self.source.metadata

    def __repr__(self) -> str:
        count = wording.plural(len(self), "leaf", "leaves")
        edited = 0 if self._plan is None else len(self._plan.changed) + len(self._plan.deleted)
        return f"<{printable(str(self.path))}: {count}{f', {edited:,} edited' if edited else ''}>"

    def _repr_html_(self) -> str:
        return at(self, "**")._repr_html_() if len(self) else repr(self)

    def __len__(self) -> int:
        return len(weighed(self).index.numbers)

    def __iter__(self) -> Iterator[str]:
        """The paths, as of a dict."""
        return iter(self.paths)

    def __contains__(self, path: object) -> bool:
        """Whether there is a leaf of exactly this path, with "/" or "." between keys."""
        if not isinstance(path, str):
            return False
        index = weighed(self).index
        if path in index.texts.values():
            return True
        pieces = tuple(map(text_of, labels(path)))
        return any(index.pieces(number) == pieces for number in index.numbers)

    def __dir__(self) -> list[str]:
        """What users call; the verbs of `Leaves` are for engines."""
        return [name for name in super().__dir__() if name.startswith("__") or name in _PUBLIC]

    @property
    def paths(self) -> list[str]:
        """The paths of its leaves, in order; each is a selector for its leaf."""
        return list(map(weighed(self).index.path, weighed(self).index.numbers))

    def keys(self) -> list[str]:
        """The paths, as of a dict."""
        return self.paths

    def values(self) -> Iterator[Array]:
        """The leaves, each read when it comes."""
        return map(weighed(self).fetch, weighed(self).index.numbers)

    def items(self) -> Iterator[tuple[str, Array]]:
        """Pairs of path and leaf, each read when it comes.

        >>> import tempfile
        >>> from paramend.checkpoints.whole import save
        >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
        >>> _ = save({"a": np.zeros(2), "b": np.ones(1)}, path)
        >>> [(path, leaf.tolist()) for path, leaf in open(path).items()]
        [('a', [0.0, 0.0]), ('b', [1.0])]
        """
        return zip(self.paths, self.values(), strict=True)

    def __getitem__(self, path: str) -> Array:
        """The leaf at this path: a copy, which later patches of the file do not change.

        Raises:
            NoMatch: there is no such leaf; the message has the nearest path.
        """
        leaves = weighed(self)
        numbers = chosen(path, leaves)
        if len(numbers) > 1:
            raise BadArgument(f"{path!r} names {len(numbers)} leaves", hint="pm.at(checkpoint, selector).get()")
        return cast(Array, leaves.fetch(numbers[0]))

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files, which are shared with edited checkpoints."""
        self.source.close()

    def absence(self, text: str) -> tuple[str, str] | None:
        """Why a selector finds nothing, and the path of what it means: a head that is tied to the embedding."""
        if self._plan is not None and self._plan.restructured:  # what is absent may have been there
            return None
        return absent_head(text, self.index, self.path)

    @property
    def index(self) -> Index:
        """The names, after the edits."""
        return self.source.index if self._plan is None else self._plan.index

    @property
    def ties(self) -> Mapping[int, int]:
        found = self.source.ties
        if found and self._plan is not None and self._plan.deleted:
            return {number: one for number, one in found.items() if number in self._plan.by_number}
        return found

    def twins(self, number: int) -> list[int]:
        one = self.ties.get(number)
        return [number] if one is None else [n for n, o in self.ties.items() if o == one]

    def spec(self, number: int) -> Spec:
        return self.source.spec(number) if self._plan is None else self._plan.by_number[number].spec

    def nbytes(self, number: int) -> int:
        return self.source.nbytes(number) if self._untouched(number) else self.spec(number).nbytes

    def refusal(self, number: int) -> str:
        return self.source.refusal(number) if self._untouched(number) else ""

    def read(self, number: int) -> Array:
        """A leaf, edited: the values that `save` writes. Without edits it is a view of the file where the format allows
        it, so a later patch changes it; `fetch` returns a copy."""
        if self._untouched(number):
            return self.source.read(number)
        return self.fetch(number)

    def fetch(self, number: int, index: Slice | None = None) -> Array:
        """A leaf, edited, or a slice of it, as a copy: nothing of the file stays mapped."""
        if index is not None:
            leaf = self.read(number)
            return np.array(backend(leaf).get(leaf, index))
        if self._untouched(number):
            return copied(self.source, number)
        row = self.plan.by_number[number]
        out = np.empty(row.spec.size, numpy_dtype(row.spec.dtype))
        at = 0
        from paramend.piecewise.rows import values  # not needed to look at a checkpoint

        for piece in values(self.source, row):
            out[at : at + piece.size] = piece
            at += piece.size
        return out.reshape(row.spec.shape)

    def home(self, number: int) -> Source | None:
        """The source, if it holds the values of a leaf unedited; None otherwise."""
        return self.source if self._untouched(number) else None

    def _untouched(self, number: int) -> bool:
        return self._plan is None or not self._plan.by_number[number].calls

    def children(self, node: object) -> list[tuple[Hashable, object]] | None:
        return self.source.children(node)

    def edited(self, calls: Mapping[int, Call]) -> "Checkpoint":
        check_calls(self, calls)
        sealed = {n: call for n, call in calls.items() if call.op.moves is not None and self.source.refusal(n)}
        made = self.planned(self.plan.edited({n: call for n, call in calls.items() if n not in sealed}))
        if not sealed:
            return made
        from paramend.checkpoints.gathering import moved  # most leaves can be read

        return made.remade(moved(made.plan, sealed))

    def planned(self, plan: Plan, recipe: str = "") -> "Checkpoint":
        """The same checkpoint with another plan."""
        return Checkpoint(self.source, plan, recipe, raw=self.raw)

    def edited_(self, calls: Mapping[int, Call]) -> None:
        """Raise: the files of a checkpoint are edited in place by `pm.patch`, which can be undone."""
        verb = next(iter(calls.values())).op.name
        raise Unsupported(f"{verb}_ cannot edit an opened checkpoint in place", hint=self.patched_by.format("..."))

    @property
    def patched_by(self) -> str:
        """The code that edits its files in place, with `{}` for the edit."""
        path = repr(str(self.path)).replace("{", "{{").replace("}", "}}")
        return f"pm.patch({path}, lambda tree: {{}})"

    def regrouped(self, groups: Sequence[Group], *, close_up: bool = True) -> "Checkpoint":
        """The checkpoint with groups of leaves replaced by others; the paths of all others stay."""
        from paramend.checkpoints.gathering import regrouped  # most edits regroup nothing

        check_whole(self, {number for group in groups for number in group.numbers}, "be made part of other leaves")
        return self.remade(regrouped(self.plan, groups))

    def remade(self, plan: Plan) -> "Checkpoint":
        """What a plan makes of other leaves, taken like those of this checkpoint."""
        source = cast(Source, plan.leaves)
        planned = plan.texts or any(map(attrgetter("calls"), plan.rows))
        return Checkpoint(source, plan if planned else None, raw=self.raw)

    def labelled(self, labels: Mapping[int, L], rest: L) -> dict[str, L]:
        return {self.index.path(number): labels.get(number, rest) for number in self.index.numbers}

    def deleted(self, numbers: Iterable[int]) -> "Checkpoint":
        gone = {twin for number in numbers for twin in self.plan.twins(number)}
        check_whole(self, gone)
        return self.planned(self.plan.without(gone))

    def moved(self, selector: Selector, numbers: Iterable[int], to: str) -> "Checkpoint":
        """The checkpoint with some leaves under other paths, like `structure.relocate` for trees in memory."""
        from paramend.edits import structure  # most programs rename nothing

        chosen = {twin for number in numbers for twin in self.plan.twins(number)}
        moved = structure.moves(self.index, selector, chosen, to)
        check_renamed(self, lambda: moved)
        return self.relocated(moved)

    def relocated(self, moves: Mapping[int, Sequence[tuple[str, int | None]]]) -> "Checkpoint":
        made = self.planned(self.plan.renamed(moves))
        if not self.quantization:
            return made
        from paramend.edits.decoding import modules, renamed  # most checkpoints are not quantised

        moved = {module: new for n in self.index.numbers for module, new in [modules(self, [n]) + modules(made, [n])]}
        return cast("Checkpoint", renamed(made, moved))

    def expression(self, number: int) -> Origin:
        from paramend.piecewise.rows import expression  # not needed to look at a checkpoint

        return leaf_of(self.source, number) if self.untouched else expression(self.source, self.plan.by_number[number])

    def computing(self, origin: Origin, call: Call, *, path: str, pieces: tuple[str, ...]) -> Origin:
        from paramend.piecewise.edited import Edited  # as above

        place = Site(pieces, out_first=self.index.separator == ".") if call.op.placed else NOWHERE
        return Edited(origin, [call], [place], path, Damage())

    def save(
        self,
        out: str | os.PathLike[str],
        *,
        force: bool = False,
        link: bool = False,
        max_shard_size: int | str | None = None,
        record: bool = False,
        workers: int | None = None,
        engine: str = "processes",
        resume: bool = False,
        progress: Progress | None = None,
    ) -> "RewriteReport":
        """The report of what was written: the checkpoint with all edits, in one pass and bounded memory.

        Args:
            out: the checkpoint to write. A suffix (`.safetensors`, ...) asks for one file of that format, a `/` at
                the end for a directory; without either, it is a file or a directory like the source.
            force: whether `out` may already exist; it is then replaced in one step.
            link: whether unchanged files are hard-linked instead of copied.
            max_shard_size: the most bytes of tensors in one file, such as "5GB"; the output is then a directory.
            record: whether the output carries a record of what was done, with a digest of each edited leaf:
                `pm.record` reads it, `pm.verify_record` checks it against the bytes.
            workers: how many processes make it, which write the same bytes as one.
            engine: "processes" on this machine, or "ray": workers of Ray, on a cluster at `RAY_ADDRESS` or one that is
                started here; "ray://HOST:PORT" for one that is far away.
            resume: whether to go on from what an earlier run left that was killed, and to leave what is made if this
                one is cut short.
            progress: called with an `Event` as bytes are written.

        Raises:
            BadArgument: the suffix is mistyped.
            CannotWrite: the output exists, is the source, or its folder does not exist; or what is to be resumed has
                other edits, options or sources. Nothing was written.
            MissingExtra: Ray is not installed.
        """
        from paramend.rewriting.crews import Crew  # not needed to look at a checkpoint
        from paramend.rewriting.rewrite import write

        return write(
            self.plan,
            out,
            force=force,
            link=link,
            max_shard_size=max_shard_size,
            record=self.recipe if record else None,
            progress=progress,
            crew=Crew(workers, engine, resume),
        )


def open(path: str | os.PathLike[str], *, raw: bool = False) -> Checkpoint:
    """A checkpoint, opened: its leaves are read on demand, as copies.

    If a patch of yours was cut short, it is taken back first.

    Args:
        path: a file or a directory; its format is detected from its content.
        raw: whether leaves are taken as they are stored, also the codes and scales of quantised weights; without it,
            edits that would take these for values are refused.

    Raises:
        CannotRead: there is no such file.
        BadCheckpoint: it is damaged, its format is unknown, or an undo record that is not yours says that a patch was
            cut short.

    >>> import tempfile
    >>> from paramend.checkpoints.whole import save
    >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
    >>> _ = save({"w": np.ones(3, "float32")}, path)
    >>> with open(path) as checkpoint:
    ...     print(checkpoint.index.path(0), checkpoint.spec(0))
    w float32[3]
    """
    recover(path)
    return checkpoint_at(path, raw=raw)


def checkpoint_at(path: str | os.PathLike[str], *, raw: bool = False) -> Checkpoint:
    """The same as `open`, without a look at records of patches."""
    source = open_source(path)
    mark_blocks(source, path_of(source.path))
    return Checkpoint(source, raw=raw)


def recover(path: str | os.PathLike[str]) -> None:
    """Take back a patch that was cut short, by `journal.undo.recover`, which is loaded only if there are undo records.

    Records are in folders whose names end in `.undo`: in a folder of shards, or beside a file.
    """
    try:
        if isinstance(path_of(path), Url):  # nothing in a store is changed in place
            return
        home = home_of(Path(path))
        folder = home if home.is_dir() else home.parent
        with os.scandir(folder) as inside:
            found = any(entry.name.endswith(".undo") for entry in inside)
    except (OSError, ValueError):  # whoever reads the checkpoint reports it
        return
    if found:
        from paramend.journal import undo  # most checkpoints have no undo records

        undo.recover(path)
