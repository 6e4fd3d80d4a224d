"""`Checkpoint`: a model on disk as leaves that are read when asked for, and edits that are carried out when saved."""

import importlib
import os
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, get_args, overload

import numpy as np

from paramend._optional import need
from paramend.arrays.registry import backend, backend_of, to_numpy
from paramend.edits.call import Call
from paramend.edits.plan import Plan
from paramend.errors import BadArgument, Unsupported
from paramend.formats.registry import home_of, open_source
from paramend.formats.source import Source
from paramend.leaves.leaves import Editable, Index, keys_of, plain
from paramend.leaves.specs import AnyTree, Array, Slice, Spec, numpy_dtype
from paramend.reports import wording
from paramend.reports.progress import Progress
from paramend.selectors.selector import Selector, resolve

if TYPE_CHECKING:
    import jax
    import torch

    from paramend.rewriting.rewrite import RewriteReport

L = TypeVar("L")
# Under this key the metadata of a file says what separates keys, where its names alone would mislead.
_SEPARATOR = "paramend.separator"


class Checkpoint(Editable):
    """A checkpoint as a tree: `pm.at(checkpoint, selector)` takes it as it takes any other. Made by `pm.open`.

    An edit gives a new checkpoint with a longer plan; nothing is read or written before a leaf is asked for, or
    `.save(out)`. The files themselves never change. It is a context manager; `close()` gives its files back.

    Attributes:
        source: what was opened.
        plan: what the edits so far will do; its text is the table of a dry run.
        recipe: the recipe that the plan was made by, as YAML; "" if it was not made by one alone.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
    >>> _ = save({"fc": {"weight": np.ones((2, 2), "float32"), "bias": np.ones(2, "float32")}}, path)
    >>> checkpoint = open(path)
    >>> checkpoint
    <.../model.safetensors: 2 leaves>
    >>> checkpoint["fc.bias"].tolist()
    [1.0, 1.0]
    """

    def __init__(self, source: Source, plan: Plan | None = None, recipe: str = "") -> None:
        self.source = source
        self.recipe = recipe
        self._plan = plan

    @property
    def plan(self) -> Plan:
        """What the edits so far will do; its text is the table of a dry run."""
        if self._plan is None:
            self._plan = Plan.of(self.source)
        return self._plan

    @property
    def path(self) -> Path:
        """The path, as the user gave it."""
        return Path(self.source.path)

    @property
    def untouched(self) -> bool:
        """Whether no edit was planned."""
        return self._plan is None

    @property
    def format(self) -> str:
        """The name of the format, as the table of formats has it."""
        found: str = self.source.format
        return found

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the file says of itself besides its leaves."""
        return self.source.metadata

    def __repr__(self) -> str:
        count = wording.plural(len(self), "leaf", "leaves")
        edited = 0 if self._plan is None else len(self._plan.changed) + len(self._plan.deleted)
        return f"<{self.path}: {count}{f', {edited:,} edited' if edited else ''}>"

    def __len__(self) -> int:
        return len(self.index.numbers)

    def __getitem__(self, path: str) -> Array:
        """The leaf of this path: a copy, which no later patch of the file changes.

        Raises:
            NoMatch: there is none; the message holds the nearest.
        """
        numbers = resolve(path, self)
        if len(numbers) > 1:
            raise BadArgument(f"{path!r} names {len(numbers)} leaves", hint="pm.at(checkpoint, selector).get()")
        return self.fetch(numbers[0])

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files, which edited checkpoints share."""
        self.source.close()

    # -- as leaves

    @property
    def index(self) -> Index:
        """The names, after the edits."""
        return self.source.index if self._plan is None else self._plan.index

    @property
    def ties(self) -> Mapping[int, int]:
        """Leaf number → the first number of the same leaf, for leaves with several paths."""
        found = self.source.ties
        if found and self._plan is not None and self._plan.deleted:
            return {number: one for number, one in found.items() if number in self._plan.by_number}
        return found

    def twins(self, number: int) -> list[int]:
        """The numbers of all paths of a leaf."""
        one = self.ties.get(number)
        return [number] if one is None else [n for n, o in self.ties.items() if o == one]

    def spec(self, number: int) -> Spec:
        """Shape and dtype of a leaf, after the edits."""
        return self.source.spec(number) if self._plan is None else self._plan.by_number[number].spec

    def nbytes(self, number: int) -> int:
        """The bytes of a leaf, after the edits."""
        return self.source.nbytes(number) if self._untouched(number) else self.spec(number).nbytes

    def refusal(self, number: int) -> str:
        """Why a leaf cannot be read as an array, or ""."""
        return self.source.refusal(number) if self._untouched(number) else ""

    def read(self, number: int) -> Array:
        """A leaf, edited: the values that `save` writes. Without edits it is a view of the file where the format allows
        it: a later patch shows in it. `fetch` gives a copy."""
        if self._untouched(number):
            return self.source.read(number)
        return self.fetch(number)

    def fetch(self, number: int, index: Slice | None = None) -> Array:
        """A leaf, edited, or a slice of it, in memory of its own: nothing of the file stays mapped."""
        if index is not None:
            leaf = self.read(number)
            return np.array(backend(leaf).get(leaf, index))
        if self._untouched(number):
            return _copied(self.source, number)
        row = self.plan.by_number[number]
        out = np.empty(row.spec.size, numpy_dtype(row.spec.dtype))
        at = 0
        from paramend.piecewise.rows import values  # to look at a checkpoint needs none of it

        for piece in values(self.source, row):
            out[at : at + piece.size] = piece
            at += piece.size
        return out.reshape(row.spec.shape)

    def origin(self, number: int) -> Source | None:
        """The source, if it holds the values of a leaf as they are; None if an edit stands between."""
        return self.source if self._untouched(number) else None

    def _untouched(self, number: int) -> bool:
        return self._plan is None or not self._plan.by_number[number].calls

    def children(self, node: object) -> list[tuple[Hashable, object]] | None:
        """The entries of a dict, list or tuple, of which masks are made; None for a leaf."""
        return self.source.children(node)

    # -- edits

    def edited(self, calls: Mapping[int, Call]) -> "Checkpoint":
        """The checkpoint with calls on some leaves added to its plan."""
        return Checkpoint(self.source, self.plan.edited(calls))

    def edited_(self, calls: Mapping[int, Call]) -> None:
        """Refuses: the files of a checkpoint are edited in place by `pm.patch`, which can undo it."""
        verb = next(iter(calls.values())).op.name
        raise Unsupported(f"{verb}_ cannot edit an opened checkpoint in place", hint=self.patched_by.format("..."))

    @property
    def patched_by(self) -> str:
        """How its files are edited in place: code, with `{}` for the edit."""
        path = repr(str(self.path)).replace("{", "{{").replace("}", "}}")
        return f"pm.patch({path}, lambda tree: {{}})"

    def labelled(self, labels: Mapping[int, L], rest: L) -> dict[str, L]:
        """A dict from paths to labels."""
        return {self.index.path(number): labels.get(number, rest) for number in self.index.numbers}

    def deleted(self, numbers: Iterable[int]) -> "Checkpoint":
        """The checkpoint without some leaves."""
        return Checkpoint(self.source, self.plan.without(numbers))

    def moved(self, selector: Selector, numbers: Iterable[int], to: str) -> "Checkpoint":
        """The checkpoint with some leaves under other paths, as `structure.move` moves those of trees in memory."""
        from paramend.edits import structure  # most programs rename nothing

        chosen = {twin for number in numbers for twin in self.plan.twins(number)}
        return Checkpoint(self.source, self.plan.renamed(structure.moves(self.index, selector, chosen, to)))

    def save(
        self,
        out: str | os.PathLike[str],
        *,
        force: bool = False,
        link: bool = False,
        max_shard_size: int | str | None = None,
        record: bool = False,
        progress: Progress | None = None,
    ) -> "RewriteReport":
        """A report of what was written: the checkpoint with all edits, in one pass and bounded memory.

        Args:
            out: the checkpoint to write. A suffix (`.safetensors`, ...) asks for one file of that format, a `/` at
                the end for a directory; without either, it is a file or a directory as the source is.
            force: whether `out` may exist already; it is then replaced in one step.
            link: whether files in which nothing changes get a second name instead of a copy.
            max_shard_size: the most bytes of tensors in one file, such as "5GB"; the output is then a directory.
            record: whether the output carries a record of what was done, with a digest of each leaf that was edited:
                `pm.record` reads it, `pm.verify_record` holds it against the bytes.
            progress: called with an `Event` as bytes are written.

        Raises:
            CannotWrite: the output exists, is the source, or has no place to go to. Nothing was written.
        """
        from paramend.rewriting.rewrite import write  # to look at a checkpoint needs none of it

        return write(
            self.plan,
            out,
            force=force,
            link=link,
            max_shard_size=max_shard_size,
            record=self.recipe if record else None,
            progress=progress,
        )


