"""`widen` on models of transformers: each method is exact in float64, and what it makes is alive."""

import pytest
import torch

import paramend as pm
from paramend.porting.float64_torch import float64
from support.slow import slow_except
from support.tiny_models import BASE, EXPERTS, MODELS, kind, logits, make

WIDE = {
    "tile": {"hidden": 64, "heads": 8, "kv_heads": 4, "mlp": 96},
    "split": {"hidden": 96, "heads": 12, "mlp": 192, "method": "split"},
    "zero": {"hidden": 40, "heads": 5, "kv_heads": 5, "mlp": 70, "method": "zero"},
}
# Heads that are counted by the residual width alone, without groups.
BY_WIDTH = {"gpt2": 128, "gpt_neox": 64, "bert": 64}
FAMILIES = slow_except({"llama", "gpt2"}, MODELS)
# Families with the names of others, each with something of its own.
MORE = {
    "granite": {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 3.0},
    "starcoder2": {},
    "cohere": {"use_qk_norm": True},
    "nemotron": {"head_dim": 8},
    "exaone4": {"sliding_window": 4, "sliding_window_pattern": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 24},
}
CLASSES = {"starcoder2": "Starcoder2", "qwen2_moe": "Qwen2Moe", "olmoe": "Olmoe", "exaone4": "Exaone4"}


def lengths(family, method):
    """What to ask for: families without groups have no heads of keys, and their heads follow from the width."""
    said = dict(WIDE[method])
    groups = family not in BY_WIDTH and family not in ("phi", "vit")
    if not groups:
        said.pop("kv_heads", None)
        said["mlp"] = {"gpt2": 192}.get(family, said["mlp"])
    if family == "phi":
        said |= {"heads": 8, "kv_heads": 4 if method == "tile" else 8}
    if groups and method == "zero":
        said |= {"heads": 8, "kv_heads": 4}
    if family == "olmo2" and method != "tile":
        said = {"hidden": said["hidden"], "mlp": said["mlp"], "method": method}
    if family == "qwen3_moe":
        said["mlp"] = 96 if method == "tile" else 80
    return said


def exact(family):
    """A model in float64, and what it computes there."""
    model = eager(make(family, torch.float64))
    with torch.no_grad(), float64():
        return model, logits(model, family)


def eager(model):
    """The model as torch computes it in float64 too: not all kernels for experts and attention do."""
    model.config._attn_implementation = "eager"
    model.config._experts_implementation = "eager"
    return model


@pytest.mark.numeric
@pytest.mark.parametrize("method", WIDE)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_wider_model_computes_what_it_did(family, method, tmp_path):
    model, before = exact(family)
    asked = lengths(family, method)
    wide, report = pm.widen(model, **asked)
    with float64():
        assert (logits(wide, family) - before).abs().max() <= 1e-11 * max(1, before.abs().max())
        assert torch.equal(logits(model, family), before)
    sizes = {axis: both[1] for axis, both in report.sizes.items()}
    assert sizes == {axis: size for axis, size in asked.items() if axis in sizes}
    models = []
    for name, one in (
        ("old", model),
        ("new", wide),
    ):  # embeddings may be scaled by a root, which in a file is not rounded
        one.save_pretrained(tmp_path / name)
        models.append(eager(kind(family).from_pretrained(tmp_path / name)).eval())
    with float64():
        before, after = (logits(one, family) for one in models)
    assert (after - before).abs().max() <= 1e-11 * max(1, before.abs().max())


@pytest.mark.numeric
@pytest.mark.parametrize("family", slow_except({"llama"}, ["llama", "gpt2", "gemma2", "olmo2"]))
def test_new_places_get_gradients_and_copies_that_are_split_part(family):
    model = make(family, attn_implementation="eager")
    wide, report = pm.widen(model, hidden=40, method="zero", **({"heads": 5} if family == "gpt2" else {}))
    optimizer = torch.optim.SGD(wide.parameters(), 1e-2)
    dead = {row.path: torch.ones(row.after.shape, dtype=bool) for row in report.rows}
    for _ in range(3):  # where the head is tied, its new columns are zero in the first step
        optimizer.zero_grad()
        out = logits(wide, family).flatten(0, -2)
        torch.nn.functional.cross_entropy(out, torch.arange(len(out)) % 64).backward()
        optimizer.step()
        for name, p in wide.named_parameters():
            if name in dead:
                dead[name] &= p.grad == 0
    for name, p in model.named_parameters():
        if name in dead and "embed" not in name and "wte" not in name and "wpe" not in name:
            corner = tuple(map(slice, p.shape))
            still = dead[name].clone()
            still[corner] = False
            assert not still.any(), name
    split, _ = pm.widen(make("llama"), mlp=128, method="split")
    optimizer = torch.optim.Adam(split.parameters(), 1e-2)
    out = logits(split, "llama").flatten(0, -2)
    torch.nn.functional.cross_entropy(out, torch.arange(len(out)) % 64).backward()
    optimizer.step()
    up = split.model.layers[0].mlp.up_proj.weight
    assert (up[:64] - up[64:]).abs().mean() > 1e-3


@pytest.mark.slow
@pytest.mark.numeric
@pytest.mark.parametrize("method", ["tile", "zero"])
@pytest.mark.parametrize("family", MORE)
@torch.no_grad()
def test_families_with_multipliers_norms_and_experts_of_their_own_are_exact(family, method, monkeypatch):
    name = CLASSES.get(family, family.capitalize())
    monkeypatch.setitem(MODELS, family, (f"{name}Config", f"{name}ForCausalLM", BASE | MORE[family]))
    model, before = exact(family)
    wide, _ = pm.widen(model, hidden=64 if method == "tile" else 40, method=method)
    with float64():
        assert (logits(wide, family) - before).abs().max() <= 1e-11 * max(1, before.abs().max())
