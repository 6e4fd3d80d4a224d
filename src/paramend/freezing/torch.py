"""Freezing in torch: parameters without gradients, and buffers that the forward pass leaves as they are."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from paramend.edits.call import sliced_shape
from paramend.errors import BadArgument, Unsupported
from paramend.freezing import torch_buffers
from paramend.freezing.report import FreezeReport, FrozenReport, FrozenRow
from paramend.leaves.leaves import tied
from paramend.leaves.specs import Spec, dtype_name
from paramend.selectors.selector import resolve, sel
from paramend.selectors.slices import write_index
from paramend.trees.tree import Tree


def freeze_(
    module: nn.Module, selector: Any, index: Any, optimizer: Any, norm_stats: bool, keep_state: bool
) -> FreezeReport:
    """The report of the selected leaves, after freezing them."""
    chosen = _Chosen.of(module, selector)
    chosen.refuse_halves(selector)
    if index is not None:
        withhold(chosen.parameters(), index, optimizer)
        return chosen.report("frozen", index)
    if optimizer is not None:
        _forget(optimizer, chosen.parameters(), keep_state)
    holders = torch_buffers.holders(module)
    for layer, name, parameter in chosen.places():
        vars(layer).setdefault("_trained_before", {}).setdefault(name, parameter.requires_grad)
        if not vars(layer)["_trained_before"][name] and not hasattr(parameter, "_local_tensor"):
            torch_buffers.watch(holders, layer, name)
    for parameter in chosen.parameters().values():
        parameter.requires_grad_(False)
        parameter.grad = None  # a gradient left from an earlier step would be applied in the next
    for layer, names in chosen.buffers():
        left = () if norm_stats else torch_buffers.statistics_of(layer, names)
        torch_buffers.hold(module, layer, [name for name in names if name not in left])
    return chosen.report("frozen", index, norm_stats)


def unfreeze_(module: nn.Module, selector: Any, index: Any, optimizer: Any) -> FreezeReport:
    """The report of the selected leaves, after thawing them."""
    chosen = _Chosen.of(module, selector)
    if optimizer is not None or index is not None:
        release(chosen.parameters(), index, optimizer)
    if index is not None:
        return chosen.report("thawed", index)
    holders = torch_buffers.holders(module)
    for layer, name, parameter in chosen.places():
        before = vars(layer).get("_trained_before", {})
        # A parameter that `freeze_` never saw is thawed too, whoever froze it. Integers cannot have a gradient.
        if before.pop(name, parameter.is_floating_point() or parameter.is_complex()):
            parameter.requires_grad_()
        else:
            torch_buffers.unwatch(holders, layer, name)
        if not before:
            vars(layer).pop("_trained_before", None)
    for layer, names in chosen.buffers():
        torch_buffers.release(module, layer, names)
    return chosen.report("thawed", index)


def frozen(module: nn.Module, optimizer: Any) -> FrozenReport:
    """The report of which parameters are frozen."""
    withheld = getattr(optimizer, "_withheld", None)
    sliced = {id(parameter) for parameter, _ in withheld.slices} if withheld is not None else set()
    rows = [
        FrozenRow(
            name,
            Spec(tuple(p.shape), dtype_name(p.dtype)),
            "frozen" if not p.requires_grad else "partly" if id(p) in sliced else "trained",
        )
        for name, p in module.named_parameters()
    ]
    if optimizer is None:
        return FrozenReport(tuple(rows))
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return FrozenReport(tuple(rows), sum(value.numel() * value.element_size() for value in held))


@dataclass(frozen=True)
class _Chosen:
    """The leaves of a module that a selector chooses, under all their names."""

    module: nn.Module
    tree: Tree
    numbers: tuple[int, ...]
    ids: frozenset[int]

    @classmethod
    def of(cls, module: nn.Module, selector: Any) -> "_Chosen":
        sharded = any(hasattr(p, "_local_tensor") for p in module.parameters())
        tree = _Sharded(module) if sharded else Tree(module)
        numbers = resolve(selector, tree)
        twins = {twin for number in numbers for twin in tree.twins(number)}
        return cls(module, tree, numbers, frozenset(id(tree.values[number]) for number in twins))

    def report(self, did: str, index: Any, statistics: bool = True) -> FreezeReport:
        """A row for each leaf; without the running statistics, if these are not held."""
        left = set()
        for layer, names in self.buffers() if not statistics else ():
            left |= {id(layer._buffers[name]) for name in torch_buffers.statistics_of(layer, names)}
        numbers = (number for number in self.numbers if id(self.tree.values[number]) not in left)
        rows = (FrozenRow(self.tree.index.path(number), self.tree.spec(number), did) for number in numbers)
        return FreezeReport(did, rows, "" if index is None else write_index(index))

    def parameters(self) -> dict[str, torch.Tensor]:
        """The parameters by name, without buffers."""
        return {name: p for name, p in self.module.named_parameters() if id(p) in self.ids}

    def places(self) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
        """The parameters with the layers that hold them and their names there."""
        for layer in self.module.modules():
            for name, parameter in layer._parameters.items():
                if parameter is not None and id(parameter) in self.ids:
                    yield layer, name, parameter

    def buffers(self) -> Iterator[tuple[nn.Module, list[str]]]:
        """The layers with buffers among these tensors, and the names of these there."""
        for layer in self.module.modules():
            names = [name for name, buffer in layer._buffers.items() if buffer is not None and id(buffer) in self.ids]
            if names:
                yield layer, names

    def refuse_halves(self, selector: Any) -> None:
        """Raise for a parameter with two names if only one is selected: it cannot both be frozen and train on."""
        named = set(resolve(selector, _Untied(self.tree.root)))
        for number in sorted(named):
            others = [twin for twin in self.tree.twins(number) if twin not in named]
            if others:
                one, other = self.tree.index.path(number), self.tree.index.path(others[0])
                raise BadArgument(
                    f"{one} and {other} are one parameter (tied), and only {one} is to be frozen",
                    hint=f"name both: pm.freeze_(module, [{sel(selector)!r}, {other!r}])",
                )


class _Sharded(Tree):
    """A module with DTensors (FSDP2), which have no storage to compare: leaves are tied if they are one object."""

    @property
    def ties(self) -> Mapping[int, int]:
        return tied({number: id(self.values[number]) for number in self.index.numbers})


class _Untied(Tree):
    """A tree in which every name is a separate leaf: a selector finds the names it matches, without their twins."""

    @property
    def ties(self) -> Mapping[int, int]:
        return {}


def _forget(optimizer: Any, parameters: dict[str, torch.Tensor], keep_state: bool) -> None:
    """Drop the state that an optimizer keeps for parameters."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in parameters.values()):
        one = next(iter(parameters), "no parameter")
        raise BadArgument(
            f"this {type(optimizer).__name__} holds none of the selected parameters: {one}",
            hint="the optimizer of this module: torch.optim.AdamW(module.parameters())",
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.state.clear()  # one history of curvature for all parameters, which would go on moving the frozen ones
    elif not keep_state:
        for parameter in parameters.values():
            optimizer.state.pop(parameter, None)


class _Withheld:
    """The slices that one optimizer must not move, and the hooks that ensure it: decay and momentum move elements
    without a gradient, too, so these are saved before each step and put back after it."""

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
