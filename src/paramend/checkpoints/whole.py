"""Whole trees: a checkpoint as nested dicts of arrays, and a tree in memory as a checkpoint."""

import copy
import importlib
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args, overload

import numpy as np

from paramend._optional import need
from paramend.checkpoints.checkpoint import Checkpoint, recover
from paramend.checkpoints.copies import copied
from paramend.checkpoints.memory import SEPARATOR, InMemory
from paramend.disk.identity import check_not_overwritten
from paramend.disk.urls import text_of
from paramend.edits.plan import Plan
from paramend.edits.weights import weighed
from paramend.errors import BadArgument, RenameClash, Unsupported
from paramend.formats.registry import open_source
from paramend.formats.source import Source
from paramend.leaves.outlines import ATOMS, Outline, Place, closed, once, outline_of
from paramend.leaves.paths import Joined
from paramend.leaves.specs import BLOCKS, AnyTree, Array
from paramend.reports import wording
from paramend.reports.progress import Progress

if TYPE_CHECKING:
    import jax
    import torch

    from paramend.rewriting.rewrite import RewriteReport

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
    """What a checkpoint holds, as nested dicts of arrays.

    They are copies, which later changes of the file do not affect. Leaves that are tied in the file are one array under
    several paths; those of JAX are one each, so that a step may donate them. Steps, learning rates and all else that is
    not an array are there as the file has them; so are lists and tuples. Typed PRNG keys are their numbers; with "jax"
    they are keys. Weights in blocks of GGUF are decoded to float32.

    Args:
        path: a file or a directory.
        kind: "numpy", "jax" or "torch".
        nested: whether names are split into keys at their separators, "/" if some name contains one, otherwise ".";
            if False, the result is a flat dict of the arrays by name, as `load_state_dict` takes it.
        mmap: whether numpy arrays are read-only views of the file where the format allows it. They take no memory
            until they are read, and **a later `pm.patch` or `pm.undo` of the file changes them**.

    Raises:
        BadArgument: there is no such kind, or `mmap` is used with a kind other than numpy.
        Unsupported: a leaf cannot be read, that library has no such dtype, or two leaves have one name.
        BadCheckpoint: it is damaged, or another program wrote into it while it was read.

    >>> import tempfile
    >>> from pathlib import Path
    >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
    >>> _ = save({"fc": {"bias": np.ones(2, "float32")}}, path)
    >>> load(path)
    {'fc': {'bias': array([1., 1.], dtype=float32)}}
    """
    if kind not in _KINDS:
        near = wording.closest(kind, _KINDS, limit=1)
        raise BadArgument(f"{kind!r} is not a kind of array", hint=f'"{near[0]}"' if near else ", ".join(_KINDS))
    if mmap and kind != "numpy":
        raise BadArgument(f"mmap=True gives views of the file, and {kind} arrays are copies", hint="mmap=False")
    library: Any = None
    if kind != "numpy":
        need(kind, extra=kind, to=f"load {kind} arrays")
        library = importlib.import_module(f"paramend.arrays.{kind}")
    recover(path)
    source = open_source(path)
    try:
        names = None if nested else _names(source)
        outline, seen = outline_of(source), weighed(Checkpoint(source))
        ties = {} if kind == "jax" else source.ties
        made: dict[int, Any] = {}
        for number, (_, place) in outline.places.items():
            if (first := ties.get(number, number)) not in made:
                blocks = source.spec(first).dtype in BLOCKS
                array = seen.read(first) if blocks else source.read(first) if mmap else copied(source, first)
                scalar = place.scalar and not array.ndim
                leaf = array.item() if scalar else array if library is None else library.from_numpy(array)
                made[first] = library.typed_keys(leaf, place.key) if place.key and kind == "jax" else leaf
        arrays = {number: made[ties.get(number, number)] for number in source.index.numbers}
        if not mmap:
            check_not_overwritten(source.stats)
        given = source.metadata.get(SEPARATOR)
    finally:
        source.close()
    if names is not None or given == "":
        return {name: arrays[number] for name, number in (names or _names(source)).items()}
    tree: dict[str, Any] = _tree(outline, arrays, given, natural="." if kind == "torch" else "/")
    return tree


