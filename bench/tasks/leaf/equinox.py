import equinox as eqx
import numpy as np


def edit(params):
    return eqx.tree_at(lambda tree: tree["params"]["layer_2499"]["mlp"]["kernel"], params, replace_fn=np.zeros_like)
