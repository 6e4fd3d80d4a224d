"""`pm.anatomy`: what configuration, names and shapes say of a model, and how its configuration follows an edit."""

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

from paramend.anatomy.anatomies import Anatomy
from paramend.anatomy.bodies import Body, Pieces, bodies_of
from paramend.anatomy.documents import document_of
from paramend.anatomy.experts import experts_of
from paramend.anatomy.sections import parsed
from paramend.anatomy.sizes import Leaf
from paramend.anatomy.ties import ties_of
from paramend.disk.urls import path_of
from paramend.edits.memory import Memory, editable
from paramend.edits.weights import weighed
from paramend.errors import CannotRead, SpecMismatch
from paramend.leaves.groups import groups_of
from paramend.leaves.leaves import Editable, separator_of
from paramend.leaves.specs import AnyTree
from paramend.selectors.layers import candidates
from paramend.trees.lookup import is_torch_module


class Configured(Protocol):
    """A configuration as transformers has it."""

    def to_dict(self) -> dict[str, Any]: ...


# A configuration, one of transformers, or the path of a `config.json`.
ConfigLike = Mapping[str, Any] | Configured | str | os.PathLike[str]


def anatomy(model: AnyTree, config: ConfigLike | None = None) -> Anatomy:
    """What configuration, names and shapes say of a model: layers, experts, heads, widths, vocabulary, ties, parts.

    Nothing is guessed: what neither tells is None.

    Args:
        model: an opened checkpoint, a module of transformers, or a tree of arrays.
        config: its configuration, as a mapping, as transformers has it, or the path of a `config.json`. By default that
            beside a checkpoint, or of a module; a tree of arrays has none.

    Raises:
        CannotRead: there is no such file.
        BadCheckpoint: the configuration is damaged.

    >>> layer = {"self_attn": {"o_proj": {"weight": np.ones((4, 4))}}}
    >>> tree = {"embed_tokens": {"weight": np.ones((9, 4))}, "layers": [layer, layer]}
    >>> print(anatomy(tree, {"num_hidden_layers": 2, "num_attention_heads": 2}))
    layers      count: 2, kinds: 2 attention, where: layers
    heads       query: 2, head_dim: 2
    hidden      4
    vocabulary  9
    """
    stored = editable(model)
    leaves = weighed(stored, inputs=True)
    index, values = leaves.index, configuration(stored, config)
    held = {number: Leaf(index.pieces(number), leaves.spec(number).shape) for number in index.numbers}
    main, bodies = bodies_of(values, held, candidates(index))
    paths = {number: leaf.path for number, leaf in held.items()}
    groups = Counter(group.scheme.name for group in groups_of(stored))
    ties = ties_of({} if is_module(stored) else values, paths, leaves.ties)
    texts = {number: index.path(number) for number in index.numbers}
    experts = None
    with suppress(SpecMismatch):  # of names, shapes and configuration, which is told where experts are edited
        experts = experts_of(stored, values)
    mixture = None if experts is None else experts.to_dict()
    return Anatomy(
        main, bodies, _others(held, bodies), texts, ties, mixture, dict(groups) or None, separator_of(texts.values())
    )


def configuration(leaves: Editable, given: ConfigLike | None = None) -> dict[str, Any]:
    """The configuration of a model: that given, else that beside a checkpoint or of a module; {} if there is none.
    `CannotRead` if there is no such file, `BadCheckpoint` if it is damaged."""
    if isinstance(given, str | os.PathLike):
        file = path_of(given) / "config.json" if path_of(given).is_dir() else path_of(given)
        try:
            return parsed(file.read_bytes(), file)
        except OSError as error:
            raise CannotRead(f"{file}: {error.strerror}") from None
    if given is None and is_module(leaves):
        given = getattr(leaves.root, "config", None)  # type: ignore[attr-defined]
    if given is not None:
        return dict(given) if isinstance(given, Mapping) else given.to_dict() if hasattr(given, "to_dict") else {}
    document = document_of(leaves)
    return {} if document is None else document.values


def is_module(leaves: Editable) -> bool:
    """Whether leaves are those of a torch module, which shows itself what is one."""
    return isinstance(leaves, Memory) and is_torch_module(leaves.root)


def _others(leaves: Mapping[int, Leaf], bodies: Mapping[str, Body]) -> dict[str, Pieces]:
    """The modules of a model of several parts that are in none of them: name → path."""
    mine = {number for body in bodies.values() for number in body.leaves}
    if not bodies or {*bodies} == {"encoder", "decoder"}:
        return {}
    found: dict[str, Pieces] = {}
    for number, leaf in leaves.items():
        if number not in mine and len(leaf.path) > 1:
            depth = 1 + (leaf.path[0] == "model" and len(leaf.path) > 2)
            found.setdefault(leaf.path[depth - 1], leaf.path[:depth])
    return found
