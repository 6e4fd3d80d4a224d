"""The network, a residual one in Flax, as small as a digit needs."""

import flax.linen as nn
import jax


class Classifier(nn.Module):
    """Ten logits from 64 pixels: a first layer, residual blocks of two layers each, a last layer.

    Flax numbers the layers in the order in which they are made: `Dense_0` comes first, `Dense_[-1]` is the last.
    """

    blocks: int = 1
    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(self.width)(x))
        for _ in range(self.blocks):
            hidden = nn.relu(nn.Dense(2 * self.width)(x))
            x = x + nn.Dense(self.width)(hidden)
        return nn.Dense(10)(x)
