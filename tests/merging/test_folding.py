"""Adapters folded into their base: what PEFT's `merge_and_unload` gives in float64, on disk and in memory."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from flax import nnx
from safetensors.numpy import save_file

import paramend as pm
from paramend.cli.main import cli
from paramend.errors import BadCheckpoint, BadRecipe, CannotRead, NoMatch, SpecMismatch, Unsupported
from paramend.leaves.specs import numpy_dtype
from support import adapters_reference

CASES = adapters_reference.cases()
FOLDABLE = [name for name in CASES if name not in ("grouped", "layers")]


@pytest.fixture
def folder(tmp_path):
    """What writes a case to disk: the path of the base, that of the adapter."""

    def write(case, *, cast=None, config=None):
        base, adapter = tmp_path / "base", tmp_path / "adapter"
        base.mkdir()
        adapter.mkdir()
        save_file(
            {key: value.astype(cast or value.dtype) for key, value in case.base.items()}, base / "model.safetensors"
        )
        if case.config or config:
            (base / "config.json").write_text(json.dumps(case.config | (config or {})))
        put(adapter, case)
        return base, adapter

    return write


def put(folder, case, **settings):
    folder.mkdir(exist_ok=True)
    save_file(case.adapter, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(case.settings | settings))
    return folder


def close(got, want):
    """Whether all leaves are those of PEFT, to 1e-12."""
    assert got.keys() == want.keys()
    for path, value in want.items():
        np.testing.assert_allclose(got[path], value, rtol=1e-12, atol=1e-12, err_msg=path)


@pytest.mark.numeric
@pytest.mark.parametrize("name", FOLDABLE)
def test_a_fold_is_what_peft_merges(name, folder):
    case = CASES[name]
    base, adapter = folder(case)
    made, report = pm.fold(pm.open(base), adapter)
    close(dict(made.items()), case.merged)
    assert {source for row in report.rows for source in row.sources} == case.adapter.keys()
    assert {row.path for row in report.rows} | set(report.kept) == case.base.keys()


@pytest.mark.parametrize("name", FOLDABLE)
def test_what_is_written_is_what_is_made_in_memory_and_in_place(name, folder, tmp_path):
    case = CASES[name]
    base, adapter = folder(case, cast="float32")
    before = (base / "model.safetensors").read_bytes()
    pm.fold(pm.open(base), adapter)[0].save(tmp_path / "out")
    if not name.startswith("experts square"):  # which need a configuration
        assert not pm.diff(tmp_path / "out", pm.fold(pm.load(base), adapter)[0])
    pm.patch(base, lambda tree: pm.fold(tree, adapter)[0])
    assert not pm.diff(base, tmp_path / "out")
    pm.undo(base)
    assert (base / "model.safetensors").read_bytes() == before


def test_norms_do_not_see_the_wrong_reading_of_experts(folder):
    """The control: B with the ranks of one expert after the other has the right norm, and is another matrix."""
    case = CASES["experts"]
    base, adapter = folder(case)
    name = "model.experts.gate_up_proj"
    right = pm.fold(pm.open(base), adapter)[0][name] - case.base[name]
    b = case.adapter["base_model.model.model.experts.base_layer.lora_B.weight"]
    a = case.adapter["base_model.model.model.experts.base_layer.lora_A.weight"]
    wrong = 1.5 * np.einsum("oer,eri->eoi", b.reshape(8, 3, 2), a.reshape(3, 2, 5))
    assert 0.5 < np.linalg.norm(wrong) / np.linalg.norm(right) < 2
    assert np.linalg.norm(wrong - right) > np.linalg.norm(right)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_narrow_floats_are_the_float32_sum_rounded_once(dtype, tmp_path):
    """With whole numbers in A and B, so that their products are exact."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(67, 33)).astype(numpy_dtype(dtype))
    a, b = (rng.integers(-8, 8, shape).astype("float32") for shape in ((R, 33), (67, R)))
    save_file({"fc.weight": w}, tmp_path / "model.safetensors")
    adapter = peft(tmp_path / "adapter", {"fc.lora_A.weight": a, "fc.lora_B.weight": b}, lora_alpha=R / 64)
    made = pm.fold(pm.open(tmp_path / "model.safetensors"), adapter)[0]["fc.weight"]
    want = (w.astype("float32") + np.float32(1 / 64) * (b @ a)).astype(w.dtype)
    assert made.tobytes() == want.tobytes()


