"""Grafts between trees of every kind: what is copied, what is refused and how, and that nothing changes on an error."""

import copy
import itertools
import json

import equinox as eqx
import flax.linen as nn
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
from jax.sharding import NamedSharding, PartitionSpec

import paramend as pm
from paramend.arrays.losses import damage
from paramend.errors import BadArgument, GraftRefused, SelectorError, Unsupported
from paramend.grafting.alignment import propose
from paramend.grafting.graft import graft, graft_
from paramend.reports.report import Line, fold, table


class MLP(nn.Module):
    layers: int
    features: int = 4
    out: int = 4

    @nn.compact
    def __call__(self, x):
        for _ in range(self.layers - 1):
            x = nn.relu(nn.Dense(self.features)(x))
        return nn.Dense(self.out)(x)


def init(layers, seed=0, **kwargs):
    return MLP(layers, **kwargs).init(jax.random.key(seed), jnp.ones((1, 4)))


class NNXNet(nnx.Module):
    def __init__(self, layers, seed=0):
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(layers)])


def torch_net(*sizes, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


def a(*shape, value=1.0, dtype="float32"):
    return np.full(shape, value, dtype)


def refused(call, *args, **kwargs):
    with pytest.raises(GraftRefused) as caught:
        call(*args, **kwargs)
    return caught.value


def run_hint(error, target, source):
    """Runs each line of a hint as the user would; what it gives."""
    space = {"pm": type("pm", (), {"graft": graft, "graft_": graft_, "sel": pm.sel}), "source": source}
    space |= {"target": target, "module": target}
    return [eval(line.strip(), space) for line in error.hint.splitlines()]


# ---- copying ---------------------------------------------------------------------------------------------------


def test_deeper_mlp_starts_from_a_smaller_one():
    small, big = init(3), init(5, seed=1)
    tree, report = graft(big, small)
    for i in range(3):
        assert np.array_equal(tree["params"][f"Dense_{i}"]["kernel"], small["params"][f"Dense_{i}"]["kernel"])
    assert tree["params"]["Dense_4"]["kernel"] is big["params"]["Dense_4"]["kernel"]
    assert [row.path for row in report.fresh] == [f"params/Dense_{i}/{p}" for i in (3, 4) for p in ("kernel", "bias")]
    assert report.totals["copied"] == {"leaves": 6, "parameters": 60, "taken": 60}
    assert list(tree["params"]) == list(big["params"])


def test_last_goes_to_last():
    small, big = init(3, out=2), init(5, seed=1, out=2)
    tree, _ = graft(big, small, rename={"**/Dense_[-1]/**": "**/Dense_[-1]/**"})
    assert np.array_equal(tree["params"]["Dense_4"]["kernel"], small["params"]["Dense_2"]["kernel"])
    assert tree["params"]["Dense_2"]["kernel"] is big["params"]["Dense_2"]["kernel"]
    error = refused(graft, big, small)
    assert "params/Dense_2/kernel  your model float32[4,4], the source float32[4,2]" in str(error)
    assert 'rename={"params/Dense_[-1]/**": "params/Dense_[-1]/**"})  # copies 6 leaves' in error.hint
    run_hint(error, big, small)


def test_last_to_last_of_a_shallower_model_collides_and_says_so():
    error = refused(graft, init(3), init(5), rename={"**/Dense_[-1]/**": "**/Dense_[-1]/**"})
    assert "2 leaves of your model have several sources" in str(error)
    assert "from params/Dense_2/bias, params/Dense_4/bias" in str(error)
    assert "its place is taken" in {row.did for row in error.report.unused}
    rules = {"**/Dense_[-1]/**": "**/Dense_[-1]/**", "**/Dense_[2:]/**": None}
    tree, report = graft(init(3), source := init(5, seed=1), rename=rules)
    assert np.array_equal(tree["params"]["Dense_2"]["kernel"], source["params"]["Dense_4"]["kernel"])
    assert {row.did for row in report.unused} == {"left behind by `rename`"}
    assert len(report.unused) == 4


@pytest.mark.parametrize(
    ("rename", "order"),
    [
        ({"h/<n>": "h/<n+1>"}, [None, 0, 1, 2]),
        ({"h/{0,1,2,3}": "h/{1,2,3,0}"}, [3, 0, 1, 2]),
        ({"h[::-1]": "h[:]"}, [3, 2, 1, 0]),
        ({"h/0": "h/3", "h/3": "h/0"}, [3, 1, 2, 0]),
        ({"h/<n>": "h/<2*n>", "x": None}, [0, None, 1, None]),
    ],
)
def test_renames_apply_at_once(rename, order):
    count = 3 if order[0] is None else 2 if None in order else 4
    source = {"h": [a(1, value=i) for i in range(count)]} | ({"x": a(1)} if "x" in rename else {})
    target = {"h": [a(1, value=-1) for _ in range(4)]}
    tree, _ = graft(target, source, rename=rename)
    assert [leaf[0] for leaf in tree["h"]] == [-1 if i is None else i for i in order]


def test_first_matching_rule_counts():
    tree, _ = graft(
        {"x": a(1), "y": a(1)}, {"a": a(1, value=5), "b": a(1, value=6)}, rename={"a": "y", "{a,b}": "{x,x}"}
    )
    assert (tree["x"][0], tree["y"][0]) == (6, 5)


# ---- kinds of trees --------------------------------------------------------------------------------------------


def test_frozen_dict_and_dict():
    small, big = init(2), FrozenDict(init(3, seed=1))
    tree, _ = graft(big, small)
    assert type(tree) is FrozenDict
    assert np.array_equal(tree["params"]["Dense_0"]["kernel"], small["params"]["Dense_0"]["kernel"])
    back, _ = graft(init(3, seed=2), big)
    assert type(back) is dict
    assert np.array_equal(back["params"]["Dense_2"]["bias"], big["params"]["Dense_2"]["bias"])


def test_train_state():
    state = TrainState.create(apply_fn=None, params=init(3)["params"], tx=optax.sgd(0.1))
    source = init(2, seed=1)
    tree, report = graft(state, source)
    assert type(tree) is TrainState
    assert np.array_equal(tree.params["Dense_1"]["kernel"], source["params"]["Dense_1"]["kernel"])
    assert len(report.copied) == 4


def test_nnx_module_state_and_torch():
    model, small = NNXNet(3), NNXNet(2, seed=1)
    optimizer_sees = model.layers[0].kernel
    tree, report = graft(model, nnx.state(small))
    assert type(tree) is NNXNet
    assert np.array_equal(tree.layers[1].kernel[...], small.layers[1].kernel[...])
    assert model.layers[1].kernel[...] is not small.layers[1].kernel[...]
    assert [row.path for row in report.fresh] == ["layers/2/kernel", "layers/2/bias"]
    graft_(model, small)
    assert model.layers[0].kernel is optimizer_sees
    assert np.array_equal(model.layers[1].kernel[...], small.layers[1].kernel[...])
    kernels = {f"{n}.kernel": weight.T for n, weight in enumerate(torch_net(4, 4, 4).state_dict().values()) if n < 1}
    tree, _ = graft(model, kernels, rename={"<n>.kernel": "layers/<n>/kernel"})
    assert np.array_equal(tree.layers[0].kernel[...], kernels["0.kernel"].numpy())
    assert isinstance(tree.layers[0].kernel, nnx.Param)


def test_equinox():
    model, small = (eqx.nn.MLP(4, 4, 4, depth, key=jax.random.key(depth)) for depth in (3, 1))
    tree, report = graft(model, small)
    assert type(tree) is eqx.nn.MLP
    assert np.array_equal(tree.layers[0].weight, small.layers[0].weight)
    assert tree.layers[3].weight is model.layers[3].weight
    assert len(report.copied) == 4


def test_torch_module_and_state_dict():
    model, source = torch_net(4, 4, 2), torch_net(4, 4, seed=1).state_dict()
    before = copy.deepcopy(model.state_dict())
    tree, report = graft(model, source)
    assert torch.equal(tree[0].weight, source["0.weight"])
    assert isinstance(tree[0].weight, torch.nn.Parameter)
    assert tree[1].weight is model[1].weight
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    parameter = model[0].weight
    assert [row.path for row in graft_(model, source).copied] == ["0.weight", "0.bias"]
    assert model[0].weight is parameter
    assert parameter.requires_grad
    assert torch.equal(parameter, source["0.weight"])
    source["0.weight"].zero_()
    assert parameter.abs().sum() > 0, "the model holds a copy"
    flat, _ = graft(model.state_dict(), source)
    assert type(flat) is type(model.state_dict())
    assert flat["0.weight"].abs().sum() == 0
    assert "0.weight" in str(report)


def test_boxes_and_sharding_are_kept():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    target = {"w": nn.Partitioned(jax.device_put(jnp.zeros((8, 2)), sharding), names=("x", None))}
    tree, _ = graft(target, {"w": a(8, 2)})
    assert isinstance(tree["w"], nn.Partitioned)
    assert tree["w"].value.sharding == sharding
    assert float(tree["w"].value.sum()) == 16
    tree, report = graft(target, {"w": a(5, 2)}, mismatch="overlap")
    assert tree["w"].value.sharding == sharding
    assert float(tree["w"].value.sum()) == 10
    assert report.mismatched[0].taken == 10


def test_prng_keys_and_tracing():
    target = {"rng": jax.random.key(0), "w": jnp.zeros(2)}
    source = {"rng": jax.random.key(7), "w": jnp.ones(2)}
    tree, _ = graft(target, source)
    assert np.array_equal(jax.random.key_data(tree["rng"]), jax.random.key_data(source["rng"]))
    assert "a leaf cannot take part" in str(refused(graft, target, {"rng": a(), "w": a(2)}))

    @jax.jit
    def start(target, source):
        return graft(target, source, mismatch="overlap")[0]

    out = start({"w": jnp.zeros((2, 2), "bfloat16")}, {"w": jnp.ones((3, 1))})
    assert out["w"].tolist() == [[1, 0], [1, 0]]


# ---- ties ------------------------------------------------------------------------------------------------------


class Tied(torch.nn.Module):
    def __init__(self, value=0.0):
        super().__init__()
        self.wte = torch.nn.Embedding(3, 2)
        self.head = torch.nn.Linear(2, 3, bias=False)
        self.head.weight = self.wte.weight
        torch.nn.init.constant_(self.wte.weight, value)


def test_tied_leaves_stay_tied():
    for source in (Tied(5.0), {"wte.weight": torch.full((3, 2), 5.0)}, {"head.weight": torch.full((3, 2), 5.0)}):
        model = Tied()
        report = graft_(model, source)
        assert [(row.path, row.did) for row in report.copied] == [("wte.weight", "copied")]
        assert report.unused == report.fresh == []
        assert model.head.weight is model.wte.weight
        assert model.head.weight[0].tolist() == [5, 5]
        new, _ = graft(Tied(), source)
        assert new.head.weight is new.wte.weight


def test_two_sources_for_a_tied_leaf():
    same = {"wte.weight": torch.full((3, 2), 5.0), "head.weight": torch.full((3, 2), 5.0)}
    model = Tied()
    report = graft_(model, same)
    assert [row.source for row in report.copied] == ["wte.weight", "head.weight"]
    assert report.totals["copied"] == {"leaves": 1, "parameters": 6, "taken": 6}
    other = {"wte.weight": torch.full((3, 2), 5.0), "head.weight": torch.full((3, 2), 6.0)}
    model = Tied(1.0)
    error = refused(graft_, model, other)
    assert "shared under several paths, would get different values" in str(error)
    assert "from wte.weight and head.weight, which differ" in str(error)
    assert model.wte.weight[0].tolist() == [1, 1]


def test_tied_source_for_an_untied_target():
    shared = torch.full((2,), 3.0)
    tree, report = graft({"x": torch.ones(2), "y": torch.ones(2)}, {"x": shared, "y": shared})
    assert len(report.copied) == 2
    assert tree["x"] is not tree["y"]
    assert graft({"x": torch.ones(2)}, {"x": shared, "y": shared})[1].unused == []


def test_a_template_whose_zeros_are_one_array():
    zeros = np.zeros(2)
    tree, report = graft({"x": zeros, "y": zeros}, {"x": np.ones(2), "y": np.full(2, 5.0)})
    assert (tree["x"].tolist(), tree["y"].tolist(), zeros.tolist()) == ([1, 1], [5, 5], [0, 0])
    assert [row.path for row in report.copied] == ["x", "y"]
    with pytest.raises(Unsupported, match="x and y are one array, which cannot take two values") as caught:
        graft_({"x": zeros, "y": zeros}, {"x": np.ones(2), "y": np.full(2, 5.0)})
    assert "pm.graft returns a new tree" in caught.value.hint
    assert zeros.tolist() == [0, 0]
    with pytest.raises(Unsupported, match="x and y share memory"):
        graft_({"x": zeros, "y": zeros[1:]}, {"x": np.ones(2)})


# ---- options ---------------------------------------------------------------------------------------------------


def test_mismatch():
    target, source = {"w": a(4, 4, value=0), "b": a(2)}, {"w": a(2, 6, value=7), "b": a(2)}
    error = refused(graft, target, source)
    assert "w  your model float32[4,4], the source float32[2,6]" in str(error)
    kept, report = graft(target, source, mismatch="keep")
    assert kept["w"] is target["w"]
    assert (report.mismatched[0].did, report.mismatched[0].taken) == ("kept", 0)
    overlap, report = graft(target, source, mismatch="overlap")
    assert overlap["w"].sum() == 7 * 8
    assert overlap["w"][:2].min() == 7
    row = report.mismatched[0]
    assert (row.did, row.taken, row.shape, row.source_shape) == ("corner [:2, :4] copied", 8, (4, 4), (2, 6))
    assert target["w"].sum() == 0


def test_overlap_needs_equal_ranks():
    target, source = {"w": a(4, 4), "v": a(2)}, {"w": a(4), "v": a(2)}
    error = refused(graft, target, source, mismatch="overlap")
    assert error.hint == 'pm.graft(target, source, mismatch="keep")  # copies 1 leaf'


def test_overlap_in_torch_keeps_the_parameter():
    model = torch_net(4, 4)
    torch.nn.init.zeros_(model[0].weight)
    parameter = model[0].weight
    graft_(model, {"0.weight": torch.ones(2, 3), "0.bias": torch.ones(4)}, mismatch="overlap")
    assert model[0].weight is parameter
    assert parameter.sum() == 6


def test_unused():
    target, source = {"w": a(2)}, {"w": a(2), "extra": a(3)}
    error = refused(graft, target, source)
    assert "a leaf of the source goes nowhere in your model:\n  extra  float32[3]" in str(error)
    _, report = graft(target, source, unused="ok")
    assert [(row.path, row.shape, row.did) for row in report.unused] == [("extra", (3,), "no such leaf in your model")]


def test_missing():
    target, source = {"w": a(2), "v": a(3)}, {"w": a(2)}
    error = refused(graft, target, source, missing="error")
    assert "a leaf of your model has nothing in the source:\n  v  float32[3]" in str(error)
    assert len(graft(target, source)[1].fresh) == 1


def test_dtype():
    target = {"w": np.zeros(4, "float16")}
    source = {"w": np.array([1e6, 1e-9, np.inf, 1.5], "float32")}
    tree, report = graft(target, source)
    assert tree["w"].dtype == "float16"
    row = report.copied[0]
    assert (row.did, row.overflowed, row.lost) == ("copied, cast from float32", 1, 1)
    assert "1 overflow; 1 lost" in str(report)
    tree, report = graft(target, source, dtype="source")
    assert tree["w"].dtype == "float32"
    assert report.copied[0].did == "copied, now float32"
    assert "a dtype differs" in str(error := refused(graft, target, source, dtype="error"))
    assert error.hint == "pm.graft(target, source)  # copies 1 leaf"
    tree, _ = graft({"w": jnp.zeros((2, 2), "bfloat16")}, {"w": a(1, 3)}, mismatch="overlap", dtype="source")
    assert tree["w"].dtype == "float32"


@pytest.mark.parametrize("kind", ["numpy", "jax", "torch"])
@pytest.mark.parametrize("given", ["numpy", "jax", "torch"])
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("int32", "float32")])
def test_values_cross_libraries_and_dtypes(kind, given, dtypes):
    def make(library, dtype, value):
        if library == "torch":
            return torch.full((2, 3), value, dtype=getattr(torch, dtype))
        return (jnp.full if library == "jax" else np.full)((2, 3), value, dtype=jnp.dtype(dtype))

    target, source = {"w": make(kind, dtypes[0], 0)}, {"w": make(given, dtypes[1], 3)}
    if given == "torch" and dtypes[1] != "int32":
        source["w"] = torch.nn.Parameter(source["w"])
    for mismatch in ("error", "overlap"):
        tree, _ = graft(target, source, mismatch=mismatch)
        assert type(tree["w"]) is type(target["w"])
        assert tree["w"].dtype == target["w"].dtype
        assert float(tree["w"].sum()) == 18


