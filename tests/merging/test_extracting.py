"""Adapters taken out of a tuned model: the nearest of their rank, in the form that PEFT loads, and back again."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import paramend as pm
from paramend.cli.main import cli
from paramend.errors import BadArgument, CannotWrite, NoMatch, SpecMismatch


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def low(out, into, rank, seed):
    return normal(out, rank, seed=seed) @ normal(rank, into, seed=seed + 1)


SHAPES = {
    "model.embed_tokens.weight": (9, 4),
    "h.0.q_proj.weight": (6, 4),
    "h.0.conv.weight": (5, 3, 2, 2),
    "h.0.mlp.gate.weight": (3, 4),
    "h.0.mlp.experts.gate_up_proj": (3, 8, 4),
    "h.0.mlp.experts.down_proj": (3, 4, 5),
    "h.0.norm.weight": (4,),
    "h.0.same.weight": (2, 2),
}


@pytest.fixture
def models():
    """A base, and one to which matrices of rank 2 were added."""
    base = {path: normal(*shape, seed=n) for n, (path, shape) in enumerate(SHAPES.items())}
    tuned = dict(base)
    for n, (path, shape) in enumerate(SHAPES.items()):
        if len(shape) == 3:
            tuned[path] = base[path] + np.stack([low(*shape[1:], 2, 10 * n + expert) for expert in range(shape[0])])
        elif path.endswith("norm.weight"):
            tuned[path] = base[path] + 1
        elif "same" not in path:
            tuned[path] = base[path] + low(shape[0], int(np.prod(shape[1:])), 2, 100 + 10 * n).reshape(shape)
    return base, tuned


@pytest.mark.numeric
def test_what_was_added_in_few_ranks_comes_back(models, tmp_path):
    base, tuned = models
    adapter, report = pm.extract(tuned, base, rank=2)
    adapter.save(tmp_path / "adapter")
    for given in (adapter, tmp_path / "adapter"):
        made, _ = pm.fold(base, given)
        for path in base.keys() - {"h.0.norm.weight"}:
            np.testing.assert_allclose(made[path], tuned[path], rtol=1e-10, atol=1e-10, err_msg=path)
    assert report.said == (
        "h.0.norm.weight (float64[4]) changed, and is not in the adapter: it is not a matrix of floats in a module",
    )
    assert report.kept == ("h.0.same.weight",)


@pytest.mark.numeric
@pytest.mark.parametrize("rank", [1, 3, 20])
def test_no_adapter_of_its_rank_is_closer(rank):
    base, tuned = {"fc": {"weight": np.zeros((7, 5))}}, {"fc": {"weight": normal(7, 5)}}
    adapter, _ = pm.extract(tuned, base, rank=rank)
    off = pm.fold(base, adapter)[0]["fc"]["weight"] - tuned["fc"]["weight"]
    tail = np.linalg.svd(tuned["fc"]["weight"], compute_uv=False)[rank:]
    np.testing.assert_allclose(np.linalg.norm(off), np.sqrt(np.sum(tail**2)), rtol=1e-10, atol=1e-10)


def test_energy_takes_the_smallest_rank_that_holds_it(tmp_path):
    values = {"a": [3.0, 2.0, 1.0], "b": [1.0, 1.0, 1.0]}  # of squares 9 + 4 + 1 and 1 + 1 + 1
    base = {name: {"weight": np.zeros((3, 3), "float32")} for name in values}
    tuned = {name: {"weight": np.diag(sigma).astype("float32")} for name, sigma in values.items()}
    for energy, ranks in {0.6: (1, 2), 0.9: (2, 3), 0.95: (3, 3)}.items():
        adapter, _ = pm.extract(tuned, base, energy=energy)
        adapter.save(tmp_path / "adapter", force=True)
        leaves = load_file(tmp_path / "adapter/adapter_model.safetensors")
        assert tuple(len(leaves[f"base_model.model.{name}.lora_A.weight"]) for name in values) == ranks
        np.testing.assert_array_equal(
            *(pm.fold(base, each)[0]["a"]["weight"] for each in (adapter, tmp_path / "adapter"))
        )


def test_the_leaves_have_the_names_and_the_packing_of_peft(models, tmp_path):
    base, tuned = models
    pm.extract(tuned, base, rank=2)[0].save(tmp_path / "adapter")
    leaves = load_file(tmp_path / "adapter/adapter_model.safetensors")
    shapes = {path.removeprefix("base_model.model."): leaf.shape for path, leaf in leaves.items()}
    assert shapes == {
        "model.embed_tokens.lora_embedding_A": (2, 9),
        "model.embed_tokens.lora_embedding_B": (4, 2),
        "h.0.q_proj.lora_A.weight": (2, 4),
        "h.0.q_proj.lora_B.weight": (6, 2),
        "h.0.conv.lora_A.weight": (2, 3, 2, 2),
        "h.0.conv.lora_B.weight": (5, 2, 1, 1),
        "h.0.mlp.gate.lora_A.weight": (2, 4),
        "h.0.mlp.gate.lora_B.weight": (3, 2),
        "h.0.mlp.experts.base_layer.lora_A.weight": (6, 4),
        "h.0.mlp.experts.base_layer.lora_B.weight": (8, 6),
        "h.0.mlp.experts.lora_A.weight": (6, 5),
        "h.0.mlp.experts.lora_B.weight": (4, 6),
    }
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 2)
    assert config["target_parameters"] == [
        f"h.0.mlp.{name}" for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    ]


@pytest.mark.numeric
@pytest.mark.parametrize("leaf", ["kernel", "weight"])
def test_weights_with_inputs_first(leaf, tmp_path):
    """Of JAX, and of a Conv1D, which a bias beside it tells."""
    base = {"c_fc": {leaf: normal(4, 6), "bias": normal(6)}, "c_proj": {leaf: normal(4, 4), "bias": normal(4)}}
    base |= {"gate": {leaf: normal(4, 4), "bias": normal(4)}}
    tuned = {
        name: {leaf: held[leaf] + low(*held[leaf].shape, 1, 7), "bias": held["bias"]} for name, held in base.items()
    }
    adapter, _ = pm.extract(tuned, base, rank=1)
    adapter.save(tmp_path / "adapter")
    assert load_file(tmp_path / "adapter/adapter_model.safetensors")["base_model.model.c_fc.lora_A.weight"].shape == (
        1,
        4,
    )
    made, _ = pm.fold(base, tmp_path / "adapter")
    for name in base:
        np.testing.assert_allclose(made[name][leaf], tuned[name][leaf], rtol=1e-10, atol=1e-10)


def test_what_cannot_be_extracted():
    base = {"a": {"weight": np.ones((2, 2))}}
    for given in ({}, {"rank": 1, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}, {"rank": 1.5}):
        with pytest.raises(BadArgument):
            pm.extract(base, base, **given)
    with pytest.raises(NoMatch, match="do not differ in any matrix"):
        pm.extract(base, base, rank=1)
    with pytest.raises(NoMatch, match=r"b\.weight is in the tuned model alone"):
        pm.extract(base | {"b": {"weight": np.ones(1)}}, base, rank=1)
    with pytest.raises(SpecMismatch, match="in the tuned model"):
        pm.extract({"a": {"weight": np.ones((2, 3))}}, base, rank=1)
    with pytest.raises(SpecMismatch, match="not finite"):
        pm.extract({"a": {"weight": np.full((2, 2), np.inf)}}, base, rank=1)


def test_the_command_writes_a_folder_once(models, tmp_path):
    for name, tree in zip(("base", "tuned"), models, strict=True):
        save_file(tree, tmp_path / f"{name}.safetensors")
    typed = [
        "extract",
        str(tmp_path / "tuned.safetensors"),
        str(tmp_path / "base.safetensors"),
        "-o",
        str(tmp_path / "out"),
    ]
    run = CliRunner().invoke
    assert run(cli, [*typed, "--rank", "2"]).exit_code == 0
    made = run(cli, ["fold", str(tmp_path / "base.safetensors"), str(tmp_path / "out"), "--dry-run"])
    assert made.exit_code == 0 and "6 of 8 leaves change" in made.output
    again = run(cli, [*typed, "--rank", "2"])
    assert isinstance(again.exception, CannotWrite) or again.exit_code == 2


@pytest.mark.parametrize("quantised", [("tuned",), ("base",), ("tuned", "base")])
def test_quantised_weights_are_subtracted_by_their_values(quantised, tmp_path):
    floats = {"base": normal(32, 32).astype("float32")}
    floats["tuned"] = floats["base"] + low(32, 32, 2, 5).astype("float32")
    models, values = {}, {}
    for name, weight in floats.items():
        tree = {"fc": {"weight": weight}, "norm": {"weight": np.ones(3, "float32")}}
        if name in quantised:
            pm.save(pm.quantize(tree, "fc/weight", scheme="fp8-block")[0], tmp_path / f"{name}.safetensors")
            models[name] = pm.open(tmp_path / f"{name}.safetensors")
            tree = pm.dequantize(models[name], dtype="float32")[0]
        models.setdefault(name, tree)
        values[name] = next(iter(pm.at(tree, "fc/weight").get().values())).astype("float64")
    adapter, report = pm.extract(models["tuned"], models["base"], rank=np.int64(4))
    a, b = (adapter.leaves.read(number) for number in adapter.leaves.index.numbers)
    sigma = np.linalg.svd(values["tuned"] - values["base"], compute_uv=False)
    assert np.linalg.norm(b @ a) == pytest.approx(np.linalg.norm(sigma[:4]), rel=1e-5)
    assert len(report.rows) == 1 and len(report.kept) == 1
