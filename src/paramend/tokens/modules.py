"""What a module of transformers says of its tokens beside its weights: configurations, and numbers in its modules."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from paramend.anatomy.documents import Document
from paramend.anatomy.sections import enter
from paramend.anatomy.tokens import New

# The file of a configuration → the attribute that holds it.
FILES = {"config.json": "config", "generation_config.json": "generation_config"}
_SIZES = ("num_embeddings", "out_features", "vocab_size")


def documents_of(module: Any) -> Iterator[Document]:
    """The configurations of a module, as the files that they are saved as."""
    for name, attribute in FILES.items():
        own: Any = getattr(module, attribute, None)
        if hasattr(own, "to_json_string"):
            text = own.to_json_string(use_diff=False).encode()
            yield Document(Path(name), text, text)


def follow(module: Any, texts: Sequence[Document], sizes: Mapping[int, int], new: New) -> None:
    """Make the modules of a module, and its configurations, those of tables with other `sizes`, old → new."""
    for text in texts:
        enter(getattr(module, FILES[text.name]), json.loads(text.before), text.values)
    for each in module.modules():
        weight = getattr(each, "weight", None)
        sized = {name: sizes.get(getattr(each, name, -1)) for name in _SIZES}
        found = {name: size for name, size in sized.items() if size and (weight is None or len(weight) == size)}
        for name, size in found.items():
            setattr(each, name, size)
        if found and getattr(each, "padding_idx", None) is not None:
            each.padding_idx = new(each.padding_idx)
