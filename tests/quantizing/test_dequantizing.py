"""Quantised weights as floats: what comes out is what the formats define, and all else stays, on disk and in memory."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import paramend as pm
from paramend.anatomy.quantization import dequantised, stated
from paramend.errors import BadArgument, NoMatch, Quantized, RenameClash, SpecMismatch, Unsupported, ValuesLost
from support import tiny_models

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def codes(*shape, seed=0):
    """Random codes of FP8, none of them NaN."""
    found = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    found[(found & 0x7F) == 0x7F] = 0
    return torch.from_numpy(found).view(torch.float8_e4m3fn)


def scales(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def product(q, s, dtype=torch.bfloat16, block=128):
    """Codes times the scales of their blocks, in float32, rounded once."""
    rows, columns = q.shape
    return (q.float() * s.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]).to(dtype)


def same(got, want):
    """Whether an array has shape, dtype and bits of a tensor."""
    assert got.dtype.name == str(want.dtype).removeprefix("torch.")
    return np.array_equal(got, want.view(torch.int16).numpy().view(got.dtype) if got.itemsize == 2 else want.numpy())


UP, GATE, NORM = (f"model.layers.{n}.weight" for n in ("0.up_proj", "1.gate_proj", "1.norm"))


@pytest.fixture
def leaves():
    return {
        UP: codes(129, 256),
        f"{UP}_scale_inv": scales(2, 2),
        GATE: codes(256, 128, seed=1),
        f"{GATE}_scale_inv": scales(2, 1, seed=1),
        NORM: torch.arange(3, dtype=torch.bfloat16),
        "lm_head.weight": torch.randn(4, 3, generator=torch.Generator().manual_seed(3)).bfloat16(),
    }


@pytest.fixture
def folder(tmp_path, leaves):
    """A model in two shards: of one weight, codes and scales are in different ones."""
    path = tmp_path / "model"
    path.mkdir()
    of = {name: 1 + (name in (f"{UP}_scale_inv", GATE, NORM)) for name in leaves}
    for shard in (1, 2):
        some = {name: leaf for name, leaf in leaves.items() if of[name] == shard}
        save_file(some, path / f"model-{shard:05}-of-00002.safetensors", {"format": "pt"})
    files = {name: f"model-{shard:05}-of-00002.safetensors" for name, shard in of.items()}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config = {"torch_dtype": "bfloat16", "quantization_config": FP8 | {"modules_to_not_convert": ["lm_head"]}}
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "tokenizer.json").write_text("{}")
    return path


def written(path):
    """All leaves of a folder, as torch reads them."""
    return {name: leaf for file in sorted(path.glob("*.safetensors")) for name, leaf in load_file(file).items()}


# ---- on disk ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_each_weight_as_one_leaf_and_the_rest_as_it_was(folder, leaves, tmp_path):
    tree, report = pm.dequantize(pm.open(folder))
    assert [(row.path, row.scheme, str(row.spec)) for row in report.rows] == [
        (UP, "fp8-block", "bfloat16[129,256]"),
        (GATE, "fp8-block", "bfloat16[256,128]"),
    ]
    assert report.rows[0].leaves == (UP, f"{UP}_scale_inv") and (report.kept, report.others) == ({}, 2)
    done = tree.save(tmp_path / "out")
    found = written(tmp_path / "out")
    assert set(found) == {UP, GATE, NORM, "lm_head.weight"}
    for name in (UP, GATE):
        assert torch.equal(found[name], product(leaves[name], leaves[f"{name}_scale_inv"]))
    for name in (NORM, "lm_head.weight"):
        assert torch.equal(found[name], leaves[name])
    assert done.bytes_computed == 2 * (129 * 256 + 256 * 128) and (tmp_path / "out" / "tokenizer.json").exists()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)


def test_the_configuration_goes_with_the_last_quantised_weight(folder, tmp_path):
    tree, report = pm.dequantize(pm.open(folder))
    tree.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"torch_dtype": "bfloat16"}
    assert any("quantization_config" in line for line in report.said)


def test_a_module_joins_the_list_of_those_that_are_not_quantised(folder, leaves, tmp_path):
    tree, report = pm.dequantize(pm.open(folder), "**/up_proj/weight")
    assert report.kept == {GATE: "fp8-block"}
    tree.save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    listed = config["quantization_config"]["modules_to_not_convert"]
    assert listed == ["lm_head", "model.layers.0.up_proj"]
    found = written(tmp_path / "out")
    assert torch.equal(found[GATE].view(torch.uint8), leaves[GATE].view(torch.uint8))
    again, rest = pm.dequantize(pm.open(tmp_path / "out"))
    assert [row.path for row in rest.rows] == [GATE] and same(again[GATE], product(leaves[GATE], scales(2, 1, seed=1)))


def test_the_dtype_of_the_configuration_follows(folder, tmp_path):
    tree, _ = pm.dequantize(
        pm.at(pm.open(folder), pm.sel("**").where(dtype="bfloat16")).cast("float32"), dtype="float32"
    )
    tree.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"torch_dtype": "float32"}


def test_positions_count_layers_afterwards_too(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "num_nextn_predict_layers": 1}))
    tree, _ = pm.dequantize(pm.open(folder), "**/layers[-1]/**")
    stored = tree.as_stored().paths
    assert f"{UP}_scale_inv" not in stored and f"{GATE}_scale_inv" in stored
    assert pm.at(tree, "**/layers[-1]/**").paths == [UP]


@pytest.mark.slow
def test_a_model_is_loaded_by_transformers_bit_for_bit(tmp_path):
    model = tiny_models.make("llama", torch.bfloat16)
    plain = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    stored, want = dict(plain), dict(plain)
    for place, name in enumerate(name for name in plain if name.endswith("_proj.weight")):
        q = codes(*plain[name].shape, seed=place)
        s = scales(*(-(-n // 16) for n in q.shape), seed=place) / 1024
        stored |= {name: q, f"{name}_scale_inv": s}
        want[name] = product(q, s, block=16)
    model.save_pretrained(tmp_path / "model")
    save_file(stored, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = FP8 | {"weight_block_size": [16, 16]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    pm.dequantize(pm.open(tmp_path / "model"))[0].save(tmp_path / "out")
    got = tiny_models.kind("llama").from_pretrained(tmp_path / "out", dtype="auto")
    assert not hasattr(got.config, "quantization_config")
    assert all(torch.equal(leaf, want[name]) for name, leaf in got.state_dict().items())


def test_files_that_tell_of_quantisation_alone_go_with_it(folder, tmp_path):
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "quantize_config.json").write_text(json.dumps(FP8))
    done = pm.dequantize(pm.open(folder))[0].save(tmp_path / "out")
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    assert (tmp_path / "out" / "config.json").read_text() == '{"a": 1}'
    assert done.left_out == ("quantize_config.json (no longer true)",)


@pytest.mark.parametrize("suffix", [".pt", ".npz", ".msgpack"])
def test_other_formats_hold_quantised_kernels_too(suffix, tmp_path):
    kernel, scale = np.arange(-16, 16, dtype=np.int8).reshape(4, 8), np.arange(8, dtype=np.float32)
    pm.save({"a": {"kernel": kernel, "scale": scale}, "n": np.ones(3)}, tmp_path / f"m{suffix}")
    pm.dequantize(pm.open(tmp_path / f"m{suffix}"), dtype="float32")[0].save(tmp_path / f"out{suffix}")
    found = pm.load(tmp_path / f"out{suffix}")
    assert np.array_equal(found["a"]["kernel"], kernel.astype(np.float32) * scale) and list(found["a"]) == ["kernel"]


# ---- schemes ------------------------------------------------------------------------------------------------------


def packed(values, axis):
    """Codes of 4 bits in words of 32, eight in a row along an axis."""
    words = np.stack(
        [np.take(values, range(at, values.shape[axis], 8), axis).astype(np.uint32) << 4 * at for at in range(8)]
    )
    return np.bitwise_or.reduce(words).view(np.int32)


Q = np.random.default_rng(0).integers(0, 16, (24, 16))  # (in, out)
S = np.random.default_rng(1).random((1, 16)).astype(np.float16)


def test_weights_of_gptq_get_their_own_name_and_shape():
    model = {
        "fc": {"qweight": packed(Q, 0), "qzeros": packed(np.full((1, 16), 7), 1), "scales": S, "bias": np.ones(16)}
    }
    tree, report = pm.dequantize(model, dtype="float32")
    assert list(tree["fc"]) == ["weight", "bias"] and tree["fc"]["bias"] is model["fc"]["bias"]
    assert np.array_equal(tree["fc"]["weight"], ((Q - 8).astype(np.float32) * S.astype(np.float32)).T)
    assert report.rows[0].scheme == "gptq" and report.rows[0].leaves == ("fc/qweight", "fc/scales", "fc/qzeros")


def test_experts_of_gpt_oss_get_their_own_name_and_shape():
    blocks, exponents = np.full((2, 4, 3, 16), 0x2A, np.uint8), np.full((2, 4, 3), 128, np.uint8)
    tree, _ = pm.dequantize({"experts": {"gate_up_proj_blocks": blocks, "gate_up_proj_scales": exponents}}, dtype=None)
    found = tree["experts"]["gate_up_proj"]
    assert found.shape == (2, 96, 4) and found.dtype.name == "bfloat16"
    assert np.array_equal(found[0, :2, 0].astype(np.float32), [-2.0, 2.0])  # the low half first: -1 · 2, 1 · 2


# ---- in memory ----------------------------------------------------------------------------------------------------


def test_a_state_dict_holds_tensors_and_keeps_other_objects(leaves):
    tree, _ = pm.dequantize(leaves)
    assert list(tree) == [UP, GATE, NORM, "lm_head.weight"] and tree[NORM] is leaves[NORM]
    assert torch.equal(tree[UP], product(leaves[UP], leaves[f"{UP}_scale_inv"])) and tree[UP].dtype == torch.bfloat16


def test_kernels_of_jax_stay_arrays_of_jax():
    model = {"Dense_0": {"kernel": jnp.full((4, 8), 3, jnp.int8), "scale": jnp.arange(8, dtype=jnp.float32)}}
    tree, report = pm.dequantize(model, dtype="float32")
    assert isinstance(tree["Dense_0"]["kernel"], jnp.ndarray) and list(tree["Dense_0"]) == ["kernel"]
    assert np.array_equal(tree["Dense_0"]["kernel"], np.tile(3.0 * np.arange(8), (4, 1)))
    assert json.loads(json.dumps(report.to_dict()))["weights"][0]["path"] == "Dense_0/kernel"


def test_tied_weights_stay_tied(leaves):
    twin = {"twin.weight": leaves[UP], "twin.weight_scale_inv": leaves[f"{UP}_scale_inv"]}
    tree, report = pm.dequantize(leaves | twin, UP)
    assert tree["twin.weight"] is tree[UP] and len(report.rows) == 2


def test_the_least_codes_keep_their_values_where_torch_flushes_least_numbers():
    leaves = {
        "w.weight": torch.arange(8, dtype=torch.uint8).view(torch.float8_e4m3fn)[None],
        "w.weight_scale": torch.ones(1),
    }
    torch.set_flush_denormal(True)
    try:
        tree, _ = pm.dequantize(leaves)
    finally:
        torch.set_flush_denormal(False)
    assert tree["w.weight"].tolist() == [[code * 2.0**-9 for code in range(8)]]


def test_values_beyond_float16_are_counted(tmp_path):
    leaves = {
        "w.weight": torch.tensor([[1.0, -448.0]]).to(torch.float8_e4m3fn),
        "w.weight_scale": torch.tensor([200.0]),
    }
    want = np.array([[200, -np.inf]], np.float16)
    with pytest.warns(ValuesLost, match=r"1 value overflows \(w.weight\)"):
        tree, _ = pm.dequantize(leaves, dtype="float16")
    assert np.array_equal(tree["w.weight"].numpy(), want) and tree["w.weight"].dtype == torch.float16
    save_file(leaves, tmp_path / "a.safetensors")
    report = pm.dequantize(pm.open(tmp_path / "a.safetensors"), dtype="float16")[0].save(tmp_path / "b.safetensors")
    assert "1 value overflows (w.weight)" in report.summary
    assert np.array_equal(load_file(tmp_path / "b.safetensors")["w.weight"].numpy(), want)


# ---- selectors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "want"),
    [
        ("**/{up,gate}_proj/*", [UP, GATE]),
        ("**/weight_scale_inv", [UP, GATE]),
        (pm.sel("**").where(dtype="float8_e4m3fn"), [UP, GATE]),
        (pm.sel("**").where(ndim=2, dtype="float32") & ~pm.sel(UP), [GATE]),
        ([UP, NORM], [UP]),
    ],
)
def test_weights_are_chosen_by_their_names_or_by_those_of_their_leaves(leaves, selector, want):
    assert [row.path for row in pm.dequantize(leaves, selector)[1].rows] == want


@pytest.mark.parametrize("selector", [NORM, ~pm.sel("**/*_proj/weight"), "nowhere"])
def test_a_selector_of_no_quantised_weight_is_an_error(leaves, selector):
    with pytest.raises(NoMatch):
        pm.dequantize(leaves, selector)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"dtype": "int8"}, BadArgument, "int8"),
        ({"dtype": "float8_e4m3fn"}, BadArgument, "float8_e4m3fn"),
    ],
)
def test_weights_become_floats(leaves, change, error, says):
    with pytest.raises(error, match=says):
        pm.dequantize(leaves, **change)


def test_what_cannot_be_decoded_is_refused_by_name():
    model = {
        "a": {"trellis": np.zeros((2, 2, 32), np.int16), "suh": np.ones(32, "float16"), "svh": np.ones(32, "float16")}
    }
    with pytest.raises(Quantized, match="a/trellis"):
        pm.dequantize(model)


def test_the_name_of_a_weight_may_be_taken():
    model = {"qweight": packed(Q, 0), "qzeros": packed(np.full((1, 16), 7), 1), "scales": S, "weight": np.ones(2)}
    with pytest.raises(RenameClash, match="weight"):
        pm.dequantize(model)


def test_modules_are_edited_as_their_state():
    module = torch.nn.Linear(4, 3, bias=False)
    module.weight = torch.nn.Parameter(codes(3, 4), requires_grad=False)
    module.weight_scale = torch.nn.Parameter(scales(1), requires_grad=False)
    with pytest.raises(Unsupported, match="state_dict"):
        pm.dequantize(module)
    assert list(pm.dequantize(module.state_dict())[0]) == ["weight"]


def test_a_weight_whose_module_is_ignored_is_an_error(folder):
    config = {"quantization_config": FP8 | {"modules_to_not_convert": ["model.layers.0.up_proj"]}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecMismatch, match="up_proj"):
        pm.dequantize(pm.open(folder))


# ---- configurations -----------------------------------------------------------------------------------------------

METHODS = {
    "compressed-tensors": ({"quant_method": "compressed-tensors", "ignore": ["lm_head"]}, "ignore", ["lm_head", "a.b"]),
    "fp8": ({"quant_method": "fp8"}, "modules_to_not_convert", ["lm_head", "a.b"]),
    "fp8 of vLLM": ({"quant_method": "fp8", "ignored_layers": []}, "ignored_layers", ["a.b"]),
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, "llm_int8_skip_modules", ["lm_head", "a.b"]),
    "awq": ({"quant_method": "awq", "modules_to_not_convert": None}, "modules_to_not_convert", ["lm_head", "a.b"]),
    "modelopt": ({"quant_method": "modelopt", "exclude_modules": ["a*"]}, "exclude_modules", ["a*"]),
    "quark": ({"quant_method": "quark", "exclude": ["c"]}, "exclude", ["c", "a.b"]),
    "gptq": ({"quant_method": "gptq"}, "dynamic", {r"-:^a\.b$": {}}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("above", [(), ("text_config",)])
def test_each_method_has_its_list(method, above):
    config, key, want = METHODS[method]
    whole = {"quantization_config": config}
    whole = {"text_config": whole, "a": 1} if above else whole
    found = dequantised("config.json", whole, ["a.b"], ["lm_head"], left=True)
    part = (found["text_config"] if above else found)["quantization_config"]
    assert part[key] == want and stated(part, "a.b").ignored and not stated(part, "d.b").ignored
    assert dequantised("config.json", whole, ["a.b"], [], left=False) == ({"text_config": {}, "a": 1} if above else {})


def test_files_of_other_writers_follow_or_go():
    old = {"producer": {}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}
    new = dequantised("hf_quant_config.json", old, ["a.b"], [], left=True)
    assert new["quantization"]["exclude_modules"] == ["lm_head", "a.b"] and old["quantization"]["exclude_modules"] == [
        "lm_head"
    ]
    assert dequantised("quantize_config.json", {"bits": 4}, ["a.b"], [], left=False) is None
