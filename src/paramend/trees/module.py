"""The kind of torch modules: their leaves are those of the state dict, parameters and persistent buffers."""

import copy
from collections.abc import Mapping
from typing import Any

import torch

from paramend.errors import Unsupported
from paramend.trees.kind import Kind


def _open(module: Any) -> tuple[tuple[Any, ...], tuple[Any, ...], Any]:
    transient = module._non_persistent_buffers_set
    found = {name: value for name, value in module._parameters.items() if value is not None}
    found |= {k: v for k, v in module._buffers.items() if v is not None and k not in transient}
    found |= {name: child for name, child in module._modules.items() if child is not None}
    return tuple(found), tuple(found.values()), None


def _replace(module: Any, changes: Mapping[int, Any]) -> Any:
    # Tensors in the memo are not copied: unchanged ones stay the same objects, ties stay ties.
    kept = {id(t): t for t in (*module.parameters(), *module.buffers())}
    try:
        return copy.deepcopy(module, kept | {at: _placed(value, kept.get(at)) for at, value in changes.items()})
    except AssertionError as error:  # of FSDP2, whose modules have hooks of their own
        raise Unsupported(
            f"{type(module).__name__} cannot be copied: {error}",
            hint="edit it in place, as pm.at(module, ...).zero_() does, or edit module.state_dict()",
        ) from error


def _placed(value: Any, old: Any) -> Any:
    """A tensor in the place of another: of a Parameter, a Parameter."""
    if not isinstance(old, torch.nn.Parameter) or isinstance(value, torch.nn.Parameter) or value.grad_fn is not None:
        return value
    return torch.nn.Parameter(value, old.requires_grad)


MODULE = Kind("torch module", _open, close=lambda module, children: module, replace=_replace)


def kind_of(kind: type) -> Kind | None:
    """The kind of a torch module, or None."""
    return MODULE if issubclass(kind, torch.nn.Module) else None
