"""Masks and labels of every kind of model at work inside optax."""

import copy
import pickle

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import paramend as pm
from support.nnx import pure

TRAIN = {"train": optax.sgd(1.0), "freeze": optax.set_to_zero()}


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(2, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.last = nnx.Linear(2, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.norm(self.first(x)))


class Layers(eqx.Module):
    first: eqx.nn.Linear
    last: eqx.nn.Linear
    act: object

    def __init__(self, key):
        self.first, self.last = eqx.nn.Linear(2, 2, key=key), eqx.nn.Linear(2, 1, key=key)
        self.act = jax.nn.relu

    def __call__(self, x):
        return self.last(self.act(self.first(x)))


@flax.struct.dataclass
class Scale:
    first: jax.Array
    last: jax.Array

    def __call__(self, x):
        return x * self.first + self.last


KEY = jax.random.key(0)


def module():
    return Net(nnx.Rngs(0))


# What is labelled, and the parameters that optax is given.
MODELS = {
    "dict": lambda: ({"first": jnp.ones(2), "last": jnp.ones(2)},) * 2,
    "nnx state": lambda: (nnx.state(module(), nnx.Param),) * 2,
    "nnx state, pure parameters": lambda: (nnx.state(module(), nnx.Param), pure(nnx.state(module(), nnx.Param))),
    "nnx module": lambda: (module(), nnx.state(module(), nnx.Param)),
    "nnx module, pure parameters": lambda: (module(), pure(nnx.state(module(), nnx.Param))),
    "equinox": lambda: (Layers(KEY), eqx.filter(Layers(KEY), eqx.is_array)),
    "equinox, filtered": lambda: (eqx.filter(Layers(KEY), eqx.is_array),) * 2,
    "flax struct": lambda: (Scale(jnp.ones(2), jnp.ones(2)),) * 2,
}


def named(tree):
    return pm.labels(tree, {"freeze": "first/**" if not isinstance(tree, dict | Scale) else "first", "train": "**"})


def updates(tx, params):
    """Path → the first number of the update of a gradient of ones."""
    found, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    return {path: float(np.asarray(leaf).ravel()[0]) for path, leaf in pm.at(found, "**").get().items()}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", ["labels", "labels of parameters", "copied", "pickled", "mask", "mask of parameters"])
def test_inside_optax(model, way):
    tree, params = MODELS[model]()
    if way == "mask" and isinstance(tree, nnx.Module):
        tree = nnx.state(tree, nnx.Param)  # statistics have no place in the optimizer
    selector = "first" if model in ("dict", "flax struct") else "first/**"
    mask = lambda tree: pm.at(tree, selector).mask()
    tx = {
        "labels": lambda: optax.partition(TRAIN, named(tree)),
        "labels of parameters": lambda: optax.multi_transform(TRAIN, named),
        "copied": lambda: optax.partition(TRAIN, copy.deepcopy(named(tree))),
        "pickled": lambda: optax.partition(TRAIN, pickle.loads(pickle.dumps(named(tree)))),
        "mask": lambda: optax.chain(optax.sgd(1.0), optax.masked(optax.set_to_zero(), mask(tree))),
        "mask of parameters": lambda: optax.chain(optax.sgd(1.0), optax.masked(optax.set_to_zero(), mask)),
    }[way]()
    found = updates(tx, params)
    assert {value for path, value in found.items() if path.startswith("first")} == {0.0}
    assert {value for path, value in found.items() if not path.startswith("first")} == {-1.0}


def test_labels_of_a_module_are_like_its_tree():
    model = Layers(KEY)
    found = named(model)
    assert found.last.weight == "train" and found.first.bias == "freeze"
    assert sorted(set(jax.tree.leaves(found))) == ["freeze", "train"]
    flags = jax.tree.map(lambda label: label == "train", found)
    trained, _ = eqx.partition(eqx.filter(model, eqx.is_array), eqx.filter(flags, lambda flag: True))
    assert trained.first.weight is None and trained.last.weight is model.last.weight
    assert found == found.tree and repr(found) == repr(found.tree)
    state = named(module())
    assert state["first"]["kernel"] == "freeze"
    assert not hasattr(found, "other")


@pytest.mark.slow
@pytest.mark.parametrize("of", ["module", "state", "mask"])
def test_inside_an_optimizer_of_nnx(of):
    net = module()
    state = nnx.state(net, nnx.Param)
    tx = optax.partition(TRAIN, named(net if of == "module" else state))
    if of == "mask":
        tx = optax.chain(optax.sgd(1.0), optax.masked(optax.set_to_zero(), pm.at(state, "first/**").mask()))
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    before = {path: np.asarray(leaf) for path, leaf in pm.at(nnx.state(net, nnx.Param), "**").get().items()}
    gradients = nnx.grad(lambda net: net(jnp.arange(6.0).reshape(3, 2) ** 2).sum())(net)
    optimizer.update(net, gradients)
    after = pm.at(nnx.state(net, nnx.Param), "**").get()
    same = {path for path in before if before[path].tobytes() == np.asarray(after[path]).tobytes()}
    assert {path for path in before if path.startswith("first")} <= same != set(before)
