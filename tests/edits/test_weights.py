"""Quantised weights are edited as the weights that they are, in memory, on disk and in place."""

import hashlib
import json
import pickle
import weakref

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import paramend as pm
from paramend.errors import Quantized

SCHEMES = ("fp8-tensor", "fp8-channel", "fp8-block", "int8", "int4", "gptq", "awq", "mxfp4", "nvfp4", "nf4", "fp4")
SCHEMES += ("bnb-int8",)
RNG = np.random.default_rng(0)
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
WEIGHT = RNG.standard_normal((256, 384)).astype("float32")
FLOATS = {UP: WEIGHT, DOWN: np.ascontiguousarray(WEIGHT.T), "model.norm.weight": np.ones(4, "float32")}
# The relative L2 of rounding to the nearest, which no edit exceeds much.
LOSS = {"fp8": 0.03, "int8": 0.01, "bnb-int8": 0.01, "int4": 0.13, "gptq": 0.13, "awq": 0.13, "nf4": 0.11}
LOSS |= {"mxfp4": 0.14, "nvfp4": 0.11, "fp4": 0.14}


@pytest.fixture(scope="module", params=SCHEMES)
def model(request, tmp_path_factory):
    """A model on disk in one of the schemes: its folder and the scheme."""
    folder = tmp_path_factory.mktemp("m")
    pm.save(FLOATS, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    out = folder / "quantised"
    pm.quantize(pm.open(folder), "**.mlp.**", scheme=request.param)[0].save(out)
    return out, request.param


def floats(path):
    """The values of the weights of a checkpoint, float32, as `dequantize` gives them."""
    with pm.open(path) as checkpoint:
        tree = pm.dequantize(checkpoint, "**", dtype="float32")[0]
        return {name: np.array(tree[name]) for name in (UP, DOWN)}


def bytes_of(path):
    """The bytes of each leaf as it is stored."""
    return in_bytes(load_file(path / "model.safetensors"))


def in_bytes(tree):
    return {name: x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, x in tree.items()}


def loss(scheme):
    return next(value for name, value in LOSS.items() if scheme.startswith(name))


def test_a_weight_is_one_leaf(model):
    folder, _scheme = model
    with pm.open(folder) as checkpoint:
        assert sorted(checkpoint.paths) == sorted(FLOATS)
        assert checkpoint[UP].shape == (256, 384)
        assert np.array_equal(checkpoint[UP], pm.dequantize(checkpoint, UP, dtype=None)[0][UP])
        assert [row.shape for row in pm.stats(checkpoint, UP).leaves] == [(256, 384)]
    with pm.open(folder, raw=True) as stored:
        assert len(stored) > 3


def edits():
    """Name → the edit, what it is on floats, and whether it is exact."""
    extra = RNG.standard_normal((256, 384)).astype("float32")
    return {
        "zero": (lambda at: at.zero(), lambda w: w * 0, True),
        "a row of zeros": (lambda at: at[3].zero(), lambda w: np.where(np.arange(256)[:, None] == 3, 0, w), True),
        "fill": (lambda at: at.fill(0.75), lambda w: np.full_like(w, 0.75), False),
        "set": (lambda at: at.set(extra), lambda w: extra, False),
        "add": (lambda at: at.add(0.5), lambda w: w + np.float32(0.5), False),
        "multiply": (lambda at: at.multiply(0.5), lambda w: w * np.float32(0.5), False),
        "multiply by an odd number": (lambda at: at.multiply(0.9), lambda w: w * np.float32(0.9), False),
        "multiply by a negative number": (lambda at: at.multiply(-2.0), lambda w: w * np.float32(-2), False),
        "clip": (lambda at: at.clip(-1.0, 1.0), lambda w: np.clip(w, -1, 1), False),
        "apply": (lambda at: at.apply(np.abs), np.abs, False),
        "scales kept": (lambda at: at.add(0.3, requantize="keep"), lambda w: w + np.float32(0.3), False),
    }


@pytest.mark.parametrize("name", edits())
def test_edits_on_disk_in_place_and_in_memory_agree_and_are_right(model, name, tmp_path):
    folder, scheme = model
    edit, meant, exact = edits()[name]
    before = floats(folder)
    with pm.open(folder) as checkpoint:
        made = edit(pm.at(checkpoint, UP))
        report = made.save(tmp_path / "out")
    after = floats(tmp_path / "out")
    wanted = meant(before[UP])
    gap = after[UP] - wanted
    if exact:
        assert not gap.any()
    else:
        assert np.linalg.norm(gap) <= loss(scheme) * np.linalg.norm(wanted) * (2 if "kept" in name else 1)
    assert np.array_equal(after[DOWN], before[DOWN])
    (row,) = report.to_dict()["changed"]
    assert row["path"] == UP and row["scheme"] == scheme
    if "relative_l2" in row:
        own = np.linalg.norm(gap.astype("float64")) / np.linalg.norm(wanted.astype("float64"))
        assert row["relative_l2"] == pytest.approx(own, rel=1e-3, abs=1e-6)
        assert row["max_abs"] == pytest.approx(np.abs(gap).max(), rel=1e-3, abs=1e-6)
    # What is not of that weight keeps its bytes.
    old, new = bytes_of(folder), bytes_of(tmp_path / "out")
    assert {leaf for leaf in old if old[leaf] != new[leaf]} <= {leaf for leaf in old if ".up_proj." in leaf}
    # In place it is the same, and is taken back byte for byte.
    file = folder / "model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    pm.patch(folder, lambda tree: edit(pm.at(tree, UP)))
    assert bytes_of(folder) == new
    pm.undo(folder)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == digest
    # In memory too.
    tree = load_file(file)
    edited = edit(pm.at(tree, UP))
    assert in_bytes(edited) == new


@pytest.mark.parametrize("scheme", ["fp8-block", "int4", "gptq", "nf4", "mxfp4"])
def test_blocks_without_a_change_keep_their_bytes(scheme):
    tree = pm.quantize({"fc": {"weight": torch.from_numpy(WEIGHT)}}, "**", scheme=scheme)[0]
    new = pm.at(tree, "fc.weight")[0, 0].set(torch.tensor(9.0))
    old_values, new_values = (pm.dequantize(each, "**", dtype="float32")[0]["fc"]["weight"] for each in (tree, new))
    moved = (old_values != new_values).nonzero()
    assert len(moved) and moved[:, 0].max() < 128 and moved[:, 1].max() < 128
    assert abs(new_values[0, 0].item() - 9) <= 1


def test_zeros_are_codes_and_scales_stay(model, tmp_path):
    folder, _scheme = model
    with pm.open(folder) as checkpoint:
        pm.at(checkpoint, UP).zero(requantize="never").save(tmp_path / "out")
    old, new = bytes_of(folder), bytes_of(tmp_path / "out")
    changed = [name for name in old if old[name] != new[name]]
    assert len(changed) == 1 and changed[0].rpartition(".")[2] in ("weight", "weight_packed", "qweight")
    assert not np.signbit(floats(tmp_path / "out")[UP]).any()


def test_a_checkpoint_that_was_looked_at_can_be_pickled(model):
    with pm.open(model[0]) as checkpoint:
        paths = checkpoint.paths
        again = pickle.loads(pickle.dumps(checkpoint))
        assert again.paths == paths and np.array_equal(again[UP], checkpoint[UP])


def test_what_must_be_encoded_is_refused_where_that_is_asked(model):
    folder, _scheme = model
    with pm.open(folder) as checkpoint:
        with pytest.raises(Quantized, match="would encode the weight anew"):
            pm.at(checkpoint, UP).add(1.0, requantize="never")
        with pytest.raises(pm.errors.BadArgument, match="a way to encode"):
            pm.at(checkpoint, UP).add(1.0, requantize="amx")
        assert pm.at(checkpoint, "model.norm.weight").add(1.0, requantize="never")["model.norm.weight"][0] == 2


def test_a_cast_is_what_dequantize_does(model, tmp_path):
    folder, _scheme = model
    with pm.open(folder) as checkpoint:
        pm.at(checkpoint, UP).cast("bfloat16").save(tmp_path / "cast")
        pm.dequantize(checkpoint, UP)[0].save(tmp_path / "dequantised")
    assert bytes_of(tmp_path / "cast") == bytes_of(tmp_path / "dequantised")
    one, other = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("cast", "dequantised"))
    assert one["quantization_config"] == other["quantization_config"]


