"""`at` on torch modules, tensors and state dicts: identity, ties, memory format, autograd, optimizers."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import paramend as pm
from paramend.errors import SpecMismatch, Unsupported


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False))
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)))


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Tied()


VERBS = {
    "zero": lambda s, end: getattr(s, "zero" + end)(),
    "fill": lambda s, end: getattr(s, "fill" + end)(0.5),
    "set": lambda s, end: getattr(s, "set" + end)(np.full((3, 3), 2, np.float32)),
    "add": lambda s, end: getattr(s, "add" + end)(1.0),
    "multiply": lambda s, end: getattr(s, "multiply" + end)(0.5),
    "clip": lambda s, end: getattr(s, "clip" + end)(-0.01, 0.01),
    "apply": lambda s, end: getattr(s, "apply" + end)(torch.tanh),
    "noise": lambda s, end: getattr(s, "noise" + end)(0.1, seed=2),
    "reinit": lambda s, end: getattr(s, "reinit" + end)("xavier_uniform", seed=2),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_gives_a_new_module_and_its_twin_changes_this_one(module, verb):
    before = {name: (p, p.detach().clone()) for name, p in module.state_dict(keep_vars=True).items()}
    edited = VERBS[verb](pm.at(module, "body.2.weight"), "")
    assert type(edited) is Tied
    assert edited is not module
    for name, (parameter, value) in before.items():
        assert torch.equal(parameter, value)
        other = edited.state_dict(keep_vars=True)[name]
        if name == "body.2.weight":
            assert type(other) is nn.Parameter
            assert other.requires_grad
            assert other.is_leaf
            assert not torch.equal(other, value)
        else:
            assert other is parameter
    assert edited.head.weight is edited.embed.weight
    assert VERBS[verb](pm.at(module, "body.2.weight"), "_") is None
    for name, (parameter, value) in before.items():
        now = module.state_dict(keep_vars=True)[name]
        assert now is parameter
        assert torch.equal(now, edited.state_dict()[name])
        assert torch.equal(now, value) == (name != "body.2.weight")


def test_tied_weights_are_one_leaf_and_stay_tied(module):
    selection = pm.at(module, "{embed,head}.weight")
    assert selection.paths == ["embed.weight"]
    edited = selection.multiply(2.0)
    assert edited.head.weight is edited.embed.weight
    assert torch.equal(edited.head.weight, 2 * module.embed.weight)
    state = pm.at(module.state_dict(), "head.weight").zero()
    assert state["head.weight"] is state["embed.weight"]
    assert not state["embed.weight"].any()
    assert pm.param_count(module, "**.weight") == sum(
        p.numel() for name, p in module.named_parameters() if name.endswith("weight")
    )


def test_an_optimizer_goes_on_working(module):
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        module(torch.arange(5)).square().sum().backward()
        optimizer.step()

    step()
    pm.at(module, "body.0.weight").zero_()
    assert any(p is module.body[0].weight for group in optimizer.param_groups for p in group["params"])
    step()
    assert module.body[0].weight.any()


def test_attributes_flags_and_memory_format_are_kept():
    weight = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), requires_grad=False)
    weight.tag = "mine"
    for edited in (pm.at({"w": weight}, "w").zero()["w"], pm.at({"w": weight}, "w").multiply(2.0)["w"]):
        assert edited.is_contiguous(memory_format=torch.channels_last)
        assert not edited.requires_grad
        assert edited.tag == "mine"
    filled = pm.at({"w": weight}, "w").set(np.zeros((2, 3, 4, 4), np.float32))["w"]
    assert filled.is_contiguous(memory_format=torch.channels_last)
    pointer = weight.data_ptr()
    pm.at({"w": weight}, "w").fill_(3.0)
    assert weight.data_ptr() == pointer
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_tensor_inside_a_graph_stays_inside():
    weight = torch.ones(2, requires_grad=True)
    doubled = weight * 2
    pm.at({"w": doubled}, "w").multiply(3.0)["w"].sum().backward()
    assert weight.grad.tolist() == [6.0, 6.0]


def test_functional_call_with_edited_parameters(module):
    state = dict(module.state_dict(keep_vars=True))
    out = torch.func.functional_call(module, pm.at(state, "body.2.weight").zero(), (torch.arange(5),))
    assert not out.any()


DTYPES = [
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int8",
    "int64",
    "uint8",
    "complex64",
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype):
    leaf = (
        torch.tensor([-1.0, 2.0, 0.0]).to(getattr(torch, dtype))
        if dtype != "uint8"
        else torch.tensor([1, 2, 0], dtype=torch.uint8)
    )
    tree = {"w": leaf}
    zero = pm.at(tree, "w").zero()["w"]
    assert zero.dtype == leaf.dtype
    assert not zero.view(torch.uint8).any()
    double = pm.at(tree, "w").multiply(2)["w"]
    assert double.dtype == leaf.dtype
    assert torch.equal(double.to(torch.complex64), leaf.to(torch.complex64) * 2) or dtype == "uint8"
    assert pm.at(tree, "w").set(pm.at(tree, "w").get())["w"].dtype == leaf.dtype
    sliced = pm.at(tree, "w")[1:].fill(1)["w"]
    assert sliced.to(torch.complex64).tolist()[1:] == [1, 1]


# XLA cannot compile float16, and float8 that goes through it, for a processor that does not convert float16.
@pytest.mark.parametrize(
    "dtype",
    ["float16", "float8_e4m3fn", *(pytest.param(name, marks=pytest.mark.numeric) for name in ("float32", "bfloat16"))],
)
def test_the_same_numbers_in_every_library(dtype):
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    host = np.asarray(jnp.asarray(rng.normal(size=(40, 30)), dtype))
    trees = {
        "numpy": {"fc": {"weight": host}},
        "jax": {"fc": {"weight": jnp.asarray(host)}},
        "torch": {"fc": {"weight": pm.at({"w": torch.zeros(40, 30, dtype=getattr(torch, dtype))}, "w").set(host)["w"]}},
    }
    edits = {
        "multiply": lambda s: s.multiply(0.3),
        "add": lambda s: s.add(0.3),
        "clip": lambda s: s.clip(-0.3, 0.7),
        "noise": lambda s: s.noise(0.3, seed=5),
        "slice": lambda s: s[3:7].multiply(1.7),
        "fill": lambda s: s.fill(0.3),
    }
    for name, edit in edits.items():
        results = {}
        for library, tree in trees.items():
            out = edit(pm.at(tree, "**"))
            results[library] = pm.at({"w": host}, "w").set(out["fc"]["weight"])["w"].tobytes()
        assert results["numpy"] == results["jax"] == results["torch"], (dtype, name)


def test_reinit_reads_fans_as_torch_lays_kernels_out():
    module = nn.Conv2d(50, 40, 3)
    drawn = pm.at(module, "weight").reinit("kaiming_normal", seed=1).weight
    assert float(drawn.detach().std()) == pytest.approx((2 / (50 * 9)) ** 0.5, rel=0.02)


def test_what_cannot_change_in_place_is_refused_before_anything_changes():
    import jax.numpy as jnp

    tree = {"a": torch.ones(2), "b": jnp.ones(2)}
    with pytest.raises(Unsupported, match="b cannot change in place"):
        pm.at(tree, "*").zero_()
    assert tree["a"].tolist() == [1.0, 1.0]
    frozen = np.ones(2)
    frozen.flags.writeable = False
    with pytest.raises(Unsupported, match="this array is read-only"):
        pm.at({"w": frozen}, "w").zero_()


def test_a_failing_function_changes_nothing(module):
    before = copy.deepcopy(module.state_dict())
    seen = []

    def fails_later(tensor):
        seen.append(tensor)
        if len(seen) > 2:
            raise RuntimeError("late")
        return tensor * 2

    with pytest.raises(RuntimeError, match="late"):
        pm.at(module, "**.{weight,bias}").apply_(fails_later)
    with pytest.raises(SpecMismatch):
        pm.at(module, "**.weight").set_(torch.ones(3, 3))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_meta_tensors_are_described_but_not_edited():
    with torch.device("meta"):
        module = nn.Linear(3, 4)
    assert pm.param_count(module) == 16
    with pytest.raises(Unsupported, match="meta device"):
        pm.at(module, "weight").zero()


def test_hooks_and_modes_survive_the_copy(module):
    module.eval()
    module.body[0].register_forward_hook(lambda m, i, o: o * 0)
    edited = pm.at(module, "head.weight").multiply(1.0)
    assert not edited.training
    assert torch.equal(edited(torch.arange(5)), module(torch.arange(5)))
