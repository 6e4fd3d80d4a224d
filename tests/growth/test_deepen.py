"""`deepen` on trees of JAX and numpy, NNX modules and states, and scanned stacks."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from flax.core import freeze
from jax.sharding import PartitionSpec as P

import paramend as pm
from paramend.demo import training
from paramend.demo.network import Classifier
from paramend.errors import BadArgument, NoMatch, OutOfRange, SpecMismatch, Unsupported
from support.numerics import assert_close

ORDERS = [[0, 1, 2], [0, 1, 1, 2], [2, 0], [1], [0, 1, 2, 0, 1, 2], [0, 0, 0]]


def layers(count, of=dict):
    rng = np.random.default_rng(0)
    return [of(w=rng.normal(size=(2, 2)), b=rng.normal(size=2)) for _ in range(count)]


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("order", ORDERS, ids=str)
class TestContainers:
    def test_lists_and_tuples(self, order):
        for of in (list, tuple):
            tree = {"embed": np.ones(2), "layers": of(layers(3)), "head": np.zeros(1)}
            new, _ = pm.deepen(tree, order=order)
            assert same(new, tree | {"layers": of(tree["layers"][i] for i in order)})

    def test_digit_keys(self, order):
        old = layers(3)
        new, _ = pm.deepen({"h": {str(i): layer for i, layer in enumerate(old)}}, layers="h[*]", order=order)
        assert list(new["h"]) == [str(j) for j in range(len(order))]
        assert same(list(new["h"].values()), [old[i] for i in order])

    def test_siblings_with_a_first_and_a_last_layer(self, order):
        old = layers(5)
        tree = {"params": {f"Dense_{i}": layer for i, layer in enumerate(old)}}
        new, _ = pm.deepen(tree, layers="params/Dense_[1:-1]", order=order)
        expected = [old[0], *(old[i + 1] for i in order), old[4]]
        assert list(new["params"]) == [f"Dense_{j}" for j in range(len(expected))]
        assert same(list(new["params"].values()), expected)

    def test_flat_names(self, order):
        old = layers(3)
        tree = {"wte": np.ones(1)} | {f"h.{i}.{n}": x for i, layer in enumerate(old) for n, x in layer.items()}
        new, _ = pm.deepen(tree | {"ln_f": np.ones(1)}, layers="h[*]", order=order)
        names = [f"h.{j}.{n}" for j in range(len(order)) for n in ("w", "b")]
        assert list(new) == ["wte", *names, "ln_f"]
        assert all(np.array_equal(new[f"h.{j}.{n}"], old[i][n]) for j, i in enumerate(order) for n in ("w", "b"))

    def test_haiku(self, order):
        old = layers(3)
        tree = {f"net/~/linear_{i}/~/inner": layer for i, layer in enumerate(old)}
        new, _ = pm.deepen(tree, layers="net/~/linear_[*]", order=order)
        assert list(new) == [f"net/~/linear_{j}/~/inner" for j in range(len(order))]
        assert same(list(new.values()), [old[i] for i in order])

    def test_more_than_ten(self, order):
        old = layers(12)
        new, _ = pm.deepen({f"b_{i}": old[i] for i in range(12)}, layers="b_[:3]", order=order)
        expected = [*(old[i] for i in order), *old[3:]]
        assert list(new) == [f"b_{j}" for j in range(len(expected))]
        assert same(list(new.values()), expected)

    def test_a_scanned_stack(self, order):
        wo = np.random.default_rng(0).normal(size=(3, 2, 4))
        tree = {"blocks": {"wo": jnp.asarray(wo, "bfloat16")}, "head": jnp.ones(3)}
        new, _ = pm.deepen(tree, layers=pm.sel("blocks/**")[:], order=order)
        assert (new["blocks"]["wo"] == tree["blocks"]["wo"][np.array(order)]).all()
        assert new["blocks"]["wo"].dtype == jnp.bfloat16
        assert new["head"] is tree["head"]
        new, _ = pm.deepen({"wo": wo.transpose(1, 0, 2)}, layers=pm.sel("wo")[:, :], order=order)
        assert np.array_equal(new["wo"], wo[order].transpose(1, 0, 2))

    def test_under_jit(self, order):
        tree = {"layers": jax.tree.map(jnp.asarray, layers(3))}
        expected, _ = pm.deepen(tree, order=order)
        assert same(jax.jit(lambda tree: pm.deepen(tree, order=order)[0])(tree), expected)


def test_what_stays_is_the_same_and_copies_share_nothing_that_can_change():
    tree = {"layers": layers(2), "head": np.ones(2)}
    new, report = pm.deepen(tree, order=[0, 0, 1])
    assert new["layers"][0]["w"] is tree["layers"][0]["w"]
    assert new["head"] is tree["head"]
    new["layers"][1]["w"][:] = 7
    assert (tree["layers"][0]["w"] != 7).all()
    assert len(tree["layers"]) == 2
    assert [row.did for row in report.layers] == ["kept", "copied", "kept"]


def test_tied_leaves():
    shared, own = torch.ones(2), torch.zeros(2)
    tree = {"embed": shared, "layers": [{"e": shared, "a": own, "b": own}]}
    new, _ = pm.deepen(tree, order=[0, 0])
    assert new["layers"][1]["e"] is shared
    assert new["layers"][1]["a"] is new["layers"][1]["b"]
    assert new["layers"][1]["a"] is not own
    with pytest.raises(Unsupported, match="same leaf as embed"):
        pm.deepen(tree, order=pm.depth.blocks(1, count=1), identity="e")


def test_two_stacks_and_an_optimizer_state():
    params = {"params": {f"Dense_{i}": {"kernel": jnp.full(2, float(i))} for i in range(4)}}
    tx = optax.adam(1e-3)
    _, state = tx.update(params, tx.init(params))
    order = pm.depth.stack(3)
    new, report = pm.deepen(params, layers="params/Dense_[:-1]", order=order)
    grown, told = pm.deepen(state, layers="**/params/Dense_[:-1]", order=order)
    assert jax.tree.structure(grown) == jax.tree.structure(tx.init(new))
    assert "in each of 2 stacks" in told.headline()
    assert (grown[0].mu["params"]["Dense_5"]["kernel"] == state[0].mu["params"]["Dense_2"]["kernel"]).all()
    grafted, told = pm.graft(tx.init(new), state, rename=report.rename)
    mu = grafted[0].mu["params"]
    assert (mu["Dense_6"]["kernel"] == state[0].mu["params"]["Dense_3"]["kernel"]).all()
    assert not mu["Dense_4"]["kernel"].any()
    assert grafted[0].count == 1


def test_moments_of_dropped_layers_are_left_behind():
    tree = {"layers": layers(3)}
    new, report = pm.deepen(tree, order=pm.depth.drop(3, layers=[0]))
    state, told = pm.graft({"mu": jax.tree.map(np.zeros_like, new)}, {"mu": tree}, rename=report.rename)
    assert same(state["mu"]["layers"], tree["layers"][1:])
    assert len(told.unused) == 2


@pytest.mark.numeric
def test_frozen_dicts_and_other_containers():
    tree = freeze({"layers_0": {"w": jnp.ones(1)}, "layers_1": {"w": jnp.zeros(1)}})
    new, _ = pm.deepen(tree, layers="layers_[*]", order=[1, 0, 0])
    assert type(new) is type(tree)
    assert [float(new[f"layers_{i}"]["w"][0]) for i in range(3)] == [0, 1, 1]
    mlp = eqx.nn.MLP(4, 4, 4, depth=3, key=jax.random.key(0))
    deeper, _ = pm.deepen(mlp, layers="layers[1:-1]", order=[0, 1, 1])
    x = jnp.ones(4)
    for layer in (*mlp.layers[:3], mlp.layers[2]):
        x = jax.nn.relu(layer(x))
    assert (deeper(jnp.ones(4)) == mlp.layers[3](x)).all()


def test_what_stands_between_layers_goes_with_the_layer_before():
    linear = [eqx.nn.Linear(2, 2, key=jax.random.key(i)) for i in range(3)]
    sequential = eqx.nn.Sequential([part for layer in linear for part in (eqx.nn.Lambda(jnp.tanh), layer)])
    new, _ = pm.deepen(sequential, layers="layers[:-1]", order=[0, 1, 0, 1])
    assert [type(layer).__name__ for layer in new.layers] == ["Lambda", "Linear"] * 5
    with pytest.raises(BadArgument, match="leave gaps"):
        pm.deepen({"l": [{"w": np.ones(1)}, None, {"w": np.ones(1)}]}, layers="l[*]", order=[1, 0])


# ---- the digits classifier -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier():
    data = training.load()
    model = Classifier(blocks=1)
    params = model.init(jax.random.key(0), data.pixels)
    return data, model, training.train(model, params, optax.adam(2e-3), data, epochs=5)


def test_a_deeper_classifier_of_digits(classifier):
    data, model, params = classifier
    order = pm.depth.blocks(1, count=2).each(2)
    new, report = pm.deepen(params, layers="params/Dense_[1:-1]", order=order, identity=["kernel", "bias"])
    deeper = Classifier(blocks=3)
    # The same products on the same shapes, one by one, and x + 0 = x: no bit may differ.
    assert (deeper.apply(new, data.pixels) == model.apply(params, data.pixels)).all()
    assert str(report.new) == 'pm.sel("params/Dense_{3,4,5,6}/**")'
    trained = training.train(deeper, new, pm.freeze(optax.adamw(1e-3), report.frozen), data, epochs=1)
    pm.verify(new, trained, only=report.new)
    moved = {f"params/Dense_{i}/kernel" for i in (3, 4, 5, 6)}
    assert moved <= set(pm.verify(new, trained, only="**"))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(4, name="out")(nn.relu(nn.Dense(8, name="inner")(x))), None


class Scanned(nn.Module):
    count: int

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.count)
        return nn.Dense(2)(scan(name="blocks")(x, None)[0])


@pytest.mark.numeric
def test_a_scanned_model_computes_the_same_and_only_new_slices_train():
    x = jax.random.normal(jax.random.key(0), (5, 4))
    params = Scanned(3).init(jax.random.key(1), x)
    layers = pm.sel("params/blocks/**")[:]
    new, report = pm.deepen(params, layers=layers, order=pm.depth.blocks(3, count=2), identity="out/*")
    # Two loops are compiled, so nobody can ask for equal bits: 5 blocks of sums of 4 and 8 terms, and the head.
    assert_close(Scanned(5).apply(new, x), Scanned(3).apply(params, x), terms=5 * 12 + 4, scale=8)
    tx = pm.freeze(optax.adamw(0.1), "**", until={report.new: 0})
    grads = jax.grad(lambda params: (Scanned(5).apply(params, x) ** 2).sum())(new)
    trained = optax.apply_updates(new, tx.update(grads, tx.init(new), new)[0])
    kernels = [tree["params"]["blocks"]["out"]["kernel"] for tree in (new, trained)]
    moved = [bool((kernels[0][i] != kernels[1][i]).any()) for i in range(5)]
    assert moved == [False, False, True, False, True]
    with pytest.raises(BadArgument, match="slices of leaves") as caught:
        print(report.frozen)
    assert "until={report.new: 0}" in caught.value.hint


def test_a_sharded_stack():
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    for spec, count, expected in ((P(None, "a"), 3, P(None, "a")), (P("a", None), 4, P("a", None))):
        x = jax.device_put(jnp.arange(32.0).reshape(8, 4), jax.sharding.NamedSharding(mesh, spec))
        new, _ = pm.deepen({"w": x}, layers=pm.sel("w")[:], order=pm.depth.blocks(8, count=count), identity="w")
        assert new["w"].sharding.spec == expected
        assert new["w"].shape == (8 + count, 4)


# ---- NNX -------------------------------------------------------------------------------------------------------


class Residual(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(4, 8, rngs=rngs)
        self.out = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return x + self.out(nnx.relu(self.inner(x)))


class Network(nnx.Module):
    def __init__(self, count):
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([Residual(rngs) for _ in range(count)])
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.numeric
def test_nnx_modules():
    model, x = Network(12), jnp.arange(8.0).reshape(2, 4)
    before = model(x)
    new, report = pm.deepen(model, order=pm.depth.blocks(12, count=3), identity="out/*")
    assert (new(x) == before).all()
    assert (len(new.blocks), len(model.blocks)) == (15, 12)
    variables = [id(v) for _, v in nnx.iter_graph(new) if isinstance(v, nnx.Variable)]
    assert len(set(variables)) == 15 * 4 + 2
    block = model.blocks[1]
    report = pm.deepen_(model, order=pm.depth.blocks(12, count=3), identity="out/*")
    assert (model(x) == before).all()
    assert model.blocks[1] is block
    assert pm.at(model, report.new).paths[0].startswith("blocks/4/")
    grads = nnx.grad(lambda model: model(x).sum())(model)
    assert grads["blocks"][4]["out"]["kernel"][...].any()


def test_nnx_states():
    model = Network(3)
    state, _ = pm.deepen(nnx.state(model), layers="blocks[*]", order=[0, 1, 2, 2])
    assert type(state) is nnx.State
    deeper = Network(4)
    nnx.update(deeper, state)
    assert (deeper.blocks[3].out.kernel[...] == model.blocks[2].out.kernel[...]).all()
    assert state["blocks"][3]["out"]["kernel"] is not state["blocks"][2]["out"]["kernel"]


def test_what_nnx_layers_share_stays_shared():
    class Sharing(nnx.Module):
        def __init__(self):
            self.rngs = nnx.Rngs(0)
            self.embed = nnx.Param(jnp.ones(2))
            self.blocks = nnx.List([Residual(self.rngs) for _ in range(2)])
            for block in self.blocks:
                block.embed, block.rngs = self.embed, self.rngs

    model = Sharing()
    new, _ = pm.deepen(model, layers="blocks[*]", order=[0, 0, 1])
    for tree in (new, model):
        if tree is model:
            pm.deepen_(model, layers="blocks[*]", order=[0, 0, 1])
        assert all(block.embed is tree.embed and block.rngs is tree.rngs for block in tree.blocks)
        assert tree.blocks[0].inner is not tree.blocks[1].inner
        assert tree.blocks[0].inner.kernel is not tree.blocks[1].inner.kernel


def test_layers_that_are_attributes_are_refused():
    class Named(nnx.Module):
        def __init__(self):
            self.block_0, self.block_1 = Residual(nnx.Rngs(0)), Residual(nnx.Rngs(1))

    model = Named()
    for verb in (pm.deepen, pm.deepen_):
        with pytest.raises(Unsupported, match=r"attributes of a \S*Named"):
            verb(model, layers="block_[*]", order=[0, 1, 1])


# ---- identities ------------------------------------------------------------------------------------------------


def test_values_other_than_zero_and_orders_without_identity():
    tree = {"layers": layers(2)}
    order = pm.depth.splice(2, at=1)
    new, report = pm.deepen(tree, order=order, identity={"w": -1.0, "b": 0})
    assert (new["layers"][1]["w"] == -1).all()
    assert not new["layers"][1]["b"].any()
    assert report.layers[1].set == {"w": -1.0, "b": 0.0}
    plain, report = pm.deepen(tree, order=order, identity=None)
    assert same(plain["layers"][1], tree["layers"][0])
    assert report.layers[1].did == "copied"


def test_zeros_are_positive_even_of_nan():
    tree = {"layers": [{"w": np.array([-1.0, np.nan, -np.inf])}]}
    new, _ = pm.deepen(tree, order=pm.depth.blocks(1, count=1), identity="w")
    assert not np.signbit(new["layers"][1]["w"]).any()
    assert not new["layers"][1]["w"].any()


def test_an_identity_is_never_made_of_the_layer_itself():
    tree = {"layers": layers(1)}
    new, report = pm.deepen(tree, order=pm.depth.splice(1, at=0), identity="w")
    assert tree["layers"][0]["w"].all()
    assert new["layers"][1]["w"] is tree["layers"][0]["w"]
    assert report.rename == {"**/layers/0/**": "**/layers/1/**"}


# ---- refusals --------------------------------------------------------------------------------------------------

TREE = {"params": {f"Dense_{i}": {"kernel": np.ones(2)} for i in range(4)}, "n": np.ones(())}
ONE = pm.depth.blocks(4, count=1)


@pytest.mark.parametrize(
    ("error", "options", "says"),
    [
        (NoMatch, {"layers": "params/Dens_[*]", "order": [0]}, "names no numbered layers"),
        (BadArgument, {"layers": "params/Dense_0", "order": [0]}, "does not end in a key"),
        (BadArgument, {"layers": "params/*[*]", "order": [0]}, "does not end in a key"),
        (BadArgument, {"layers": "params/Dense_[::2]", "order": [0]}, "gaps"),
        (OutOfRange, {"layers": "params/Dense_[4]", "order": [0]}, "out of range"),
        (BadArgument, {"layers": "params/Dense_[*]", "order": [4]}, "names layer 4"),
        (BadArgument, {"layers": "params/Dense_[*]", "order": pm.depth.stack(3)}, "3 layers, and this one has 4"),
        (BadArgument, {"layers": "params/Dense_[*]", "order": ONE}, "the identity; its modules are kernel"),
        (BadArgument, {"layers": "params/Dense_[*]", "order": ONE, "identity": 3}, "identity=3 is not"),
        (BadArgument, {"layers": "params/Dense_[*]", "order": [0], "identity": "kernel"}, "has no identity"),
        (NoMatch, {"layers": "params/Dense_[*]", "order": ONE, "identity": "kernl"}, "none of the leaves"),
        (BadArgument, {"layers": 3, "order": [0]}, "not a selector"),
        (BadArgument, {"layers": pm.sel("params/**")[1], "order": [0]}, "must select all layers"),
        (SpecMismatch, {"layers": pm.sel("**")[:], "order": [0]}, "differs in length"),
    ],
)
def test_refused(error, options, says):
    with pytest.raises(error, match=says) as caught:
        pm.deepen(TREE, **options)
    assert caught.value.hint


def test_layers_within_layers():
    tree = {"layers": [{"layers": layers(2)}, {"layers": layers(2)}]}
    with pytest.raises(BadArgument, match="layers within layers"):
        pm.deepen(tree, layers="**/layers[*]", order=[0])


def test_numbers_that_rise_unevenly():
    with pytest.raises(BadArgument, match="rise by 1, 2"):
        pm.deepen({"a_0": np.ones(1), "a_1": np.ones(1), "a_3": np.ones(1)}, layers="a_[*]", order=[0])


def test_a_tree_does_not_change_in_place():
    with pytest.raises(Unsupported, match="cannot be changed in place"):
        pm.deepen_({"layers": layers(2)}, order=[0])


def test_fixed_entries():
    import dataclasses

    @dataclasses.dataclass
    class Held:
        block_0: np.ndarray
        block_1: np.ndarray

    with pytest.raises(Unsupported, match="entries are fixed"):
        pm.deepen(Held(np.ones(1), np.ones(1)), layers="block_[*]", order=[0, 0, 1])


def test_hints_are_code_that_works():
    names = {"pm": pm}
    tree = {"layers": layers(3), "head": {"layers": layers(2)}}
    with pytest.raises(NoMatch) as caught:
        pm.deepen(tree, order=[0])
    for hint in caught.value.hint.split(" or "):
        assert pm.deepen(tree, order=[0], **eval(f"dict({hint})"))
    with pytest.raises(BadArgument) as caught:
        pm.deepen(tree["head"], order=pm.depth.blocks(1, count=1), identity="w")
    assert pm.deepen(tree["head"], **eval(f"dict({caught.value.hint})", names), identity="w")
    with pytest.raises(BadArgument) as caught:
        pm.deepen(tree["head"], order=[0, 1, 1], identity="w")
    assert pm.deepen(tree["head"], **eval(f"dict({caught.value.hint})", names), identity="w")
    with pytest.raises(BadArgument) as caught:
        pm.deepen(tree["head"], order=[0, 5])
    assert pm.deepen(tree["head"], **eval(f"dict({caught.value.hint})"))
    one = pm.depth.blocks(2, count=1)
    with pytest.raises(NoMatch) as caught:
        pm.deepen(tree["head"], order=one, identity="W")
    assert pm.deepen(tree["head"], order=one, **eval(f"dict({caught.value.hint})"))
    with pytest.raises(NoMatch) as caught:
        pm.deepen(tree["head"], order=one, identity="lama")
    assert caught.value.hint == 'identity="llama"'
