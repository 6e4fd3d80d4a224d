"""Models for ports: random torch modules, and linen modules without their parameters."""

import flax.linen as nn
import jax
import numpy as np
import torch

KEY = jax.random.key(0)


def random(module, seed=0):
    """A torch module whose parameters and statistics are random, in evaluation mode."""
    torch.manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.normal_() if "var" not in name else tensor.uniform_(0.5, 2)
    return module.eval()


def compact(function):
    """A linen module that computes a function of its input."""
    return type("Compact", (nn.Module,), {"__call__": nn.compact(lambda self, x: function(x))})()


def zeros(leaf):
    """Zeros for what `jax.eval_shape` says; statistics are float32 in Flax, whatever the parameters are."""
    return np.zeros(leaf.shape, "float64" if leaf.dtype == "float32" else leaf.dtype)