def test_only():
    target = {"enc": {"w": a(2, value=0)}, "dec": {"w": a(2, value=0)}}
    source = {"enc": {"w": a(2)}, "dec": {"w": a(2), "x": a(1)}}
    tree, report = graft(target, source, only="enc/**")
    assert tree["dec"] is target["dec"] or tree["dec"]["w"] is target["dec"]["w"]
    assert [(row.path, row.did) for row in report.fresh] == [("dec/w", "outside `only`")]
    assert {(row.path, row.did) for row in report.unused} == {("dec/w", "outside `only`"), ("dec/x", "outside `only`")}
    # a leaf that `only` would select, had your model a place for it, is still missed
    error = refused(graft, target, {**source, "enc": {"w": a(2), "x": a(1)}}, only="enc/**")
    assert "goes nowhere in your model:\n  enc/x" in str(error)
    tree, _ = graft(target, source, only=~pm.sel("dec/**"))
    assert tree["enc"]["w"].sum() == 2
    assert "`only` selects nothing" in str(refused(graft, target, source, only="encoder/**"))


def test_bad_options():
    with pytest.raises(BadArgument, match="mismatch='overlop' is not one of 'error', 'keep', 'overlap'") as caught:
        graft({"w": a(1)}, {"w": a(1)}, mismatch="overlop")
    assert caught.value.hint == 'mismatch="overlap"'
    with pytest.raises(SelectorError):
        graft({"w": a(1)}, {"w": a(1)}, rename={"w[": "w"})
    with pytest.raises(BadArgument, match="the source holds no arrays"):
        graft({"w": a(1)}, {})
    with pytest.raises(BadArgument, match="whole leaves"):
        graft({"w": a(1)}, {"w": a(1)}, only=pm.sel("w")[0])


