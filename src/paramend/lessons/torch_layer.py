"""The lesson on zeroing a torch layer in place."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from paramend.growth.zeroing import init_zero_
from paramend.lessons.lesson import Case, Lesson, Solve, mistake
from paramend.lessons.observation import Observation, observed


def init_zero(layer: nn.Module) -> Any:
    """The layer, with its weight and bias set to zero in place."""
    return init_zero_(layer)


def _parameters(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name in ("weight", "bias"):
        parameter = getattr(layer, name, None)
        if parameter is not None:
            yield name, parameter


def _each(write: Callable[[Any, str, Any], object]) -> Solve:
    """A solution that does one thing with every parameter."""

    def solve(layer: Any) -> None:
        for name, parameter in _parameters(layer):
            write(layer, name, parameter)

    return solve


def _unguarded(write: Callable[[Any], object]) -> Solve:
    """A solution that writes to weight and bias, whether they are there or not."""

    def solve(layer: Any) -> None:
        with torch.no_grad():
            write(layer.weight)
            write(layer.bias)

    return solve


def _if_weight(solve: Solve) -> Solve:
    return lambda layer: solve(layer) if hasattr(layer, "weight") else None


@torch.no_grad()
def _without_bias(layer: Any) -> None:
    layer.weight.zero_()
    layer.bias = None


@torch.no_grad()
def _unguarded_weight(layer: Any) -> None:
    layer.weight.zero_()
    if layer.bias is not None:
        layer.bias.zero_()


def observe(solve: Solve, case: Case) -> Observation:
    """What became of the layer's parameters and buffers; for a Sequential, after a call for each layer."""
    (layer,) = copy.deepcopy(case.args)
    names = [name for name, _ in layer.named_parameters(remove_duplicate=False)]
    before = dict(layer.named_parameters(remove_duplicate=False))
    told = {name: (p.shape, p.dtype, p.device, p.requires_grad) for name, p in before.items()}
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}

    def call() -> None:
        for one in layer if isinstance(layer, nn.Sequential) else [layer]:
            solve(one)

    seen = observed(call, solve)
    if seen.raised:
        return seen
    facts: dict[str, str] = {}
    after = dict(layer.named_parameters(remove_duplicate=False))
    for name in names:
        new = after.get(name)
        if new is None:
            facts[name] = "gone"
            continue
        facts[name] = _content(new)
        facts[f"{name}, the Parameter object"] = "the same" if new is before[name] else "another"
        now = (new.shape, new.dtype, new.device, new.requires_grad)
        for what, value in zip(("shape", "dtype", "device", "requires_grad"), now, strict=True):
            facts[f"{name}, {what}"] = str(tuple(value) if isinstance(value, torch.Size) else value)
    added = [name for name in after if name not in told]
    facts["parameters that were not there"] = ", ".join(added) or "none"
    for name, buffer in layer.named_buffers():
        kept = name in buffers and torch.equal(buffer, buffers[name])
        facts[f"{name} (a buffer)"] = "left as it was" if kept else "changed"
    return Observation(facts=facts)


def _content(parameter: nn.Parameter) -> str:
    values = parameter.detach().float()
    if values.isnan().any():
        return "nan is left"
    if values.any():
        return "not zero"
    return "-0.0 somewhere" if values.signbit().any() else "zero"


def cases(rng: np.random.Generator) -> list[Case]:
    """Layers of several kinds and dtypes, one with nan, one frozen, and a Sequential with gaps."""
    a, b = (int(n) for n in rng.integers(2, 6, size=2))
    with torch.random.fork_rng(devices=[]):  # creating layers draws from torch's global generator, which learners use
        layers: list[tuple[str, nn.Module]] = [
            ("a Linear layer", nn.Linear(a, b)),
            ("a bfloat16 layer", nn.Conv1d(a, b, 2).to(torch.bfloat16)),
            ("bias=None, and a nan in the weight", nn.Linear(a, b, bias=False)),
            ("a frozen float64 layer with buffers", nn.BatchNorm1d(a).double().requires_grad_(False)),
            ("layer by layer", nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, a, bias=False), nn.LayerNorm(a))),
        ]
    for _, layer in layers:
        for parameter in layer.parameters():
            parameter.data.copy_(torch.from_numpy(rng.normal(size=tuple(parameter.shape))))
            parameter.data.view(-1)[0] = -1.0
    next(layers[2][1].parameters()).data.view(-1)[0] = torch.nan
    return [Case((layer,), note=note) for note, layer in layers]