def test_whole_blocks_move_with_their_scales():
    for scheme, places in (("fp8-block", range(128, 256)), ("fp8-channel", [5, 3, 3]), ("int8", [255, 0])):
        tree = pm.quantize({"fc": {"weight": torch.from_numpy(WEIGHT)}}, "**", scheme=scheme)[0]
        before = pm.dequantize(tree, "**", dtype="float32")[0]["fc"]["weight"].numpy()
        taken = pm.at(tree, "fc.weight").take(places)
        after = pm.dequantize(taken, "**", dtype="float32")[0]["fc"]["weight"].numpy()
        assert np.array_equal(after, before[list(places)])
    with pytest.raises(Quantized, match="move in whole blocks"):
        pm.at(pm.quantize({"fc": {"weight": WEIGHT}}, "**", scheme="fp8-block")[0], "fc/weight").take([0, 1])
    with pytest.raises(Quantized, match="move in whole blocks"):
        pm.at(tree, "fc.weight").transpose((1, 0))


def test_projections_that_engines_join_keep_one_scale_of_scales():
    layer = {f"{name}.weight": torch.from_numpy(WEIGHT.copy()) for name in ("q_proj", "k_proj", "o_proj")}
    tree = pm.quantize(layer, "**", scheme="nvfp4")[0]
    top = {name: tree[f"{name}.weight_global_scale"].item() for name in ("q_proj", "k_proj", "o_proj")}
    with pytest.raises(pm.errors.Unsupported, match="edit all weights that share it"):
        pm.at(tree, "q_proj.weight").multiply(3.0)
    alone = pm.at(tree, "q_proj.weight").multiply(0.5)
    assert alone["q_proj.weight_global_scale"].item() == top["q_proj"]
    both = pm.at(tree, "{q,k}_proj.weight").multiply(0.5)
    assert both["q_proj.weight_global_scale"].item() == both["k_proj.weight_global_scale"].item() == top["q_proj"] * 2
    assert pm.at(tree, "o_proj.weight").multiply(0.5)["o_proj.weight_global_scale"].item() == top["o_proj"] * 2


