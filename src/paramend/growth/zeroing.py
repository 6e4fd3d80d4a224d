"""Zero initialization of torch layers, in place."""

from typing import TYPE_CHECKING, Any, TypeVar

from paramend._optional import imported
from paramend.arrays.registry import backend
from paramend.edits.memory import Memory
from paramend.edits.quantized import check_values
from paramend.errors import Unsupported
from paramend.reports import wording
from paramend.trees.lookup import is_torch_module

if TYPE_CHECKING:
    import torch

Layer = TypeVar("Layer", bound="torch.nn.Module")


def zero_(layer: "torch.nn.Module") -> None:
    """Set every parameter of a torch layer or container to +0.0, in place.

    Buffers, such as running statistics, stay as they are. The parameters remain the same objects with the same dtype,
    device and `requires_grad`, so optimizers and tied layers go on with them. A layer without parameters, such as
    `nn.ReLU()`, is left as it is.

    Args:
        layer: a `torch.nn.Module`.

    Raises:
        Quantized: it holds a quantised weight.
        Unsupported: it is not a torch module; a weight is computed from other parameters (weight norm, pruning); or it
            holds no values yet (on the meta device, a lazy layer).

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU(), torch.nn.Linear(2, 1))
    >>> for layer in model:
    ...     zero_(layer)
    >>> model(torch.ones(1, 2)).tolist()
    [[0.0]]
    """
    if not is_torch_module(layer):
        raise _no_layer(layer)
    for name, inner in layer.named_modules():
        _refuse_computed(name, inner)
    held = Memory(layer)
    check_values(held, held.index.numbers, "cannot become zero")
    parameters = dict(layer.named_parameters())
    for name, parameter in parameters.items():
        lazy = hasattr(parameter, "materialize")
        why = "it has no shape yet (a lazy layer)" if lazy else backend(parameter).refusal(parameter)
        if why:
            said = f"{name} cannot become zero: {why}"
            raise Unsupported(said, hint='first layer.to_empty(device="cpu"), or run a batch through a lazy layer')
    for parameter in parameters.values():
        parameter.detach().zero_()  # the same storage, outside the graph; autograd still sees the change


def init_zero_(layer: Layer) -> Layer:
    """`pm.init.zero_` under its earlier name, under which it also returns the layer.

    >>> import torch
    >>> init_zero_(torch.nn.Linear(2, 1, bias=False)).weight.tolist()
    [[0.0, 0.0]]
    """
    zero_(layer)
    return layer


def _refuse_computed(name: str, module: Any) -> None:
    """Refuse a weight that is computed from parameters: zero parameters may make it NaN, or not zero."""
    where = f"{type(module).__name__}{f' {name!r}' if name else ''}"
    of = f'dict(layer.named_modules())["{name}"]' if name else "layer"
    for tensor in getattr(module, "parametrizations", ()):
        why = f"the {tensor} of {where} is parametrized: it is computed from other parameters"
        raise Unsupported(why, hint=f'first torch.nn.utils.parametrize.remove_parametrizations({of}, "{tensor}")')
    for hook in module._forward_pre_hooks.values():
        way_out = _WAYS_OUT.get(type(hook).__module__.removeprefix("torch.nn.utils."))
        if way_out:
            tensor = getattr(hook, "name", None) or getattr(hook, "_tensor_name", "weight")
            why = f"the {tensor} of {where} is computed from other parameters by {type(hook).__name__}"
            raise Unsupported(why, hint=f'first {way_out}({of}, "{tensor}")')


_WAYS_OUT = {
    "weight_norm": "torch.nn.utils.remove_weight_norm",
    "spectral_norm": "torch.nn.utils.remove_spectral_norm",
    "prune": "torch.nn.utils.prune.remove",
}


def _no_layer(layer: Any) -> Unsupported:
    hint = 'in JAX: params = pm.at(params, "**/Dense_0/**").zero()'
    if imported("torch"):
        import torch

        if isinstance(layer, torch.Tensor):
            hint = "torch.nn.init.zeros_(tensor)"
    return Unsupported(f"zero_ takes a torch layer (an nn.Module), and this is {wording.described(layer)}", hint=hint)
