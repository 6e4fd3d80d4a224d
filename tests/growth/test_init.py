"""Initial values that contribute nothing at first: exact, and alive."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import paramend as pm
from paramend.errors import BadArgument, NoMatch, Unsupported
from support.numerics import assert_close
from support.tiny_models import logits, make


def apply_(model, change):
    model.load_state_dict(change(model.state_dict()))
    return model


class Bottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        for i in (1, 2, 3):
            setattr(self, f"conv{i}", nn.Conv2d(4, 4, 3, padding=1, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(4))
            nn.init.normal_(getattr(self, f"bn{i}").bias)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return x + self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(y)))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Bottleneck(), Bottleneck())

    def forward(self, x):
        return self.layer1(self.bn1(self.conv1(x)))


@pytest.mark.numeric
def test_zero_gamma():
    x = torch.randn(2, 1, 6, 6)
    model = Net()
    stem = model.bn1(model.conv1(x))
    apply_(model, lambda state: pm.init.zero(state, "gamma"))
    assert torch.equal(model(x), stem)
    assert model.bn1.weight.all()
    report = pm.check_live(model, lambda model: (model(x) ** 2).mean(), "layer1[0]/**")
    assert {path.split(".")[2] for path in report.at(1)} == {"bn3"}
    # bn3 takes the mean out of what conv3 gives, so what comes before lives on through its gain.
    assert not report.dead


class LoRA(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 4)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 4, bias=False)})

    def forward(self, x):
        return self.base(x) + self.lora_B["default"](self.lora_A["default"](x))


@pytest.mark.numeric
def test_lora():
    x, model = torch.randn(3, 4), LoRA()
    apply_(model, lambda state: pm.init.zero(state, "lora"))
    assert torch.equal(model(x), model.base(x))
    loss = lambda model: (model(x) ** 2).mean()
    live = pm.check_live(model, loss, "lora_*/**")
    assert (live.at(1), live.at(2)) == (["lora_B.default.weight"], ["lora_A.default.weight"])
    pm.at(model, "lora_A/**").zero_()
    assert len(pm.check_live(model, loss, "lora_*/**", steps=4).dead) == 2


def test_gates_are_scalars():
    tree = {"block": {"resweight": jnp.ones(()), "alpha": jnp.ones(3), "w": jnp.ones(2)}}
    new = pm.init.zero(tree, "gates")
    assert new["block"]["resweight"] == 0
    assert new["block"]["alpha"].all()
    live = pm.check_live(new["block"], lambda p: ((1 + p["resweight"] * p["w"]) ** 2).sum(), "{resweight,w}")
    assert (live.at(1), live.at(2)) == (["resweight"], ["w"])


class DiT(nn.Module):
    """A block of DiT: shift, scale and gate are made of the condition."""

    def __init__(self):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(4, 12))
        self.mlp, self.norm = nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False)

    def forward(self, x, condition):
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


@pytest.mark.numeric
def test_adaln_zero():
    x, condition, model = torch.randn(5, 4), torch.randn(5, 4), DiT()
    apply_(model, lambda state: pm.init.zero(state, "adaln"))
    assert torch.equal(model(x, condition), x)
    live = pm.check_live(model, lambda model: (model(x, condition) ** 2).mean())
    assert live.at(1) == ["adaLN_modulation.1.weight", "adaLN_modulation.1.bias"]
    assert live.at(2) == ["mlp.weight", "mlp.bias"]


def test_zero_convolutions():
    tree = {f"controlnet_down_blocks.{i}.{n}": np.ones(2) for i in range(2) for n in ("weight", "bias")}
    new = pm.init.zero(tree | {"down_blocks.0.weight": np.ones(2)}, "convs")
    assert [name for name, x in new.items() if x.any()] == ["down_blocks.0.weight"]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_zero_residual(family):
    model = pm.init.zero_residual(make(family))
    shallow = pm.deepen(make(family), order=[0])[0]
    shallow = pm.init.zero_residual(shallow)
    assert torch.equal(logits(model, family), logits(shallow, family))


@pytest.mark.numeric
def test_fixup_keeps_the_variance():
    rng = np.random.default_rng(0)
    width, depth = 64, 16

    def he():
        return rng.normal(size=(width, width)) * np.sqrt(2 / width)

    tree = {"blocks": [{"w1": he(), "b": np.ones(width), "w2": he(), "s": np.ones(1)} for _ in range(depth)]}

    def growth(tree):
        x = y = rng.normal(size=(256, width))
        for block in tree["blocks"]:
            y = y + np.maximum(y @ block["w1"] + block["b"], 0) @ block["w2"] * block["s"]
        return y.var() / x.var()

    fixed = pm.init.fixup(tree | {"fc": {"w": np.ones(2)}}, layers="blocks[*]", head="fc/*")
    assert growth(tree) > 1e4
    assert growth(fixed) == 1
    assert_close(fixed["blocks"][3]["w1"], tree["blocks"][3]["w1"] * depth**-0.5, terms=2)
    assert not fixed["blocks"][3]["b"].any()
    assert fixed["blocks"][3]["s"].all()
    assert not fixed["fc"]["w"].any()


def test_refusals():
    tree = {"blocks": [{"w": np.ones((2, 2))}]}
    with pytest.raises(BadArgument, match="not a scheme"):
        pm.init.zero(tree, "lorra")
    for scheme in pm.init.SCHEMES:
        with pytest.raises(NoMatch, match=scheme):
            pm.init.zero(tree, scheme)
    with pytest.raises(Unsupported, match="1 weight"):
        pm.init.fixup(tree, layers="blocks[*]")
    with pytest.raises(NoMatch, match="head"):
        pm.init.fixup({"b": [{"v": np.ones((2, 2)), "w": np.ones((2, 2))}]}, layers="b[*]", head="x")
    with pytest.raises(BadArgument, match="not known"):
        pm.init.zero_residual(tree)