def test_trees_of_jax_stay_arrays_of_jax():
    tree = {"Dense_0": {"kernel": jnp.arange(-16, 16, dtype=jnp.int8).reshape(4, 8), "scale": jnp.ones(8)}}
    doubled = pm.at(tree, "Dense_0/kernel").multiply(2.0)
    assert (
        isinstance(doubled["Dense_0"]["scale"], type(jnp.ones(1))) and doubled["Dense_0"]["scale"].tolist() == [2] * 8
    )
    assert doubled["Dense_0"]["kernel"] is tree["Dense_0"]["kernel"]
    assert pm.at(tree, "Dense_0/kernel").one().dtype == jnp.float32


def test_modules_of_torch_change_in_place():
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    module.weight_scale_inv = torch.nn.Parameter(torch.ones(1, 1), requires_grad=False)
    weight, scale = module.weight, module.weight_scale_inv
    pm.at(module, "weight").add_(2.0)
    assert module.weight is weight and module.weight_scale_inv is scale
    assert (module.weight.float() * module.weight_scale_inv).tolist() == [[3.0] * 4] * 4
    pm.at(module, "weight").zero_()
    assert not module.weight.float().any() and module.weight_scale_inv.item() == scale.item()


def test_powers_of_two_take_no_other_factor():
    leaves = {"weight": np.full((4, 16), 0x21, "uint8"), "weight_scale": np.full((4, 1), 127, "uint8")}
    tree = {"fc": {"weight_packed": leaves["weight"], "weight_scale": leaves["weight_scale"]}}
    assert pm.at(tree, "fc/weight").multiply(4.0)["fc"]["weight_scale"].tolist() == [[129]] * 4
    with pytest.raises(Quantized):
        pm.at(tree, "fc/weight").multiply(0.9, requantize="never")


