"""Dense models as mixtures of experts, against what transformers computes."""

import json
import pickle

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner

import paramend as pm
from paramend.cli.main import cli
from support.doubles import double_throughout
from support.slow import slow_except
from support.tiny_experts import BASE, TOKENS, logits

DENSE = {
    "llama": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-4}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}
CASES = slow_except({"llama", "qwen2"}, DENSE)
BOUND = 1e-11


def dense(family, dtype=torch.float64, **changes):
    stem, says = DENSE[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{stem}Config")(**BASE | says | changes)
    made = getattr(transformers, f"{stem}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for name, value in made.named_parameters():
            value.add_(torch.randn(value.shape) * (0.1 if "norm" in name else 0.2))
    return made


def run(*args):
    return CliRunner().invoke(cli, list(map(str, args)))


@pytest.fixture
def saved(tmp_path):
    dense("llama", torch.float32).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.numeric
@pytest.mark.parametrize("family", CASES)
def test_a_mixture_of_copies_computes_what_the_dense_model_does(family, monkeypatch):
    double_throughout(monkeypatch)
    model = dense(family)
    wanted = logits(model)
    for top_k, router in ((1, "random"), (2, torch.randn(4, 16)), (4, np.zeros((4, 16)))):
        new, report = pm.upcycle(model, experts=4, top_k=top_k, router=router)
        assert float((logits(new) - wanted).abs().max()) <= BOUND * float(wanted.abs().max())
        assert pm.experts(new).mixture.top_k == top_k
    assert (
        type(new).__name__
        == {"llama": "Mixtral", "mistral": "Mixtral", "qwen2": "Qwen2Moe", "qwen3": "Qwen3Moe"}[family] + "ForCausalLM"
    )
    assert any("router gets no gradient" in said for said in report.said)


@pytest.mark.parametrize("family", CASES)
def test_a_checkpoint_becomes_one_that_transformers_loads(family, tmp_path):
    model = dense(family, torch.float32)
    model.save_pretrained(tmp_path / "old", max_shard_size="20KB")
    with pm.open(tmp_path / "old") as old:
        lazy, _ = pm.upcycle(old, experts=3, top_k=2, drop=0.5, seed=5)
        lazy.save(tmp_path / "new")
    wanted = pm.upcycle(model, experts=3, top_k=2, drop=0.5, seed=5)[0]
    loaded, info = type(wanted).from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(info.values())
    for name, value in wanted.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    for key in ("rms_norm_eps", "rope_parameters", "hidden_act", "sliding_window", "tie_word_embeddings", "head_dim"):
        assert getattr(loaded.config, key, None) == getattr(model.config, key, None), key
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["architectures"] == [type(wanted).__name__]
    assert config.get("norm_topk_prob", True) is True


def test_what_a_configuration_does_not_say_is_what_the_dense_family_means(saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    for key in ("rope_parameters", "rms_norm_eps", "num_key_value_heads", "max_position_embeddings"):
        config.pop(key, None)
    (saved / "config.json").write_text(json.dumps(config))
    with pm.open(saved) as old:
        found = pm.config(pm.upcycle(old, experts=2, top_k=1)[0])
        assert (found["rope_theta"], found["rms_norm_eps"], found["max_position_embeddings"]) == (1e4, 1e-6, 2048)
        assert found["num_key_value_heads"] == found["num_attention_heads"]
        assert (found["model_type"], found["num_local_experts"], found["num_experts_per_tok"]) == ("mixtral", 2, 1)


def test_units_are_drawn_anew(saved):
    with pm.open(saved) as old:
        new, report = pm.upcycle(old, experts=3, top_k=1, drop=0.5, seed=1)
        again, _ = pm.upcycle(old, experts=3, top_k=1, drop=0.5, seed=1)
        other, _ = pm.upcycle(old, experts=3, top_k=1, drop=0.5, seed=2)
        layer, path = "model.layers.1", "model.layers.1.block_sparse_moe.experts"
        sets = []
        for n in range(3):
            units = []
            for name, role, axis in (("w1", "gate_proj", 1), ("w3", "up_proj", 1), ("w2", "down_proj", 0)):
                value = new[f"{path}.{n}.{name}.weight"]
                units.append((value != old[f"{layer}.mlp.{role}.weight"]).any(axis))
                assert np.array_equal(value, again[f"{path}.{n}.{name}.weight"])
                assert not np.array_equal(value, other[f"{path}.{n}.{name}.weight"])
            assert np.array_equal(units[0], units[1]) and np.array_equal(units[0], units[2])
            assert units[0].sum() == report.redrawn == 12
            sets.append(tuple(units[0].tolist()))
        assert len(set(sets)) == 3
        assert not any("no gradient" in said for said in report.said)
        assert pm.upcycle(old, experts=2, top_k=1, drop=0.02)[1].redrawn == 0


@pytest.mark.numeric
def test_what_is_drawn_has_the_moments_of_what_it_replaces():
    from paramend.growth.upcycling import _redrawn
    from paramend.leaves.origins.stored import Held

    weight = (np.random.default_rng(0).standard_normal((400, 300)) * 0.3 + 0.05).astype("float32")
    units = np.arange(0, 400, 2)
    origin = _redrawn(Held(weight), units, 0, 0, ("a",))
    drawn = origin.read()[units]
    assert abs(drawn.mean() - weight[units].mean()) < 0.01 * 0.3
    assert abs(drawn.std() / weight[units].std() - 1) < 0.01
    parts = [origin.read_range(start, min(start + 7001, 120_000)) for start in range(0, 120_000, 7001)]
    assert np.array_equal(np.concatenate(parts).reshape(400, 300), origin.read())
    assert np.array_equal(pickle.loads(pickle.dumps(origin)).read(), origin.read())
    columns = _redrawn(Held(weight.T.copy()), units, 1, 0, ("a",)).read()
    assert np.array_equal(columns[:, 1::2], weight.T[:, 1::2])


def test_the_shared_expert_contributes_nothing_and_is_alive():
    model, _ = pm.upcycle(dense("qwen2", torch.float32), experts=2, top_k=1, drop=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2):
        model.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        shared = model.model.layers[0].mlp
        if not step:
            assert shared.shared_expert.down_proj.weight.grad.any()
        optimizer.step()
    assert shared.shared_expert_gate.weight.grad.any()
    assert shared.shared_expert.gate_proj.weight.grad.any()
    assert shared.gate.weight.grad.any()


def test_tied_heads_stay_tied():
    new, _ = pm.upcycle(dense("qwen3", torch.float32), experts=2, top_k=1)
    assert new.lm_head.weight is new.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"experts": 2, "top_k": 3}, "BadArgument", "top_k=3 of experts=2"),
        ({"experts": 0, "top_k": 0}, "BadArgument", "cannot be chosen"),
        ({"experts": 2, "top_k": 1, "drop": 1.5}, "BadArgument", "no share"),
        ({"experts": 2, "top_k": 1, "drop": "a"}, "BadArgument", "no share"),
        ({"experts": 2, "top_k": 1, "seed": -1}, "BadArgument", "negative"),
        ({"experts": 2, "top_k": 1, "seed": 1.5}, "BadArgument", "not a list of whole numbers"),
        ({"experts": 2, "top_k": 1, "router": "copy"}, "BadArgument", "neither 'random' nor an array"),
        ({"experts": 2, "top_k": 1, "router": np.ones((2, 3))}, "SpecMismatch", "2 experts of 16 inputs need"),
    ],
)
def test_numbers_that_do_not_fit(saved, given, error, said):
    with pm.open(saved) as old, pytest.raises(getattr(pm.errors, error), match=said):
        pm.upcycle(old, **given)


