"""Sidecars: the files of a directory that hold no weights, which are copied unchanged."""

import re
import stat
from pathlib import Path

from paramend.formats.index import is_index
from paramend.formats.registry import FOREIGN_WEIGHTS, SUFFIXES
from paramend.formats.shards import Shards
from paramend.rewriting.files import Copy, File

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
    found = _Sidecars(source.folder)
    weights = {file.path.name for file in source.files}
    if source.shard_index is not None:
        weights.add(source.shard_index.path.name)
    for name in sorted(path.name for path in source.folder.iterdir()):
        if name in weights or name.startswith("."):
            continue
        if is_index(name) or _OTHER_WEIGHTS.fullmatch(name):
            found.left_out.append(f"{name} (other weights)")
        else:
            found.collect(name)
    return found.files, found.left_out, found.weights


class _Sidecars:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[File] = []
        self.left_out: list[str] = []
        self.weights: list[str] = []

    def collect(self, name: str) -> None:
        path = self.folder / name
        try:
            if path.is_symlink() and not is_of_hub_cache(self.folder, path):
                self.left_out.append(f"{name} (a symbolic link)")
                return
            status = path.stat()
        except OSError:
            self.left_out.append(f"{name} (it cannot be read)")
            return
        if stat.S_ISDIR(status.st_mode) and not path.is_symlink():
            for inner in sorted(path.iterdir()):
                if not inner.name.startswith("."):
                    self.collect(f"{name}/{inner.name}")
        elif not stat.S_ISREG(status.st_mode):
            self.left_out.append(f"{name} (not a regular file)")
        elif self._stale(name, path):
            self.left_out.append(f"{name} (other weights)")
        else:
            copy = (Copy(path, 0, status.st_size),) if status.st_size else ()
            self.files.append(File(name, status.st_size, copy, path))

    def _stale(self, name: str, path: Path) -> bool:
        """Whether a file holds weights of the same model in another form; those of other models are noted."""
        if not _WEIGHTS.fullmatch(path.name):
            return False
        if any(_OTHER_FORMS.fullmatch(part) for part in name.split("/")[:-1]) or path.name.lower().endswith(".gguf"):
            return True
        if not _STATES.fullmatch(path.name):
            self.weights.append(name)
        return False


def is_of_hub_cache(folder: Path, path: Path) -> bool:
    """Whether a symbolic link stays with the model: within the directory, or in the blobs of a hub cache beside it.

    Any other may lead to files that nobody meant to copy.
    """
    real, home = path.resolve(), folder.resolve()
    return real.is_relative_to(home) or real.parent == home.parent.parent / "blobs"
