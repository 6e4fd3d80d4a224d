"""Values from other files: `.npy` files and checkpoints, read only when needed."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paramend.checkpoints.checkpoint import Checkpoint, open as open_checkpoint
from paramend.disk.urls import Url, path_of
from paramend.edits.quantized import check_values
from paramend.edits.structure import moves
from paramend.edits.weights import Weights, weighed
from paramend.errors import BadArgument, BadCheckpoint, NoMatch, Unsupported, WrongCount
from paramend.formats.files import open_bytes
from paramend.leaves.leaves import Editable, Index
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Stored
from paramend.leaves.paths import labels, text_of
from paramend.leaves.specs import Array
from paramend.reports import wording
from paramend.selectors.renames import captures
from paramend.selectors.selector import Selector, resolve


class Donors:
    """Files that values come from, in a folder, each opened once and closed when nothing refers to its values any
    more."""

    def __init__(self, folder: str | os.PathLike[str] = "", *, raw: bool = False) -> None:
        self._raw = raw
        self._folder = path_of(folder)
        self._open: dict[Path, Array | Checkpoint] = {}

    def place(self, name: str | Path, tree: Any = None) -> Path:
        """Where a file is: in the folder of the recipe, or else in that of the checkpoint, as records say it."""
        here = path_of(name) if isinstance(path_of(name), Url) else self._folder / name
        return here if here.exists() or not isinstance(tree, Checkpoint) else tree.path.absolute().parent / name

    def model(self, name: str, tree: Any) -> Checkpoint:
        """A checkpoint."""
        found = self.open(self.place(name, tree).absolute())
        if not isinstance(found, Checkpoint):
            raise BadArgument(f"{name} holds one array, not a model", hint="source: [tuned.safetensors]")
        return found

    def open(self, name: str | Path) -> Array | Checkpoint:
        path = self.place(name)
        if path not in self._open:
            self._open[path] = read_npy(path) if path.suffix == ".npy" else open_checkpoint(path, raw=self._raw)
        return self._open[path]

    def values(
        self, name: str, leaf: str | None, leaves: Editable, chosen: Sequence[tuple[int, Selector]]
    ) -> dict[int, Array | Origin]:
        """Leaf number → an array, or a reference to one, for the chosen leaves, each with the selector that matched it.

        `leaf` is the path in the file, whose wildcards stand for what those of the selectors matched; without it, the
        leaf of the same path, whatever the separators. `NoMatch` lists all that are missing.

        An edited checkpoint gets references. Trees in memory get copies, which become leaves and outlive the file; so
        do checkpoints that take leaves from their own file, because a patch writes one leaf before it reads the next.
        """
        donor, stored = self.open(name), leaves.stored if isinstance(leaves, Weights) else leaves
        if not isinstance(donor, Checkpoint):
            if leaf is not None:
                raise BadArgument(f"{name} holds one array, without a name", hint="leave leaf out")
            array = donor if isinstance(stored, Checkpoint) else np.array(donor)
            return dict.fromkeys((number for number, _ in chosen), array)
        lazy = isinstance(stored, Checkpoint) and not _share(stored, donor)
        seen: Any = weighed(donor)

        def read(number: int) -> Array | Origin:
            if isinstance(seen, Weights) and number in seen.groups:
                return seen.expression(number) if lazy else seen.fetch(number)
            check_values(donor, [number], f"of {name} is no value to take")
            why = donor.refusal(number)
            if why:
                raise Unsupported(f"{name}: {donor.index.path(number)} cannot be read: {why}")
            return Stored(donor.source, number) if lazy and donor.spec(number).ndim else donor.fetch(number)

        if leaf is not None and not captures(leaf):
            try:
                found = resolve(leaf, seen)
            except NoMatch as error:
                error.args = (f"{name}: {error}",)
                raise
            if len(found) != 1:
                raise WrongCount(f"{leaf!r} is {len(found)} leaves of {name}", found=len(found), wanted=1)
            return dict.fromkeys((number for number, _ in chosen), read(found[0]))
        paths = {number: leaves.index.pieces(number) for number, _ in chosen}
        if leaf is not None:
            paths = _moved(leaves.index, chosen, leaf)
        known = {seen.index.pieces(number): number for number in seen.index.numbers}
        missing = ["/".join(path) for path in paths.values() if path not in known]
        if missing:
            near = wording.closest(missing[0], ["/".join(path) for path in known], limit=1)
            own = donor.index.separator
            hint = f'did you mean "{near[0].replace("/", own)}"?' if near else f"paramend show {name}"
            lacks = wording.listing([each.replace("/", own) for each in missing], 4)
            raise NoMatch(f"{name} has no {lacks}", hint=hint, near=near)
        return {number: read(known[path]) for number, path in paths.items()}


def _moved(index: Index, chosen: Sequence[tuple[int, Selector]], leaf: str) -> dict[int, tuple[str, ...]]:
    """The paths that a template gives to the selected leaves, as pieces."""
    found: dict[int, tuple[str, ...]] = {}
    for selector in dict.fromkeys(selector for _, selector in chosen):
        numbers = {number for number, by in chosen if by == selector}
        for number, keys in moves(index, selector, numbers, leaf).items():
            found[number] = tuple(text_of(label) for key, _ in keys for label in labels(key))
    return found


def _share(one: Checkpoint, other: Checkpoint) -> bool:
    files = {(stat.st_dev, stat.st_ino) for stat in one.source.stats.values()}
    return any((stat.st_dev, stat.st_ino) in files for stat in other.source.stats.values())


def read_npy(path: Path) -> Array:
    """The array in an `.npy` file; `BadCheckpoint` if there is none."""
    with open_bytes(path) as file:  # numpy would wait forever on a pipe
        held: Any = io.BytesIO(file.read()) if isinstance(path, Url) else path
    try:
        try:
            array: Array = np.load(held, mmap_mode=None if held is not path else "r", allow_pickle=False)
        except ValueError:  # an array without elements cannot be mapped
            array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError) as error:
        raise BadCheckpoint(f"{path}: no array can be read from it: {error}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biufc":
        raise BadCheckpoint(
            f"{path} holds {getattr(array, 'dtype', type(array).__name__)}, not numbers of a known dtype",
            hint='pm.save({"w": array}, "values.safetensors")',
        )
    return np.asarray(array).astype(array.dtype.newbyteorder("="), copy=False)
