"""Buffers of torch modules that stay as they are while the model trains.

No gradient moves a buffer; the forward pass of some layer does. Hooks, and the handles that remove them, belong to the
module and not to its state dict: copies and pickles of it stay frozen.

- Running statistics and the vectors of spectral norm stay in eval mode, and `model.train()` ends that in all layers. So
  the layer that owns them is in eval mode while it runs, and then no more.
- What moves other buffers, such as a codebook that is a moving average, is unknown. So while the layer runs, or a
  module above it, copies stand in their place.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

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
    for name in [name for name in names if name not in safe]:
        for module, path in _above(root, layer):
            _lend(module, f"{path}.{name}" if path else name)


def release(root: nn.Module, layer: nn.Module, names: list[str]) -> None:
    """Let the layer change these buffers again."""
    if statistics_of(layer, names) or set(names) & _vectors(layer):
        for handle in vars(layer).pop("_holds_statistics", ()):
            handle.remove()
    if "_lends_buffers" in vars(layer):
        for module, path in _above(root, layer):
            _keep(module, [f"{path}.{name}" if path else name for name in names])


def _vectors(layer: nn.Module) -> set[str]:
    """The buffers of a layer that spectral norm iterates, in train mode."""
    hooks = [hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]
    found = {f"{hook.name}_{end}" for hook in hooks for end in "uv"}
    return found | {"_u", "_v"} if isinstance(layer, _SpectralNorm) else found


def _above(root: nn.Module, layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules from the root down to a layer, with the path of the layer in each, for each of its places."""
    found: list[tuple[nn.Module, str]] = []

    def visit(module: nn.Module, above: tuple[tuple[nn.Module, str], ...]) -> None:
        if module is layer:
            names = [name for _, name in above[1:]]
            found.extend((one, ".".join(names[at:])) for at, (one, _) in enumerate(above))
        for name, child in module._modules.items():
            if child is not None and all(child is not one for one, _ in above):  # modules may refer to each other
                visit(child, (*above, (child, name)))

    visit(root, ((root, ""),))
    return found


# ---- eval mode while a layer runs ----------------------------------------------------------------------------------


def _enter(layer: nn.Module, args: Any) -> None:
    layer._trains_outside = layer.training
    layer.training = False


def _leave(layer: nn.Module, args: Any, output: Any) -> None:
    # Called also when another hook failed before `_enter`.
    layer.training = vars(layer).pop("_trains_outside", layer.training)


# ---- copies while a layer runs -------------------------------------------------------------------------------------


def _lend(module: nn.Module, path: str) -> None:
    vars(module).setdefault("_lends_buffers", {})[path] = None
    if "_lending" not in vars(module):
        vars(module)["_lending"] = (
            module.register_forward_pre_hook(_give_copies, prepend=True),
            module.register_forward_hook(_take_back, always_call=True),
        )


def _keep(module: nn.Module, paths: Iterable[str]) -> None:
    lent = vars(module).get("_lends_buffers", {})
    for path in paths:
        lent.pop(path, None)
    if not lent:
        vars(module).pop("_lends_buffers", None)
        for handle in vars(module).pop("_lending", ()):
            handle.remove()


def _give_copies(module: nn.Module, args: Any) -> None:
    kept = []
    for path in vars(module)["_lends_buffers"]:
        above, _, name = path.rpartition(".")
        owner = module.get_submodule(above)
        buffer = owner._buffers.get(name)
        # Its owner may have been thawed alone.
        if buffer is not None and name in vars(owner).get("_lends_buffers", {}):
            kept.append((owner, name, buffer))
            owner._buffers[name] = buffer.clone()
    vars(module)["_kept_buffers"] = [*vars(module).get("_kept_buffers", ()), kept]  # modules may call themselves


def _take_back(module: nn.Module, args: Any, output: Any) -> None:
    *outer, kept = vars(module).get("_kept_buffers", ()) or ([],)
    for owner, name, buffer in kept:
        owner._buffers[name] = buffer
    if outer:
        vars(module)["_kept_buffers"] = outer
    else:
        vars(module).pop("_kept_buffers", None)