def test_scales_are_a_name_of_the_weight_too():
    tree = {"weight": np.ones((4, 4), ml_dtypes.float8_e4m3fn), "weight_scale_inv": np.ones((1, 1), "float32")}
    tree = {"fc": tree}
    assert pm.at(tree, "**/weight_scale_inv").paths == ["fc/weight"]
    assert not pm.at(tree, "**/weight_scale_inv").zero()["fc"]["weight"].astype(float).any()


def test_a_plan_says_how(model):
    folder, scheme = model
    with pm.open(folder) as checkpoint:
        text = str(pm.at(checkpoint, UP).add(1.0).plan)
        assert f"add(1.0) ({scheme}: encoded anew, with scales by the greatest magnitude of each block (amax))" in text
        assert "codes of 0" in str(pm.at(checkpoint, UP).zero().plan)
        assert "by its scales" in str(pm.at(checkpoint, UP).multiply(2.0).plan)


def test_a_report_has_the_distance_of_all_that_was_encoded(model, tmp_path):
    """Also where it is 0."""
    folder, scheme = model
    with pm.open(folder) as checkpoint:
        (row,) = pm.at(checkpoint, UP).clip(-1e6, 1e6).save(tmp_path / "out").to_dict()["changed"]
    assert row["relative_l2"] == row["max_abs"] == row["blocks_encoded"] == 0 and row["scheme"] == scheme
    assert bytes_of(folder) == bytes_of(tmp_path / "out")


def test_the_first_version_of_gptq_holds_positive_values_without_a_zero_point_of_0(tmp_path):
    leaves = {"qweight": np.full((4, 8), 0x33333333, np.int32), "qzeros": np.full((1, 1), 0x12345677, np.int32)}
    leaves["scales"] = np.ones((1, 8), np.float16)
    pm.save({f"fc.{name}": leaf for name, leaf in leaves.items()}, tmp_path / "model.safetensors")
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "checkpoint_format": "gptq"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pm.open(tmp_path) as checkpoint:
        filled = pm.at(checkpoint, "fc.weight").fill(0.5)
        assert np.allclose(filled["fc.weight"], 0.5, rtol=1e-3)