def open(path: str | os.PathLike[str]) -> Checkpoint:
    """A checkpoint, opened: its leaves are read when they are asked for, as copies.

    A patch of yours that was cut short is taken back first.

    Args:
        path: a file or a directory; its content shows what format it is of.

    Raises:
        CannotRead: there is no such file.
        BadCheckpoint: it is damaged, of no known format, or an undo record that is not yours says that a patch was cut
            short.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
    >>> _ = save({"w": np.ones(3, "float32")}, path)
    >>> with open(path) as checkpoint:
    ...     print(checkpoint.index.path(0), checkpoint.spec(0))
    w float32[3]
    """
    recover(path)
    return Checkpoint(open_source(path))


def recover(path: str | os.PathLike[str]) -> None:
    """Takes back a patch of a checkpoint that was cut short, by `journal.undo.recover`, which most opens need not load.

    Records lie in folders whose names end in `.undo`: in a folder of shards, or beside a file.
    """
    try:
        home = home_of(Path(path))
        folder = home if home.is_dir() else home.parent
        with os.scandir(folder) as inside:
            found = any(entry.name.endswith(".undo") for entry in inside)
    except (OSError, ValueError):  # what is wrong is said by what reads the checkpoint
        return
    if found:
        from paramend.journal import undo  # most checkpoints have no undo records

        undo.recover(path)