# ---- refusing --------------------------------------------------------------------------------------------------


def test_all_cases_at_once():
    target = {"a": a(2), "b": a(3), "c": a(1)}
    source = {"a": a(4), "x": a(1), "y": a(1), "z": a(1), "b": a(3)}
    error = refused(graft, target, source, rename={"x": "c", "y": "c", "nope/**": "**", "*": "*"}, missing="error")
    text = str(error)
    assert (
        text.index("does nothing") < text.index("several sources") < text.index("a shape differs") < text.index("z  f")
    )
    assert "hint" in text
    assert {row.path for row in error.report.mismatched} == {"a"}
    assert error.report.refused
    assert error.report.headline().startswith("graft refused, nothing was changed")


def test_depth_either_way_is_never_silent():
    deep, shallow = init(16), init(12)
    assert graft(deep, shallow)[1].totals["fresh"]["leaves"] == 8
    error = refused(graft, shallow, deep)
    assert "8 leaves of the source go nowhere" in str(error)
    assert "params/Dense_{12..15}/kernel  4 × float32[4,4]" in str(error)
    (_, report), *_ = run_hint(error, shallow, deep)
    assert len(report.unused) == 8


def test_nothing_copied_is_refused_whatever_the_options():
    error = refused(graft, {"a": a(2)}, {"b": a(3)}, unused="ok")
    assert "no leaf of your model would take anything" in str(error)
    assert "\n  a  float32[2]" in str(error)


