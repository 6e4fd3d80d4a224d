"""Buffers of torch modules that stay as they are while the model trains.

No gradient moves a buffer; the forward pass of some layer does. Hooks, and the handles that remove them, belong to the
module and not to its state dict: copies and pickles of it stay frozen.

- Running statistics and the vectors of spectral norm stay in eval mode, and `model.train()` ends that in all layers. So
  the layer that owns them is in eval mode while it runs, and then no more.
- What moves other buffers, such as a codebook that is a moving average, is unknown. So while the layer runs, or a
  module above it, copies stand in their place. So they do for parameters that no gradient trained, as codebooks may be.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from paramend.leaves.paths import text_of
from paramend.trees.walks import containers

_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})


def statistics_of(layer: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of these buffers of a layer that are running statistics."""
    return [name for name in names if name in _STATISTICS]


def hold(root: nn.Module, layer: nn.Module, names: list[str]) -> None:
    """Keep some buffers of a layer as they are, whenever the root or a module between the two runs."""
    vectors = [name for name in names if name in _vectors(layer)]
    statistics = statistics_of(layer, names)
    if (vectors or statistics) and not hasattr(layer, "_holds_statistics"):
        layer._holds_statistics = (
            layer.register_forward_pre_hook(_enter, prepend=bool(vectors)),  # before the hook of spectral norm
            layer.register_forward_hook(_leave, always_call=True),
        )
    safe = {*vectors, *(statistics if isinstance(layer, _NormBase) else ())}  # other layers may not heed the mode
    lent = [name for name in names if name not in safe]
    for module, path in _above(root, layer) if lent else ():
        for name in lent:
            _lend(module, f"{path}.{name}" if path else name)


Holders = Mapping[int, list[tuple[nn.Module, str]]]


def holders(root: nn.Module) -> Holders:
    """id of a module → itself and the modules that hold it, each with its path there."""
    found: dict[int, list[tuple[nn.Module, str]]] = {id(module): [(module, "")] for module in root.modules()}
    for module in root.modules():
        for name, child in module._modules.items():
            if child is not None:
                found[id(child)].append((module, name))
    return found


def watch(holders: Holders, layer: nn.Module, name: str) -> None:
    """Keep a parameter as it is that no gradient moved before, so that the forward pass may. Copies stand in for it
    while its layer runs, or a module that holds the layer. If it does not move the first time in train mode, they do so
    no more."""
    for module, path in holders[id(layer)]:
        _lend(module, f"{path}.{name}" if path else name, looks=True)


def unwatch(holders: Holders, layer: nn.Module, name: str) -> None:
    """Let the layer change this parameter again."""
    for module, path in holders[id(layer)]:
        if "_lends" in vars(module):
            _keep(module, [f"{path}.{name}" if path else name])


def release(root: nn.Module, layer: nn.Module, names: list[str]) -> None:
    """Let the layer change these buffers again."""
    if statistics_of(layer, names) or set(names) & _vectors(layer):
        for handle in vars(layer).pop("_holds_statistics", ()):
            handle.remove()
    if "_lends" in vars(layer):
        for module, path in _above(root, layer):
            _keep(module, [f"{path}.{name}" if path else name for name in names])


def _vectors(layer: nn.Module) -> set[str]:
    """The buffers of a layer that spectral norm iterates, in train mode."""
    hooks = [hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]
    found = {f"{hook.name}_{end}" for hook in hooks for end in "uv"}
    return found | {"_u", "_v"} if isinstance(layer, _SpectralNorm) else found


def _above(root: nn.Module, layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules from the root down to a layer, with the path of the layer in each, for each of its places."""
    places = {path: node for path, node, _ in containers(root)}
    return [
        (places[path[:at]], ".".join(map(text_of, path[at:])))
        for path, node in places.items()
        if node is layer
        for at in range(len(path) + 1)
    ]


# ---- eval mode while a layer runs ----------------------------------------------------------------------------------


def _enter(layer: nn.Module, args: Any) -> None:
    layer._trains_outside = layer.training
    layer.training = False


def _leave(layer: nn.Module, args: Any, output: Any) -> None:
    # Called also when another hook failed before `_enter`.
    layer.training = vars(layer).pop("_trains_outside", layer.training)


# ---- copies while a layer runs -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Loan:
    """A tensor that a copy stands in for."""

    owner: nn.Module
    name: str
    path: str
    tensor: torch.Tensor
    copy: torch.Tensor

    @property
    def moved(self) -> bool:
        """Whether the forward pass changed the copy, or put something in its place."""
        return _table(self.owner, self.name).get(self.name) is not self.copy or not torch.equal(self.copy, self.tensor)


def _table(owner: nn.Module, name: str) -> dict[str, Any]:
    table: dict[str, Any] = owner._parameters if name in owner._parameters else owner._buffers
    return table


def _lend(module: nn.Module, path: str, *, looks: bool = False) -> None:
    vars(module).setdefault("_lends", {}).setdefault(path, looks)
    if "_lending" not in vars(module):
        vars(module)["_lending"] = (
            module.register_forward_pre_hook(_give_copies, prepend=True),
            module.register_forward_hook(_take_back, always_call=True),
        )


def _keep(module: nn.Module, paths: Iterable[str]) -> None:
    lent = vars(module).get("_lends", {})
    for path in paths:
        lent.pop(path, None)
    if not lent:
        vars(module).pop("_lends", None)
        for handle in vars(module).pop("_lending", ()):
            handle.remove()


def _give_copies(module: nn.Module, args: Any) -> None:
    loans: list[_Loan] = []
    for path in vars(module)["_lends"]:
        above, _, name = path.rpartition(".")
        owner = module.get_submodule(above)
        table = _table(owner, name)
        tensor = table.get(name)
        # Its owner may have been thawed alone.
        if tensor is not None and name in vars(owner).get(
            "_trained_before" if table is owner._parameters else "_lends", ()
        ):
            copy = tensor.detach().clone()
            table[name] = copy if table is owner._buffers else nn.Parameter(copy, requires_grad=False)
            loans.append(_Loan(owner, name, path, tensor, table[name]))
    # Modules may call themselves.
    vars(module)["_lent"] = [*vars(module).get("_lent", ()), (loans, _frozen_below(module))]


def _frozen_below(module: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """The frozen parameters of a module that changes buffers of its own, which may assign parameters as well."""
    if not any(name in vars(module)["_lends"] for name in module._buffers):
        return []
    layers = ((layer, vars(layer).get("_trained_before", ())) for layer in module.modules())
    return [
        (layer, name, layer._parameters[name]) for layer, names in layers for name in names if name in layer._parameters
    ]


def _take_back(module: nn.Module, args: Any, output: Any) -> None:
    *outer, (loans, parameters) = vars(module).get("_lent", ()) or (([], []),)
    still = []
    for loan in loans:
        if vars(module)["_lends"].get(loan.path) and module.training:
            if loan.moved:
                vars(module)["_lends"][loan.path] = False
            else:
                still.append(loan.path)
    for loan in loans:
        _table(loan.owner, loan.name)[loan.name] = loan.tensor
    for layer, name, parameter in parameters:
        layer._parameters[name] = parameter
    if outer:
        vars(module)["_lent"] = outer
    else:
        vars(module).pop("_lent", None)
    if still:
        _keep(module, still)
