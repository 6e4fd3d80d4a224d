"""Names of NNX that differ between the releases of Flax that are supported."""

from flax import nnx

pure = getattr(nnx, "as_pure", None) or nnx.pure  # its name before Flax 0.12.7