# ---- whole trees -------------------------------------------------------------------------------------------


class _InMemory:
    """A tree in memory as a source: all of its leaves are in memory, none in a file."""

    format = ""
    ties: Mapping[int, int] = {}
    stats: Mapping[Path, os.stat_result] = {}

    def __init__(self, tree: Any) -> None:
        self._tree = tree
        self._last: tuple[int, Array] | None = None
        self.path = ""
        paths = tree.index.paths
        keys = {number: keys_of(path) for number, path in paths.items()}
        flat = all(len(key) == 1 for key in keys.values())
        self.index = Index(tree.index.separator if flat else _separator(tree.index.separator, keys.values()))
        self.index.names, self.index.numbers = tree.index.names, tree.index.numbers
        self.metadata = {"format": _kind(tree)}
        names = {number: plain(paths[number], self.index.separator) for number in self.index.numbers}
        split = "/" if any("/" in name for name in names.values()) else "."
        if any(tuple(names[number].split(split)) != key for number, key in keys.items()):
            self.metadata[_SEPARATOR] = "" if flat else self.index.separator
        # Of use to formats that tell lists from dicts, and hold more than arrays.
        self._lists: set[tuple[str, ...]] = set()
        self.rest: list[tuple[tuple[str | int, ...], str, Any]] = []
        self._look(tree.root, ())
        self.keys = {number: self._true(key) for number, key in keys.items()}

    def _look(self, node: Any, above: tuple[str | int, ...]) -> None:
        """Notes the lists, and what is no array."""
        inner: Iterable[tuple[str | int, Any]] = ()
        kind = {int: "scalar", float: "scalar", str: "string", type(None): "None"}.get(type(node), "")
        if hasattr(node, "_fields"):
            inner = [(name, getattr(node, name)) for name in node._fields]
            kind, node = ("", node) if inner else ("None", None)
        elif isinstance(node, list | tuple):
            self._lists.add(tuple(map(str, above)))
            inner = enumerate(node)
            kind = "" if node else type(node).__name__.capitalize()
        elif isinstance(node, Mapping):
            inner = [(str(key), child) for key, child in node.items()]
            kind, node = ("", node) if inner else ("Dict", {})
        elif is_dataclass(node) and not isinstance(node, type):
            inner = [(f.name, getattr(node, f.name)) for f in fields(node) if f.metadata.get("pytree_node", True)]
        for key, child in inner:
            self._look(child, (*above, key))
        if kind and above:
            self.rest.append((above, kind, node))

    def _true(self, keys: tuple[str, ...]) -> tuple[str | int, ...]:
        return tuple(int(key) if keys[:at] in self._lists else key for at, key in enumerate(keys))

    def spec(self, number: int) -> Spec:
        found: Spec = self._tree.spec(number)
        return found

    def nbytes(self, number: int) -> int:
        return self.spec(number).nbytes

    def refusal(self, number: int) -> str:
        return ""

    def extent(self, number: int) -> None:
        return None

    def read(self, number: int) -> Array:
        if self._last is None or self._last[0] != number:
            self._last = number, np.ascontiguousarray(to_numpy(self._tree.read(number)))
        return self._last[1]

    def read_range(self, number: int, start: int, stop: int) -> Array:
        return self.read(number).reshape(-1)[start:stop]

    def children(self, node: Any) -> None:
        return None

    def close(self) -> None:
        pass