RENAMES = [
    ({"params": {"d": {"w": a(2)}, "e": {"w": a(3)}}}, {"d": {"w": a(2)}, "e": {"w": a(3)}}, {"**": "params/**"}),
    ({"d": {"w": a(2)}, "e": {"w": a(3)}}, {"params": {"d": {"w": a(2)}, "e": {"w": a(3)}}}, {"params/**": "**"}),
    ({"d": a(2)}, {"model": {"model": {"d": a(2)}}}, {"model/model/**": "**"}),
    (
        {"layers": [{"kernel": a(2, 2), "bias": a(2)} for _ in range(3)], "out": {"kernel": a(2, 5)}},
        {"h": [{"kernel": a(2, 2), "bias": a(2)} for _ in range(3)], "out": {"kernel": a(2, 5)}},
        {"h/**": "layers/**"},
    ),
    (
        {"emb": {"weight": a(9, 2)}, "layers": [{"kernel": a(2, 3), "bias": a(2)} for _ in range(3)]},
        {"emb": {"weight": a(9, 2)}, "layers": [{"weight": a(2, 3), "bias": a(2)} for _ in range(3)]},
        {"layers/<n>/weight": "layers/<n>/kernel"},
    ),
    (
        {f"Dense_{i}": {"kernel": a(i + 1, i + 2)} for i in range(3)},
        {f"fc{i + 1}": {"kernel": a(i + 1, i + 2)} for i in range(3)},
        {"fc<n>/**": "Dense_<n-1>/**"},
    ),
    (
        {"Dense_0": {"w": a(3, 4)}, "Dense_1": {"w": a(4, 2)}},
        {"inp": {"w": a(3, 4)}, "out": {"w": a(4, 2)}},
        {"inp/**": "Dense_0/**", "out/**": "Dense_1/**"},
    ),
]


