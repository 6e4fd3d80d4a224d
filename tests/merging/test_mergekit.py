"""Configurations of mergekit: what mergekit makes of them, and what is refused by key."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

import paramend as pm
from paramend.cli.main import cli
from support.mergekit_reference import CASES, outcomes, write_models


@pytest.fixture
def models(tmp_path, monkeypatch):
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    return tmp_path


def apply(folder, text, *more):
    (folder / "config.yml").write_text(text)
    return CliRunner().invoke(cli, ["apply", str(folder / "config.yml"), *more])


@pytest.mark.parametrize("case", CASES)
def test_a_configuration_gives_what_mergekit_makes_of_it(case, models):
    done = apply(models, CASES[case], "-o", str(models / "out"))
    assert done.exit_code == 0, done.output
    right, found = outcomes()[case], pm.load(models / "out")
    leaves = {path: np.asarray(leaf) for path, leaf in pm.at(found, "**").get().items()}
    assert leaves.keys() == right.keys()
    for path, leaf in leaves.items():
        if case == "short":  # mergekit rounds to float32 first
            assert leaf.dtype.name == "bfloat16"
            assert (np.abs(leaf.astype("f4") - right[path]) <= np.abs(right[path]) * 2**-7).all()
        else:
            near = 2e-5 if case == "karcher" else 2e-6  # where mergekit stops
            np.testing.assert_allclose(leaf, right[path], rtol=2e-5, atol=near, err_msg=path)
    config = json.loads((models / "out" / "config.json").read_text())
    layers = {int(path.split(".")[2]) for path in right if ".layers." in path}
    assert config["num_hidden_layers"] == len(layers) == max(layers) + 1
    assert config["dtype"] == ("bfloat16" if case == "short" else "float32")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("merge_method: sce\nmodels: [{model: a}]\n", ["$.merge_method", "sce"]),
        ("merge_method: linear\n", ["$: one of models and slices"]),
        (
            "merge_method: linear\nmodels: [{model: a}, {model: none}]\n",
            ["$.models[1].model", "no file"],
        ),
        (
            "merge_method: slerp\ntokenizer: {}\nmodels: [{model: a, lora: x}]\nparameters: {density: 1}\n",
            ["$.tokenizer", "$.models[0].lora", "$.parameters.density"],
        ),
        ("merge_method: linear\nmodules: {text: {}}\nmodels: [{model: a}]\n", ["$.modules"]),
        ("merge_method: linear\ndtype: float99\nmodels: [{model: a}]\n", ["$.dtype"]),
        ("merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [3, 3]}]}]\n", ["layer_range"]),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 99]}]}]\n",
            ["slices of a", "layer_range"],
        ),
        ("merge_method: linear\nmodels: [{model: a+b/c}]\n", ["hint: paramend fold a b/c -o OUT"]),
        ("merge_method: ties\nmodels: [{model: a}]\n", ["needs the model"]),
        (
            "merge_method: linear\nparameters: {weight: {filter: mlp, value: 1}}\nmodels: [{model: a}, {model: b}]\n",
            ["there is no weight for a"],
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_key(text, says, models):
    done = apply(models, text, "-o", str(models / "out"))
    assert done.exit_code == 2, done.output
    assert all(each in done.output for each in says)
    assert not (models / "out").exists()


def test_a_tokenizer_is_copied_as_far_as_it_is_the_same(models):
    text = "merge_method: linear\nbase_model: a\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n"
    for name, tokens in (("a", "{}"), ("b", "{}")):
        (models / name / "tokenizer.json").write_text(tokens)
    for source in ("base", "union", "a", "b"):
        done = apply(models, f"{text}tokenizer_source: {source}\n", "-o", str(models / "out"), "--force")
        assert done.exit_code == 0, done.output
        assert (models / "out" / "tokenizer.json").read_text() == "{}"
    (models / "b" / "tokenizer.json").write_text('{"b": 1}')
    for source in ("union", "b"):
        done = apply(models, f"{text}tokenizer_source: {source}\n", "-o", str(models / "no"))
        assert done.exit_code == 2
        assert "$.tokenizer_source" in done.output
    assert apply(models, f"{text}tokenizer_source: base\n", "-o", str(models / "yes")).exit_code == 0


def test_a_path_belongs_to_our_recipes_alone(models):
    done = apply(models, CASES["karcher"], str(models / "a"), "-o", str(models / "out"))
    assert done.exit_code == 2
    assert "without PATH" in done.output
    done = apply(models, "version: 1\nsteps: [zero: lm_head.weight]\n", "-o", str(models / "out"))
    assert done.exit_code == 2
    assert "PATH is needed" in done.output
    dry = apply(models, CASES["karcher"], "--dry-run")
    assert "karcher(a, b, c" in dry.output