LESSON = Lesson(
    name="init_zero",
    reference=init_zero,
    cases=cases,
    observe=observe,
    mistakes=(
        mistake(
            "the bias dropped or left as it was",
            "A layer is its weight and its bias: both become zero, and both stay there.",
            _if_weight(torch.no_grad()(lambda layer: layer.weight.zero_())),
            _if_weight(_without_bias),
        ),
        mistake(
            "a layer without weight or bias is not expected",
            "nn.ReLU has no weight, and with bias=None the bias is not a tensor. Check before you write: "
            "getattr(layer, 'bias', None) is not None.",
            _unguarded(lambda parameter: parameter.zero_()),
            _unguarded(lambda parameter: parameter.fill_(0)),
            _unguarded(lambda parameter: parameter.data.zero_()),
            _unguarded(lambda parameter: parameter.copy_(torch.zeros_like(parameter))),
            _unguarded_weight,
            _if_weight(_unguarded(lambda parameter: parameter.zero_())),
            _if_weight(_unguarded(lambda parameter: parameter.data.zero_())),
        ),
        mistake(
            "a scalar where an array belongs",
            "The weight became one number. Write zeros into the existing tensor, which has the layer's shape.",
            _each(lambda layer, name, _: setattr(layer, name, 0.0)),
            _each(lambda layer, name, parameter: setattr(parameter, "data", torch.tensor(0.0))),
            _each(lambda layer, name, parameter: setattr(parameter, "data", 0.0)),
            _each(lambda layer, name, _: setattr(layer, name, nn.Parameter(torch.tensor(0.0)))),
        ),
        mistake(
            "dtype lost by zeros(shape)",
            "torch.zeros(shape) is float32 on the CPU, whatever the layer was. `parameter.zero_()` keeps "
            "dtype and device.",
            _each(lambda layer, name, old: setattr(old, "data", torch.zeros(old.shape))),
            _each(lambda layer, name, old: setattr(layer, name, nn.Parameter(torch.zeros(old.shape)))),
        ),
        mistake(
            "the parameter replaced instead of its numbers",
            "A new nn.Parameter is not the one that the optimizer and tied layers hold, and it is not "
            "frozen if the old one was. Write into the old one.",
            _each(lambda layer, name, old: setattr(layer, name, nn.Parameter(torch.zeros_like(old)))),
            _each(
                lambda layer, name, old: setattr(
                    layer, name, nn.Parameter(torch.zeros_like(old), requires_grad=old.requires_grad)
                )
            ),
        ),
        mistake(
            "every tensor zeroed, buffers too",
            "The state dict also holds buffers: a BatchNorm with running_var zero divides by almost nothing.",
            torch.no_grad()(lambda layer: [tensor.zero_() for tensor in layer.state_dict().values()]),
        ),
        mistake(
            "a copy zeroed instead of the layer",
            "The given layer is unchanged: the zeros are in another object. In place means in this one.",
            lambda layer: init_zero_(copy.deepcopy(layer)),
        ),
        mistake(
            "multiplied by zero",
            "Multiplied by zero, nan and inf become nan, and negative numbers -0.0. `zero_()` writes zeros.",
            torch.no_grad()(_each(lambda layer, name, parameter: parameter.mul_(0))),
        ),
        mistake(
            "the edit recorded by autograd",
            "A parameter that requires a gradient cannot be edited in place outside of torch.no_grad().",
            _each(lambda layer, name, parameter: parameter.zero_()),
        ),
        mistake(
            "requires_grad changed",
            "requires_grad was switched off for the edit and stayed off: the layer will not train. Use "
            "torch.no_grad().",
            _each(lambda layer, name, parameter: parameter.requires_grad_(False).zero_()),
        ),
    ),
)