@pytest.mark.parametrize(("target", "source", "rename"), RENAMES)
def test_proposed_rename_works(target, source, rename):
    error = refused(graft, target, source)
    first = error.hint.splitlines()[0]
    assert json.dumps(rename) in first
    (_, report), *_ = run_hint(error, target, source)
    assert report.fresh == report.unused == []


def test_proposals_for_torch_prefixes_and_partial_models():
    model = torch_net(4, 4, 4, 2)
    source = {f"module.{name}": value for name, value in torch_net(4, 4, 4, 2, seed=1).state_dict().items()}
    error = refused(graft_, model, source)
    assert 'pm.graft_(module, source, rename={"module.**": "**"})' in error.hint
    (report,) = run_hint(error, model, source)
    assert len(report.copied) == 6
    # 5 layers under another name into 3: the rename, and the option for what is left
    target = {"layers": [{"w": a(2, 2)} for _ in range(3)]}
    source = {"h": [{"w": a(2, 2)} for _ in range(5)]}
    error = refused(graft, target, source)
    assert error.hint == 'pm.graft(target, source, rename={"h/**": "layers/**"}, unused="ok")  # copies 3 leaves'


def test_proposal_keeps_the_rules_given():
    target = {"layers": [a(2), a(2)], "head": {"w": a(3)}}
    source = {"model": {"h": [a(2), a(2)]}, "lm_head": {"w": a(3)}}
    error = refused(graft, target, source, rename={"lm_head/**": "head/**"})
    (_, report), *_ = run_hint(error, target, source)
    assert len(report.copied) == 3


