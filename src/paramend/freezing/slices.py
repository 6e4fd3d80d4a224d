"""Slices of torch parameters that an optimizer does not move.

A gradient of zero is not enough: weight decay and momentum still move such elements. So the elements are saved before
each step and put back after it, whatever the optimizer does in between.
"""

from typing import Any

import torch

from paramend.edits.call import sliced_shape
from paramend.errors import BadArgument, Unsupported
from paramend.selectors.slices import write_index


class _Withheld:
    """The slices that one optimizer must not move, and the hooks that ensure it."""

    def __init__(self, optimizer: Any) -> None:
        self.slices: list[tuple[torch.Tensor, Any]] = []
        self._before: list[torch.Tensor] = []
        self.handles = (
            optimizer.register_step_pre_hook(self._remember),
            optimizer.register_step_post_hook(self._put_back),
        )

    def _remember(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._before = []
        for parameter, index in self.slices:
            self._before.append(parameter.detach()[index].clone())
            if parameter.grad is not None:
                parameter.grad[index] = 0  # so that it adds nothing to moments, nor to norms within the step

    def _put_back(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for (parameter, index), before in zip(self.slices, self._before, strict=True):
                parameter[index] = before
        self._before = []


def withhold(parameters: dict[str, torch.Tensor], index: Any, optimizer: Any) -> None:
    """Keep the same slice of each parameter unchanged in every step of the optimizer."""
    _need(optimizer, index, "freeze_")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in parameters.items():
        if id(parameter) not in held:
            raise BadArgument(
                f"this {type(optimizer).__name__} does not hold {name}",
                hint="the optimizer of this module: torch.optim.AdamW(module.parameters())",
            )
        try:
            sliced_shape(tuple(parameter.shape), index)
        except IndexError as error:
            error.args = (f"{name}: {error}",)
            raise
    if not hasattr(optimizer, "_withheld"):
        optimizer._withheld = _Withheld(optimizer)
    optimizer._withheld.slices += [(parameter, index) for parameter in parameters.values()]


def release(parameters: dict[str, torch.Tensor], index: Any, optimizer: Any) -> None:
    """Let the optimizer move this slice of each parameter again; without an index, all their slices."""
    _need(optimizer, index, "unfreeze_")
    withheld = getattr(optimizer, "_withheld", None)
    if withheld is None:
        return
    ids = {id(parameter) for parameter in parameters.values()}
    wanted = None if index is None else write_index(index)
    withheld.slices = [
        (parameter, other)
        for parameter, other in withheld.slices
        if id(parameter) not in ids or wanted not in (None, write_index(other))
    ]
    if not withheld.slices:
        for handle in withheld.handles:
            handle.remove()
        del optimizer._withheld


def _need(optimizer: Any, index: Any, verb: str) -> None:
    if optimizer is None:
        raise Unsupported(
            f"a slice [{write_index(index)}] is frozen in the steps of an optimizer, since requires_grad holds for the "
            "whole tensor",
            hint=f"pm.{verb}(module, selector, optimizer=optimizer)",
        )
