"""Delete and rename over every container: types, order and identity are kept, the given tree is never written to."""

import copy
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from flax.core import FrozenDict
from flax.training.train_state import TrainState
from hypothesis import given, settings, strategies as st

import paramend as pm
from paramend.errors import BadArgument, RenameClash, Unsupported


def a(value=0.0):
    return np.full(2, value)


def shape(node):
    """The containers and keys of a tree, with the first number of each leaf."""
    if isinstance(node, dict | FrozenDict | nnx.State):
        return {key: shape(child) for key, child in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(map(shape, node))
    return float(np.ravel(node)[0]) if hasattr(node, "shape") else node


# ---- delete ----------------------------------------------------------------------------------------------------


def test_delete_prunes_what_became_empty_and_keeps_what_was():
    tree = {"a": {"w": a(1), "inner": {"v": a(2)}}, "b": a(3), "empty": {}, "none": None}
    assert shape(pm.at(tree, "a/**").delete()) == {"b": 3.0, "empty": {}, "none": None}
    assert shape(pm.at(tree, "**").delete()) == {"empty": {}, "none": None}


def test_delete_closes_up_lists_and_tuples():
    tree = {"list": [{"w": a(0)}, {"w": a(1)}, {"w": a(2)}], "tuple": (a(0), a(1), a(2))}
    after = pm.at(tree, ["list[1]/**", "tuple[0]"]).delete()
    assert shape(after) == {"list": [{"w": 0.0}, {"w": 2.0}], "tuple": (1.0, 2.0)}


def test_delete_keeps_untouched_objects():
    tree = {"a": {"w": a(), "v": a()}, "b": [a(), {"c": a()}], "f": FrozenDict({"x": a()})}
    after = pm.at(tree, "a/w").delete()
    assert after["b"] is tree["b"]
    assert after["f"] is tree["f"]
    assert after["a"]["v"] is tree["a"]["v"]
    assert list(tree["a"]) == ["w", "v"]


def test_delete_takes_all_paths_of_a_tied_leaf():
    shared = torch.ones(1)
    assert list(pm.at({"wte": shared, "head": {"w": shared}, "x": torch.ones(2)}, "wte").delete()) == ["x"]


def test_arrays_of_numpy_and_jax_are_values_however_many_places_they_stand_at():
    for shared in (np.ones(1), jnp.ones(1)):
        tree = {"params": {"w": shared}, "ema": {"w": shared}}
        assert list(pm.at(tree, "ema/**").delete()) == ["params"]
        assert list(pm.at(tree, "ema/**").rename("old/**")) == ["params", "old"]


def test_delete_in_a_dataclass_stops_at_its_fields():
    model = nn.Dense(2)
    state = TrainState.create(apply_fn=model.apply, params={"a": {"w": jnp.ones(2)}}, tx=optax.sgd(0.1))
    assert pm.at(state, "params/**").delete().params == {}
    wide = state.replace(params={"a": {"w": jnp.ones(2)}, "b": jnp.ones(1)})
    assert set(pm.at(wide, "params/a/**").delete().params) == {"b"}


def test_trees_with_the_same_keys_in_another_order():
    for keys in (["x", "y", "z"], ["y", "x", "z"], ["z", "y", "x"]):
        tree = {key: a(ord(key)) for key in keys}
        assert shape(pm.at(tree, "x").delete()) == {key: float(ord(key)) for key in keys if key != "x"}
        assert list(pm.at(tree, "x").rename("w")) == ["w" if key == "x" else key for key in keys]


# ---- rename ----------------------------------------------------------------------------------------------------


def test_rename_keeps_order_and_the_tree_given():
    tree = {"x": a(0), "h_0": {"w": a(1)}, "h_1": {"w": a(2)}, "y": a(3)}
    before = copy.deepcopy(tree)
    after = pm.at(tree, "h_<n>/**").rename("layers_<n+1>/**")
    assert list(after) == ["x", "layers_1", "layers_2", "y"]
    assert shape(tree) == shape(before)
    assert after["layers_1"]["w"] is tree["h_0"]["w"]
    assert after["x"] is tree["x"]
    assert list(pm.at(tree, "h_<n>/**").rename("layers/<n>/**")) == ["x", "layers", "y"]
    assert list(pm.at(tree, "h_0/w").rename("h_0/v")["h_0"]) == ["v"]


def test_rotation_and_swap():
    tree = {f"h_{i}": {"w": a(i), "b": a(i + 10)} for i in range(3)}
    rotated = pm.at(tree, ["h_{0,1,2}/**"]).rename("h_{1,2,0}/**")
    assert shape(rotated) == {f"h_{i}": {"w": (i + 2) % 3 + 0.0, "b": (i + 2) % 3 + 10.0} for i in range(3)}
    assert shape(pm.at({"a": a(1), "b": a(2)}, "{a,b}").rename("{b,a}")) == {"a": 2.0, "b": 1.0}
    shifted = pm.at({"h_0": a(0), "h_1": a(1)}, "h_<n>").rename("h_<n+1>")
    assert list(shape(shifted).items()) == [("h_1", 0.0), ("h_2", 1.0)]


def test_rename_to_itself_gives_the_same_objects():
    tree = {"a": {"w": a()}, "b": [a()]}
    assert pm.at(tree, "**").rename("**") is tree


def test_partial_move_into_an_existing_subtree():
    tree = {"old": {"w": a(1), "b": a(2)}, "new": {"b": a(3)}, "z": a(4)}
    after = pm.at(tree, "old/w").rename("new/w")
    assert shape(after) == {"old": {"b": 2.0}, "new": {"b": 3.0, "w": 1.0}, "z": 4.0}
    assert list(after) == ["old", "new", "z"]


@pytest.mark.parametrize(
    ("selector", "to", "message"),
    [
        ("a/w", "a/b", r"a/w would go to a/b \(which is taken\)"),
        ("a/*", "c/*/x/y", r"would go to c/w/x/y"),
        ("a/w", "a/b/c", r"a/b is a leaf"),
        ("a/w", "d", r"which is taken"),
        ("a/*", "l/*", r"l is a list and has no 'w'"),
        ("{a,c}/w", "{e,e}/w", r"c/w would go to e/w \(which is taken\)"),
    ],
)
def test_clashes(selector, to, message):
    tree = {"a": {"w": a(), "b": a()}, "c": {"w": a()}, "d": None, "l": [a()]}
    with pytest.raises(RenameClash, match=message):
        pm.at(tree, selector).rename(to)


def test_all_clashes_at_once():
    with pytest.raises(RenameClash, match="2 leaves would collide with others"):
        pm.at({"a": {"w": a(), "b": a()}, "c": {"w": a(), "b": a()}}, "a/*").rename("c/*")


def test_lists():
    tree = {"layers": [{"w": a(0)}, {"w": a(1)}, {"w": a(2)}]}
    reversed_ = pm.at(tree, "layers/{0,1,2}/**").rename("layers/{2,1,0}/**")
    assert shape(reversed_) == {"layers": [{"w": 2.0}, {"w": 1.0}, {"w": 0.0}]}
    moved = pm.at(tree, "layers/**").rename("net/blocks/**")
    assert shape(moved) == {"net": {"blocks": [{"w": 0.0}, {"w": 1.0}, {"w": 2.0}]}}
    assert shape(pm.at(tree, "layers[-1]/**").rename("head/**")) == {
        "layers": [{"w": 0.0}, {"w": 1.0}],
        "head": {"w": 2.0},
    }
    assert shape(pm.at(tree, "layers/<n>/w").rename("h_<n>")) == {"h_0": 0.0, "h_1": 1.0, "h_2": 2.0}
    assert shape(pm.at(({"w": a(0)},), "0/w").rename("0/w/x")) == ({"w": {"x": 0.0}},)
    with pytest.raises(RenameClash, match="entries 1, 2 and no entry 0"):
        pm.at(tree, "layers/0/**").rename("first/**")
    with pytest.raises(RenameClash, match="entries 0, 1, 4 and no entry 2"):
        pm.at(tree, "layers/2/w").rename("layers/4/w")


def test_moved_subtrees_keep_their_containers():
    tree = {"enc": OrderedDict(b=[a(0), (a(1), a(2))], a={3: a(3), 7: a(7)}), "f": FrozenDict({"p": {"q": a(5)}})}
    after = pm.at(tree, "enc/**").rename("net/enc/**")
    assert shape(after)["net"] == {"enc": {"b": [0.0, (1.0, 2.0)], "a": {3: 3.0, 7: 7.0}}}
    assert type(after["net"]["enc"]) is OrderedDict
    assert list(after["net"]["enc"]) == ["b", "a"]
    assert after["f"] is tree["f"]


def test_keys_that_are_numbers():
    tree = {0: {"w": a(0)}, 1: {"w": a(1)}}
    assert shape(pm.at(tree, "<n>/w").rename("<n+1>/w")) == {1: {"w": 0.0}, 2: {"w": 1.0}}
    assert shape(pm.at(tree, "**").rename("params/**")) == {"params": {0: {"w": 0.0}, 1: {"w": 1.0}}}


def test_selectors_that_narrow_a_text():
    tree = {"a": {"w": np.ones((2, 2)), "b": a(1)}, "c": {"w": np.ones((2, 2))}}
    after = pm.at(tree, pm.sel("*/w") & ~pm.sel("c/**")).rename("*/kernel")
    assert pm.at(after, "**").paths == ["a/kernel", "a/b", "c/w"]
    after = pm.at(tree, pm.sel("a/*").where(ndim=1)).rename("x/*")
    assert pm.at(after, "**").paths == ["a/w", "x/b", "c/w"]
    with pytest.raises(BadArgument, match="needs a selector of text"):
        pm.at(tree, lambda path, spec: True).rename("x/**")


# ---- containers ------------------------------------------------------------------------------------------------


def test_frozen_dict():
    tree = FrozenDict({"z": {"w": jnp.ones(1)}, "a": {"w": jnp.zeros(1)}, "k": jnp.ones(2)})
    after = pm.at(tree, "z/w").rename("y/v/w")
    assert type(after) is FrozenDict
    assert list(after) == ["y", "a", "k"]
    assert shape(after) == {"y": {"v": {"w": 1.0}}, "a": {"w": 0.0}, "k": 1.0}
    assert after["k"] is tree["k"]
    assert type(pm.at(tree, "a/**").delete()) is FrozenDict


def test_default_dict_and_ordered_dict():
    tree = defaultdict(dict, {"a": OrderedDict(w=a(1), v=a(2))})
    after = pm.at(tree, "a/w").rename("a/u")
    assert (type(after), after.default_factory) == (defaultdict, dict)
    assert list(after["a"]) == ["u", "v"]
    assert type(after["a"]) is OrderedDict


def test_flat_state_dict_stays_flat_with_its_metadata():
    state = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)).state_dict()
    after = pm.at(state, "<n>.**").rename("net.layers.<n+1>.**")
    assert list(after) == [f"net.layers.{i}.{p}" for i in (1, 2) for p in ("weight", "bias")]
    assert after._metadata == state._metadata
    assert after["net.layers.1.weight"] is state["0.weight"]
    assert list(pm.at(after, "net.layers.**").rename("**")) == ["1.weight", "1.bias", "2.weight", "2.bias"]
    single = torch.nn.Linear(2, 3).state_dict()
    assert list(pm.at(single, "*").rename("fc.*")) == ["fc.weight", "fc.bias"]
    assert list(pm.at(single, "weight").delete()) == ["bias"]
    assert list(state) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_haiku_keys_stay_whole():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([4, 2])(x)))
    params = net.init(jax.random.key(0), jnp.ones((1, 3)))
    after = pm.at(params, "mlp/~/linear_<n>/*").rename("mlp/~/linear_<n+1>/*")
    assert {key: set(value) for key, value in after.items()} == {f"mlp/~/linear_{i}": {"w", "b"} for i in (1, 2)}
    assert set(pm.at(params, "mlp/~/**").rename("net/**")) == {"net/linear_0", "net/linear_1"}