def nested(values, scale):
    """Codes of nf4 whose scales are codes: map[code] · `scale` + 0.02."""
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [4, 64]}
    state |= {"nested_blocksize": 256, "nested_offset": 0.02}
    leaves = {"": np.full((128, 1), 0xFF, np.uint8), ".absmax": values, ".quant_map": np.zeros(16, "float32")}
    leaves |= {".nested_absmax": np.array([scale], "float32")}
    leaves |= {".nested_quant_map": np.linspace(-1, 1, 255, dtype="float32").repeat([1] * 254 + [2])}
    leaves |= {".quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8)}
    return {f"fc.weight{name}": leaf for name, leaf in leaves.items()}


def test_scales_of_scales_of_bitsandbytes_grow_where_a_block_needs_it():
    tree = nested(np.array([254, 127, 0, 127], np.uint8), 0.01)
    assert np.allclose(pm.at(tree, "fc.weight").one()[:, 0], [0.03, 0.02, 0.01, 0.02])
    filled = pm.at(tree, "fc.weight").fill(0.5)
    assert np.allclose(pm.at(filled, "fc.weight").one(), 0.5, rtol=1e-6)
    with pytest.raises(pm.errors.Unsupported, match="near enough"):  # 0.02 is added to all scales
        pm.at(tree, "fc.weight").multiply(1e-4)
    smaller = pm.at(tree, "fc.weight")[1].add(-0.01)
    assert smaller["fc.weight.nested_absmax"] == tree["fc.weight.nested_absmax"]
    assert np.allclose(pm.at(smaller, "fc.weight").one()[:, 0], [0.03, 0.01, 0.01, 0.02])


def test_parameters_are_counted_as_weights(model):
    folder, _scheme = model
    with pm.open(folder) as checkpoint:
        assert pm.param_count(checkpoint) == 2 * 256 * 384 + 4 and pm.param_count(checkpoint, UP) == 256 * 384


def test_stacked_codes_of_a_scheme_of_matrices_are_refused_by_name():
    tree = pm.quantize({"fc": {"weight": torch.from_numpy(WEIGHT)}}, "**", scheme="gptq")[0]["fc"]
    stacked = {"fc": {name: torch.stack([leaf, leaf]) for name, leaf in tree.items()}}
    with pytest.raises(pm.errors.SpecMismatch, match="one of matrices"):
        pm.at(stacked, "fc.weight").zero()


def test_blocks_whose_scales_are_not_finite():
    scales = np.full((2, 4, 1), 127, np.uint8)
    scales[0, 0] = 255  # 2^128, as the library has it
    experts = {"gate_up_proj_blocks": np.full((2, 4, 1, 16), 0x22, np.uint8), "gate_up_proj_scales": scales}
    zero = pm.at({"experts": experts}, "experts/gate_up_proj").zero()
    assert not pm.at(zero, "experts/gate_up_proj").one().any()
    assert zero["experts"]["gate_up_proj_scales"][1].tolist() == [[127]] * 4
    tree = {"weight": np.ones((4, 4), ml_dtypes.float8_e4m3fn), "weight_scale_inv": np.full((1, 1), np.nan, "f4")}
    row = pm.at(pm.at({"fc": tree}, "fc/weight")[0].zero(), "fc/weight").one()
    assert not row[0].any() and np.isnan(row[1:]).all()
    four = {"weight_packed": np.full((1, 8), 0x22, np.uint8), "weight_scale": np.ones((1, 1), ml_dtypes.float8_e4m3fn)}
    four["weight_global_scale"] = np.zeros(1, "float32")
    with pytest.raises(pm.errors.Unsupported, match="scales of scales"):
        pm.at({"fc": four}, "fc/weight").zero()


def test_nan_that_stays_is_no_distance(tmp_path):
    codes = np.ones((4, 4), ml_dtypes.float8_e4m3fn)
    codes[0, 0] = np.nan
    pm.save({"fc.weight": codes, "fc.weight_scale_inv": np.ones((1, 1), "float32")}, tmp_path / "m.safetensors")
    with pm.open(tmp_path / "m.safetensors") as checkpoint:
        (row,) = pm.at(checkpoint, "fc.weight").add(1.0).save(tmp_path / "out.safetensors").to_dict()["changed"]
    assert row["relative_l2"] == row["max_abs"] == 0


def test_a_leaf_that_two_weights_share_does_not_change_for_one():
    codes, scale = torch.ones(4, 4).to(torch.float8_e4m3fn), torch.full((1, 1), 2.0)
    whole = {name: {"weight": codes, "weight_scale_inv": scale} for name in "ab"}
    assert pm.at(pm.at(whole, "a.weight").add(1.0), "b.weight").one()[0, 0] == 3
    scales = {name: {"weight": codes.clone(), "weight_scale_inv": scale} for name in "ab"}
    payload = {name: {"weight": codes, "weight_scale_inv": scale.clone()} for name in "ab"}
    for tree, edit in (
        (scales, lambda at: at.multiply(3.0)),
        (scales, lambda at: at.add(1.0)),
        (payload, lambda at: at.zero()),
        (payload, lambda at: at.fill(1.0)),
    ):
        with pytest.raises(Quantized, match=r"is a part of b\.weight, too"):
            edit(pm.at(tree, "a.weight"))
    assert not pm.at(pm.at(scales, "a.weight").zero(), "a.weight").one().any()
    both = pm.at(scales, "{a,b}.weight").multiply(3.0)
    assert [pm.at(both, f"{name}.weight").one()[0, 0] for name in "ab"] == [6, 6]


def test_files_are_closed_when_nobody_holds_the_checkpoint(model, tmp_path):
    pm.save({"w": np.ones(2, "float32")}, tmp_path / "plain.safetensors")
    for path in (model[0], tmp_path / "plain.safetensors"):
        checkpoint = pm.open(path)
        assert len(pm.at(checkpoint, "**").get()) == len(checkpoint.paths)
        source = weakref.ref(checkpoint.source)
        del checkpoint
        assert source() is None
