"""What a JAX model moves in its forward pass is not called frozen; what is called frozen does not move."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze as frozen_dict

from paramend.errors import Unsupported
from paramend.freezing.freeze import freeze, frozen
from support.nnx import pure

ADAM = optax.adam(0.1)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(self.norm(self.linear(x))))


def paths(rows):
    return {row.path for row in rows}


def values(state):
    is_key = jnp.issubdtype
    leaves = {"/".join(map(str, path)): variable.get_raw_value() for path, variable in nnx.to_flat_state(state)}
    return {
        p: np.asarray(jax.random.key_data(x) if is_key(x.dtype, jax.dtypes.prng_key) else x) for p, x in leaves.items()
    }


@pytest.mark.slow
def test_a_training_step_of_nnx_moves_just_what_the_report_says():
    net = Net(nnx.Rngs(0))
    tx = freeze(ADAM, "{linear,norm,dropout}/**")
    report = frozen(net, tx)
    optimizer = nnx.Optimizer(net, freeze(ADAM, "{linear,norm}/**"), wrt=nnx.Param)
    before = values(nnx.state(net))
    gradients = nnx.grad(lambda model: model(jnp.arange(12.0).reshape(4, 3) ** 2).sum())(net)
    optimizer.update(net, gradients)
    after = values(nnx.state(net))
    moved = {path for path in after if after[path].tobytes() != before[path].tobytes()}
    assert moved == paths(report.trained) | {"norm/mean", "norm/var", "dropout/rngs/count"}
    assert paths(report.moving) == {"norm/mean", "norm/var", "dropout/rngs/count", "dropout/rngs/key"}
    assert paths(report.frozen) == {"linear/kernel", "linear/bias", "norm/scale", "norm/bias"}
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(pure(optimizer.opt_state)))
    assert report.state_nbytes == held
    assert "moved by the model itself: " in str(report)
    assert [row["status"] for row in report.to_dict()["leaves"]].count("moving") == 4


@pytest.mark.parametrize("make", [dict, frozen_dict])
def test_collections_of_flax(make):
    layer = {"mean": jnp.ones(2), "var": jnp.ones(2)}
    variables = make({"params": {"norm": {"scale": jnp.ones(2)}, "out": jnp.ones(3)}, "batch_stats": {"norm": layer}})
    report = frozen(variables, freeze(ADAM, "**/norm/**"))
    assert paths(report.frozen) == {"params/norm/scale"} and paths(report.trained) == {"params/out"}
    assert paths(report.moving) == {"batch_stats/norm/mean", "batch_stats/norm/var"}
    assert report.state_nbytes == 2 * 3 * 4 + 4
    alone = frozen({"batch_stats": jnp.ones(2), "w": jnp.ones(2)}, freeze(ADAM, "w"))  # just a name
    assert not alone.moving


def test_the_state_of_equinox():
    norm, state = eqx.nn.make_with_state(lambda: eqx.nn.BatchNorm(3, "batch", mode="ema"))()
    tree = (eqx.filter(norm, eqx.is_array), state)
    report = frozen(tree, freeze(ADAM, "**"))
    assert paths(report.frozen) == {"0/weight", "0/bias"}
    assert len(report.moving) == len(jax.tree.leaves(state)) > 0


def test_variables_of_ones_own():
    class Average(nnx.Variable):
        pass

    tree = nnx.state(nnx.Dict(w=nnx.Param(jnp.ones(2)), mean=Average(jnp.ones(2))))
    report = frozen(tree, freeze(ADAM, "**"))
    assert (paths(report.frozen), paths(report.moving)) == ({"w"}, {"mean"})
    only = nnx.state(nnx.Dict(mean=Average(jnp.ones(2))))  # then these are what is trained
    assert paths(frozen(only, freeze(ADAM, "**")).frozen) == {"mean"}


@pytest.mark.parametrize("selector", ["batch_stats/**", "**/mean"])
def test_what_no_optimizer_holds_is_refused(selector):
    variables = {"params": {"w": jnp.ones(2)}, "batch_stats": {"norm": {"mean": jnp.ones(2)}}}
    with pytest.raises(Unsupported, match="moves batch_stats/norm/mean in its forward pass") as caught:
        freeze(ADAM, selector).init(variables)
    assert "use_running_average=True" in caught.value.hint
    freeze(ADAM, ["params/w", selector]).init(variables)
