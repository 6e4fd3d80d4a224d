"""Steps that make other leaves of a tree: floats in a scheme and back, parts, leaves of other files, zeros, names."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import paramend as pm
from paramend.errors import BadRecipe

UP, HEAD = "model.layers.0.mlp.up_proj.weight", "lm_head.weight"


def drawn(*shape, seed=0):
    return (np.random.default_rng(seed).normal(size=shape) * 0.02).astype("float32")


LEAVES = {
    "model.embed_tokens.weight": drawn(10, 128),
    UP: drawn(128, 128, seed=1),
    "model.norm.weight": drawn(128, seed=2),
    HEAD: drawn(10, 128, seed=3),
}
MTP = {"mtp.w": np.arange(6, dtype="f2").reshape(2, 3), "mtp.b": np.arange(3, dtype="i1"), "other": np.ones(1, "f4")}


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A folder with a configuration, beside a file to take leaves from."""
    monkeypatch.chdir(tmp_path)
    Path("m").mkdir()
    save_file(LEAVES, "m/model.safetensors", metadata={"format": "pt"})
    Path("m/config.json").write_text(json.dumps({"torch_dtype": "float32", "model_type": "llama"}))
    save_file(MTP, "mtp.safetensors", metadata={"format": "pt"})
    return Path("m")


def written(path):
    """The bytes of all leaves by name, as the reference library reads them, and the configuration."""
    leaves = load_file(Path(path) / "model.safetensors")
    return {name: (str(w.dtype), w.shape, w.tobytes()) for name, w in leaves.items()}, json.loads(
        (Path(path) / "config.json").read_text()
    )


STEPS = {
    "quantize": (
        [{"quantize": {"at": "**/*_proj/weight", "scheme": "int4", "group_size": 32}}],
        lambda tree: pm.quantize(tree, "**/*_proj/weight", scheme="int4", group_size=32)[0],
    ),
    "quantize and back": (
        [{"quantize": {"at": UP, "scheme": "int8"}}, {"dequantize": {"at": UP, "dtype": "float32"}}],
        lambda tree: pm.dequantize(pm.quantize(tree, UP, scheme="int8")[0], UP, "float32")[0],
    ),
    "edits before and after": (
        [
            {"multiply": {"at": UP, "value": 2}},
            {"quantize": {"at": UP, "scheme": "int8"}},
            {"dequantize": "**"},
            {"add": {"at": UP, "value": 1}},
            {"zero": HEAD},
        ],
        lambda tree: pm.at(
            pm.at(
                pm.dequantize(pm.quantize(pm.at(tree, UP).multiply(2), UP, scheme="int8")[0], "**", "bfloat16")[0], UP
            ).add(1),
            HEAD,
        ).zero(),
    ),
    "part": (
        [{"part": {"at": ["model.**", HEAD], "rename": {"model.**": "**"}}}],
        lambda tree: pm.part(tree, pm.sel("model.**") | HEAD, rename={"model.**": "**"})[0],
    ),
    "insert": (
        [{"insert": {"at": "mtp.**", "from": "mtp.safetensors", "rename": {"mtp.**": "model.mtp.**"}}}],
        lambda tree: pm.insert(tree, pm.open("mtp.safetensors"), "mtp.**", rename={"mtp.**": "model.mtp.**"})[0],
    ),
}


@pytest.mark.parametrize("case", STEPS)
def test_a_step_does_what_its_function_does_and_a_record_replays_it(case, model):
    steps, by_hand = STEPS[case]
    by_hand(pm.open(model)).save("right/")
    recipe = pm.Recipe(steps)
    recipe.apply(pm.open(model)).save("out/", record=True)
    assert written("out") == written("right") != written(model)
    again = pm.Recipe.parse(pm.record("out").recipe)
    assert again == recipe
    again.apply(pm.open(model)).save("again/")
    assert written("again") == written("right")


@pytest.mark.parametrize("case", ["quantize", "quantize and back", "insert"])
def test_a_step_on_a_state_dict(case, model):
    steps, by_hand = STEPS[case]
    found, right = pm.Recipe(steps).apply(dict(LEAVES)), by_hand(dict(LEAVES))
    assert list(found) == list(right)
    assert all(found[name].tobytes() == right[name].tobytes() for name in right)


def test_leaves_of_another_file_come_into_a_folder_in_place_and_go_again(model):
    before = sorted((file.name, file.read_bytes()) for file in model.iterdir())
    Path("add.yaml").write_text("version: 1\nsteps: [insert: {at: 'mtp.**', from: mtp.safetensors}]\n")
    pm.patch(model, pm.Recipe.load("add.yaml").apply)
    assert pm.open(model)["mtp.w"].tobytes() == MTP["mtp.w"].tobytes() and "other" not in pm.open(model)
    pm.undo(model)
    assert sorted((file.name, file.read_bytes()) for file in model.iterdir() if file.is_file()) == before


