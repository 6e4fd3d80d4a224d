import jax
import numpy as np


def edit(params):
    def zero(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return np.zeros_like(leaf) if name == "params/layer_2499/mlp/kernel" else leaf

    return jax.tree_util.tree_map_with_path(zero, params)
