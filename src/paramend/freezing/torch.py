"""Freezing in torch: parameters without gradients, normalization layers that keep their statistics."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from paramend.selectors import resolve
from paramend.trees.registry import Tree

_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})


def freeze_(module: nn.Module, selector: Any) -> list[str]:
    """The paths of the chosen leaves, after they were frozen."""

    def stop(tensor: torch.Tensor) -> None:
        tensor.requires_grad_(False)
        tensor.grad = None  # one that is left from an earlier step would be applied in the next

    return _each(module, selector, stop, _hold)


def unfreeze_(module: nn.Module, selector: Any) -> list[str]:
    """The paths of the chosen leaves, after they were thawed."""

    def go(tensor: torch.Tensor) -> None:
        if tensor.is_floating_point() or tensor.is_complex():  # integers can have no gradient
            tensor.requires_grad_()

    return _each(module, selector, go, _release)


def _each(
    module: nn.Module,
    selector: Any,
    on_parameter: Callable[[torch.Tensor], None],
    on_owner: Callable[[nn.Module], None],
) -> list[str]:
    """The chosen paths, after each parameter and each owner of statistics among them was dealt with."""
    tree = Tree(module)
    chosen = resolve(selector, tree)
    numbers = {twin for number in chosen for twin in tree.twins(number)}
    ids = {id(tree.values[number]) for number in numbers}
    for parameter in module.parameters():
        if id(parameter) in ids:
            on_parameter(parameter)
    for owner in _owners(module, ids):
        on_owner(owner)
    return [tree.index.path(number) for number in chosen]


def _owners(module: nn.Module, ids: set[int]) -> Iterator[nn.Module]:
    """The layers whose running statistics are among these tensors."""
    for layer in module.modules():
        if any(id(layer._buffers.get(name)) in ids for name in _STATISTICS):
            yield layer


# ---- statistics that stay ---------------------------------------------------------------------------------
#
# A normalization layer updates its statistics while its `training` is true, and `model.train()` makes it true
# in all layers. So it is made false for just as long as the layer runs. Hooks, and the handles that remove
# them, belong to the module and not to its state dict: copies and pickles of it stay frozen.


def _hold(layer: nn.Module) -> None:
    if not hasattr(layer, "_holds_statistics"):
        layer._holds_statistics = (
            layer.register_forward_pre_hook(_enter),
            layer.register_forward_hook(_leave, always_call=True),
        )


def _release(layer: nn.Module) -> None:
    for handle in vars(layer).pop("_holds_statistics", ()):
        handle.remove()


def _enter(layer: nn.Module, args: Any) -> None:
    layer._trains_outside = layer.training
    layer.training = False


def _leave(layer: nn.Module, args: Any, output: Any) -> None:
    # Called also when another hook failed before `_enter`.
    layer.training = vars(layer).pop("_trains_outside", layer.training)
