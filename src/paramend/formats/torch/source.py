"""The format of `torch.save`: a zip archive of storages, and a pickle of the tensors that view them.

Files are read without torch, and nothing in them is run: see `paramend.formats.torch.pickles`. Opening reads the zip's
directory and the pickle; storages are read on demand.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from paramend.errors import BadCheckpoint, Unsupported
from paramend.formats.files import OpenFile
from paramend.formats.limits import shown
from paramend.formats.source import check_readable, in_numpy
from paramend.formats.structure import Walk
from paramend.formats.torch.foreign import check_whole
from paramend.formats.torch.pickles import Vocabulary, unpickle
from paramend.formats.torch.rebuilds import Tensor, TorchWords
from paramend.formats.torch.writer import Rebuilt, Recorder, TorchWriter
from paramend.formats.zips import STORED, Archive, Member, ZipSource
from paramend.leaves.nested import folded
from paramend.leaves.origins.origin import Extent
from paramend.leaves.outlines import Outline, outline
from paramend.leaves.overlaps import share
from paramend.leaves.specs import Array, numpy_dtype
from paramend.reports import wording

MAX_PICKLE = 256_000_000
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"

WRITER = TorchWriter()

# Tensors that are alike in all of these are one.
_VIEW = attrgetter("storage.key", "offset", "shape", "stride", "dtype", "conj", "neg", "sealed")


class TorchFile(ZipSource):
    """One file of `torch.save` as `Leaves`. Opening reads the zip's directory and the pickle in it. Tensors anywhere in
    nested dicts, lists and tuples are leaves, numbered in the order of the structure."""

    format = "torch"
    tensors: list[Tensor]  # of each leaf, which elements of which storage it views

    def _begin(self) -> None:
        _check_kind(self._file)
        self.archive = Archive(self._file)
        self.folder = _root(self.archive)  # the folder in it that holds everything
        self._structure = self._unpickled()
        walk = TorchWalk(self._structure, f"{self.path}: data.pkl", room=self._pickle.nbytes)
        self.index, self.ties = walk.index, walk.ties  # the names; dict keys and list positions, joined by "."
        self.rows = self.tensors = walk.leaves
        # What else is in the structure, by path: epochs, learning rates, lists of plain values.
        self.metadata: Mapping[str, Any] = walk.others

    def outline(self) -> Outline:
        numbers = iter(range(len(self.tensors)))
        return outline(self._structure, lambda node: next(numbers) if type(node) is Tensor else None)

    def recorded(self) -> tuple[Any, list[Any]]:
        """The structure with an array of its number for each leaf, and the calls that rebuild leaves: see `Recorder`.
        `Unsupported` if the pickle holds objects that are carried unread."""
        if self.carried:
            what = f"{self.path} also holds objects of {wording.listing(self.carried, 4)}, which are carried unread"
            why = "they stay when values change, and not when leaves get other names or specs"
            raise Unsupported(f"{what}: {why}", hint="a name that ends in .safetensors leaves them out")
        calls: list[Any] = []

        def fits(node: Any, seen: Any) -> bool:
            return isinstance(node, dict) or (type(node) in (list, tuple) and type(seen) is type(node))

        def children(pair: tuple[Any, Any]) -> Iterable[tuple[Any, Any]]:
            node, seen = pair
            if type(seen) is Rebuilt and isinstance(node, dict):  # a counter, whose entries are in its call
                seen = seen.arguments[0] if seen.arguments else {}
            return zip(_children(node), _children(seen), strict=True) if fits(node, seen) else ()

        def close(pair: tuple[Any, Any], made: list[Any]) -> Any:
            node, seen = pair
            if type(node) is Tensor:
                calls.append(seen)
                return np.array(len(calls) - 1)
            if type(seen) is Rebuilt and isinstance(node, dict):
                return Rebuilt(seen.function, (_like(node, made, {}),)) if seen.arguments else seen
            return _like(node, made, vars(seen) if type(node) is OrderedDict else {}) if fits(node, seen) else seen

        return folded((self._structure, self._read_pickle(Recorder(TorchWords({})))), children, close), calls

    def member(self, number: int) -> Member | None:
        """The member of the zip that holds the elements of a leaf; None if they are in several, or nowhere."""
        storage = self.tensors[number].storage
        return None if storage is None else self.archive.members[f"{self.folder}/data/{storage.key}"]

    def refusal(self, number: int) -> str:
        return self.tensors[number].sealed

    def extent(self, number: int) -> Extent | None:
        """Where the bytes of a leaf are; None if they are strided, sparse, or are not the values themselves."""
        tensor = self.tensors[number]
        if tensor.storage is None or not tensor.contiguous or tensor.conj or tensor.neg:
            return None
        first, rest = divmod(tensor.offset * tensor.bits if tensor.size else 0, 8)
        return None if rest else Extent(self.path, self._place(tensor.storage.key) + first, tensor.nbytes)

    def overlaps(self, number: int) -> tuple[int, ...]:
        tensor = self.tensors[number]
        mates = self._sharing.get(tensor.storage.key) if tensor.storage and tensor.size else None
        if mates is None:
            return ()
        own, (start, stop) = self.ties.get(number, number), tensor.bounds
        near = mates[(mates[:, 1] < stop) & (mates[:, 2] > start), 0].tolist()
        others = [other for other in near if self.ties.get(other, other) != own]
        here = self._bytes(tensor)
        return tuple(other for other in others if share(here, self._bytes(self.tensors[other])))

    def read(self, number: int) -> Array:
        tensor = self.tensors[number]
        check_readable(self, number)
        assert tensor.storage is not None
        dtype = numpy_dtype(tensor.dtype)
        strides = tuple(step * dtype.itemsize for step in tensor.stride)
        start = self._place(tensor.storage.key) + tensor.offset * dtype.itemsize if tensor.size else 0
        memory, start = self._file.memory(start, tensor.reach * dtype.itemsize)
        with in_numpy(tensor.shape):
            if not tensor.size:
                empty = np.empty(tensor.shape, dtype)
                empty.flags.writeable = False
                return empty
            array: Array = np.ndarray(tensor.shape, dtype, memory, start, strides)
            if array.flags.aligned and not tensor.conj and not tensor.neg:
                return array
            # The gaps are read too, so that a view that repeats elements stays small.
            span = np.frombuffer(memory, np.uint8, tensor.reach * dtype.itemsize, start).copy().view(dtype)
            if tensor.conj:
                np.conjugate(span, out=span)
            if tensor.neg:
                np.negative(span, out=span)
            array = np.ndarray(tensor.shape, dtype, span.view(np.uint8).data, 0, strides)
        array.flags.writeable = False
        return array

    @property
    def _pickle(self) -> Member:
        return self.archive.members[f"{self.folder}/data.pkl"]

    def _unpickled(self) -> Any:
        if self._pickle.nbytes > MAX_PICKLE:
            raise self.archive.bad(self._pickle.name, f"a pickle of {self._pickle.nbytes:,} bytes is too long")
        folder = f"{self.folder}/data/"
        members = self.archive.members.values()
        words = TorchWords({each.name[len(folder) :]: each.nbytes for each in members if each.name.startswith(folder)})
        found = self._read_pickle(words)
        self.carried = tuple(dict.fromkeys(words.carried))
        if self.carried:
            check_whole(found, self.path)
        return found

    def _read_pickle(self, words: Vocabulary) -> Any:
        return unpickle(self.archive.read(self._pickle.name), words, file=str(self.path), place="data.pkl")

    def _place(self, key: str) -> int:
        return self.archive.offsets(f"{self.folder}/data/{key}").start

    @cached_property
    def _sharing(self) -> dict[str, Array]:
        """Storage key → the leaves that view it, if there are several, one row each: (number, first bit, end)."""
        found: dict[str, list[tuple[int, int, int]]] = {}
        for number, tensor in enumerate(self.tensors):
            if tensor.storage and tensor.size:
                found.setdefault(tensor.storage.key, []).append((number, *tensor.bounds))
        return {key: np.array(rows, np.int64) for key, rows in found.items() if len(rows) > 1}

    def _bytes(self, tensor: Tensor) -> Array:
        assert tensor.storage is not None
        start = self._place(tensor.storage.key) + tensor.offset * tensor.bits // 8
        if tensor.bits % 8 or len(tensor.shape) > 32:
            return np.ndarray(((tensor.reach * tensor.bits + 7) // 8,), np.uint8, self._file.map, start)
        width = tensor.bits // 8
        strides = tuple(step * width for step in tensor.stride)
        return np.ndarray(tensor.shape, f"V{width}", self._file.map, start, strides)


class TorchWalk(Walk):
    """The tensors of a structure; `ties` leads from the number of each that occurs again to the first one."""

    kind, separator, shares = Tensor, ".", True

    def __init__(self, root: Any, place: str, *, room: int) -> None:
        self.ties: dict[int, int] = {}
        self._first: dict[tuple[Any, ...], int] = {}
        super().__init__(root, place, room=room)

    def crowded(self, containers: bool) -> str:
        what = "containers" if containers else "values, or long keys,"
        return f"the same {what} are in too many places"

    def _leaf(self, names: dict[Any, Any], key: Any, leaf: Tensor) -> None:
        flaw = leaf.flaw()
        if flaw:
            raise self._bad(flaw)
        super()._leaf(names, key, leaf)
        number = len(self.leaves) - 1
        same = (id(leaf),) if leaf.storage is None else _VIEW(leaf)
        first = self._first.setdefault(same, number)
        if first != number:
            self.ties[first] = self.ties[number] = first


def _children(node: Any) -> Iterable[Any]:
    """The values in a container; none in anything else."""
    return node.values() if isinstance(node, dict) else node if type(node) in (list, tuple) else ()


def _like(node: Any, values: list[Any], attributes: Mapping[str, Any]) -> Any:
    """A container with other values, and with attributes."""
    if not isinstance(node, dict):
        return type(node)(values)
    made = type(node)(zip(node, values, strict=True))
    if attributes:
        vars(made).update(attributes)
    return made


def _check_kind(file: OpenFile) -> None:
    head = file.read(0, min(512, file.size))
    if head.startswith(b"PK"):
        return
    if not head:
        raise BadCheckpoint(f"{file.path}: the file is empty")
    reason, hint = "it is not a file of torch.save (not a zip file)", ""
    if head[257:262] == b"ustar":
        reason = "it is a tar archive: the first, old format of torch.save, or a bundle with a checkpoint in it"
        hint = f"tar -xf {file.path}, or {_resave(file.path)}"
    elif head.startswith(_LEGACY):
        reason, hint = "it is in the old format of torch.save, which is not a zip file", _resave(file.path)
    elif head.startswith(b"\x80"):
        reason = "it is a Python pickle, not a file of torch.save (not a zip file)"
    elif head.startswith(b"version https://git-lfs"):
        reason, hint = "it is a Git LFS pointer, not the file itself", "git lfs pull"
    elif head[8:9] == b"{":
        reason = "it is a safetensors file, not one of torch.save"
    raise BadCheckpoint(f"{file.path}: {reason}", hint=hint)


def _resave(path: Path, loaded: str = "torch.load({!r}, weights_only=True)") -> str:
    new = str(path.with_name(f"{path.stem}-new{path.suffix}"))
    return f"torch.save({loaded.format(str(path))}, {new!r})"


def _root(archive: Archive) -> str:
    """The folder that holds everything in an archive, after checking that `torch.save` wrote it."""
    path = archive.file.path
    roots = [name.removesuffix("/data.pkl") for name in archive.members if name.endswith("/data.pkl")]
    roots = [root for root in roots if "/" not in root]
    if len(roots) != 1:
        what = "two of them" if roots else "none"
        raise BadCheckpoint(f"{path}: a file of torch.save has one member data.pkl in a folder, but here is {what}")
    root = roots[0]
    if f"{root}/constants.pkl" in archive.members or any(name.startswith(f"{root}/code/") for name in archive.members):
        hint = _resave(path, "torch.jit.load({!r}).state_dict()")
        raise BadCheckpoint(f"{path}: it is a TorchScript archive, a program with its tensors", hint=hint)
    for member in archive.members.values():
        if not member.name.startswith(f"{root}/"):
            raise archive.bad(member.name, f"it is outside the folder {shown(root)} that holds the rest")
        if member.method != STORED:
            raise archive.bad(member.name, "it is compressed, which torch.save never does", _resave(path))
    order = archive.members.get(f"{root}/byteorder")
    if order and (order.nbytes > 16 or archive.read(order.name) != b"little"):
        raise archive.bad(order.name, "only little-endian files are read", _resave(path))
    return root
