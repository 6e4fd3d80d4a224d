"""Leaves that take other shapes: carried out on checkpoints, trees and modules, whose own numbers follow."""

import copy
from collections.abc import Mapping
from typing import Any

from paramend.anatomy.sections import enter
from paramend.checkpoints.assemble import exchanged, origin_of
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.edits.memory import Memory
from paramend.growth.configured import blank
from paramend.leaves.paths import text_of
from paramend.resize.widths import Growth
from paramend.trees.lookup import is_torch_module
from paramend.trees.walks import containers

Growths = Mapping[int, Growth]

# Attribute of a layer → the leaves that tell it, each with the axis; None for all of its shape.
_NUMBERS: Mapping[str, tuple[tuple[str, int | None], ...]] = {
    "in_features": (("weight", 1), ("kernel", -2)),
    "out_features": (("weight", 0), ("kernel", -1)),
    "in_channels": (("weight", 1),),
    "out_channels": (("weight", 0),),
    "num_features": (("weight", 0), ("running_mean", 0), ("scale", -1)),
    "normalized_shape": (("weight", None),),
    "num_embeddings": (("weight", 0), ("embedding", 0)),
    "embedding_dim": (("weight", 1),),
    "embedding_size": (("weight", 1),),
    "features": (("embedding", 1),),
}


def on_disk(checkpoint: Checkpoint, growths: Growths, texts: Any = ()) -> Checkpoint:
    """The checkpoint with leaves that are made of its own when they are read, and changed files beside them."""
    grown = {number: each.origin(origin_of(checkpoint, number)) for number, each in growths.items()}
    return exchanged(checkpoint, grown, texts=texts)


def in_memory(memory: Memory, growths: Growths, config: Mapping[str, Any] | None) -> Any:
    """A new tree of the same type; leaves that stay are the same objects."""
    twin = None if config is None else _anew(memory.root, config)
    new = memory.with_leaves({number: _parameter(memory, number, growths[number]) for number in _once(memory, growths)})
    _settle(new, memory, growths, twin)
    return new


def in_place(memory: Memory, growths: Growths, config: Mapping[str, Any] | None) -> None:
    """Give a torch or NNX module its new leaves. Parameters stay the same objects, without gradients."""
    twin = None if config is None else _anew(memory.root, config)
    made = {number: growths[number].array(_bare(memory.read(number))) for number in _once(memory, growths)}
    for number, value in made.items():
        if number in memory.boxes:
            memory.assign(number, value)
        else:
            tensor = memory.read(number)
            tensor.grad, tensor.data = None, value
    _settle(memory.root, memory, growths, twin)


def _once(memory: Memory, growths: Growths) -> list[int]:
    return [number for number in growths if memory.ties.get(number, number) == number]


def _parameter(memory: Memory, number: int, grown: Growth) -> Any:
    """A new leaf; in place of a parameter of torch, one that requires gradients like it."""
    old = memory.read(number)
    value = grown.array(_bare(old))
    if not is_torch_module(memory.root):
        return value
    from torch.nn import Parameter

    return Parameter(value, requires_grad=old.requires_grad) if isinstance(old, Parameter) else value


def _bare(x: Any) -> Any:
    return x.detach() if hasattr(x, "detach") else x


def _settle(root: Any, memory: Memory, growths: Growths, twin: Any) -> None:
    """Write the new lengths into the attributes of modules, or those of a model made anew, with its configuration."""
    if twin is not None:
        enter(root.config, root.config.to_dict(), twin.config.to_dict())
        _alike(root, twin)
        return
    changed = {memory.index.pieces(number)[:-1] for number in growths}
    for path, node, kind in list(containers(root)):
        held = vars(node) if hasattr(node, "__dict__") and tuple(map(text_of, path)) in changed else {}
        for name in _NUMBERS.keys() & held.keys():
            leaves, turned = dict(kind.entries(node)), type(node).__name__.startswith("ConvTranspose")
            shapes = ((tuple(leaves[leaf].shape), axis) for leaf, axis in _NUMBERS[name] if leaf in leaves)
            for shape, axis in [*shapes][:1]:
                length = shape if axis is None else shape[1 - axis if turned else axis]
                object.__setattr__(node, name, length)  # modules of Equinox are frozen, and these are new


def _anew(model: Any, values: Mapping[str, Any]) -> Any:
    config = copy.deepcopy(model.config)
    enter(config, config.to_dict(), values)
    return blank(type(model), config)


def _alike(model: Any, twin: Any) -> None:
    """Take the numbers of modules, and buffers that no file holds, from a model made anew."""
    modules = dict(twin.named_modules())
    for name, module in model.named_modules():
        other = modules[name]
        for key in module._non_persistent_buffers_set:
            old, new, root = module._buffers[key], other._buffers.get(key), vars(other).get(f"scalar_{key}")
            if root is not None:  # which the old one may have rounded
                module._buffers[key] = old * (root / vars(module)[f"scalar_{key}"])
            elif old is not None and new is not None:
                module._buffers[key] = new.to(old.device, old.dtype)
        for key, value in vars(other).items():
            if type(value) in (int, float, tuple, str) and key in vars(module) and key != "training":
                vars(module)[key] = value