def test_no_far_fetched_proposal():
    assert list(propose({("a",): (2,)}, {("b",): (3,)})) == []
    assert "rename" not in refused(graft, {"a": a(2), "b": a(3)}, {"a": a(2), "c": a(4)}).hint


def test_torch_module_is_untouched_after_a_late_mismatch():
    model = torch_net(4, 4, 4, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    source = torch_net(4, 4, 4, 3, seed=1)
    error = refused(graft_, model, source)
    assert "2.weight  your model float32[2,4], the source float32[3,4]" in str(error)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    run_hint(error, model, source)


def test_an_assignment_that_fails_half_way_is_taken_back():
    with torch.inference_mode():
        fixed = torch.zeros(2)
    weights = {"a": torch.zeros(2), "b": fixed}
    with pytest.raises(RuntimeError, match="inference tensor"):
        graft_(weights, {"a": torch.ones(2), "b": torch.ones(2)})
    assert weights["a"].tolist() == [0, 0]


def test_in_place_of_what_never_changes():
    error = refused(graft_, {"w": jnp.zeros(2)}, {"w": a(2)})
    assert "cannot change in place" in str(error)
    assert "pm.graft(target, source)" in error.hint
    error = refused(graft_, {"w": torch.zeros(2)}, {"w": torch.zeros(2, dtype=torch.float64)}, dtype="source")
    assert "cannot become float64 in place" in str(error)


def test_meta_device():
    with torch.device("meta"):
        hollow = torch.nn.Linear(2, 2)
    full = torch.nn.Linear(2, 2)
    assert "in the source it is on the meta device" in str(refused(graft_, full, hollow))
    assert "it has no values to change in place" in str(refused(graft_, hollow, full))


# ---- the report ------------------------------------------------------------------------------------------------


def test_report_is_json_and_folds():
    _, report = graft(init(12), init(10, seed=1))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["totals"]["fresh"]["leaves"] == len(data["fresh"]) == 4
    assert data["copied"][0] | {"shape": [4, 4]} == data["copied"][0]
    text = str(report)
    assert "params/Dense_{0..9}/kernel  10 × float32[4,4]  copied" in text
    assert text.startswith("graft: 20 of 24 leaves copied")
    assert repr(report).startswith("<GraftReport: graft: 20 of 24")


def test_fold():
    def folded(*paths, **kwargs):
        return [
            line.paths
            for line in fold([Line(path if isinstance(path, tuple) else (path,)) for path in paths], **kwargs)
        ]

    grid = [f"l/{i}/e/{j}/w" for i in range(3) for j in range(2)]
    assert folded(*grid) == [("l/{0..2}/e/{0,1}/w",)]
    assert folded(*grid[:-1]) == [("l/0/e/{0,1}/w",), ("l/1/e/{0,1}/w",), ("l/2/e/0/w",)]
    assert folded("l/0", "l/2", "l/9") == [("l/{0,2,9}",)]
    # sources are folded only where they follow the path
    assert folded(("a/0", "b/1"), ("a/1", "b/2")) == [("a/{0,1}", "b/{1,2}")]
    assert folded(("a/0", "b/1"), ("a/1", "b/0")) == [("a/0", "b/1"), ("a/1", "b/0")]
    layers = [f"m/{part}/{name}" for part in ("x", "y") for name in "abc"]
    assert folded(*layers, limit=2) == [("m/x/**",), ("m/y/**",)]
    assert folded(*layers, limit=1) == [("m/**",)]
    assert folded(*layers, limit=1, elsewhere=["m/y/d"]) == [("m/x/**",), ("m/y/a",), ("m/y/b",), ("m/y/c",)]
    assert table([]) == ""


def test_damage():
    assert damage(np.array([70000.0, 1.0]), "float16") == (1, 0)
    assert damage(np.array([1e300, 1e-300, np.nan]), "float32") == (1, 1)
    assert damage(np.array([1.0, 2.0], "float32"), "bfloat16") == (0, 0)
    assert damage(np.array([-1, 255, 256]), "uint8") == (2, 0)
    assert damage(np.array([0.5, 1.0, 0.0]), "bool") == (0, 1)
    assert damage(np.array([70000, 3]), "float16") == (1, 0)


# ---- properties ------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "h_0", "h_1", "h_2", "w"])
LEAVES = st.sampled_from([(1,), (2,), (2, 2), (3, 1)]).map(
    lambda shape: np.arange(np.prod(shape), dtype="f4").reshape(shape)
)
SHARED = [np.ones(2, "f4"), np.full(2, 9, "f4")]
TREES = st.recursive(
    LEAVES | st.sampled_from(SHARED),
    lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=4),
    max_leaves=8,
).filter(lambda tree: isinstance(tree, dict))
RULES = st.dictionaries(
    st.sampled_from(["a/**", "h_<n>/**", "**/w", "b", "h_[-1]/**"]),
    st.sampled_from(["**", None, "h_<n>/**", "b/**", "a"]),
    max_size=2,
)