def _separator(natural: str, keys: Iterable[tuple[str, ...]]) -> str:
    """The separator that stands in no key."""
    text = "\n".join(key for path in keys for key in path)
    for separator in str(natural), "/", ".":
        if separator not in text:
            return separator
    slash, dot = (next(key for path in keys for key in path if char in key) for char in "/.")
    raise Unsupported(
        f"keys hold both separators, as {slash!r} and {dot!r} do: no name would tell what separates them",
        hint="rename some keys first",
    )


def _kind(tree: Any) -> str:
    """What transformers calls the library of a tree's arrays."""
    for number in tree.index.numbers[:1]:
        library = str(getattr(backend_of(type(tree.read(number))), "__name__", "")).rpartition(".")[2]
        kinds: dict[str, str] = {"torch": "pt", "jax": "flax"}
        return kinds.get(library, "np")
    return "np"


Kind: TypeAlias = Literal["numpy", "jax", "torch"]
_KINDS = get_args(Kind)


@overload
def load(
    path: str | os.PathLike[str], kind: Literal["numpy"] = ..., *, nested: Literal[False], mmap: bool = ...
) -> dict[str, Array]: ...
@overload
def load(
    path: str | os.PathLike[str], kind: Literal["jax"], *, nested: Literal[False], mmap: Literal[False] = ...
) -> "dict[str, jax.Array]": ...
@overload
def load(
    path: str | os.PathLike[str], kind: Literal["torch"], *, nested: Literal[False], mmap: Literal[False] = ...
) -> "dict[str, torch.Tensor]": ...
@overload
def load(
    path: str | os.PathLike[str], kind: Literal["numpy"] = ..., *, nested: bool = ..., mmap: bool = ...
) -> dict[str, AnyTree]: ...
@overload
def load(
    path: str | os.PathLike[str], kind: Kind, *, nested: bool = ..., mmap: Literal[False] = ...
) -> dict[str, AnyTree]: ...
def load(
    path: str | os.PathLike[str], kind: Kind = "numpy", *, nested: bool = True, mmap: bool = False
) -> dict[str, AnyTree]:
    """The arrays of a checkpoint, as nested dicts.

    They are arrays of their own: what happens to the file later does not change them. Leaves that are tied in the file
    are one array under several paths.

    Args:
        path: a file or a directory.
        kind: "numpy", "jax" or "torch".
        nested: whether names fall into keys at their separators, "/" if some name holds one and else "."; if not, a
            flat dict by name comes back, such as `load_state_dict` takes.
        mmap: whether arrays of numpy are read-only views of the file where the format allows it. They cost no memory
            before they are read, and **a later `pm.patch` or `pm.undo` of the file changes them**.

    Raises:
        BadArgument: there is no such kind, or `mmap` is asked for another one than numpy.
        Unsupported: a leaf cannot be read, or that library has no such dtype.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
    >>> _ = save({"fc": {"bias": np.ones(2, "float32")}}, path)
    >>> load(path)
    {'fc': {'bias': array([1., 1.], dtype=float32)}}
    """
    if kind not in _KINDS:
        near = wording.closest(kind, _KINDS, limit=1)
        raise BadArgument(f"{kind!r} is not a kind of arrays", hint=f'"{near[0]}"' if near else ", ".join(_KINDS))
    if mmap and kind != "numpy":
        raise BadArgument(f"mmap=True gives views of the file, and arrays of {kind} are copies", hint="mmap=False")
    convert = _converter(kind)
    recover(path)
    source = open_source(path)
    try:
        paths, separator = source.index.paths, source.index.separator
        made: dict[int, Any] = {}
        for number in source.index.numbers:
            if (first := source.ties.get(number, number)) not in made:
                made[first] = convert(source.read(first) if mmap else _copied(source, first))
        flat = {plain(paths[n], separator): made[source.ties.get(n, n)] for n in source.index.numbers}
        given = source.metadata.get(_SEPARATOR)
        keys = {number: keys_of(paths[number]) for number in source.index.numbers}
    finally:
        source.close()
    if not nested or given == "":
        return flat
    if all(len(key) == 1 for key in keys.values()):  # a flat table of names
        separator = given or ("/" if any("/" in name for name in flat) else ".")
        return _nested((tuple(name.split(separator)), array) for name, array in flat.items())
    return _nested(zip(keys.values(), flat.values(), strict=True))