def test_nnx_state():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(2)])
            self.head = nnx.Linear(2, 1, rngs=rngs)

    model = Net(nnx.Rngs(0))
    state = nnx.state(model)
    after = pm.at(state, "layers/<n>/**").rename("blocks/<n>/**")
    assert type(after) is type(state)
    assert sorted(pm.at(after, "**").paths) == sorted(
        path.replace("layers", "blocks") for path in pm.at(state, "**").paths
    )
    assert isinstance(after["blocks"][0]["kernel"], nnx.Param)
    assert after["blocks"][1]["kernel"][...] is state["layers"][1]["kernel"][...]
    assert set(pm.at(state, "head/**").delete()) == {"layers"}
    with pytest.raises(Unsupported, match="fixed by its class") as caught:
        pm.at(model, "head/kernel").rename("head/w")
    assert "nnx.state(module)" in caught.value.hint


def test_boxes_move_with_their_value():
    model = nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.ones, ("in", "out")))
    params = model.init(jax.random.key(0), jnp.ones((1, 2)))
    after = pm.at(params, "params/kernel").rename("params/w")
    assert isinstance(after["params"]["w"], nn.Partitioned)
    assert after["params"]["w"].names == ("in", "out")
    assert list(pm.at(params, "**/kernel").delete()["params"]) == ["bias"]


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class Record:
    left: Any
    right: Any


