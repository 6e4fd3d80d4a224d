"""Sidecars: the files of a directory that hold no weights, which are copied unchanged."""

import re
import stat
from pathlib import Path

from paramend.formats.index import SUFFIX
from paramend.formats.registry import FOREIGN_SUFFIXES, SUFFIXES
from paramend.formats.shards import Shards
from paramend.rewriting.files import Copy, File

# Weights of the same model in another form would contradict the edited ones.
_OTHER_WEIGHTS = re.compile(
    r"(?:pytorch_model|tf_model|flax_model|rust_model|model|consolidated|diffusion_pytorch_model|adapter_model)"
    rf"[-_.0-9a-z]*(?:{'|'.join(map(re.escape, (*SUFFIXES, *FOREIGN_SUFFIXES)))})",
    re.IGNORECASE,
)


def sidecars(source: Shards) -> tuple[list[File], list[str]]:
    """The files beside the weights, and what is left out of the directory."""
    files: list[File] = []
    left_out: list[str] = []
    weights = {file.path.name for file in source.files}
    if source.shard_index is not None:
        weights.add(source.shard_index.path.name)
    for name in sorted(path.name for path in source.folder.iterdir()):
        if name in weights or name.startswith("."):
            continue
        other = name.endswith((".safetensors", SUFFIX)) or _OTHER_WEIGHTS.fullmatch(name)
        if other:
            left_out.append(f"{name} (other weights)")
        else:
            _collect(source.folder, name, files, left_out)
    return files, left_out


def _collect(folder: Path, name: str, files: list[File], left_out: list[str]) -> None:
    path = folder / name
    try:
        if path.is_symlink() and not is_of_hub_cache(folder, path):
            left_out.append(f"{name} (a symbolic link)")
            return
        status = path.stat()
    except OSError:
        left_out.append(f"{name} (it cannot be read)")
        return
    if stat.S_ISDIR(status.st_mode) and not path.is_symlink():
        for inner in sorted(path.iterdir()):
            if not inner.name.startswith("."):
                _collect(folder, f"{name}/{inner.name}", files, left_out)
    elif stat.S_ISREG(status.st_mode):
        copy = (Copy(path, 0, status.st_size),) if status.st_size else ()
        files.append(File(name, status.st_size, copy, path))
    else:
        left_out.append(f"{name} (not a regular file)")


def is_of_hub_cache(folder: Path, path: Path) -> bool:
    """Whether a symbolic link stays with the model: within the directory, or in the blobs of a hub cache beside it.

    Any other may lead to files that nobody meant to copy.
    """
    real, home = path.resolve(), folder.resolve()
    return real.is_relative_to(home) or real.parent == home.parent.parent / "blobs"
