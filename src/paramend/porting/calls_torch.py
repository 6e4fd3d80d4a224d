"""Torch modules: copies with other parameters, and their calls."""

import copy
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

import torch

from paramend.arrays.torch import from_numpy, numpy
from paramend.porting.calls import Change
from paramend.porting.recorder import Recorder, patched


def owns(model: object) -> bool:
    """Whether it is a torch module."""
    return isinstance(model, torch.nn.Module)


def replaced(model: Any, change: Change) -> Any:
    """A copy of the module on the host with other parameters and buffers."""
    model = getattr(model, "_orig_mod", model)  # that of torch.compile
    plain = [each for module in model.modules() for each in vars(module).values() if isinstance(each, torch.Tensor)]
    twin = copy.deepcopy(model, {id(each): each.detach().clone() for each in plain}).cpu()  # weight_norm computes some
    for name, tensor in chain(twin.named_parameters(), twin.named_buffers()):
        if tensor.is_floating_point() or tensor.is_complex():
            values = change(name, numpy(tensor))
            if values is not None:
                tensor.data = from_numpy(values)
    return twin


def watched(recorder: Recorder) -> AbstractContextManager[None]:
    """A context in which modules are called through the recorder."""
    return patched([torch.nn.Module], recorder)
