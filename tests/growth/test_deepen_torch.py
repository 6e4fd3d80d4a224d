"""`deepen` on torch modules: every family stays what it computes, bit for bit, and trains from the right place."""

import copy

import pytest
import torch
from torch import nn

import paramend as pm
from paramend.errors import BadArgument, Unsupported
from support.tiny_models import FAMILIES, generated, kind, loaded, logits, make

ORDER = pm.depth.blocks(3, count=2)


def loss_of(model, family):
    out = logits(model, family).flatten(0, -2)
    return nn.functional.cross_entropy(out, torch.arange(len(out)) % out.shape[-1])


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_identity_layers_change_nothing(family, dtype, tmp_path):
    model = make(family, dtype)
    before = logits(model, family)
    deeper, report = pm.deepen(model, order=ORDER)
    assert torch.equal(logits(deeper, family), before)
    assert torch.equal(logits(model, family), before)
    assert [row.did for row in report.layers] == ["kept", "kept", "identity", "kept", "identity"]
    assert report.config
    if family != "vit" and dtype == torch.float32:
        assert torch.equal(generated(deeper), generated(model))
    if dtype == torch.float32:  # rounding a model also rounds its rotary frequencies, and a file does not hold them
        deeper.save_pretrained(tmp_path)
        assert torch.equal(logits(loaded(family, tmp_path), family), before)


@pytest.mark.numeric
@pytest.mark.parametrize("family", FAMILIES)
def test_the_new_layers_train_from_the_first_step_and_do_not_jump(family):
    model = make(family)
    old = dict(model.named_parameters())
    report = pm.deepen_(model, order=pm.depth.blocks(3, count=1))
    assert {id(p) for p in old.values()} < {id(p) for p in model.parameters()}
    pm.freeze_(model, report.frozen)
    with torch.no_grad():
        before = logits(model, family)
    loss_of(model, family).backward()
    live = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert live == {f"{row.path}.{name}" for row in report.layers for name in row.set}
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4).step()
    with torch.no_grad():
        jump = (logits(model, family) - before).norm() / before.norm()
    assert 0 < jump <= 0.02


@pytest.mark.numeric
def test_the_wrong_place_for_a_zero_is_seen_by_that_step():
    model = make("olmo2")
    pm.deepen_(model, order=pm.depth.blocks(3, count=1), identity=["self_attn.o_proj.*", "mlp.down_proj.*"])
    with torch.no_grad():
        before = logits(model, "olmo2")
    loss_of(model, "olmo2").backward()
    torch.optim.AdamW(model.model.layers[3].parameters(), lr=1e-4).step()
    with torch.no_grad():
        assert (logits(model, "olmo2") - before).norm() / before.norm() > 0.1


@pytest.mark.parametrize("order", [[0, 1, 2, 0, 1, 2], [0, 0, 1, 1, 2, 2], [0, 1, 1, 2], [2, 0], [1]], ids=str)
def test_other_orders_are_what_loading_the_mapped_tensors_gives(order):
    model = make("qwen2")
    state = model.state_dict()
    deeper, _ = pm.deepen(model, order=order)
    expected = {name: value for name, value in state.items() if ".layers." not in name}
    for target, source in enumerate(order):
        above = f"model.layers.{source}."
        expected |= {f"model.layers.{target}.{n[len(above) :]}": v for n, v in state.items() if n.startswith(above)}
    assert deeper.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in deeper.state_dict().items())
    assert deeper.config.num_hidden_layers == len(order)
    assert deeper.config.layer_types == [model.config.layer_types[source] for source in order]
    fresh = kind("qwen2")(deeper.config)
    fresh.load_state_dict(expected)
    with torch.no_grad():
        assert torch.equal(logits(fresh.eval(), "qwen2"), logits(deeper, "qwen2"))
        assert torch.equal(generated(fresh), generated(deeper))
    state_dict, _ = pm.deepen(state, layers="model.layers[*]", order=order)
    assert all(torch.equal(state_dict[name], value) for name, value in expected.items())


def test_names_alone_tell_most_families():
    state = {
        f"transformer.h.{i}.{n}": torch.ones(1) for i in (0, 1) for n in make("gpt2").transformer.h[0].state_dict()
    }
    _, report = pm.deepen(state, order=pm.depth.blocks(2, count=1))
    assert report.family == "gpt2"
    gemma = make("gemma2").state_dict()
    with pytest.raises(BadArgument, match="is not known") as caught:
        pm.deepen(gemma, order=ORDER)
    assert "-1.0" in caught.value.hint
    new, report = pm.deepen(gemma, order=ORDER, identity="gemma2")
    assert (new["model.layers.2.post_attention_layernorm.weight"] == -1).all()


def test_layers_know_their_new_numbers_and_share_the_configuration():
    model = make("llama")
    pm.deepen_(model, order=[2, 0, 0, 1])
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)
    pointers = [p.data_ptr() for p in model.parameters()]
    assert len(set(pointers)) == len(pointers)


def test_tied_weights_stay_tied():
    model = make("gpt2")
    pm.deepen_(model, order=ORDER)
    assert model.lm_head.weight is model.transformer.wte.weight
    shared = nn.Linear(2, 2)
    blocks = nn.Sequential(nn.Sequential(nn.Linear(2, 2), shared), nn.Sequential(nn.Linear(2, 2), shared))
    pm.deepen_(blocks, layers="[*]", order=[0, 1, 1])
    assert blocks[2][1] is shared
    assert blocks[2][0] is not blocks[1][0]


def test_a_sequential_with_activations_between():
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    report = pm.deepen_(model, layers="[1:-1]", order=[0, 0])
    assert [type(layer).__name__ for layer in model] == ["Linear", "ReLU"] * 3 + ["Linear"]
    assert [row.path for row in report.layers] == ["2", "4"]
    assert model[3] is not model[5]
    assert model(torch.ones(1, 2)).shape == (1, 1)


class Basic(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(inner)))


@pytest.mark.numeric
@pytest.mark.parametrize("training", [False, True])
def test_a_residual_network(training):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(Basic(4), Basic(4))).train(training)
    x = torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(model)(x)
    report = pm.deepen_(model, layers="2[*]", order=pm.depth.blocks(2, every=1))
    assert report.family == "resnet"
    assert torch.equal(model(x), before)


# ---- refusals --------------------------------------------------------------------------------------------------


def test_post_norm_layers_are_refused():
    import transformers

    config = transformers.BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    model = transformers.BertModel(config)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Unsupported, match="post-LN"):
        pm.deepen_(model, order=pm.depth.blocks(2, count=1))
    with pytest.raises(Unsupported, match="post-LN"):
        pm.deepen(before, order=pm.depth.blocks(2, count=1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    pm.deepen_(model, order=[0, 1, 1])
    assert model.config.num_hidden_layers == 3


def test_scales_by_the_number_of_a_layer_are_refused():
    model = make("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(Unsupported, match="divided by i \\+ 1"):
        pm.deepen_(model, order=ORDER)
    assert len(model.transformer.h) == model.config.n_layer == 3


def test_more_in_a_layer_than_the_family_knows_is_refused():
    model = make("llama")
    for layer in model.model.layers:
        layer.adapter = nn.Linear(32, 32)
    with pytest.raises(BadArgument, match="adapter is not known"):
        pm.deepen_(model, order=ORDER)


def test_a_wrong_family():
    with pytest.raises(BadArgument, match="missing"):
        pm.deepen(make("gpt2").state_dict(), order=ORDER, identity="llama")
