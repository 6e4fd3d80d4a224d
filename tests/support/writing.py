"""Files written from the parts that a format's writer names, as simply as that can be done."""

import os
from collections.abc import Mapping
from pathlib import Path

from paramend.formats.safetensors import Header, layout
from paramend.formats.source import Item, LeafBytes
from paramend.leaves.origins.origin import Extent
from paramend.leaves.specs import Spec


def write(path: Path, form, leaves: list[tuple[Item, bytes]], metadata=None, outline=None) -> Path:
    """The path of a file of a format with these leaves, each an item and its bytes; long runs of zeros are holes."""
    writer, ranges = form.writer(), []
    with path.open("wb") as file:
        for part in writer.parts([item for item, _ in leaves], metadata or {}, outline):
            data = leaves[part.item][1] if isinstance(part, LeafBytes) else part
            if isinstance(part, LeafBytes):
                ranges += [(file.tell(), file.tell() + part.stop - part.start)] if part.start < part.stop else []
            if data is None:  # a leaf of zeros, too long to be held
                file.seek(part.stop - part.start, os.SEEK_CUR)
            else:
                file.write(data[part.start : part.stop] if isinstance(part, LeafBytes) else data)
    if writer.seals:
        with form.open(path) as made, path.open("r+b") as file:
            for _, at, data in made.after_patch([Extent(path, start, stop - start) for start, stop in ranges]):
                file.seek(at)
                file.write(data)
    return path


def write_header(specs: Mapping[str, Spec], metadata=None) -> Header:
    """The header of a safetensors file that holds tensors of these specs one after the other."""
    return layout(((name, spec, spec.nbytes) for name, spec in specs.items()), metadata)