def test_models_that_have_no_mixture(saved, tmp_path):
    for config in ({"attention_bias": True}, {"mlp_bias": True}):
        with pytest.raises(pm.errors.Unsupported, match=r"no place for model\.layers\.0"):
            pm.upcycle(dense("llama", torch.float32, **config), experts=2, top_k=1)
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"model_type": "gemma2"}))
    with pm.open(saved) as old, pytest.raises(pm.errors.Unsupported, match="what mixture a 'gemma2' model becomes"):
        pm.upcycle(old, experts=2, top_k=1)
    (saved / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pm.open(saved) as old, pytest.raises(pm.errors.Unsupported, match="has not all"):
        pm.upcycle(old, experts=2, top_k=1)
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    with pytest.raises(pm.errors.Unsupported, match="some layers have a sliding window"):
        pm.upcycle(dense("qwen3", torch.float32, **windows), experts=2, top_k=1)


def test_quantised_weights_are_refused(saved, tmp_path):
    with pm.open(saved) as old:
        quantised, _ = pm.quantize(old, "**/mlp/*/weight", scheme="fp8-tensor")
        quantised.save(tmp_path / "q")
    with pm.open(tmp_path / "q") as old, pytest.raises(pm.errors.Quantized, match="part of a quantised weight"):
        pm.upcycle(old, experts=2, top_k=1)


def test_the_command(saved, tmp_path):
    np.save(tmp_path / "router.npy", np.eye(2, 16))
    args = ["upcycle", saved, "--experts", 2, "--top-k", 1, "--router", tmp_path / "router.npy", "-o", tmp_path / "out"]
    done = run(*args, "--drop", 0.25, "--seed", 3, "--json", "--html", tmp_path / "page.html")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["redrawn"] == 6
    with pm.open(tmp_path / "out") as new:
        assert np.array_equal(new["model.layers.0.block_sparse_moe.gate.weight"], np.eye(2, 16, dtype="float32"))
    done = run("upcycle", saved, "--experts", 2, "--top-k", 1, "--router", "copy", "--dry-run")
    assert done.exit_code == 2 and "neither 'random'" in done.stderr


def test_a_step_of_a_recipe(saved, tmp_path):
    np.save(tmp_path / "router.npy", np.eye(2, 16))
    (tmp_path / "r.yaml").write_text(
        "version: 1\nsteps:\n  - upcycle: {experts: 2, top_k: 1, router: router.npy, drop: 0.25, seed: 3}\n"
    )
    with pm.open(saved) as old:
        found = pm.Recipe.load(tmp_path / "r.yaml").apply(old)
        wanted, _ = pm.upcycle(old, experts=2, top_k=1, router=np.eye(2, 16), drop=0.25, seed=3)
        assert found.keys() == wanted.keys()
        assert all(np.array_equal(found[path], wanted[path]) for path in found)
        assert pm.config(found)["num_local_experts"] == 2


@pytest.mark.slow
def test_a_deeper_mixture_trains_on_from_where_the_dense_model_stood(tmp_path):
    def trained(model, steps):
        optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model = dense("llama", torch.float32)
    before = trained(model, 10)
    model.save_pretrained(tmp_path / "old")
    made, _ = pm.upcycle(pm.open(tmp_path / "old"), experts=4, top_k=2)
    made, _ = pm.deepen(made, order=pm.depth.blocks(2, count=2))
    made.save(tmp_path / "new")
    new, said = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and new.config.num_hidden_layers == 4
    stood = model(TOKENS, labels=TOKENS).loss.item()
    after = trained(new, 50)
    assert abs(after[0] - stood) < 1e-4
    assert max(after) < before[0] and after[-1] < stood / 2
