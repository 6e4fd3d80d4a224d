"""Floats in a scheme, or with the values that it gives: leaves, configuration, and what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import paramend as pm
from paramend.anatomy.quantization import quantised
from paramend.cli.main import cli
from paramend.errors import BadArgument, NoMatch, Quantized, SpecMismatch, Unsupported
from support.slow import slow_except

SCHEMES = [
    "fp8-tensor",
    "fp8-channel",
    "fp8-block",
    "int8",
    "int4",
    "gptq",
    "awq",
    "mxfp4",
    "nvfp4",
    "nf4",
    "fp4",
    "bnb-int8",
]
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"


def drawn(*shape, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()


@pytest.fixture
def leaves():
    return {
        "model.embed_tokens.weight": drawn(16, 128),
        UP: drawn(256, 128, seed=1),
        DOWN: drawn(128, 256, seed=2),
        "model.layers.1.mlp.down_proj.bias": drawn(128, seed=3),
        "model.norm.weight": drawn(128, seed=4),
        "lm_head.weight": drawn(16, 128, seed=5),
    }


@pytest.fixture
def folder(tmp_path, leaves):
    path = tmp_path / "model"
    path.mkdir()
    save_file(leaves, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", "model_type": "llama"}))
    return path


def config_of(path):
    return json.loads((path / "config.json").read_text()).get("quantization_config")


# ---- in a scheme --------------------------------------------------------------------------------------------------


def test_codes_of_blocks_are_those_of_arithmetic(leaves):
    tree, report = pm.quantize(leaves, UP, scheme="fp8-block")
    weight = leaves[UP].float()
    scale = weight.reshape(2, 128, 128).abs().amax((1, 2))[:, None] / 448
    want = (weight / scale.repeat_interleave(128, 0)).to(torch.float8_e4m3fn)
    assert torch.equal(tree[f"{UP}_scale_inv"], scale)
    assert torch.equal(tree[UP].view(torch.uint8), want.view(torch.uint8))
    error = (want.float() * scale.repeat_interleave(128, 0)).double() - weight.double()
    assert report.rows[0].relative_l2 == pytest.approx(float(error.norm() / weight.double().norm()))
    assert report.rows[0].max_abs == pytest.approx(float(error.abs().max()))
    assert list(tree)[1:4] == [UP, f"{UP}_scale_inv", DOWN] and tree[DOWN] is leaves[DOWN]


def test_codes_of_int4_are_those_of_arithmetic(leaves):
    tree, _ = pm.quantize(leaves, DOWN, scheme="int4", group_size=64)
    name = DOWN.removesuffix(".weight")
    assert tree[f"{name}.weight_shape"].tolist() == [128, 256]
    scale, words = tree[f"{name}.weight_scale"], tree[f"{name}.weight_packed"].numpy().view(np.uint32)
    greatest = leaves[DOWN].float().reshape(128, 4, 64).abs().amax(-1)
    assert torch.equal(scale, (greatest / 7.5).bfloat16())
    codes = np.stack([words >> 4 * at & 15 for at in range(8)], -1).reshape(128, 256).astype(np.float32) - 8
    exact = leaves[DOWN].float().numpy() / np.repeat(scale.float().numpy(), 64, 1)
    assert np.array_equal(codes, np.clip(np.rint(exact), -8, 7))


@pytest.mark.parametrize("scheme", slow_except(set(SCHEMES) - {"nf4", "fp4"}, SCHEMES))
def test_leaves_and_configuration_agree(folder, leaves, tmp_path, scheme):
    out = tmp_path / "out"
    tree, report = pm.quantize(pm.open(folder), "**", scheme=scheme)
    assert [row.path for row in report.rows] == [UP, DOWN]
    assert all(0.001 < row.relative_l2 < 0.14 and row.max_abs > 0 for row in report.rows)
    tree.save(out)
    found = load_file(out / "model.safetensors")
    for name in leaves.keys() - {UP, DOWN}:
        assert torch.equal(found[name], leaves[name])
    same, _ = pm.quantize(leaves, "**", scheme=scheme)
    assert set(same) == set(found) and all(
        torch.equal(same[n].view(torch.uint8), found[n].view(torch.uint8)) for n in found if same[n].ndim
    )
    back, told = pm.dequantize(pm.open(out))
    simulated, _ = pm.quantize(pm.open(folder), "**", scheme=scheme, simulate=True)
    assert [row.scheme for row in told.rows] == [scheme] * 2
    assert all(np.array_equal(back[name].view(np.uint16), simulated[name].view(np.uint16)) for name in leaves)
    back.save(tmp_path / "back")
    assert config_of(out) and config_of(tmp_path / "back") is None


def test_a_second_layer_joins_the_first(folder, tmp_path):
    pm.quantize(pm.open(folder), UP, scheme="int4")[0].save(tmp_path / "one")
    assert DOWN.removesuffix(".weight") in config_of(tmp_path / "one")["ignore"]
    tree, report = pm.quantize(pm.open(tmp_path / "one"), "**", scheme="int4")
    assert [row.path for row in report.rows] == [DOWN] and report.kept == {UP: "int4"}
    tree.save(tmp_path / "two")
    assert sorted(config_of(tmp_path / "two")["ignore"]) == ["lm_head", "model.embed_tokens"]
    with pytest.raises(Unsupported, match=r"quant_method: compressed-tensors.* is written as quant_method: fp8"):
        pm.quantize(pm.open(tmp_path / "one"), DOWN, scheme="fp8-block")
    simulated, _ = pm.quantize(pm.open(tmp_path / "one"), DOWN, scheme="fp8-block", simulate=True)
    assert simulated.paths == pm.open(tmp_path / "one").paths


def test_a_pattern_that_names_a_module_is_not_rewritten():
    old = {
        "quantization_config": quantised("config.json", {}, "int4", None, ["a.up_proj"], [])["quantization_config"]
        | {"ignore": ["re:.*down.*"]}
    }
    with pytest.raises(Unsupported, match="re:"):
        quantised("config.json", old, "int4", None, ["a.down_proj"], [])


# ---- simulated ----------------------------------------------------------------------------------------------------


def test_kernels_of_jax_have_their_scales_by_output():
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((64, 6)) * [1, 10, 100, 1, 1, 1], jnp.float32)
    tree, report = pm.quantize({"Dense_0": {"kernel": kernel, "bias": jnp.ones(6)}}, "**", scheme="int8", simulate=True)
    scale = np.abs(np.asarray(kernel)).max(0) / np.float32(127.5)
    want = np.clip(np.rint(np.asarray(kernel) / scale), -128, 127).astype(np.float32) * scale
    assert isinstance(tree["Dense_0"]["kernel"], jnp.ndarray) and np.array_equal(tree["Dense_0"]["kernel"], want)
    assert report.did == "simulated" and len(report.rows) == 1
    with pytest.raises(Unsupported, match="simulate=True"):
        pm.quantize({"Dense_0": {"kernel": kernel}}, "**", scheme="int8")


def test_modules_of_torch_are_simulated_as_a_copy():
    module = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.LayerNorm(8))
    before = module[0].weight.detach().clone()
    tree, _ = pm.quantize(module, "**", scheme="nf4", simulate=True)
    found = tree[0].weight if isinstance(tree, torch.nn.Module) else tree["0.weight"]
    assert not torch.equal(found, before) and torch.equal(module[0].weight, before)
    assert all(len(set(row)) <= 16 for row in found.reshape(-1, 64).tolist())


# ---- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "scheme", "error", "says"),
    [
        ("model.norm.weight", "int8", SpecMismatch, "model.norm.weight"),
        ([UP, "**/bias"], "int8", SpecMismatch, "down_proj.bias"),
        ("**/embed_tok*/weight", "int8", SpecMismatch, "counts only where it is named"),
        ("nowhere", "int8", NoMatch, "nowhere"),
        (UP, "int3", BadArgument, "int3"),
        ("**/ten.weight", "int4", SpecMismatch, "ten.weight"),
        ("**/bad.weight", "fp8-tensor", Unsupported, "bad.weight: a value is not finite"),
        ("**/nan.weight", "fp8-block", SpecMismatch, "nan.weight: it holds values that are not finite"),
        ("**/whole.weight", "int8", SpecMismatch, "int32"),
    ],
)
@pytest.mark.parametrize("simulate", [False, True])
def test_what_cannot_be_quantised_is_refused_by_name(leaves, selector, scheme, error, says, simulate):
    leaves |= {"ten.weight": drawn(8, 10), "bad.weight": torch.full((8, 8), torch.inf)}
    leaves["nan.weight"] = torch.full((128, 128), torch.nan)
    leaves["whole.weight"] = torch.ones(8, 8, dtype=torch.int32)
    with pytest.raises(error, match=says):
        pm.quantize(leaves, selector, scheme=scheme, simulate=simulate)


@pytest.mark.parametrize("scheme", ["fp8-block", "mxfp4", "nvfp4", "bnb-int8"])
def test_a_size_of_groups_that_a_scheme_has_not_is_refused(leaves, scheme):
    with pytest.raises(BadArgument, match=f"group_size=64: {scheme}"):
        pm.quantize(leaves, UP, scheme=scheme, group_size=64)


def test_a_mistyped_scheme_is_said_before_what_its_weights_must_be():
    with pytest.raises(BadArgument, match=r"(?s)'fp8blok' is no scheme.*hint: fp8-block"):
        pm.quantize({"kernel": np.ones((2, 4), "f4")}, "**", scheme="fp8blok")


def test_a_head_is_quantised_where_it_is_named(leaves):
    assert [row.path for row in pm.quantize(leaves, "**/lm_head/weight", scheme="int8")[1].rows] == ["lm_head.weight"]


def test_what_is_quantised_is_not_quantised_again(leaves):
    tree, _ = pm.quantize(leaves, UP, scheme="fp8-channel")
    with pytest.raises(Quantized, match="fp8-channel"):
        pm.quantize(tree, UP, scheme="int4")


def test_tied_leaves_are_not_parted(leaves):
    leaves["lm_head.weight"] = leaves["model.embed_tokens.weight"]
    with pytest.raises(Unsupported, match="several paths"):
        pm.quantize(leaves, "lm_head.weight", scheme="int8")


# ---- commands -----------------------------------------------------------------------------------------------------


def run(*args):
    done = CliRunner().invoke(cli, list(map(str, args)), prog_name="paramend")
    assert done.exit_code == 0, done.output
    return done


def test_commands_there_and_back(folder, tmp_path):
    told = run("quantize", folder, "**/mlp/**", "--except", DOWN, "--scheme", "fp8-block", "--dry-run")
    assert "relative L2" in told.stdout and "nothing was written" in told.stderr
    run("quantize", folder, "**/mlp/**", "--scheme", "fp8-block", "-o", tmp_path / "q")
    data = json.loads(run("dequantize", tmp_path / "q", "--dtype", "float32", "-o", tmp_path / "f", "--json").stdout)
    assert [row["scheme"] for row in data["weights"]] == ["fp8-block"] * 2
    assert (
        config_of(tmp_path / "f") is None and load_file(tmp_path / "f" / "model.safetensors")[UP].dtype == torch.float32
    )
