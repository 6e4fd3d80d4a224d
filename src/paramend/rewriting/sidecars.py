"""Sidecars: files beside weights, which are copied unchanged; and those of checkpoints that are directories."""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from paramend.disk.urls import unanswered
from paramend.formats.registry import FOREIGN_WEIGHTS, SUFFIXES
from paramend.formats.shards import Shards, is_index
from paramend.rewriting.files import File, copied_file

# Weights of the same model in another form would contradict the edited ones.
_ENDS = rf"(?:{'|'.join(map(re.escape, (*SUFFIXES, *FOREIGN_WEIGHTS)))})"
_OTHER_WEIGHTS = re.compile(
    r"(?:pytorch_model|tf_model|flax_model|rust_model|model|consolidated|diffusion_pytorch_model|adapter_model)"
    rf"[-_.0-9a-z]*{_ENDS}"
    r"|.*(?:\.gguf|\.ggml|\.onnx|\.onnx[._]data|\.safetensors|\.tflite|\.mlmodel|\.mar|\.nemo|\.distcp)",
    re.IGNORECASE,
)
# Folders that hold the whole model in another form.
_OTHER_FORMS = re.compile(
    r"onnx|original|openvino|coreml|gguf|metal|tflite|tensorrt|trt|mlx|ct2|ctranslate2", re.IGNORECASE
)
_WEIGHTS = re.compile(rf".*(?:{_ENDS}|\.onnx[._]data|\.distcp|\.mlmodel|\.pdparams|\.engine|\.plan)", re.IGNORECASE)
# What trainers save beside a model under suffixes of weights.
_STATES = re.compile(r"(?:training_args|optimizer|scheduler|scaler|rng_state|random_states)[-_.0-9a-z]*", re.IGNORECASE)


def sidecars(source: Shards) -> tuple[list[File], list[str], list[str]]:
    """The files beside the weights, what is left out of the directory, and which of the files hold weights.

    The last are those of other models, as in the folders of a pipeline: they are copied as they are.
    """
    files, left_out, others = list[File](), list[str](), list[str]()
    own = {file.path.name for file in source.files}
    own |= set() if source.shard_index is None else {source.shard_index.path.name}
    for name in sorted({path.name for path in source.folder.iterdir() if not path.name.startswith(".")} - own):
        if is_index(name) or _OTHER_WEIGHTS.fullmatch(name):
            left_out.append(f"{name} (other weights)")
            continue
        for inner, file in walked(source.folder, name, hidden=False):
            *above, last = inner.split("/")
            if not isinstance(file, File):
                left_out.append(f"{inner} ({file})")
            elif not _WEIGHTS.fullmatch(last):
                files.append(file)
            elif any(map(_OTHER_FORMS.fullmatch, above)) or last.lower().endswith(".gguf"):
                left_out.append(f"{inner} (other weights)")
            else:
                files.append(file)
                others += [] if _STATES.fullmatch(last) else [inner]
    return files, left_out, others


def walked(home: Path, name: str, *, hidden: bool) -> Iterator[tuple[str, File | str]]:
    """The files under a name in a directory, each as it is copied, or why it cannot be; hidden ones, too, or not."""
    path = home / name
    if hidden and (path.name == ".undo" or path.name.endswith(".orbax-checkpoint-tmp")):
        return
    linked = path.is_symlink()
    try:
        if linked and not (is_of_hub_cache(home, path) and (path.is_file() or not hidden)):
            yield name, "a symbolic link"
            return
        status = path.stat()
    except OSError as error:
        if unanswered(error):
            raise
        yield name, "it cannot be read"
        return
    if stat.S_ISDIR(status.st_mode) and not linked:
        for inner in sorted(path.iterdir()):
            if hidden or not inner.name.startswith("."):
                yield from walked(home, f"{name}/{inner.name}", hidden=hidden)
    else:
        regular = stat.S_ISREG(status.st_mode)
        yield name, copied_file(path, status.st_size, name) if regular else "not a regular file"


def is_of_hub_cache(folder: Path, path: Path) -> bool:
    """Whether a symbolic link stays with the model: within the directory, or in the blobs of a hub cache beside it.

    Any other may lead to files that nobody meant to copy.
    """
    real, home = path.resolve(), folder.resolve()
    return real.is_relative_to(home) or real.parent == home.parent.parent / "blobs"


def tree_within(source: Any) -> Path:
    """The folder that holds the tree, within that of the checkpoint."""
    return Path(source.folder.relative_to(source.path))


def own_files(source: Any, *, link: bool) -> tuple[list[File], list[str]]:
    """The files of a directory, and what is left out."""
    home, inner = source.path, tree_within(source)
    files: list[File] = []
    left_out: list[str] = []
    for entry in sorted(os.scandir(home), key=lambda entry: entry.name):
        # From the folder of a manager, one step and the metadata common to all steps are copied.
        step = source.steps and entry.is_dir() and entry.name != "metadata" and entry.name != inner.parts[0]
        if step:
            left_out.append(f"{entry.name} (another step)" if entry.name.isdigit() else entry.name)
            continue
        for name, file in walked(home, entry.name, hidden=True):  # some stores have hidden files
            if isinstance(file, File):
                files.append(replace(file, link=link and _OWN.fullmatch(name.rpartition("/")[2]) is None))
            else:
                left_out.append(f"{name} ({file})")
    return files, left_out


# Metadata files, which say what other files count: hard links to them could not be replaced.
_OWN = re.compile(r"_(?!.*\.distcp).*|\..*|manifest\..*|zarr\.json")
