"""`.metadata` of a distributed checkpoint, a pickle of torch's own classes: read without running it, and written.

https://docs.pytorch.org/docs/stable/distributed.checkpoint.html describes the classes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from paramend.errors import BadCheckpoint, RenameClash
from paramend.formats.files import OpenFile
from paramend.formats.limits import MAX_PIECES, is_deep, is_within, shown
from paramend.formats.torch.pickles import Flaw, Foreign, Name, unpickle
from paramend.formats.torch.rebuilds import KNOWN, Tensor, TorchWords, dtype_of
from paramend.formats.torch.writer import Rebuilt, pickled
from paramend.leaves.specs import Spec

METADATA, SUFFIX = ".metadata", ".distcp"
MAX_METADATA = 1_000_000_000
_VERSION = "1.0.0"

_METADATA = "torch.distributed.checkpoint.metadata."
_INFO, _SIZE = "torch.distributed.checkpoint.filesystem._StorageInfo", "torch.Size"
_ROOT = ("state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version")
# Each class of such a pickle, with its fields in the order of its arguments.
_CLASSES: Mapping[str, tuple[str, ...]] = {
    f"{_METADATA}Metadata": _ROOT,
    "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata": (*_ROOT, "mcore_data"),
    f"{_METADATA}TensorStorageMetadata": ("properties", "size", "chunks"),
    f"{_METADATA}ChunkStorageMetadata": ("offsets", "sizes"),
    f"{_METADATA}TensorProperties": ("dtype", "layout", "requires_grad", "memory_format", "pin_memory"),
    f"{_METADATA}BytesStorageMetadata": (),
    f"{_METADATA}MetadataIndex": ("fqn", "offset", "index"),
    f"{_METADATA}StorageMeta": ("checkpoint_id", "save_id", "load_id", "modules"),
    f"{_METADATA}_MEM_FORMAT_ENCODING": ("value",),
    _INFO: ("relative_path", "offset", "length", "transform_descriptors"),
    **dict.fromkeys(("pathlib.PosixPath", "pathlib._local.PosixPath", "pathlib.WindowsPath"), ()),
}
# torch.save writes memory formats as numbers, and other versions name them.
_FORMATS = tuple(f"torch.{name}" for name in ("contiguous_format", "channels_last", "preserve_format"))
_NAMES = dict(KNOWN)
_NAMES |= {text: Name(text, partial(Foreign, text)) for text in _CLASSES} | {text: Name(text) for text in _FORMATS}


class Item(NamedTuple):
    """Where something is: some bytes of a file."""

    file: str
    start: int
    nbytes: int
    transforms: tuple[str, ...] = ()  # the extensions that its bytes went through, such as "zstd"


class Chunk(NamedTuple):
    """A part of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    item: Item

    def __str__(self) -> str:
        pairs = zip(self.offsets, self.sizes, strict=True)
        return f"[{', '.join(f'{start}:{start + length}' for start, length in pairs)}] of {self.item.file}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor: its shape, its dtype, its chunks."""

    tensor: Tensor
    chunks: tuple[Chunk, ...]

    @property
    def spec(self) -> Spec:
        return self.tensor.spec


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a `.metadata` says."""

    tensors: Mapping[str, Entry]  # by name
    objects: Mapping[str, Item] = field(default_factory=dict)  # what is not a tensor, by name
    # Name → the keys of its place in the nested state dict, text and positions of lists.
    paths: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)
    kind: str = f"{_METADATA}Metadata"  # the class of it, with those of its attributes that are carried as they are
    carried: Mapping[str, Any] = field(default_factory=dict)


class _Words(TorchWords):
    """The vocabulary of `.metadata`: that of torch's files, and the classes of its own."""

    def names(self) -> Mapping[str, Name]:
        return _NAMES

    def foreign(self, module: str, name: str) -> Name:
        raise Flaw(f"{module[:100]}.{name[:100]} is not among the names that {METADATA} may hold")


def read_manifest(file: OpenFile) -> Manifest:
    """What a `.metadata` file says; `BadCheckpoint` if it is damaged, or names what such files do not hold."""
    if file.size > MAX_METADATA:
        raise BadCheckpoint(f"{file.path}: {file.size:,} bytes are too many for {METADATA}")
    root = unpickle(file.read(0, file.size), _Words({}), file=str(file.path), place="the pickle")
    place = ""
    try:
        known = _fields(root, *list(_CLASSES)[:2])
        items = dict(_items(known.get("storage_data")))
        paths = dict(_paths(known.get("planner_data")))
        tensors: dict[str, Entry] = {}
        objects: dict[str, Item] = {}
        for place, node in _table(known.get("state_dict_metadata"), "state_dict_metadata"):
            if type(node) is Foreign and node.text == f"{_METADATA}BytesStorageMetadata":
                objects[place] = _found(items, place, None)
            else:
                tensors[place] = _entry(node, place, items)
    except Flaw as flaw:
        raise BadCheckpoint(f"{file.path}: {f'{shown(place)}: ' if place else ''}{flaw}") from None
    carried: dict[str, Any] = {name: known.get(name) for name in ("storage_meta", "mcore_data") if name in known}
    return Manifest(tensors, objects, paths, root.text, carried)