class Module(eqx.Module):
    left: Any
    right: Any


@pytest.mark.parametrize("kind", [Pair, Record, Module])
def test_fixed_containers_are_refused_and_their_contents_are_not(kind):
    tree = {"p": kind({"w": jnp.ones(1), "b": jnp.ones(1)}, jnp.zeros(1))}
    with pytest.raises(Unsupported, match=r"p is a \w+, whose entries are fixed"):
        pm.at(tree, "p/right").delete()
    with pytest.raises(Unsupported, match="whose entries are fixed"):
        pm.at(tree, "p/right").rename("p/other")
    assert set(pm.at(tree, "p/left/w").rename("p/left/kernel")["p"].left) == {"kernel", "b"}
    assert pm.at(tree, "p/left/*").delete()["p"].left == {}
    assert type(pm.at(tree, "p/left/*").delete()["p"]) is kind


def test_leaves_of_fixed_containers_may_be_swapped():
    after = pm.at(Pair(a(1), a(2)), "{left,right}").rename("{right,left}")
    assert (type(after), after.left[0], after.right[0]) == (Pair, 2.0, 1.0)


def test_modules_within_a_tree():
    tree = {"model": torch.nn.Linear(2, 1), "extra": torch.ones(1)}
    assert pm.at(tree, "extra").rename("more")["model"] is tree["model"]
    with pytest.raises(Unsupported, match="part of a Linear") as caught:
        pm.at(tree, "model.weight").delete()
    assert "state_dict()" in caught.value.hint
    with pytest.raises(Unsupported, match="fixed by its class"):
        pm.at(torch.nn.Linear(2, 1), "weight").delete()
    with pytest.raises(Unsupported, match="single array"):
        pm.at(np.ones(2), "**").delete()


