import paramend as pm


def edit(params):
    return pm.at(params, "params/layer_[-1]/mlp/kernel").zero()
