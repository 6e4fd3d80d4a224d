"""Adapters folded into their base: what PEFT's `merge_and_unload` gives in float64, on disk and in memory."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import paramend as pm
from paramend.errors import NoMatch
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


def test_bfloat16_is_the_float32_sum_rounded_once(folder):
    case = CASES["linear"]
    base, adapter = folder(case, cast=ml_dtypes.bfloat16)
    made = pm.fold(pm.open(base), adapter)[0]
    name = "base_model.model.model.q.lora_{}.weight"
    a, b = (case.adapter[name.format(side)].astype("float32") for side in "AB")
    old = case.base["model.q.weight"].astype(ml_dtypes.bfloat16).astype("float32")
    want = (old + np.float32(1.5) * (b @ a)).astype(ml_dtypes.bfloat16)
    assert made["model.q.weight"].tobytes() == want.tobytes()


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
    assert "lora_te_fc2.weight: the base has no such leaf" in str(caught.value)
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
    with pytest.raises(NoMatch, match=r"model\.q\.weight: the base has no such leaf"):
        pm.fold(base, adapter)
