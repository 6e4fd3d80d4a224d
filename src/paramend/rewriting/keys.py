"""Keys of GGUF files: what a new one says of its model, with the edits of its configuration."""

from typing import Any

from paramend.anatomy.documents import Document
from paramend.edits.plan import Plan
from paramend.formats.gguf.keys import entered
from paramend.rewriting.arrangement import base_of


def keys_of(made: Plan) -> dict[str, Any]:
    """The keys of a model; `BadArgument` if GGUF lacks a value of its configuration."""
    base, document = base_of(made), document_in(made)
    metadata = dict(base.metadata) if base.format == "gguf" else {}
    return metadata if document is None else entered(metadata, document.values)


def document_in(made: Plan) -> Document | None:
    """The configuration in the file of the weights, if edits change it."""
    return next((each for each in made.texts if each.own and each.text != each.before), None)