@settings(max_examples=100, deadline=None)
@given(
    TREES,
    TREES,
    RULES,
    st.sampled_from(["**", "a/**", "**/w", "h_*/**"]),
    st.sampled_from(["error", "keep", "overlap"]),
    st.sampled_from(["error", "ok"]),
)
def test_the_four_parts_divide_both_trees(target, source, rename, only, mismatch, unused):
    before = copy.deepcopy((target, source))
    try:
        tree, report = graft(target, source, rename=rename, only=only, mismatch=mismatch, unused=unused)
    except GraftRefused as error:
        tree, report = None, error.report
    except (BadArgument, SelectorError):  # wildcards of a rule that do not agree
        return
    ours = [{row.path for row in rows} for rows in (report.copied, report.fresh, report.mismatched)]
    every = pm.at(target, "**").paths
    assert sorted(path for paths in ours for path in paths) == sorted(every)
    used = {row.source for row in (*report.copied, *report.mismatched)}
    left = {row.path for row in report.unused}
    assert not used & left
    assert used | left == set(paths_and_values(source)[0])
    assert jax.tree.all(jax.tree.map(np.array_equal, (target, source), before))
    if tree is not None:
        for row in report.copied:
            assert np.array_equal(pm.at(tree, row.path).one(), leaf_at(source, row.source))
        for row in report.fresh:
            assert pm.at(tree, row.path).one() is leaf_at(target, row.path)


def leaf_at(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return tree


def paths_and_values(tree):
    found = [(("/".join(key.key for key in path)), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    return [path for path, _ in found], [leaf for _, leaf in found]


def test_a_checkpoint_as_the_source(tmp_path):
    small = {"Dense_0": {"kernel": np.ones((2, 2), np.float32)}, "Dense_1": {"kernel": np.full((2, 1), 5, np.float32)}}
    big = {f"Dense_{i}": {"kernel": jnp.zeros((2, 1 if i == 2 else 2))} for i in range(3)}
    pm.save(small, tmp_path / "small.safetensors")
    rename = {"Dense_[-1]/**": "Dense_[-1]/**"}
    with pm.open(tmp_path / "small.safetensors") as source:
        tree, report = pm.graft(big, source, rename=rename)
        assert tree["Dense_2"]["kernel"].ravel().tolist() == [5.0, 5.0]
        assert isinstance(tree["Dense_0"]["kernel"], jax.Array)
        assert report.to_dict() == pm.graft(big, small, rename=rename)[1].to_dict()
        with pytest.raises(GraftRefused):
            pm.graft({"Dense_0": {"kernel": jnp.zeros((3, 3))}}, source)
