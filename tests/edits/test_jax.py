"""`at` on JAX trees: inside transformations, compiled to what one writes by hand, on shardings, for every dtype."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import paramend as pm
from paramend.errors import OutOfRange, SpecMismatch, Unsupported
from support.numerics import assert_close


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (4, 4, 2):
            x = nn.relu(nn.Dense(features)(x))
        return x


@pytest.fixture(scope="module")
def params():
    return Mlp().init(jax.random.key(0), jnp.ones((1, 3)))


def spread(params, layer, name, value):
    """The edit by hand: dict spreads down to one leaf."""
    inner = params["params"]
    return {**params, "params": {**inner, layer: {**inner[layer], name: value}}}


LAST = "params/Dense_2/kernel"
BY_HAND = {
    "set": (
        lambda p, v: pm.at(p, LAST).set(v),
        lambda p, v: spread(p, "Dense_2", "kernel", v),
    ),
    "zero": (
        lambda p, v: pm.at(p, LAST).zero(),
        lambda p, v: spread(p, "Dense_2", "kernel", jnp.zeros_like(p["params"]["Dense_2"]["kernel"])),
    ),
    "fill": (
        lambda p, v: pm.at(p, LAST).fill(0.5),
        lambda p, v: spread(p, "Dense_2", "kernel", jnp.full_like(p["params"]["Dense_2"]["kernel"], 0.5)),
    ),
    "multiply": (
        lambda p, v: pm.at(p, LAST).multiply(0.5),
        lambda p, v: spread(p, "Dense_2", "kernel", p["params"]["Dense_2"]["kernel"] * 0.5),
    ),
    "add": (
        lambda p, v: pm.at(p, LAST).add(v),
        lambda p, v: spread(p, "Dense_2", "kernel", p["params"]["Dense_2"]["kernel"] + v),
    ),
    "clip": (
        lambda p, v: pm.at(p, LAST).clip(-0.1, 0.1),
        lambda p, v: spread(p, "Dense_2", "kernel", jnp.clip(p["params"]["Dense_2"]["kernel"], -0.1, 0.1)),
    ),
    "slice zero": (
        lambda p, v: pm.at(p, LAST)[-1].zero(),
        lambda p, v: spread(p, "Dense_2", "kernel", p["params"]["Dense_2"]["kernel"].at[-1].set(0)),
    ),
    "slice set": (
        lambda p, v: pm.at(p, LAST)[1:3].set(v[1:3]),
        lambda p, v: spread(p, "Dense_2", "kernel", p["params"]["Dense_2"]["kernel"].at[1:3].set(v[1:3])),
    ),
    "slice multiply": (
        lambda p, v: pm.at(p, LAST)[:, 0].multiply(2.0),
        lambda p, v: spread(p, "Dense_2", "kernel", p["params"]["Dense_2"]["kernel"].at[:, 0].multiply(2.0)),
    ),
    "pattern": (
        lambda p, v: pm.at(p, "**/Dense_[-1]/kernel").zero(),
        lambda p, v: spread(p, "Dense_2", "kernel", jnp.zeros_like(p["params"]["Dense_2"]["kernel"])),
    ),
}


def hlo(function, *args):
    """The compiled program without the source lines that it was traced from."""

    def step(params, value):
        return function(params, value)

    text = jax.jit(step).lower(*args).compile().as_text()
    text = re.sub(r", metadata=\{[^}]*\}", "", text)
    return re.sub(r"(?m)^(FileNames|FunctionNames|FileLocations|StackFrames)\n(?:\d.*\n)*", "", text)


@pytest.mark.parametrize("name", BY_HAND)
def test_the_compiled_program_is_the_one_written_by_hand(name, params):
    ours, by_hand = BY_HAND[name]
    value = jnp.arange(8.0).reshape(4, 2)
    text = hlo(ours, params, value)
    assert "HloModule" in text
    assert text == hlo(by_hand, params, value)
    jax.tree.map(np.testing.assert_array_equal, ours(params, value), by_hand(params, value))


@pytest.mark.numeric
def test_inside_grad_and_vmap(params):
    def loss(p):
        return jnp.sum(Mlp().apply(pm.at(p, LAST).multiply(2.0), jnp.ones((1, 3))) ** 2)

    def by_hand(p):
        doubled = spread(p, "Dense_2", "kernel", p["params"]["Dense_2"]["kernel"] * 2.0)
        return jnp.sum(Mlp().apply(doubled, jnp.ones((1, 3))) ** 2)

    jax.tree.map(np.testing.assert_array_equal, jax.grad(loss)(params), jax.grad(by_hand)(params))

    def filled(value):
        return pm.at(params, "**/bias").fill(value)

    many = jax.vmap(filled)(jnp.arange(3.0))
    assert many["params"]["Dense_0"]["bias"].tolist() == [[0.0] * 4, [1.0] * 4, [2.0] * 4]


def test_stop_gradient_freezes_what_is_selected(params):
    def loss(p):
        stopped = pm.at(p, "params/Dense_0/**").apply(jax.lax.stop_gradient)
        return jnp.sum(Mlp().apply(stopped, jnp.ones((1, 3))) ** 2)

    gradient = jax.grad(loss)(params)["params"]
    assert not np.any(gradient["Dense_0"]["kernel"])
    assert np.any(gradient["Dense_1"]["kernel"])


MESHES = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}
SLICES = {"[-1]": -1, "[2:4]": slice(2, 4), "[:, 1]": (slice(None), 1), "[[0, 2]]": np.array([0, 2])}


@pytest.fixture(params=MESHES)
def sharded(request):
    kind = MESHES[request.param]
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    values = np.arange(8.0 * 4 * 6, dtype=np.float32).reshape(8, 4, 6)
    return {
        "w": jax.device_put(values, NamedSharding(mesh, P("a", "b"))),
        "v": jax.device_put(values, NamedSharding(mesh, P(None, "a"))),
    }


def test_whole_leaf_edits_keep_the_sharding(sharded):
    host = np.ones((8, 4, 6), np.float32)
    for edited in (
        pm.at(sharded, "*").zero(),
        pm.at(sharded, "*").fill(2.0),
        pm.at(sharded, "*").set(host),
        pm.at(sharded, "*").multiply(0.5),
        pm.at(sharded, "*").add(host),
        pm.at(sharded, "*").cast("bfloat16"),
        pm.at(sharded, "*").noise(0.1, seed=1),
        pm.at(sharded, "*").noise(0.1, seed=jax.random.key(1)),
        pm.at(sharded, "*").reinit("he_normal", seed=1),
        pm.at(sharded, "*").apply(jnp.tanh),
    ):
        for name, leaf in edited.items():
            assert leaf.sharding == sharded[name].sharding


@pytest.mark.parametrize("index", SLICES)
def test_slice_edits_keep_the_sharding(sharded, index):
    at = SLICES[index]
    for name, leaf in sharded.items():
        part = np.asarray(leaf)[at]
        new = np.linspace(0, 1, part.size, dtype=np.float32).reshape(part.shape)
        edits = {
            "zero": (lambda s: s.zero(), np.zeros_like(part)),
            "fill": (lambda s: s.fill(3.0), np.full_like(part, 3.0)),
            "set": (lambda s, n=new: s.set(n), new),
            "multiply": (lambda s: s.multiply(0.5), part * np.float32(0.5)),
            "add": (lambda s, n=new: s.add(n), part + new),
            "apply": (lambda s: s.apply(jnp.square), part**2),
        }
        # one program for all verbs
        traced = jax.jit(
            lambda tree, n=name, all=edits: {verb: edit(pm.at(tree, n)[at])[n] for verb, (edit, _) in all.items()}
        )(sharded)
        for verb, (edit, wanted) in edits.items():
            expected = np.array(leaf)
            expected[at] = wanted
            eager = edit(pm.at(sharded, name)[at])[name]
            assert eager.sharding == leaf.sharding, verb
            np.testing.assert_array_equal(eager, expected, err_msg=verb)
            np.testing.assert_array_equal(traced[verb], expected, err_msg=verb)
        np.testing.assert_array_equal(pm.at(sharded, name)[at].one(), part)


def test_set_does_not_commit_what_was_free():
    tree = {"w": jnp.ones(2)}
    assert not pm.at(tree, "w").set(np.zeros(2, np.float32))["w"].committed
    placed = {"w": jax.device_put(jnp.ones(2), jax.devices()[3])}
    assert pm.at(placed, "w").set(np.zeros(2, np.float32))["w"].devices() == {jax.devices()[3]}


FLOATS = [
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3b11fnuz",
    "float4_e2m1fn",
]
NUMBERS = [*FLOATS, "int8", "int32", "uint8", "int4", "complex64"]


@pytest.mark.parametrize("dtype", [*NUMBERS, "bool"])
def test_zero_writes_positive_zero(dtype):
    bad = [-1.0, np.nan, np.inf, -np.inf] if dtype in FLOATS[:3] else [-1.0, 1.0, 1.0, 0.0]
    leaf = jnp.asarray(np.array(bad)).astype(dtype)
    out = pm.at({"w": leaf}, "w").zero()["w"]
    assert out.dtype == leaf.dtype
    assert not np.any(np.asarray(out).view(np.uint8))
    sliced = pm.at({"w": leaf}, "w")[:2].zero()["w"]
    assert not np.any(np.asarray(sliced)[:2].view(np.uint8))
    assert np.asarray(sliced)[2:].tobytes() == np.asarray(leaf)[2:].tobytes()


@pytest.mark.parametrize("dtype", NUMBERS)
def test_arithmetic_keeps_the_dtype(dtype):
    leaf = jnp.asarray([1, 2]).astype(dtype)
    assert pm.at({"w": leaf}, "w").multiply(2)["w"].dtype == leaf.dtype
    assert pm.at({"w": leaf}, "w").add(1)["w"].dtype == leaf.dtype
    assert pm.at({"w": leaf}, "w").fill(1)["w"].dtype == leaf.dtype
    if dtype != "complex64":
        assert pm.at({"w": leaf}, "w").clip(1, 1)["w"].dtype == leaf.dtype


def test_weak_types_stay():
    weak = jnp.sin(1.0)
    assert weak.weak_type
    tree = {"w": weak}
    for out in (
        pm.at(tree, "w").zero(),
        pm.at(tree, "w").fill(2.0),
        pm.at(tree, "w").multiply(2.0),
        pm.at(tree, "w").set(np.float32(3)[None][0:1].reshape(())),
        pm.at(tree, "w").noise(1.0),
    ):
        assert out["w"].weak_type


REFUSED = {
    "float into int": (
        jnp.ones(2, jnp.int32),
        lambda s: s.multiply(0.5),
        SpecMismatch,
        "int32 cannot hold 0.5",
    ),
    "overflow": (jnp.ones(2, jnp.int8), lambda s: s.fill(300), SpecMismatch, "int8 cannot hold 300"),
    "overflow to inf": (jnp.ones(2, jnp.float16), lambda s: s.fill(1e6), SpecMismatch, "float16 cannot hold"),
    "NaN into int": (jnp.ones(2, jnp.int32), lambda s: s.fill(float("nan")), SpecMismatch, "cannot hold nan"),
    "complex into real": (jnp.ones(2), lambda s: s.fill(1j), SpecMismatch, "float32 cannot hold 1j"),
    "sum of bools": (jnp.ones(2, bool), lambda s: s.add(True), SpecMismatch, "cannot be added to"),
    "noise on ints": (
        jnp.ones(2, jnp.int32),
        lambda s: s.noise(1.0),
        SpecMismatch,
        "random values are floats",
    ),
    "array for fill": (jnp.ones(2), lambda s: s.fill(jnp.ones(2)), SpecMismatch, "fill takes a scalar"),
    "scalar for set": (jnp.ones(2), lambda s: s.set(1.0), SpecMismatch, ".fill(1.0)"),
    "wrong shape": (jnp.ones((2, 3)), lambda s: s.set(jnp.ones((3, 2))), SpecMismatch, ".set(array.T)"),
    "wrong dtype": (jnp.ones(2), lambda s: s.set(np.ones(2)), SpecMismatch, 'astype("float32")'),
    "operand too large": (
        jnp.ones(2),
        lambda s: s.add(np.ones((3, 2), np.float32)),
        SpecMismatch,
        "broadcast",
    ),
    "fans of a vector": (jnp.ones(2), lambda s: s.reinit("he_normal"), SpecMismatch, "at least 2 axes"),
    "apply changes shape": (jnp.ones(2), lambda s: s.apply(lambda x: x[:1]), SpecMismatch, "keep_spec=False"),
    "no such slice": (jnp.ones((2, 3)), lambda s: s[2].zero(), OutOfRange, "does not fit"),
    "too many axes": (jnp.ones((2, 3)), lambda s: s[0, 0, 0].zero(), OutOfRange, "does not fit"),
    "slice of a mask": (jnp.ones(2), lambda s: s[0].mask(), ValueError, "whole leaves"),
    "key": (jax.random.key(0), lambda s: s.zero(), Unsupported, "PRNG key"),
    "key times two": (jax.random.key(0), lambda s: s.multiply(2), Unsupported, "PRNG key"),
    "abstract": (
        jax.ShapeDtypeStruct((2,), jnp.float32),
        lambda s: s.zero(),
        Unsupported,
        "ShapeDtypeStruct",
    ),
    "a dtype without zero": (
        jnp.ones(2, "float8_e8m0fnu"),
        lambda s: s.zero(),
        SpecMismatch,
        "float8_e8m0fnu has no zero",
    ),
    "x64": (jnp.ones(2), lambda s: s.cast("float64"), Unsupported, "jax_enable_x64"),
}


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_with_the_path(case):
    leaf, edit, error, says = REFUSED[case]
    with pytest.raises(error, match=re.escape(says)) as raised:
        edit(pm.at({"layer": {"leaf": leaf}}, "**"))
    if case not in ("slice of a mask", "x64"):
        assert "layer/leaf" in str(raised.value)


def test_keys_may_be_replaced_and_read():
    tree = {"rng": jax.random.key(0), "w": jnp.ones(2)}
    other = jax.random.key(1)
    assert jnp.array_equal(*map(jax.random.key_data, (pm.at(tree, "rng").set(other)["rng"], other)))
    assert pm.at(tree, "rng").one() is tree["rng"]
    assert pm.param_count(tree, "w") == 2


def test_a_tree_of_a_kind_seen_before_is_checked_anew():
    """The same names with other leaf types are another structure."""
    assert pm.at({"a": jnp.ones(2), "f": jnp.ones(1)}, "**").paths == ["a", "f"]
    assert pm.at({"a": jnp.ones(2), "f": jnp.tanh}, "**").paths == ["a"]
    assert pm.at({"a": jnp.ones(2), "f": 3.0}, "**").paths == ["a"]
    assert pm.at({"a": jnp.ones(2), "f": None}, "**").paths == ["a"]


def test_the_same_array_at_two_places_is_two_leaves(params):
    """As inside jit, and as a moving average that starts from the parameters must be."""
    state = {"params": params, "ema": params}
    edited = pm.at(state, "params/**/kernel").zero()
    assert edited["ema"]["params"]["Dense_0"]["kernel"] is params["params"]["Dense_0"]["kernel"]
    assert pm.param_count(state) == 2 * pm.param_count(params)
    jitted = jax.jit(lambda s: pm.at(s, "params/**/kernel").zero())(state)
    jax.tree.map(np.testing.assert_array_equal, edited, jitted)


def test_random_edits_depend_on_seed_and_path_only(params):
    whole = pm.at(params, "**/kernel").noise(0.1, seed=7)
    alone = pm.at(params, LAST).noise(0.1, seed=7)
    reordered = {"params": dict(reversed(params["params"].items()))}
    again = pm.at(reordered, "**/{kernel,bias}").noise(0.1, seed=7)
    for other in (alone, again):
        np.testing.assert_array_equal(whole["params"]["Dense_2"]["kernel"], other["params"]["Dense_2"]["kernel"])
    changed = pm.at(params, LAST).noise(0.1, seed=8)
    assert np.any(changed["params"]["Dense_2"]["kernel"] != alone["params"]["Dense_2"]["kernel"])


@pytest.mark.numeric
@pytest.mark.parametrize("seed", [3, jax.random.key(3), jax.random.PRNGKey(3)], ids=["int", "key", "old key"])
def test_reinit_draws_with_the_right_spread(seed):
    tree = {"a": jnp.zeros((400, 300)), "b": jnp.zeros((3, 3, 40, 50))}
    out = pm.at(tree, "*").reinit("lecun_normal", seed=seed)
    assert float(out["a"].std()) == pytest.approx((1 / 400) ** 0.5, rel=0.02)
    assert float(out["b"].std()) == pytest.approx((1 / 360) ** 0.5, rel=0.02)
    inside = jax.jit(lambda t, s: pm.at(t, "*").reinit("lecun_normal", seed=s))
    if not isinstance(seed, int):
        # the inverse of erf by a polynomial of 9 terms, near 0 of what is left of 2 u - 1
        assert_close(inside(tree, seed)["a"], out["a"], terms=9 + 3)
    own = pm.at(tree, "a").reinit(nn.initializers.constant(2.0), seed=seed)
    assert float(own["a"].min()) == 2.0