def _fields(node: Any, *kinds: str) -> dict[str, Any]:
    """The fields of an object: what a call got, or the state that was set."""
    if type(node) is not Foreign or node.text not in kinds:
        raise Flaw(f"{kinds[0].rpartition('.')[2]} is expected, not {_kind(node)}")
    parts = node.parts
    if len(parts) == 1 and type(parts[0]) is dict:
        return parts[0]
    given = parts[0] if len(parts) == 1 and type(parts[0]) is tuple else parts
    return dict(zip(_CLASSES[node.text], given, strict=False))


def _kind(node: Any) -> str:
    return node.text.rpartition(".")[2] if isinstance(node, Foreign | Name) else type(node).__name__


def _table(node: Any, what: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(node, dict):
        raise Flaw(f"{what} is {_kind(node)}, not a dict")
    for key, value in node.items():
        if type(key) is not str or is_deep(key):
            raise Flaw(f"{what} has a key that is not text, or a name of more than {MAX_PIECES} pieces")
        yield key, value


def _items(node: Any) -> Iterator[tuple[tuple[str, Any], Item]]:
    """(name, offsets) → where that chunk is."""
    if not isinstance(node, dict):
        raise Flaw(f"storage_data is {_kind(node)}, not a dict")
    for key, value in node.items():
        index, info = _fields(key, f"{_METADATA}MetadataIndex"), _fields(value, _INFO)
        name, offset = index.get("fqn"), index.get("offset")
        where: list[Any] = [info.get(key) for key in ("relative_path", "offset", "length")]
        file, start, nbytes = where
        transforms = info.get("transform_descriptors") or ()
        if type(name) is not str or type(offset) not in (tuple, type(None)):
            raise Flaw("storage_data has an index without a name or offset")
        if type(file) is not str or not is_within(file):
            raise Flaw(f"{shown(name)} is in the file {shown(str(file))}, which is no name within the checkpoint")
        if any(type(each) is not int or not 0 <= each < 1 << 63 for each in (start, nbytes)):
            raise Flaw(f"{shown(name)} has no offset and length in {shown(file)}")
        if type(transforms) not in (list, tuple) or any(type(each) is not str for each in transforms):
            raise Flaw(f"{shown(name)} went through extensions of an unknown kind")
        yield (name, offset if offset is None else _wholes(offset)), Item(file, start, nbytes, tuple(transforms))


def _paths(node: Any) -> Iterator[tuple[str, tuple[str | int, ...]]]:
    for key, value in node.items() if isinstance(node, dict) else ():
        if type(key) is str and type(value) is tuple and value and all(type(each) in (str, int) for each in value):
            yield key, value


def _found(items: Mapping[tuple[str, Any], Item], name: str, offset: tuple[int, ...] | None) -> Item:
    if (name, offset) not in items:
        where = "it" if offset is None else f"its chunk at {list(offset)}"
        raise Flaw(f"storage_data does not say where {where} is")
    return items[name, offset]


def _entry(node: Any, name: str, items: Mapping[tuple[str, Any], Item]) -> Entry:
    known = _fields(node, f"{_METADATA}TensorStorageMetadata")
    dtype = dtype_of(_fields(known.get("properties"), f"{_METADATA}TensorProperties").get("dtype"))
    shape, listed = known.get("size"), known.get("chunks")
    if type(shape) is not tuple or type(listed) is not list:
        raise Flaw("it has no size or no list of chunks")
    tensor = Tensor(_wholes(shape), (0,) * len(shape), dtype)
    if flaw := tensor.flaw():
        raise Flaw(flaw)
    found: dict[tuple[Any, Any], Chunk] = {}  # what several ranks wrote, they wrote alike
    for each in listed:
        part = _fields(each, f"{_METADATA}ChunkStorageMetadata")
        offsets, sizes = part.get("offsets"), part.get("sizes")
        if type(offsets) is not tuple or type(sizes) is not tuple or not len(offsets) == len(sizes) == len(shape):
            raise Flaw(f"a chunk of a tensor of {len(shape)} axes has no offset and size of as many")
        offsets, sizes = _wholes(offsets), _wholes(sizes)
        if (offsets, sizes) not in found:
            found[offsets, sizes] = Chunk(offsets, sizes, _found(items, name, offsets))
    return Entry(tensor, tuple(found.values()))


def _wholes(values: tuple[Any, ...]) -> tuple[int, ...]:
    if any(type(value) is not int or not 0 <= value < 1 << 62 for value in values):
        raise Flaw("its shape and offsets must be whole numbers below 2**62")
    return values


def relabelled(manifest: Manifest, names: Mapping[str, str]) -> Manifest:
    """The tensors of these names under others, and the objects; `RenameClash` if one has the name of an object."""
    check_apart(names.values(), manifest)
    paths = {name: manifest.paths[name] for name in manifest.objects if name in manifest.paths}
    paths |= {new: moved_path(manifest.paths[old], new) for old, new in names.items() if old in manifest.paths}
    return replace(manifest, tensors={new: manifest.tensors[old] for old, new in names.items()}, paths=paths)


def check_apart(names: Iterable[str], manifest: Manifest) -> None:
    """Raise `RenameClash` if tensors would have one name, or that of an object."""
    seen = set(manifest.objects)
    for name in names:
        if name in seen:
            raise RenameClash(f"two entries would be named {name} in a distributed checkpoint")
        seen.add(name)


def moved_path(path: Sequence[str | int], name: str) -> tuple[str | int, ...]:
    """The keys of a tensor that gets another name: cut into keys as the old one is, as far as it goes.

    >>> moved_path(("model", "fc.weight"), "model.out.bias"), moved_path(("groups", 0, "lr"), "groups.1.lr")
    (('model', 'out.bias'), ('groups', 1, 'lr'))
    >>> moved_path(("model", "fc.weight"), "model.a.b.c"), moved_path(("fc.weight",), "out.weight")
    (('model', 'a.b.c'), ('out.weight',))
    """
    pieces, found = name.split("."), list[str | int]()
    for at, key in enumerate(path):
        count = str(key).count(".") + 1 if at < len(path) - 1 else len(pieces)
        text = ".".join(pieces[:count])
        pieces = pieces[count:]
        if text:
            found.append(int(text) if type(key) is int and text.isdecimal() and str(int(text)) == text else text)
    return tuple(found)


# ---- written ----------------------------------------------------------------------------------------------------


def metadata_bytes(manifest: Manifest) -> bytes:
    """The `.metadata` file that says it."""
    tensors, storage = dict[str, Any](), dict[Rebuilt, Rebuilt]()
    for name, entry in manifest.tensors.items():
        chunks = [_made("ChunkStorageMetadata", _size(each.offsets), _size(each.sizes)) for each in entry.chunks]
        properties = _made("TensorProperties", Name(f"torch.{entry.tensor.dtype}"))
        tensors[name] = _made("TensorStorageMetadata", properties, _size(entry.tensor.shape), chunks)
        for at, chunk in enumerate(entry.chunks):
            storage[_made("MetadataIndex", name, _size(chunk.offsets), at)] = _info(chunk.item)
    for name, item in manifest.objects.items():
        tensors[name] = _made("BytesStorageMetadata")
        storage[_made("MetadataIndex", name)] = _info(item)
    paths = dict(manifest.paths) or None
    made: dict[int, Any] = {}
    carried = [_again(manifest.carried.get("storage_meta"), made), _VERSION]
    carried += [_again(manifest.carried["mcore_data"], made)] if "mcore_data" in manifest.carried else []
    return pickled(Rebuilt(Name(manifest.kind), (tensors, paths, storage, *carried)))


def _made(name: str, *arguments: Any) -> Rebuilt:
    return Rebuilt(Name(f"{_METADATA}{name}"), arguments)


def _size(lengths: Sequence[int]) -> Rebuilt:
    return Rebuilt(Name(_SIZE), (tuple(lengths),))


def _info(item: Item) -> Rebuilt:
    return Rebuilt(Name(_INFO), (*item[:3], *([list(item.transforms)] if item.transforms else [])))


def _again(node: Any, made: dict[int, Any]) -> Any:
    """A value that is carried, as it is written again; one that is in many places is `made` once."""
    if type(node) in (Foreign, dict, list, tuple) and id(node) not in made:
        made[id(node)] = _remade(node, made)
    return made.get(id(node), node)


def _remade(node: Any, made: dict[int, Any]) -> Any:
    if type(node) is Foreign:
        named = _CLASSES[node.text]
        parts = list(map(_fields(node, node.text).get, named)) if named else node.parts
        return Rebuilt(
            Name(node.text.replace("pathlib._local", "pathlib")), tuple(_again(part, made) for part in parts)
        )
    if isinstance(node, dict):
        return {key: _again(value, made) for key, value in node.items()}
    return type(node)(_again(each, made) for each in node)