def test_zeros_are_put_behind_and_a_leaf_gets_names(model):
    steps = [
        {"pad": {"at": ["model.embed_tokens.weight", HEAD], "multiple": 8}},
        {"pad": {"at": "**/norm/weight", "length": 130, "axis": -1}},
        {"config": {"set": {"vocab_size": 16}}},
        {"tie": {"at": "model.norm.weight", "into": ["model.norm.copy", "other.norm"]}},
    ]
    pm.Recipe(steps).apply(pm.open(model)).save("out/")
    found = load_file("out/model.safetensors")
    for name in ("model.embed_tokens.weight", HEAD):
        assert found[name].shape == (16, 128) and not found[name][10:].any()
        assert found[name][:10].tobytes() == LEAVES[name].tobytes()
    norm = np.concatenate([LEAVES["model.norm.weight"], np.zeros(2, "f4")])
    for name in ("model.norm.weight", "model.norm.copy", "other.norm"):
        assert found[name].tobytes() == norm.tobytes()
    assert found[UP].tobytes() == LEAVES[UP].tobytes()
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] == 16
    memory = pm.Recipe([steps[0]]).apply({"model.embed_tokens.weight": drawn(7, 2), HEAD: drawn(8, 2)})
    assert {name: w.shape for name, w in memory.items()} == {"model.embed_tokens.weight": (8, 2), HEAD: (8, 2)}


WRONG = [
    ({"quantize": {"at": UP, "scheme": "int5"}}, "scheme", "'int5' is no scheme that a weight can be quantised to"),
    ({"quantize": {"at": UP}}, "", "quantize needs scheme"),
    ({"pad": {"at": UP, "multiple": 0}}, "multiple", "0 is too few"),
    ({"pad": {"at": UP, "multiple": 2, "length": 8}}, "", "pad needs multiple or length, not both"),
    ({"insert": {"at": UP}}, "", "insert needs from"),
    ({"insert": {"at": UP, "from": "mtp.safetensors", "rename": []}}, "rename", "[] is not a map of paths"),
    ({"tie": {"at": UP, "into": []}}, "into", "an empty list names nothing"),
]
UNFIT = [
    ({"quantize": {"at": "model.norm.weight", "scheme": "int4"}}, "at", "model.norm.weight cannot be quantised"),
    ({"quantize": {"at": "model.nrm.weight", "scheme": "int4"}}, "at", "matches none of 4 leaves"),
    ({"dequantize": UP}, "at", "none of which is quantised"),
    ({"part": {"at": ["model.**", "absent"]}}, "at[1]", "matches none"),
    ({"insert": {"at": "mpt.**", "from": "mtp.safetensors"}}, "at", "matches none of 3 leaves"),
    ({"insert": {"at": "mtp.**", "from": "lost.safetensors"}}, "at", "lost.safetensors"),
    ({"insert": {"at": "mtp.**", "from": "w.npy"}}, "at", "w.npy holds one array, without a name"),
    ({"pad": {"at": UP, "length": 100}}, "at", "cannot be padded from 128 to 100"),
    ({"pad": {"at": ["absent"], "length": 100}}, "at[0]", "matches none"),
    ({"tie": {"at": HEAD, "into": ["model.norm.weight"]}}, "into", "model.norm.weight"),
    ({"tie": {"at": [HEAD, UP], "into": ["a"]}}, "into", "tie gives names to one leaf, and at names 2"),
]


def problems(make):
    with pytest.raises(BadRecipe) as caught:
        make()
    return caught.value.problems


def test_what_is_wrong_is_told_at_its_address_all_at_once(model):
    np.save("w.npy", np.ones(2))
    for cases, make in (
        (WRONG, pm.Recipe),
        (UNFIT, lambda steps: pm.Recipe(steps).apply(pm.open(model))),
    ):
        found = problems(lambda cases=cases, make=make: make([step for step, _, _ in cases]))
        addresses = [f"$.steps[{n}]{f'.{key}' if key else ''}" for n, (_, key, _) in enumerate(cases)]
        assert [problem.address for problem in found] == addresses
        for problem, (_, _, says) in zip(found, cases, strict=True):
            assert says in problem.message


def test_in_place_the_structure_stays(model):
    for case in ("quantize", "part", "insert"):
        found = problems(lambda case=case: pm.Recipe(STEPS[case][0]).apply_(dict(LEAVES)))
        assert [(problem.address, problem.code) for problem in found] == [("$.steps[0]", "unsupported")]
        assert "in place the structure stays" in found[0].message


def test_the_recipe_of_what_was_made_of_other_leaves_is_not_recorded_as_if_it_were_all(model):
    made = pm.Recipe([{"tie": {"at": HEAD, "into": ["copy"]}}]).apply(pm.open(model))
    pm.Recipe([{"zero": "copy"}]).apply(made).save("out/", record=True)
    assert pm.record("out").recipe == "" and not pm.open("out")["copy"].any()
