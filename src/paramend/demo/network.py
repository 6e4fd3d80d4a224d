"""The network: a small residual network in Flax."""

import flax.linen as nn
import jax


class Classifier(nn.Module):
    """Ten logits from 64 pixels: a first layer, residual blocks of two layers each, and a last layer. Flax numbers the
    layers in the order of their creation: `Dense_0` is the first, `Dense_[-1]` the last."""

    blocks: int = 1
    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(self.width)(x))
        for _ in range(self.blocks):
            hidden = nn.relu(nn.Dense(2 * self.width)(x))
            x = x + nn.Dense(self.width)(hidden)
        return nn.Dense(10)(x)
