"""The table of formats, and how the format of a checkpoint is recognised by its content."""

import contextlib
import importlib
import os
import re
import stat
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paramend.disk.urls import Url, path_of, unanswered
from paramend.errors import BadCheckpoint, CannotRead
from paramend.formats.files import FOREIGN, OpenFile, near
from paramend.formats.shards import is_index, open_directory, read_index
from paramend.formats.source import Source
from paramend.formats.zips import names_in
from paramend.leaves.nested import unexhausted
from paramend.reports import wording

_HEAD = 64


@dataclass(frozen=True, slots=True)
class Format:
    """One row of the table of formats."""

    name: str  # as `paramend show --json` prints it
    says: str  # what such checkpoints are called in messages
    suffixes: tuple[str, ...]  # how their names end; a file written under such a name has this format
    # (path, the first bytes; none for a directory) → whether it has this format.
    recognise: Callable[[Path, bytes], bool]
    # The class or function that opens one, after the name of its module in this folder and a colon. The module has a
    # `WRITER` too.
    reader: str
    keeps: str  # what survives an edit besides the leaves
    extra: str = ""  # the extra needed to read it; "" for none
    # Whether a checkpoint is a directory with files of its own kinds. The module then has `home`, which finds the one
    # that holds the tree, and its `WRITER` fills a directory.
    folder: bool = False
    framework: str = ""  # the name of the library of these files in the metadata of a safetensors file
    padded: bool = True  # whether each leaf is aligned, whatever comes before it
    structural: bool = False  # whether an edited file keeps its other content when leaves get other names or specs
    data: str = ""  # of a folder, the pattern of its files whose bytes change in place
    table: str = ""  # of a folder, the file that says which leaves it has, for which an edit in place puts another
    single: bool = True  # whether a checkpoint may be a single array without a name
    typed_keys: bool = False  # whether it tells typed PRNG keys from their numbers

    def open(self, path: Path) -> Source:
        found: Source = getattr(self.module, self.reader.partition(":")[2])(path)
        return found

    def writer(self) -> Any:
        """The writer of this format: see `Writer`."""
        return self.module.WRITER

    @property
    def module(self) -> Any:
        return importlib.import_module(f"paramend.formats.{self.reader.partition(':')[0]}")


# ---- how each is recognised ---------------------------------------------------------------------------------


def _is_safetensors(path: Path, head: bytes) -> bool:
    # A header may begin with white space; the head of a truncated file still shows its format.
    return head[8:].lstrip()[:1] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32


def _is_zip(path: Path, head: bytes) -> bool:
    return head.startswith((b"PK\x03\x04", b"PK\x05\x06"))  # a record, or the end of an empty archive