def _names(source: Source) -> dict[str, int]:
    """Name → leaf; `Unsupported` if two leaves have one name."""
    found: dict[str, int] = {}
    for number in source.index.numbers:
        name = source.index.name(number)
        if name in found:
            raise Unsupported(
                f"{source.path}: two leaves are called {name}: they have different keys, which read the same",
                hint=f"pm.load({str(source.path)!r}) keeps both",
            )
        found[name] = number
    return found


def _tree(outline: Outline, arrays: Mapping[int, Any], given: str | None, *, natural: str) -> Any:
    """The tree of a checkpoint, with the names of a flat table split.

    Keys that were split off a name remember it if trees of this kind have another separator, so that the names survive
    a later `save`.
    """
    is_data = once(_is_data)
    memo: dict[int, Any] = {}
    entries = [pair for pair in outline.entries if type(pair[1]) is Place or is_data(pair[1])]
    names = [keys[0] if len(keys) == 1 else None for keys, value in entries if type(value) is Place]
    if names and all(type(name) is str for name in names):
        separator = given or ("/" if any("/" in str(name) for name in names) else ".")
        join = partial(Joined, before=separator) if separator != natural else str
        entries = [(_split(keys[0], separator, join) if type(v) is Place else keys, v) for keys, v in entries]
    try:
        return Outline(entries, outline.containers).nested(
            lambda value: arrays[value.number] if type(value) is Place else copy.deepcopy(value, memo),
            lambda inner, like: closed(inner, like if isinstance(like, list | tuple) else None),
        )
    except RenameClash as error:
        hint = "pm.load(path, nested=False) gives a flat dict by name"
        raise Unsupported(str(error).partition("\n")[0], hint=hint) from None


def _split(name: str, separator: str, join: Callable[[str], str]) -> tuple[str, ...]:
    first, *rest = name.split(separator)
    return first, *map(join, rest)


def _is_data(value: Any) -> bool:
    """Whether an entry that is not an array can be given without running code of its file."""
    if isinstance(value, list | tuple):
        return not hasattr(value, "_fields") and all(map(_is_data, value))
    return type(value) in ATOMS or type(value) in (bytearray, dict, OrderedDict, set) or isinstance(value, np.generic)


def save(
    tree: AnyTree,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    max_shard_size: int | str | None = None,
    progress: Progress | None = None,
) -> "RewriteReport":
    """The report of what was written: a tree in memory, or a `Checkpoint`, as a checkpoint on disk.

    A `.pt` file holds the tree as it is: dicts, lists, tuples, plain values, ties. `.msgpack` and `.orbax` hold dicts,
    numbers, texts and None as flax and Orbax have them. Other formats hold arrays alone. What has no place is in
    `left_out` of the report. A torch module is saved as its state dict.

    The name of a leaf is its path: keys joined by "." in torch trees, by "/" in others, or by the other one where
    keys contain the first. A tree from `pm.load` keeps the names of its file. `pm.load` returns the tree of dicts.

    Args:
        tree: any tree of arrays.
        path: the file or, with a `/` at its end or with `max_shard_size`, the directory.
        force: whether it may already exist; it is then replaced in one step.
        max_shard_size: the most bytes of tensors in one file, such as "5GB".
        progress: called with an `Event` as bytes are written.

    Raises:
        BadArgument: the suffix of the name is that of no format.
        CannotWrite: the output exists, or its folder does not.
        RenameClash: two leaves would have one name.
        Unsupported: the format cannot hold a leaf.

    >>> import tempfile
    >>> from pathlib import Path
    >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
    >>> _ = save({"fc": {"weight": np.ones((2, 2), "float32")}}, path)
    >>> load(path)
    {'fc': {'weight': array([[1., 1.],
           [1., 1.]], dtype=float32)}}
    """
    if isinstance(tree, Checkpoint):
        return tree.save(path, force=force, max_shard_size=max_shard_size, progress=progress)
    from paramend.rewriting.rewrite import write  # not needed to look at a checkpoint
    from paramend.rewriting.wishes import named_format

    form = named_format(text_of(path), sized=max_shard_size is not None)
    joined = form.framework != "flax"
    made = Plan.of(InMemory(tree, flat=form.writer().flat, keys=form.typed_keys, joined=joined))
    return write(made, path, force=force, max_shard_size=max_shard_size, progress=progress)
