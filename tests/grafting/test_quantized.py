"""Quantised weights in grafts: all leaves together onto the same scheme, or a refusal before anything is read."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import paramend as pm
from paramend.errors import Quantized
from support.quantized import LAYOUTS, ODD, stored, write

FP8 = LAYOUTS["fp8-block", "DeepSeek-V3"]
WEIGHT, SCALE = "model.layers.0.mlp.fc.weight", "model.layers.0.mlp.fc.weight_scale_inv"
PLAIN = {WEIGHT: np.ones((256, 200), ml_dtypes.bfloat16), "model.norm.weight": np.zeros(3)}


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"unused": "ok"}, {"unused": "ok", "dtype": "source"}, {"mismatch": "overlap"}]
)
@pytest.mark.parametrize("way", ["codes to values", "values to codes"])
def test_codes_do_not_become_values_nor_values_codes(way, options, on_disk, tmp_path):
    target, source = (PLAIN, stored(ODD)) if way == "codes to values" else (stored(ODD), PLAIN)
    if on_disk:
        target, source = (
            pm.open(write(tmp_path / "a.safetensors", target)),
            pm.open(write(tmp_path / "b.safetensors", source)),
        )
    with pytest.raises(Quantized, match=r"cannot (go to|take)") as caught:
        pm.graft(target, source, **options)
    assert caught.value.payload == WEIGHT and caught.value.companions == (SCALE,)
    assert "raw=True" in caught.value.hint


def test_in_place_a_target_stays_as_it_is():
    tree = stored(ODD)
    with pytest.raises(Quantized):
        pm.graft_(tree, PLAIN)
    assert tree[WEIGHT].tobytes() == stored(ODD)[WEIGHT].tobytes() and tree["model.norm.weight"].sum() == 3


@pytest.mark.parametrize("who", LAYOUTS, ids=" ".join)
def test_all_leaves_of_a_weight_go_together_as_bytes(who, tmp_path):
    source = stored(LAYOUTS[who])
    target = {name: np.zeros_like(values) for name, values in source.items()}
    tree, report = pm.graft(target, source)
    assert len(report.copied) == len(source)
    assert all(tree[name].tobytes() == source[name].tobytes() for name in source)
    for suffix in ("safetensors", "pt"):
        here, there = (write(tmp_path / f"{n}.safetensors", each) for n, each in (("a", target), ("b", source)))
        if suffix == "pt":
            pm.open(here).save(tmp_path / "a.pt")
            here = tmp_path / "a.pt"
        made, _ = pm.graft(pm.open(here), pm.open(there))
        assert not made.raw
        made.save(tmp_path / f"out.{suffix}")
        assert not pm.diff(tmp_path / f"out.{suffix}", there)


def test_modules_and_abstract_trees_take_whole_weights():
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    module.weight_scale_inv = torch.nn.Parameter(torch.ones(1, 1), requires_grad=False)
    codes = torch.full((4, 4), 2.0).to(torch.float8_e4m3fn)
    pm.graft_(module, {"weight": codes, "weight_scale_inv": torch.full((1, 1), 3.0)})
    assert module.weight.float().sum() == 32 and module.weight_scale_inv.item() == 3
    layer = {"kernel": jnp.ones((4, 8), jnp.int8), "scale": jnp.ones(8)}
    assert pm.graft(jax.eval_shape(lambda: layer), layer)[0]["scale"].tolist() == [1] * 8


def test_renamed_leaves_go_together_too():
    source, target = stored(FP8, "h.0.fc", norm=False), stored(FP8, norm=False)
    rename = {"h.<n>.fc.**": "model.layers.<n>.mlp.fc.**"}
    tree, _ = pm.graft({name: np.zeros_like(x) for name, x in target.items()}, source, rename=rename)
    assert tree[SCALE].tolist() == source["h.0.fc.weight_scale_inv"].tolist()


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ({WEIGHT: np.zeros((256, 100), ml_dtypes.float8_e4m3fn)}, {"mismatch": "overlap"}),
        ({WEIGHT: np.zeros((256, 100), ml_dtypes.float8_e4m3fn)}, {"mismatch": "keep"}),
        ({WEIGHT: np.zeros((256, 100), ml_dtypes.float8_e4m3fn)}, {}),
        ({}, {"only": "**.weight"}),
        ({}, {"rename": {SCALE: None}}),
    ],
)
def test_parts_of_a_weight_do_not_go(target, options):
    with pytest.raises(Quantized):
        pm.graft(stored(FP8) | target, stored(FP8), **options)


@pytest.mark.parametrize(
    "target",
    [
        {WEIGHT: np.ones((256, 200), ml_dtypes.float8_e5m2)},
        {SCALE: np.ones((1, 1), "float32")},
        {SCALE: np.ones((2, 2), ml_dtypes.bfloat16)},
    ],
    ids=["another code", "larger blocks", "scales of another dtype"],
)
def test_other_codes_and_scales_are_those_of_the_target(target):
    target = stored(FP8) | target
    tree, report = pm.graft(target, stored(FP8))
    wanted, found = (pm.at(each, WEIGHT).one() for each in (stored(FP8), tree))
    assert {name: x.dtype for name, x in tree.items()} == {name: x.dtype for name, x in target.items()}
    assert 0 < report.encoded[WEIGHT][1].relative_l2 < 0.08
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.08


def test_weights_that_are_kept_hinder_nothing():
    tree, report = pm.graft(stored(FP8), {"model.norm.weight": np.zeros(3)})
    assert tree["model.norm.weight"].sum() == 0 and len(report.copied) == 1
    small = {WEIGHT: np.zeros((2, 2)), "model.norm.weight": np.zeros(3)}
    tree, _ = pm.graft(stored(FP8), small, mismatch="keep")
    assert tree[WEIGHT].tobytes() == stored(FP8)[WEIGHT].tobytes()


def test_raw_grafts_leaves_as_they_are_stored(tmp_path):
    tree, _ = pm.graft(PLAIN, stored(ODD), unused="ok", raw=True)
    assert np.array_equal(tree[WEIGHT], stored(ODD)[WEIGHT].astype(ml_dtypes.bfloat16))
    here, there = write(tmp_path / "a.safetensors", PLAIN), write(tmp_path / "b.safetensors", stored(ODD))
    made, _ = pm.graft(pm.open(here, raw=True), pm.open(there, raw=True), unused="ok")
    made.save(tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")[WEIGHT], load_file(there)[WEIGHT].bfloat16())
    with pytest.raises(Quantized):
        pm.graft(pm.open(here, raw=True), pm.open(there), unused="ok")
    values = {name: x.copy() for name, x in stored(ODD).items()}
    pm.graft_(values, PLAIN, raw=True)
    assert values[WEIGHT].astype("float32").tolist() == np.ones((256, 200)).tolist()


def test_the_hint_is_a_call_that_works():
    with pytest.raises(Quantized) as caught:
        pm.graft(PLAIN, stored(ODD), unused="ok")
    call = caught.value.hint.partition(" takes leaves")[0]
    assert call == 'pm.graft(target, source, unused="ok", raw=True)'
    eval(call, {"pm": pm, "target": PLAIN, "source": stored(ODD)})


# ---- decoded and encoded -----------------------------------------------------------------------------------------


def sides(tmp_path, on_disk, target, source):
    """Two trees, or two checkpoints that hold them."""
    if not on_disk:
        return target, source
    files = (write(tmp_path / f"{name}.safetensors", tree) for name, tree in (("a", target), ("b", source)))
    return tuple(map(pm.open, files))


@pytest.mark.parametrize("on_disk", [False, True])
def test_codes_become_the_values_that_they_stand_for(on_disk, tmp_path):
    target, source = sides(tmp_path, on_disk, PLAIN, stored(FP8))
    tree, report = pm.graft(target, source)
    codes, scale = stored(FP8)[WEIGHT].astype("float32"), stored(FP8)[SCALE]
    wanted = codes * np.repeat(np.repeat(scale, 128, 0), 100, 1)
    assert tree[WEIGHT].tobytes() == wanted.astype(ml_dtypes.bfloat16).tobytes()
    assert len(report.copied) == 2 and not report.encoded


@pytest.mark.parametrize("on_disk", [False, True])
def test_values_become_codes_and_the_report_says_how_far_off(on_disk, tmp_path):
    values = np.random.default_rng(0).standard_normal((256, 200)).astype("float32")
    target, source = sides(tmp_path, on_disk, stored(FP8), {**PLAIN, WEIGHT: values})
    tree, report = pm.graft(target, source)
    found = pm.at(tree, WEIGHT).one()
    off = np.linalg.norm(found - values) / np.linalg.norm(values)
    said = report.to_dict()["encoded"][WEIGHT]
    assert said["scheme"] == "fp8-block" and said["relative_l2"] == pytest.approx(off, rel=1e-4) and off < 0.03
    assert said["max_abs"] == pytest.approx(np.abs(found - values).max(), rel=1e-6)
    if on_disk:
        tree.save(tmp_path / "out.safetensors")
        assert np.array_equal(pm.open(tmp_path / "out.safetensors")[WEIGHT], found)


def test_one_scheme_becomes_another(tmp_path):
    values = np.random.default_rng(0).standard_normal((256, 256)).astype("float32")
    block, channel = (
        pm.quantize({"fc": {"weight": values}}, "**", scheme=f"fp8-{each}")[0] for each in ("block", "channel")
    )
    tree, report = pm.graft(pm.at(block, "fc/weight").zero(), channel)
    given, found = (pm.at(each, "fc/weight").one().astype("float32") for each in (channel, tree))
    assert np.linalg.norm(found - given) <= 0.03 * np.linalg.norm(given) and list(report.encoded) == ["fc/weight"]
    assert tree["fc"]["weight_scale_inv"].shape == (2, 2)


def test_a_module_takes_values_of_codes():
    module = torch.nn.Linear(200, 256, bias=False)
    pm.graft_(module, {name.rpartition(".")[2]: x for name, x in stored(FP8).items() if ".fc." in name})
    assert np.array_equal(module.weight.detach().numpy(), pm.at(stored(FP8), WEIGHT).one())


@pytest.mark.parametrize("scheme", ["int4", "gptq", "awq", "nf4", "bnb-int8", "nvfp4"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_values_become_codes_of_schemes_with_leaves_that_stay(scheme, on_disk, tmp_path):
    first, second = (np.random.default_rng(n).standard_normal((64, 128)).astype("float32") for n in (0, 1))
    target = pm.quantize({"fc.weight": first}, "**", scheme=scheme)[0]
    target, source = sides(tmp_path, on_disk, target, {"fc.weight": second})
    tree, report = pm.graft(target, source)
    found = np.asarray(pm.dequantize(tree, dtype="float32")[0]["fc.weight"])
    off = np.linalg.norm(found - second) / np.linalg.norm(second)
    assert off < 0.14 and report.to_dict()["encoded"]["fc.weight"]["relative_l2"] == pytest.approx(off, abs=5e-3)