def _holds_pickle(path: Path) -> bool:
    """Whether a zip file is one of torch: it holds `<name>/data.pkl`, and no arrays of numpy beside that folder. For an
    archive that is damaged, or of neither kind, the name decides."""
    with contextlib.suppress(BadCheckpoint), contextlib.closing(OpenFile(path)) as file:
        names = [name for name in names_in(file) if name.endswith((".npy", "/data.pkl"))]
        folders = tuple(name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl"))
        folders = tuple(folder for folder in folders if folder.count("/") == 1)
        arrays = any(name.endswith(".npy") and not name.startswith(folders) for name in names)
        if arrays or folders:
            return not arrays
    return not path.name.lower().endswith(".npz")


def _is_pickle(path: Path, head: bytes) -> bool:
    # torch.save before 1.6: a pickle of a magic number, of protocol 2 by default.
    return head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and len(head) > 2


def _is_msgpack(path: Path, head: bytes) -> bool:
    first = head[:1]
    if first in (b"\xc7", b"\xc8", b"\xc9"):  # one array or scalar: the head of an extension, and its kind
        width = 1 << (first[0] - 0xC7)
        return head[1 + width : 2 + width] in (b"\x01", b"\x03")
    return bool(first) and (0x80 <= first[0] <= 0x8F or first in (b"\xde", b"\xdf")) and not _is_pickle(path, head)


def _is_orbax(path: Path, head: bytes) -> bool:
    if head or not path.is_dir():
        return False
    marks = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")
    if any((path / mark).exists() for mark in marks):
        return True
    # The folder of a CheckpointManager: steps, each a checkpoint with its items in folders.
    steps = [entry for entry in path.iterdir() if entry.name.rpartition("_")[2].isdigit() and entry.is_dir()]
    inside = (inner for step in steps for inner in (step, step / "default"))
    return any((inner / mark).exists() for inner in inside for mark in marks[:2])


def _is_dcp(path: Path, head: bytes) -> bool:
    from paramend.formats.dcp.source import is_checkpoint  # the readers of formats are opened when needed

    return not head and path.is_dir() and is_checkpoint(path)


FORMATS: tuple[Format, ...] = (
    Format(
        "safetensors",
        "safetensors files, and directories of them as Hugging Face lays them out",
        (".safetensors",),
        _is_safetensors,
        "safetensors:SafetensorsFile",
        keeps="metadata, order of tensors, unknown dtypes, index, sidecars",
        padded=False,
    ),
    Format(
        "torch",
        "zip files of torch.save",
        (".pt", ".pth", ".bin", ".ckpt", ".pth.tar", ".pt.tar"),
        lambda path, head: _is_zip(path, head) and _holds_pickle(path),
        "torch.source:TorchFile",
        keeps="entries that are not tensors, shared storages",
        framework="pt",
        structural=True,
    ),
    Format(
        "npz",
        "zip files of numpy.savez",
        (".npz",),
        _is_zip,
        "npz:NpzFile",
        keeps="other files in the archive",
        framework="np",
        single=False,
    ),
    Format(
        "msgpack",
        "Flax msgpack files",
        (".msgpack",),
        _is_msgpack,
        "msgpack:MsgpackFile",
        keeps="entries that are not arrays",
        framework="flax",
    ),
    Format(
        "gguf",
        "GGUF files of llama.cpp",
        (".gguf",),
        lambda path, head: head.startswith(b"GGUF"),
        "gguf.source:open_gguf",
        keeps="keys and their types, blocks as they are, unknown types, the parts of a model in several files",
        framework="pt",
        structural=True,
        single=False,
    ),
    Format(
        "orbax",
        "Orbax directories",
        (".orbax",),
        _is_orbax,
        "orbax.source:OrbaxCheckpoint",
        keeps="layout, shardings, true key paths, custom metadata, other items of a step",
        extra="orbax",
        folder=True,
        framework="flax",
        single=False,
        typed_keys=True,
    ),
    Format(
        "dcp",
        "distributed checkpoints of torch",
        (".dcp",),
        _is_dcp,
        "dcp.source:DcpCheckpoint",
        keeps="objects that are not tensors, places in the nested state dict, other files of the directory",
        folder=True,
        data="*.distcp",
        table=".metadata",
        framework="pt",
        single=False,
    ),
)

# The format of new files whose name implies none.
DEFAULT = FORMATS[0]
# How the names of checkpoints end.
SUFFIXES = tuple(suffix for row in FORMATS for suffix in row.suffixes)

# Suffixes of formats that cannot be written here: those of weights, and others.
FOREIGN_WEIGHTS = (".ggml", ".h5", ".hdf5", ".keras", ".onnx", ".ot", ".tflite", ".pkl", ".pickle", ".npy")
_OTHERS = (".zarr", ".tar", ".gz", ".tgz", ".zip", ".7z", ".json", ".yaml", ".parquet", ".distcp", ".mlmodel")
FOREIGN_SUFFIXES = (*FOREIGN_WEIGHTS, *_OTHERS)


def find_format(path: Path, head: bytes) -> Format | None:
    """The format of a file with these first bytes, or of a directory; None if none is recognised."""
    # The length of a safetensors header may look like the first byte of something else.
    if any(head.startswith(magic) for magic, _, _ in FOREIGN) and not _is_safetensors(path, head):
        return None
    return next((row for row in FORMATS if row.recognise(path, head)), None)


def format_for(path: Path) -> Format | None:
    """The format that the name of a new file implies, or None."""
    return next((row for row in FORMATS if path.name.lower().endswith(row.suffixes)), None)


def format_of(source: Source) -> Format | None:
    """The row of the table for an opened checkpoint; None for a tree in memory."""
    return next((row for row in FORMATS if row.name == source.format), None)


def tree_format(path: Path) -> Format | None:
    """The format of a path that is a directory of one whose checkpoints are directories, such as Orbax; or None."""
    row = find_format(path, b"") if path.is_dir() else None
    return row if row is not None and row.folder else None


def is_tree(path: Path) -> bool:
    """Whether a path is such a directory."""
    return tree_format(path) is not None


def home_of(path: Path) -> Path:
    """The file or folder that identifies a checkpoint, however the user named it: for Orbax, the folder of the tree."""
    row = None
    try:
        row = tree_format(path)
    except OSError as error:
        if unanswered(error):
            raise
    if row is None:
        return path.with_name(_first_part(path.name)) if path.name.endswith(".gguf") else path
    found: Path = row.module.home(path)
    return found


def weight_files(folder: Path) -> set[str]:
    """The names of the files that are read as weights when a directory, or an index in it, is opened; of a format whose
    checkpoints are directories, of those whose bytes change in place."""
    if (row := tree_format(folder)) is not None:
        return {path.name for path in folder.glob(row.data)} if row.data else set()
    names = sorted(entry.name for entry in folder.iterdir())
    if not any(map(_holds_weights, names)) and (first := _only_gguf(folder)) is not None:
        return files_of(first)
    indexes = list(filter(is_index, names))
    if indexes:
        return {file for name in indexes for file in read_index(folder / name).files}
    found = {name for name in names if _holds_weights(name)}
    return found or set(filter(_is_weights(folder), names))


def files_of(path: Path) -> set[str]:
    """The names of the files of a checkpoint that is a file, or a model in several GGUF files."""
    if not path.name.endswith(".gguf"):
        return {path.name}
    first = _first_part(path.name)
    return {path.name, *(entry.name for entry in path.parent.iterdir() if _first_part(entry.name) == first)}


def open_source(path: str | os.PathLike[str]) -> Source:
    """A file, a directory or an index file, opened for reading. Its content tells the format; only headers are read."""
    path = path_of(path)
    if isinstance(path, Url):
        path = Url(*path.parts)  # what another one knows of its store may be old
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise CannotRead(f"{path}: there is no such file or directory", hint=near(path)) from None
    except CannotRead:
        raise
    except (OSError, ValueError) as error:
        raise CannotRead(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    with unexhausted(str(path), BadCheckpoint):
        if stat.S_ISDIR(mode):
            return _open_folder(path)
        if is_index(path.name):
            found = open_directory(path, _open_file, _holds_weights)
            assert found is not None
            return found
        return _open_file(path)


def _open_folder(path: Path) -> Source:
    try:
        row = find_format(path, b"")
        if row is not None:
            return row.open(path)
        names = [entry.name for entry in path.iterdir() if entry.name.startswith("shard-")]
        if names and not any(path.glob("*.index.json")):
            from paramend.formats.dcp.source import is_sharded, open_sharded  # few models are in this form

            if is_sharded(names):
                return open_sharded(path, _open_file)
        found = open_directory(path, _open_file, _holds_weights)
        if found is None and (first := _only_gguf(path)) is not None:
            return _open_file(first)
        found = found or open_directory(path, _open_file, _is_weights(path))
    except OSError as error:
        if isinstance(error, CannotRead):
            raise
        raise CannotRead(f"{path}: {error.strerror or error}") from None
    if found is not None:
        return found
    inside = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    below = [name for name in inside if any((path / name).glob("*.safetensors")) or _is_dcp(path / name, b"")]
    held = f"it holds {wording.listing(inside, 4)}" if inside else "it is empty"
    hint = f"{path / below[0]}" if below else "a directory with *.safetensors or *.bin files, or one of Orbax"
    raise BadCheckpoint(f"{path}: it is a directory without a checkpoint: {held}", hint=hint)


def _holds_weights(name: str) -> bool:
    return name.endswith(".safetensors") and not name.startswith(".")


def _only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder without other weights, the first of those of a model in several."""
    names = sorted(entry.name for entry in folder.iterdir() if format_for(Path(entry.name)) is not None)
    firsts = {_first_part(name) for name in names}
    return folder / names[0] if len(firsts) == 1 and names[0].endswith(".gguf") else None


def _first_part(name: str) -> str:
    """The name of the first of the files of a model, by that of one of them."""
    return re.sub(r"-\d{5}-of-(\d{5}\.gguf)$", r"-00001-of-\1", name)


def _is_weights(folder: Path) -> Callable[[str], bool]:
    """Whether a file in a folder without safetensors files holds weights: by suffix, or by content if the
    folder has one file."""
    names = [entry.name for entry in folder.iterdir()]
    visible = [name for name in names if not name.startswith(".") and not name.endswith(".json")]
    known = [name for name in visible if format_for(Path(name)) is not None]
    # Trainers save their own state beside the model.
    models = [name for name in known if name.startswith(("pytorch_model", "diffusion_pytorch_model", "adapter_model"))]
    chosen = models or known
    if len(chosen) == 1:
        return lambda name: name == chosen[0]
    if len(visible) == 1 and (folder / visible[0]).is_file():
        return lambda name: find_format(folder / name, _head(folder / name)) is not None
    if len(chosen) > 1:
        chosen.sort()
        held = f"{len(chosen)} checkpoints: {wording.listing(chosen, 4)}"
        raise BadCheckpoint(f"{folder}: it holds {held}", hint=f"open one of them: {folder / chosen[0]}")
    return lambda name: False


def _open_file(path: Path) -> Source:
    if path.name.endswith(".distcp") or (path.name == ".metadata" and any(path.parent.glob("*.distcp"))):
        what = "a part of a distributed checkpoint of torch (DCP), which is a directory"
        raise BadCheckpoint(f"{path}: it is {what}", hint=f"{path.parent}")
    head = _head(path)
    row = find_format(path, head)
    if row is None and head:
        row = format_for(path)  # its reader's message says best what is wrong
    if row is None:
        raise _unknown(path, head)
    return row.open(path)


def _head(path: Path) -> bytes:
    with contextlib.closing(OpenFile(path)) as file:
        try:
            return file.read(0, min(_HEAD, file.size))
        except OSError as error:
            raise CannotRead(f"{path}: it cannot be read: {error.strerror or error}") from None


def _unknown(path: Path, head: bytes) -> BadCheckpoint:
    if not head:
        return BadCheckpoint(f"{path}: byte 0: the file is empty", hint="copy or download it again")
    if not isinstance(path, Url) and tarfile.is_tarfile(path):
        hint = f"tar -xf {path}, then open what was in it"
        return BadCheckpoint(f"{path}: it is a tar archive, which may hold a checkpoint", hint=hint)
    for magic, what, hint in FOREIGN:
        if head.startswith(magic):
            return BadCheckpoint(f"{path}: byte 0: it is {what}", hint=hint)
    hint = f"formats that can be opened: {wording.listing([row.says for row in FORMATS])}"
    reason = "neither its first bytes nor its name are those of a known format"
    return BadCheckpoint(f"{path}: byte 0: {reason}", hint=hint)