def test_leaves_that_are_no_arrays_stay():
    tree = {"a": {"w": a(1), "fn": len, "none": None}, "name": "x"}
    assert shape(pm.at(tree, "a/w").delete()) == {"a": {"fn": len, "none": None}, "name": "x"}
    assert shape(pm.at(tree, "a/w").rename("b")) == {"a": {"fn": len, "none": None}, "name": "x", "b": 1.0}


# ---- properties ------------------------------------------------------------------------------------------------

KEYS = st.sampled_from(["a", "b", "h_0", "h_1", "w", "mlp/~/x", "p.q"])
TREES = st.recursive(
    st.integers(0, 9).map(lambda i: np.full(1, float(i))),
    lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=3) | st.lists(inner, min_size=1, max_size=3),
    max_leaves=8,
).filter(lambda tree: isinstance(tree, dict))


@settings(max_examples=150, deadline=None)
@given(TREES, st.sampled_from(["params/**", "x/y/**", "**"]))
def test_there_and_back(tree, target):
    before = copy.deepcopy(tree)
    there = pm.at(tree, "**").rename(target)
    back = pm.at(there, target).rename("**")
    assert shape(back) == shape(before) == shape(tree)
    assert list(pm.at(back, "**").get()) == list(pm.at(tree, "**").get())


@settings(max_examples=150, deadline=None)
@given(TREES, st.data())
def test_delete_leaves_the_rest(tree, data):
    def listed(node):
        """Leaves by path as they stand, whatever the separators."""
        items = node.items() if isinstance(node, dict) else enumerate(node)
        return [leaf for _, child in items for leaf in (listed(child) if isinstance(child, dict | list) else [child])]

    paths = pm.at(tree, "**").paths
    gone = data.draw(st.sets(st.sampled_from(paths), min_size=1))
    values = {id(value) for path, value in pm.at(tree, "**") if path not in gone}
    after = pm.at(tree, sorted(gone)).delete()
    assert {id(leaf) for leaf in listed(after)} == values