@pytest.mark.numeric
def test_layers_that_an_adapter_repeats_have_leaves_of_their_own(folder, tmp_path):
    case = CASES["layers"]
    base, adapter = folder(case)
    made, _ = pm.fold(pm.open(base), adapter)
    made.save(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == 4
    out = pm.open(tmp_path / "out")
    assert not out.ties
    for layer, source in enumerate([0, 1, 1, 2]):
        name = f"base_model.model.layers.{layer}.q.lora_{{}}.weight"
        added = 1.5 * case.adapter[name.format("B")] @ case.adapter[name.format("A")]
        old = case.base[f"layers.{source}.q.weight"]
        np.testing.assert_allclose(out[f"layers.{layer}.q.weight"], old + added, rtol=1e-12, atol=1e-12)


@pytest.mark.numeric
def test_terms_of_several_adapters_are_added_and_a_factor_scales_all(folder):
    case = CASES["linear"]
    base, adapter = folder(case)
    once, twice = (pm.fold(pm.open(base), each, scale=0.5)[0] for each in (adapter, [adapter, adapter]))
    for path, value in case.merged.items():
        old = case.base[path]
        np.testing.assert_allclose(once[path], old + (value - old) / 2, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(twice[path], value, rtol=1e-12, atol=1e-12)


# ---- names -----------------------------------------------------------------------------------------------------------


def linear(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def kohya(name, w, *, alpha=None, rank=2):
    """The leaves of a module in a file of kohya, and the weight with them."""
    a, b = linear(rank, *w.shape[1:], seed=1), linear(w.shape[0], rank, *(1,) * (w.ndim - 2), seed=2)
    leaves = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
    scale = 1.0 if alpha is None else alpha / rank
    leaves |= {} if alpha is None else {f"{name}.alpha": np.array(alpha)}
    return leaves, w + scale * (b.reshape(len(b), rank) @ a.reshape(rank, -1)).reshape(w.shape)


@pytest.mark.numeric
def test_kohya_names_have_no_dots_and_tensors_of_alpha(tmp_path):
    base = {
        "down_blocks.0.attn_1.to_q.weight": linear(4, 3),
        "conv_in.weight": linear(4, 3, 2, 2),
        "norm.weight": linear(3),
    }
    first, to_q = kohya("lora_unet_down_blocks_0_attn_1_to_q", base["down_blocks.0.attn_1.to_q.weight"], alpha=1.0)
    second, conv = kohya("lora_unet_conv_in", base["conv_in.weight"])
    save_file(first | second, tmp_path / "lora.safetensors")
    made, report = pm.fold(base, tmp_path / "lora.safetensors")
    np.testing.assert_allclose(made["down_blocks.0.attn_1.to_q.weight"], to_q, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(made["conv_in.weight"], conv, rtol=1e-12, atol=1e-12)
    assert made["norm.weight"] is base["norm.weight"] and report.kept == ("norm.weight",)


def test_all_that_is_not_read_or_not_there_is_listed(tmp_path):
    leaves, _ = kohya("lora_unet_fc", linear(4, 3))
    leaves |= {"lora_te_fc2.lora_down.weight": linear(2, 3), "lora_unet_fc.dora_scale": linear(4, 1)}
    save_file(leaves, tmp_path / "lora.safetensors")
    with pytest.raises(NoMatch) as caught:
        pm.fold({"fc": {"weight": linear(4, 3)}}, tmp_path / "lora.safetensors")
    assert "lora_te_fc2: the base has no such leaf" in str(caught.value)
    assert "lora_unet_fc.dora_scale: it is no leaf of an adapter of a known kind" in str(caught.value)


PREFIXES = {
    "without the prefix of the class": ("transformer.h.0.fc", "h.0.fc"),
    "with it": ("h.0.fc", "transformer.h.0.fc"),
    "inside and outside": ("model.language_model.layers.0.fc", "language_model.model.layers.0.fc"),
    "visual": ("model.visual.fc", "visual.fc"),
}


@pytest.mark.parametrize("said", PREFIXES)
def test_a_module_is_found_under_the_names_that_it_has_elsewhere(said, folder, tmp_path):
    theirs, ours = PREFIXES[said]
    case = CASES["linear"]
    names = {key: key.replace("model.model.q", f"model.{theirs}") for key in case.adapter if ".q." in key}
    adapter = put(tmp_path / "adapter", case._replace(adapter={new: case.adapter[old] for old, new in names.items()}))
    made, report = pm.fold({f"{ours}.weight": case.base["model.q.weight"]}, adapter)
    assert [row.path for row in report.rows] == [f"{ours}.weight"]
    np.testing.assert_array_equal(
        made[f"{ours}.weight"], pm.fold(case.base, _only(tmp_path, case))[0]["model.q.weight"]
    )


def _only(tmp_path, case):
    kept = {key: value for key, value in case.adapter.items() if ".q." in key}
    return put(tmp_path / "only", case._replace(adapter=kept))


def test_a_module_that_two_could_be_is_not_guessed(tmp_path):
    case = CASES["linear"]
    adapter = _only(tmp_path, case)  # for model.q
    base = {f"{part}.model.q.weight": case.base["model.q.weight"] for part in ("text", "vision")}
    with pytest.raises(NoMatch, match=r"model\.q: the base has no such leaf"):
        pm.fold(base, adapter)


# ---- experts ---------------------------------------------------------------------------------------------------------

E, F, H, R = 3, 4, 5, 2  # experts, their width, that of the model, ranks


def peft(folder, leaves, **settings):
    folder.mkdir()
    save_file(
        {f"base_model.model.{path}": np.ascontiguousarray(leaf) for path, leaf in leaves.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": R, "lora_alpha": 2 * R} | settings)
    )
    return folder


FUSED = {"outputs first": (False, 1, "qwen3_moe"), "gpt-oss": (True, 2, "gpt_oss"), "inputs first": (True, 1, "aria")}


@pytest.mark.numeric
@pytest.mark.parametrize("said", FUSED)
def test_terms_for_one_expert_go_to_its_rows_of_a_fused_leaf(said, tmp_path):
    turned, step, family = FUSED[said]
    want = {"gate_up_proj": linear(E, 2 * F, H), "down_proj": linear(E, H, F, seed=1)}
    view = (lambda leaf: leaf.transpose(0, 2, 1)) if turned else (lambda leaf: leaf)
    (tmp_path / "base").mkdir()
    base = {f"mlp.experts.{name}": np.ascontiguousarray(view(leaf)) for name, leaf in want.items()}
    save_file(base, tmp_path / "base/model.safetensors")
    (tmp_path / "base/config.json").write_text(json.dumps({"model_type": family}))
    rows = {"gate_proj": np.s_[::2] if step == 2 else np.s_[:F], "up_proj": np.s_[1::2] if step == 2 else np.s_[F:]}
    leaves = {}
    for seed, (expert, name) in enumerate((e, n) for e in range(E) for n in ("gate_proj", "up_proj", "down_proj")):
        (out, into), leaf = ((H, F), "down_proj") if name == "down_proj" else ((F, H), "gate_up_proj")
        a, b = linear(R, into, seed=2 * seed), linear(out, R, seed=2 * seed + 1)
        leaves |= {f"mlp.experts.{expert}.{name}.lora_{side}.weight": each for side, each in (("A", a), ("B", b))}
        want[leaf][expert][rows.get(name, np.s_[:])] += 2 * b @ a
    made, _ = pm.fold(pm.open(tmp_path / "base"), peft(tmp_path / "adapter", leaves))
    for name, leaf in want.items():
        np.testing.assert_allclose(view(made[f"mlp.experts.{name}"]), leaf, rtol=1e-12, atol=1e-12)


@pytest.mark.numeric
def test_terms_for_fused_experts_go_to_the_leaves_of_each(tmp_path):
    up, down = linear(E, 2 * F, H), linear(E, H, F, seed=1)
    w1, w3, w2 = up[:, :F], up[:, F:], down
    names = {"w1": w1, "w3": w3, "w2": w2}
    base = {f"block_sparse_moe.experts.{e}.{n}.weight": leaf[e].copy() for n, leaf in names.items() for e in range(E)}
    a, b, a2, b2 = (
        linear(*shape, seed=5 + n) for n, shape in enumerate([(E * R, H), (2 * F, E * R), (E * R, F), (H, E * R)])
    )
    leaves = {"mlp.experts.base_layer.lora_A.weight": a, "mlp.experts.base_layer.lora_B.weight": b}
    leaves |= {"mlp.experts.lora_A.weight": a2, "mlp.experts.lora_B.weight": b2}
    made, _ = pm.fold(base, peft(tmp_path / "adapter", leaves))
    up = up + 2 * np.einsum("ore,eri->eoi", b.reshape(2 * F, R, E), a.reshape(E, R, H))
    down = down + 2 * np.einsum("ore,eri->eoi", b2.reshape(H, R, E), a2.reshape(E, R, F))
    for name, leaf in {"w1": up[:, :F], "w3": up[:, F:], "w2": down}.items():
        got = np.stack([made[f"block_sparse_moe.experts.{e}.{name}.weight"] for e in range(E)])
        np.testing.assert_allclose(got, leaf, rtol=1e-12, atol=1e-12)


def test_square_experts_need_a_family_and_a_version(folder):
    case = CASES["experts square"]
    base, adapter = folder(case)
    (base / "config.json").unlink()
    with pytest.raises(SpecMismatch, match="only the model_type"):
        pm.fold(pm.open(base), adapter)
    put(adapter, case, peft_version="0.18.1")  # which took all experts with inputs first
    assert pm.fold(pm.open(base), adapter)[1].rows


def test_a_square_conv1d_is_told_by_its_family_or_by_a_bias_beside(folder):
    case = CASES["conv1d"]
    base, adapter = folder(case)
    made = [pm.fold(pm.open(base), adapter)[0]["model.c_proj.weight"]]
    (base / "config.json").unlink()
    made.append(pm.fold(pm.open(base), adapter)[0]["model.c_proj.weight"])  # model.c_attn is 3 x 9, and its bias 9
    put(adapter, case, fan_in_fan_out=True)  # lm_head is linear whatever the file says
    close(dict(pm.fold(pm.open(base), adapter)[0].items()), case.merged)
    made.append(
        pm.fold({"model.c_proj.weight": case.base["model.c_proj.weight"]}, _without(adapter, "c_proj"))[0][
            "model.c_proj.weight"
        ]
    )
    for each in made:
        np.testing.assert_allclose(each, case.merged["model.c_proj.weight"], rtol=1e-12, atol=1e-12)


def _without(adapter, name):
    """The adapter with the leaves of one module alone."""
    leaves = pm.open(adapter / "adapter_model.safetensors")
    return pm.at(leaves, [path for path in leaves.paths if name not in path]).delete()


# ---- heads -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tied(tmp_path):
    """A checkpoint whose head is tied to its embedding, and an adapter for the head."""
    base = tmp_path / "tied"
    base.mkdir()
    save_file({"model.embed_tokens.weight": linear(7, 4), "model.norm.weight": linear(4)}, base / "model.safetensors")
    config = {"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]}
    (base / "config.json").write_text(json.dumps(config))
    leaves = {"lm_head.lora_A.weight": linear(R, 4, seed=1), "lm_head.lora_B.weight": linear(7, R, seed=2)}
    return base, peft(tmp_path / "head", leaves), 2 * leaves["lm_head.lora_B.weight"] @ leaves["lm_head.lora_A.weight"]


@pytest.mark.numeric
def test_a_tied_head_is_refused_with_two_ways_out(tied, tmp_path):
    base, adapter, added = tied
    old = pm.open(base)["model.embed_tokens.weight"]
    with pytest.raises(Unsupported) as caught:
        pm.fold(pm.open(base), adapter)
    assert "untie=True" in caught.value.hint and 'into="embedding"' in caught.value.hint
    both, _ = pm.fold(pm.open(base), adapter, into="embedding")
    np.testing.assert_allclose(both["model.embed_tokens.weight"], old + added, rtol=1e-12, atol=1e-12)
    pm.fold(pm.open(base), adapter, untie=True)[0].save(tmp_path / "out")
    out = pm.open(tmp_path / "out")
    assert not json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]
    assert out["model.embed_tokens.weight"].tobytes() == old.tobytes()
    np.testing.assert_allclose(out["lm_head.weight"], old + added, rtol=1e-12, atol=1e-12)


@pytest.mark.numeric
def test_a_tied_head_in_memory(tied):
    base, adapter, added = tied
    weight = torch.tensor(pm.open(base)["model.embed_tokens.weight"])
    tree = {"model.embed_tokens.weight": weight, "lm_head.weight": weight}
    with pytest.raises(Unsupported):
        pm.fold(tree, adapter)
    both, _ = pm.fold(tree, adapter, into="embedding")
    assert both["lm_head.weight"] is both["model.embed_tokens.weight"]
    np.testing.assert_allclose(both["lm_head.weight"], weight + torch.tensor(added), rtol=1e-12, atol=1e-12)
    parted, _ = pm.fold(tree, adapter, untie=True)
    np.testing.assert_array_equal(parted["model.embed_tokens.weight"], weight)
    np.testing.assert_allclose(parted["lm_head.weight"], weight + torch.tensor(added), rtol=1e-12, atol=1e-12)


def test_a_model_without_a_head_has_none_that_is_tied(tied, tmp_path):
    base, _, _ = tied
    (base / "config.json").write_text(json.dumps({"tie_word_embeddings": True, "architectures": ["LlamaModel"]}))
    leaves = {"embed_tokens.lora_embedding_A": linear(R, 7), "embed_tokens.lora_embedding_B": linear(4, R)}
    assert pm.fold(pm.open(base), peft(tmp_path / "rows", leaves))[1].rows


def test_rows_of_a_tied_embedding_are_those_of_the_head(tied, tmp_path):
    base, _, _ = tied
    rows = linear(2, 4, seed=3)
    leaves = {"model.embed_tokens.token_adapter.trainable_tokens_delta": rows}
    made, _ = pm.fold(pm.open(base), peft(tmp_path / "rows", leaves, trainable_token_indices=[6, 2]))
    want = pm.open(base)["model.embed_tokens.weight"]
    want[[6, 2]] = rows
    assert made["model.embed_tokens.weight"].tobytes() == want.tobytes()


@pytest.mark.numeric
def test_terms_that_peft_ties_are_added_once(tied, tmp_path):
    base, _, added = tied
    b, a = linear(7, R, seed=2), linear(R, 4, seed=1)
    leaves = {"lm_head.lora_A.weight": a, "lm_head.lora_B.weight": b}
    leaves |= {"model.embed_tokens.lora_embedding_A": b.T, "model.embed_tokens.lora_embedding_B": a.T}
    adapter = peft(tmp_path / "both", leaves, ensure_weight_tying=True)
    made, report = pm.fold(pm.open(base), adapter, into="embedding")
    old = pm.open(base)["model.embed_tokens.weight"]
    np.testing.assert_allclose(made["model.embed_tokens.weight"], old + added, rtol=1e-12, atol=1e-12)
    assert len(report.rows[0].sources) == 4


# ---- trees -----------------------------------------------------------------------------------------------------------


@pytest.mark.numeric
@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3), (4, 2, 3)], ids=["matrix", "stack", "heads"])
def test_trees_of_jax_have_matrices_the_other_way_round(shape):
    stack = shape[0] == 2
    a, b = (linear(2, 4, R), linear(2, R, 3)) if stack else (linear(4, R), linear(R, *shape[1:]))
    base = {"layer": {"kernel": jnp.asarray(linear(*shape), "float32"), "bias": jnp.ones(3)}}
    rule = ("**/a", "**/b", "**/kernel")
    made, _ = pm.fold(base, {"layer": {"a": a, "b": b}}, scale=0.5, rule=rule)
    want = np.asarray(base["layer"]["kernel"]) + 0.5 * (a @ b if stack else np.tensordot(a, b, 1))
    np.testing.assert_allclose(made["layer"]["kernel"], want, rtol=1e-5, atol=1e-5)
    assert made["layer"]["bias"] is base["layer"]["bias"] and made["layer"]["kernel"].dtype == jnp.float32
    named, _ = pm.fold(base, {"layer": {"kernel_lora_a": a, "kernel_lora_b": b}}, scale=0.5)
    np.testing.assert_array_equal(named["layer"]["kernel"], made["layer"]["kernel"])


@pytest.mark.numeric
@pytest.mark.slow
def test_lora_of_nnx_is_folded_into_the_layer_beside_it():
    layer = nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(0))
    layer.lora.lora_b[...] = jnp.asarray(linear(2, 3), "float32")
    x = jnp.asarray(linear(5, 4), "float32")
    state = nnx.state(layer)
    adapter = {"lora": {"lora_a": layer.lora.lora_a[...], "lora_b": layer.lora.lora_b[...]}}
    folded, _ = pm.fold(pm.at(state, "lora/**").delete(), adapter)
    kernel, bias = (next(iter(pm.at(folded, name).get().values())) for name in ("kernel", "bias"))
    np.testing.assert_allclose(x @ kernel + bias, layer(x), rtol=1e-4, atol=1e-4)


def test_a_torch_module_is_folded_into_a_copy(folder):
    case = CASES["linear"]
    _, adapter = folder(case)
    model = torch.nn.Module()
    model.model = torch.nn.ModuleDict(
        {"q": torch.nn.Linear(4, 6), "k": torch.nn.Linear(4, 4), "norm": torch.nn.LayerNorm(4)}
    )
    before = model.model["q"].weight.detach().clone()
    made, _ = pm.fold(model, adapter)
    assert type(made) is type(model) and torch.equal(model.model["q"].weight, before)
    assert not torch.equal(made.model["q"].weight, before) and torch.equal(made.model["q"].bias, model.model["q"].bias)


# ---- refusals --------------------------------------------------------------------------------------------------------

REFUSED = {
    "prompt tuning": {"peft_type": "PROMPT_TUNING"},
    "activated": {"alora_invocation_tokens": [1]},
    "moved": {"init_lora_weights": "pissa_niter_4"},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_not_a_sum_of_products_is_refused(said, folder):
    case = CASES["linear"]
    base, adapter = folder(case)
    put(adapter, case, **REFUSED[said])
    with pytest.raises(Unsupported):
        pm.fold(pm.open(base), adapter)


def test_convolutions_in_groups_are_refused(folder):
    base, adapter = folder(CASES["grouped"])
    with pytest.raises(SpecMismatch, match="convolutions in groups cannot be folded"):
        pm.fold(pm.open(base), adapter)


WRONG = {
    "a rank that is not that of A": ({"r": 4}, SpecMismatch, "A has 2 ranks, and the configuration says 4"),
    "DoRA without magnitudes": ({"use_dora": True}, SpecMismatch, "no lora_magnitude_vector"),
    "a rank of no number": ({"r": "x"}, BadCheckpoint, "is not a number that it can be"),
    "a pattern that is none": ({"alpha_pattern": {"(": 1}}, BadCheckpoint, "not a pattern"),
}


@pytest.mark.parametrize("said", WRONG)
def test_a_configuration_that_does_not_fit(said, folder):
    settings, kind, message = WRONG[said]
    case = CASES["linear"]
    base, adapter = folder(case)
    put(adapter, case, **settings)
    with pytest.raises(kind, match=message):
        pm.fold(pm.open(base), adapter)


def test_weights_of_peft_need_their_configuration(folder):
    base, adapter = folder(CASES["linear"])
    (adapter / "adapter_config.json").unlink()
    for given in (adapter, adapter / "adapter_model.safetensors", pm.load(adapter / "adapter_model.safetensors")):
        with pytest.raises(CannotRead, match=r"adapter_config\.json"):
            pm.fold(pm.open(base), given)


@pytest.mark.parametrize("form", ["memory", "disk", "in place"])
def test_of_a_quantised_weight_the_blocks_that_change_are_encoded(form, tmp_path):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 120, (256, 128)).astype("uint8").view(ml_dtypes.float8_e4m3fn)
    base = {"fc.weight": codes, "fc.weight_scale_inv": np.array([[0.5], [0.25]], "float32"), "norm.weight": linear(3)}
    a, b = rng.normal(size=(R, 128)).astype("float32"), np.zeros((256, R), "float32")
    b[:128] = rng.normal(size=(128, R))  # the second block stays
    adapter = peft(tmp_path / "adapter", {"fc.lora_A.weight": a, "fc.lora_B.weight": b})
    path = tmp_path / "model.safetensors"
    pm.save(base, path)
    if form == "memory":
        made = pm.fold(base, adapter)[0]
    elif form == "disk":
        pm.fold(pm.open(path), adapter)[0].save(tmp_path / "out.safetensors")
        made = pm.load(tmp_path / "out.safetensors")
    else:
        pm.patch(path, lambda tree: pm.fold(tree, adapter)[0])
        made = pm.load(path)
    floats = (pm.dequantize(tree, dtype="float32")[0] for tree in (base, made))
    old, new = (next(iter(pm.at(tree, "fc.weight").get().values())) for tree in floats)
    codes_now, scales_now = (
        next(iter(pm.at(made, f"fc.{n}", raw=True).get().values())) for n in ("weight", "weight_scale_inv")
    )
    assert codes_now[128:].tobytes() == codes[128:].tobytes() and scales_now[1] == 0.25
    want = old + 2 * b @ a
    assert np.linalg.norm(new - want) < 0.05 * np.linalg.norm(want)
    assert np.linalg.norm(new - want) < 0.5 * np.linalg.norm(old - want)
    if form == "in place":
        pm.undo(path)
        assert pm.open(path, raw=True)["fc.weight"].tobytes() == codes.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_what_nothing_is_added_to_keeps_the_sign_of_zero(dtype, tmp_path):
    base = {"fc": {"weight": np.full((3, 4), -0.0).astype(dtype)}}
    a, b = np.zeros((R, 4), "float32"), np.zeros((3, R), "float32")
    a[:, 0], b[1] = 1, 1
    made = pm.fold(base, peft(tmp_path / "adapter", {"fc.lora_A.weight": a, "fc.lora_B.weight": b}))[0]
    for tree in (made, pm.at(base, "**").add((b, a))):
        weight = tree["fc"]["weight"].astype("float64")
        assert weight[1, 0] > 0 and np.signbit(weight).sum() == 11


def test_integers_are_not_folded_into(tmp_path):
    adapter = peft(tmp_path / "adapter", {"fc.lora_A.weight": linear(R, 8), "fc.lora_B.weight": linear(4, R)})
    with pytest.raises(SpecMismatch, match="not of floats"):
        pm.fold({"fc.weight": np.zeros((4, 8), "int8")}, adapter)


def test_two_modules_of_an_adapter_are_not_one_leaf(tmp_path):
    w = linear(4, 3)
    leaves = kohya("lora_te1_fc", w)[0] | kohya("lora_te2_fc", w)[0]
    save_file(leaves, tmp_path / "lora.safetensors")
    with pytest.raises(SpecMismatch, match="lora_te1_fc of the adapter means the same leaf"):
        pm.fold({"fc.weight": w}, tmp_path / "lora.safetensors")
    one = pm.at(pm.open(tmp_path / "lora.safetensors"), "lora_te2_fc.**").delete()
    assert pm.fold({"fc.weight": w}, one)[1].rows


@pytest.mark.numeric
def test_what_diffusers_says_in_the_metadata_of_a_file_counts(tmp_path):
    w, a, b = linear(4, 3), linear(R, 3, seed=1), linear(4, R, seed=2)
    held = {"lora_adapter_metadata": json.dumps({"unet.r": R, "unet.lora_alpha": 6, "unet.use_rslora": True})}
    save_file({"unet.fc.lora_A.weight": a, "unet.fc.lora_B.weight": b}, tmp_path / "lora.safetensors", metadata=held)
    made, _ = pm.fold({"fc.weight": w}, tmp_path / "lora.safetensors")
    np.testing.assert_allclose(made["fc.weight"], w + 6 / np.sqrt(R) * b @ a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz"])
def test_in_place_edits_before_a_fold_are_made_once(suffix, folder, tmp_path):
    case = CASES["dora"]
    _, adapter = folder(case)
    base = {path: value.astype("float32") for path, value in case.base.items()}
    path = tmp_path / f"model{suffix}"
    pm.save({name: torch.tensor(value) for name, value in base.items()} if suffix == ".pt" else base, path)

    def edit(tree):
        return pm.fold(pm.fold(pm.at(tree, "model.q.weight").multiply(2.0), adapter)[0], adapter)[0]

    before = path.read_bytes()
    pm.patch(path, edit)
    assert not pm.diff(path, edit(base))
    pm.undo(path)
    assert path.read_bytes() == before


# ---- commands and recipes --------------------------------------------------------------------------------------------


def test_a_recipe_folds_and_its_record_replays(folder, tmp_path):
    case = CASES["dora"]
    base, adapter = folder(case, cast="float32")
    recipe = pm.Recipe([{"fold": {"source": str(adapter), "scale": 0.5}}])
    recipe.apply(pm.open(base)).save(tmp_path / "out", record=True)
    assert not pm.diff(tmp_path / "out", pm.fold(pm.open(base), adapter, scale=0.5)[0])
    again = tmp_path / "again.yaml"
    again.write_text(pm.record(tmp_path / "out").recipe)  # names its files beside it
    assert not pm.diff(pm.Recipe.load(again).apply(pm.open(base)), tmp_path / "out")
    pm.verify_record(tmp_path / "out")
    with pytest.raises(BadRecipe, match=r"steps\[0\]"):
        pm.Recipe([{"fold": {"source": str(tmp_path / "none")}}]).apply(pm.open(base))


def test_the_command_shows_writes_and_takes_back(folder, tmp_path):
    base, adapter = folder(CASES["linear"], cast="float32")
    run = CliRunner().invoke
    shown = run(cli, ["fold", str(base), str(adapter), "--dry-run"])
    assert shown.exit_code == 0 and "1.5 * " in shown.output and not (tmp_path / "out").exists()
    assert run(cli, ["fold", str(base), str(adapter), "-o", str(tmp_path / "out")]).exit_code == 0
    before = (base / "model.safetensors").read_bytes()
    assert run(cli, ["fold", str(base), str(adapter), "--in-place"]).exit_code == 0
    assert not pm.diff(base, tmp_path / "out")
    assert run(cli, ["undo", str(base)]).exit_code == 0
    assert (base / "model.safetensors").read_bytes() == before