def _copied(source: Any, number: int) -> Array:
    """A leaf of a source in memory of its own, read without mapping the file."""
    spec = source.spec(number)
    flat: Array = source.read_range(number, 0, spec.size)
    try:
        found = flat.reshape(spec.shape)
    except ValueError as error:  # more axes, or longer ones around an axis of length 0, than numpy has
        raise Unsupported(f"numpy has no array of shape {spec.shape}: {error}") from error
    return found if found.flags.writeable else found.copy()


def _nested(leaves: Iterable[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, array in leaves:
        node = tree
        for at, key in enumerate(path[:-1]):
            node = node.setdefault(key, {})
            if type(node) is not dict:
                raise Unsupported(
                    f"{'/'.join(path[: at + 1])} is a leaf, and {'/'.join(path)} would be below it",
                    hint="pm.load(path, nested=False) gives a flat dict by name",
                )
        if path[-1] in node:
            raise Unsupported(
                f"{'/'.join(path)} is a leaf, and others would be below it",
                hint="pm.load(path, nested=False) gives a flat dict by name",
            )
        node[path[-1]] = array
    return tree


def _converter(kind: str) -> Any:
    """array of numpy → array of that kind."""
    if kind == "numpy":
        return lambda array: array
    need(kind, extra=kind, to=f"load arrays of {kind}")
    library = importlib.import_module(f"paramend.arrays.{kind}")
    return library.from_numpy


def save(
    tree: AnyTree,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    max_shard_size: int | str | None = None,
    progress: Progress | None = None,
) -> "RewriteReport":
    """A report of what was written: a tree in memory, or a `Checkpoint`, as a checkpoint on disk.

    The name of a leaf is its path: keys joined by "." in trees of torch, by "/" in others, or by the other one where
    keys hold the first. `pm.load` gives the tree of dicts back.

    Args:
        tree: any tree of arrays.
        path: the file or, with a `/` at its end or with `max_shard_size`, the directory.
        force: whether it may exist already; it is then replaced in one step.
        max_shard_size: the most bytes of tensors in one file, such as "5GB".
        progress: called with an `Event` as bytes are written.

    Raises:
        CannotWrite: the output exists or has no place to go to.
        Unsupported: two leaves would have one name, or no format holds a leaf.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
    >>> _ = save({"fc": {"weight": np.ones((2, 2), "float32")}}, path)
    >>> load(path)
    {'fc': {'weight': array([[1., 1.],
           [1., 1.]], dtype=float32)}}
    """
    if isinstance(tree, Checkpoint):
        return tree.save(path, force=force, max_shard_size=max_shard_size, progress=progress)
    from paramend.rewriting.rewrite import write  # to look at a checkpoint needs neither
    from paramend.trees.tree import Tree

    made = Plan.of(_InMemory(Tree(tree)))
    return write(made, path, force=force, max_shard_size=max_shard_size, progress=progress)
