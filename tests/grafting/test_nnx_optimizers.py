"""Optimizers of NNX: thawed, frozen again and resumed in place."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from paramend.checkpoints.checkpoint import open as opened
from paramend.errors import BadArgument, GraftRefused, SpecMismatch, Unsupported
from paramend.freezing.freeze import freeze, nnx_filter
from paramend.grafting.states.verbs import graft_opt_state, graft_optimizer_

ADAM = optax.adam(0.1)
FROZEN = freeze(ADAM, "first/**")


class Net(nnx.Module):
    def __init__(self, width=3):
        self.first = nnx.Linear(2, width, rngs=nnx.Rngs(0))
        self.last = nnx.Linear(width, 2, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.last(self.first(x))


def made(tx, steps=0, wrt=nnx.Param, net=None):
    """An optimizer, as if it had taken some steps: each moment holds a number of its own."""
    optimizer = nnx.Optimizer(net or Net(), tx, wrt=wrt)
    if steps:
        optimizer.step.set_raw_value(jnp.asarray(steps, jnp.uint32))
        for place, leaf in enumerate(jax.tree.leaves(optimizer.opt_state, is_leaf=_is_variable)):
            value = leaf.get_raw_value()
            if hasattr(value, "ndim"):  # a frozen parameter has no moment
                leaf.set_raw_value(jnp.full_like(value, steps if value.ndim == 0 else place + 1))
    return optimizer


def _is_variable(node):
    return isinstance(node, nnx.Variable)


def moments(optimizer):
    """Path of a moment in the parameters → its values."""
    state = nnx.to_flat_state(nnx.state(optimizer.opt_state))
    paths = {path: np.asarray(leaf.get_raw_value()) for path, leaf in state if hasattr(leaf.get_raw_value(), "ndim")}
    return {path[path.index(end) :]: x for path, x in paths.items() for end in ("mu", "nu", "count") if end in path}


def saved(optimizer, folder):
    pure = nnx.to_pure_dict(nnx.state(optimizer))
    path = folder / "optimizer.msgpack"
    path.write_bytes(flax.serialization.to_bytes(jax.tree.map(np.asarray, flax.serialization.to_state_dict(pure))))
    return path


FORMS = {
    "optimizer": lambda optimizer, folder: optimizer,
    "state": lambda optimizer, folder: nnx.state(optimizer),
    "dict": lambda optimizer, folder: nnx.to_pure_dict(nnx.state(optimizer)),
    "bytes": lambda optimizer, folder: flax.serialization.msgpack_restore(saved(optimizer, folder).read_bytes()),
    "file": lambda optimizer, folder: opened(saved(optimizer, folder)),
    "opt_state": lambda optimizer, folder: optimizer.opt_state,
}


@pytest.mark.parametrize("form", FORMS)
def test_thawed(form, tmp_path):
    old, new = made(FROZEN, steps=3), made(ADAM)
    kept = moments(old)
    fresh = moments(new)
    graft_optimizer_(new, FORMS[form](old, tmp_path))
    found = moments(new)
    assert int(new.step[...]) == (0 if form == "opt_state" else 3)
    assert found.keys() == fresh.keys() > kept.keys()
    for path, value in found.items():
        assert np.array_equal(value, kept.get(path, fresh[path])), path
    assert found[("count",)] == 3 and found[("mu", "last", "bias")].all() and not found[("mu", "first", "bias")].any()


def test_frozen_again_and_by_a_filter():
    old, new = made(ADAM, steps=3), made(FROZEN)
    report = graft_optimizer_(new, old)
    assert all(np.array_equal(value, moments(old)[path]) for path, value in moments(new).items())
    assert {row.path.split("/")[-2] for row in report.unused} == {"first"}
    with pytest.raises(GraftRefused, match="no place here"):
        graft_optimizer_(made(FROZEN), old, unused="error")
    net = Net()
    part = made(ADAM, steps=2, wrt=nnx_filter(net, "last/**"), net=net)
    whole = made(ADAM, net=net)
    graft_optimizer_(whole, part)
    assert int(whole.step[...]) == 2 and moments(whole)[("nu", "last", "kernel")].all()


def test_what_does_not_belong_together_changes_nothing():
    new = made(ADAM)
    for wrong, error, said in [
        (made(optax.sgd(0.1, momentum=0.9), steps=3), BadArgument, "nothing in this state belongs"),
        (made(ADAM, steps=3, net=Net(width=4)), SpecMismatch, "needed"),
        (ADAM.init, Unsupported, "neither an nnx.Optimizer"),
    ]:
        with pytest.raises(error, match=said):
            graft_optimizer_(new, wrong)
        assert int(new.step[...]) == 0 and not moments(new)[("mu", "last", "bias")].any()
    with pytest.raises(Unsupported) as caught:
        graft_opt_state(new, made(ADAM))
    assert caught.value.hint == "pm.graft_optimizer_(optimizer, old_optimizer)"


@pytest.mark.slow
def test_a_thawed_run_goes_on_as_if_nothing_had_happened():
    def train(net, optimizer):
        gradients = nnx.grad(lambda model: (model(jnp.ones((1, 2))) ** 2).sum())(net)
        optimizer.update(net, gradients)

    one, other = Net(), Net()
    old, whole = made(freeze(ADAM, "first/bias"), net=one), made(freeze(ADAM, "first/bias"), net=other)
    for net, optimizer in ((one, old), (other, whole)):
        train(net, optimizer)
    again = made(freeze(ADAM, "first/bias"), net=one)
    graft_optimizer_(again, old)
    for net, optimizer in ((one, again), (other, whole)):
        train(net, optimizer)
    leaves = (jax.tree.leaves(nnx.state(net)) for net in (one, other))
    assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(*leaves, strict=True))
