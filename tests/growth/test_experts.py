"""Experts kept, left out and repeated, against what transformers computes."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import paramend as pm
from paramend.anatomy.experts import renumbered
from paramend.cli.main import cli
from support.doubles import double_throughout
from support.tiny_experts import CASES, COUNT, TOKENS, logits, make

# The groups of families that have them stay of one size.
KEPT = [3, 0, 6, 5]
BOUND = 1e-11


def run(*args):
    return CliRunner().invoke(cli, list(map(str, args)))


@pytest.fixture
def double(monkeypatch):
    double_throughout(monkeypatch)


def without(model, kept, monkeypatch):
    """The logits of a model whose router gives minus infinity to all experts but some."""
    mixture = pm.experts(model).mixture
    state = model.state_dict(keep_vars=True)
    names = list(state)
    gone = [expert for expert in range(COUNT) if expert not in kept]
    weights, plain = set(), torch.nn.functional.linear
    for block in mixture.blocks:
        for name in (names[number] for number in block.along):
            if name.rpartition(".")[2] in ("e_score_correction_bias", "expert_bias"):
                with torch.no_grad():
                    state[name][..., gone] = -torch.inf  # these scores are not logits
            elif ("gate" in name or "router" in name) and name.endswith("weight") and "experts" not in name:
                weights.add(state[name].data_ptr())

    def linear(x, weight, bias=None):
        out = plain(x, weight, bias)
        if weight.data_ptr() in weights:
            out[..., gone] = -torch.inf
        return out

    assert len(weights) == len(mixture.blocks)
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    found = logits(model)
    monkeypatch.setattr(torch.nn.functional, "linear", plain)
    return found


@pytest.mark.numeric
@pytest.mark.parametrize("family", CASES)
def test_kept_experts_compute_what_a_router_without_the_others_does(family, double, monkeypatch):
    model = make(family)
    before = logits(model)
    new, report = pm.experts(model).keep(KEPT)
    assert torch.equal(logits(model), before)
    found = logits(new)
    wanted = without(model, KEPT, monkeypatch)
    assert float((found - wanted).abs().max()) <= BOUND * max(1.0, float(wanted.abs().max()))
    assert float((found - before).abs().max()) > 1e-3
    assert (report.did, report.before, report.after) == ("keep", COUNT, len(KEPT))


@pytest.mark.numeric
@pytest.mark.parametrize("family", [case for case in CASES if case.id not in ("llama4_text", "deepseek_v3")])
def test_experts_that_are_there_twice_compute_the_same(family, double):
    model = make(family)
    new, report = pm.experts(model).duplicate(2)
    wanted = logits(model)
    assert float((logits(new) - wanted).abs().max()) <= BOUND * max(1.0, float(wanted.abs().max()))
    assert report.after == 2 * COUNT
    assert pm.experts(new).mixture.top_k == 2 * pm.experts(model).mixture.top_k


@pytest.mark.numeric
@pytest.mark.parametrize("family", CASES)
def test_all_experts_in_another_order(family, double):
    model = make(family)
    new, _ = pm.experts(model).keep([1, 3, 0, 2, 7, 5, 6, 4])
    assert float((logits(new) - logits(model)).abs().max()) <= BOUND * max(1.0, float(logits(model).abs().max()))


@pytest.mark.parametrize("family", CASES)
def test_a_checkpoint_follows_and_loads(family, tmp_path):
    model = make(family, torch.float32)
    model.save_pretrained(tmp_path / "old", max_shard_size="20KB")
    with pm.open(tmp_path / "old") as old:
        lazy, report = pm.experts(old).keep(KEPT)
        lazy.save(tmp_path / "new")
        again, _ = pm.experts(old).keep(range(COUNT))
        again.save(tmp_path / "same")
    loaded, info = type(model).from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(info.values())
    wanted = pm.experts(model).keep(KEPT)[0]
    for name, value in wanted.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    files = {file.name for file in (tmp_path / "old").iterdir()}
    assert files == {file.name for file in (tmp_path / "same").iterdir()}
    assert all((tmp_path / "same" / name).read_bytes() == (tmp_path / "old" / name).read_bytes() for name in files)
    assert any(f"{COUNT} -> {len(KEPT)}" in said for said in report.said)


# ---- single layers, and what is refused --------------------------------------------------------------------------


def mixture(layers=2, count=4, **more):
    """A checkpoint's leaves by name: a mixture per layer, experts one by one."""
    names = {}
    for layer in range(layers):
        path = f"model.layers.{layer}.mlp"
        names[f"{path}.gate.weight"] = np.arange(count * 3, dtype="float32").reshape(count, 3)
        for expert in range(count):
            names[f"{path}.experts.{expert}.up_proj.weight"] = np.full((2, 3), 10 * layer + expert, "float32")
    return names | more


def written(folder, tree, config):
    folder.mkdir()
    pm.save(tree, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return pm.open(folder)


QWEN = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 1, "num_hidden_layers": 2}


def experts_of(tree, layer):
    found = {
        n: tree[f"model.layers.{layer}.mlp.experts.{n}.up_proj.weight"]
        for n in range(9)
        if f"model.layers.{layer}.mlp.experts.{n}.up_proj.weight" in tree
    }
    assert list(found) == list(range(len(found)))
    return [float(value[0, 0]) for value in found.values()]


def test_a_dict_goes_by_layer():
    tree, report = pm.experts(mixture()).keep({0: [3, 1], 1: np.array([0, 2])})
    assert experts_of(tree, 0) == [3, 1]
    assert experts_of(tree, 1) == [10, 12]
    assert tree["model.layers.0.mlp.gate.weight"].tolist() == [[9, 10, 11], [3, 4, 5]]
    assert report.layers == {"model.layers.0.mlp": (3, 1), "model.layers.1.mlp": (0, 2)}
    assert pm.experts(mixture()).drop({"0": [0], "1": [3]})[1].layers["model.layers.1.mlp"] == (0, 1, 2)


def test_copies_are_leaves_of_their_own():
    tree = mixture()
    config = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 1}
    with pytest.raises(pm.errors.Unsupported, match="how many experts a token goes to"):
        pm.experts(tree).duplicate(2)
    del config
    model = make("mixtral", torch.float32)
    new = pm.experts(model).duplicate(3)[0].state_dict()
    old = model.state_dict()
    name = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(new[name], old[name].repeat_interleave(3, 0))


@pytest.mark.parametrize(
    ("ids", "error", "said"),
    [
        ([4], "OutOfRange", "ids has 4, and there are 4 experts"),
        ([-1], "OutOfRange", "ids has -1"),
        ([1, 1], "BadArgument", "names an expert twice"),
        ([], "BadArgument", "0 experts would be left"),
        (3, "BadArgument", "is not a list"),
        ("01", "BadArgument", "is not a list"),
        ({0: [1]}, "BadArgument", "the keys of ids are without 1"),
        ({0: [1], 1: [1, 2]}, "BadArgument", "would have 1, 2 experts"),
        ({0: [1], 1: [1], 2: [1]}, "BadArgument", "2 is no layer with experts: 0, 1"),
        ({"a": [1]}, "BadArgument", "'a' is no layer with experts: 0, 1"),
    ],
)
def test_what_no_layer_can_have(ids, error, said):
    with pytest.raises(getattr(pm.errors, error), match=said):
        pm.experts(mixture()).keep(ids)


def test_fewer_than_a_token_goes_to(tmp_path):
    with written(tmp_path / "a", mixture(), QWEN | {"num_experts_per_tok": 3}) as old:
        with pytest.raises(pm.errors.BadArgument, match="2 experts would be left, and a token goes to 3"):
            pm.experts(old).drop([0, 1])
        assert pm.experts(old).keep([2, 1, 0])[1].after == 3


GROUPED = {"model_type": "deepseek_v3", "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([0, 1, 2], "the same number of each, group by group"),
        ([0, 4, 1, 5], "group by group"),
        ([0, 1, 2, 4, 5], "group by group"),
        ([0, 4], "2 groups would have 1 experts each and are compared by 2"),
        ([4, 5, 0, 1], ""),
        ([0, 1, 2, 3, 4, 5, 6, 7], ""),
    ],
)
def test_groups_stay_groups(tmp_path, ids, said):
    with written(tmp_path / "a", mixture(count=8), GROUPED) as old:
        if not said:
            assert pm.experts(old).keep(ids)[1].after == len(ids)
            return
        with pytest.raises(pm.errors.BadArgument, match=said):
            pm.experts(old).keep(ids)


def test_all_experts_stay_whatever_their_groups_are(tmp_path):
    with written(tmp_path / "a", mixture(count=2), GROUPED | {"n_routed_experts": 2}) as old:
        assert pm.experts(old).keep([0, 1])[1].after == 2


def test_groups_that_copies_would_change(tmp_path):
    with (
        written(tmp_path / "a", mixture(count=8), GROUPED) as old,
        pytest.raises(pm.errors.Unsupported, match="best two"),
    ):
        pm.experts(old).duplicate(2)


def test_blocks_that_predict_further_tokens(tmp_path):
    tree = mixture(layers=3) | {"model.layers.2.eh_proj.weight": np.ones((2, 2), "float32")}
    with written(tmp_path / "a", tree, QWEN | {"num_nextn_predict_layers": 1}) as old:
        new, _ = pm.experts(old).keep([3, 1])
        assert experts_of(new, 2) == [23, 21]
        with pytest.raises(pm.errors.BadArgument, match="without 'mtp'"):
            pm.experts(old).keep({0: [1], 1: [1]})
        for key in ("mtp", 2):
            new, _ = pm.experts(old).keep({0: [1, 2], 1: [1, 3], key: [0, 1]})
            assert experts_of(new, 2) == [20, 21]
        assert new["model.layers.2.eh_proj.weight"].tolist() == [[1, 1], [1, 1]]


def test_quantised_experts_move_as_they_are_stored(tmp_path):
    tree = mixture(layers=1)
    for expert in range(4):
        path = f"model.layers.0.mlp.experts.{expert}.gate_proj"
        tree |= {
            f"{path}.weight_packed": np.full((2, 1), expert, "int32"),
            f"{path}.weight_scale": np.full((2, 1), expert, "float32"),
            f"{path}.weight_shape": np.array([2, 8], "int64"),
        }
    ignore = ["lm_head", "model.layers.0.mlp.experts.2.up_proj", "model.layers.0.mlp.experts.0.up_proj"]
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "channel"}}
    quantization = {"quant_method": "compressed-tensors", "ignore": ignore, "config_groups": {"group_0": group}}
    with written(tmp_path / "a", tree, QWEN | {"quantization_config": quantization}) as old:
        new, _ = pm.experts(old).keep([2, 3])
        new.save(tmp_path / "b")
    with pm.open(tmp_path / "b", raw=True) as new:
        packed = [new[f"model.layers.0.mlp.experts.{n}.gate_proj.weight_packed"].tolist() for n in (0, 1)]
    assert packed == [[[2], [2]], [[3], [3]]]
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["num_experts"] == 2
    assert config["quantization_config"]["ignore"] == ["lm_head", "model.layers.0.mlp.experts.0.up_proj"]


def test_names_in_a_configuration_follow_their_experts():
    paths = [("model", "layers", str(n), "mlp") for n in (1, 11)]
    said = {"ignore": ["model.layers.1.mlp.experts.3.w1", "model.layers.11.mlp.experts.0.w1", "shared_experts.1.w1"]}
    said["dynamic"] = {r"-:^model\.layers\.1\.mlp\.experts\.3\.w1$": {}}
    alike = renumbered(said, dict.fromkeys(paths, (3, 0)), 4)
    assert alike["ignore"] == [
        said["ignore"][0].replace("3", "0"),
        said["ignore"][1].replace(".0.", ".1."),
        said["ignore"][2],
    ]
    assert list(alike["dynamic"]) == [r"-:^model\.layers\.1\.mlp\.experts\.0\.w1$"]
    apart = renumbered(said["ignore"], {paths[0]: [1, 3], paths[1]: [2, 1]}, 4)
    assert apart == ["model.layers.1.mlp.experts.1.w1", "shared_experts.1.w1"]


def test_blocks_and_scales_of_gpt_oss(tmp_path):
    tree = {"model.layers.0.mlp.router.weight": np.eye(4, dtype="float32")}
    tree |= {"model.layers.0.mlp.router.bias": np.arange(4, dtype="float32")}
    ones = np.arange(4, dtype="uint8")
    tree |= {"model.layers.0.mlp.experts.down_proj_blocks": np.broadcast_to(ones[:, None, None, None], (4, 2, 1, 16))}
    tree |= {"model.layers.0.mlp.experts.down_proj_scales": np.broadcast_to(ones[:, None, None], (4, 2, 1))}
    config = {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 1, "experts_per_token": 1}
    config |= {"quantization_config": {"quant_method": "mxfp4"}}
    with written(tmp_path / "a", tree, config) as old:
        new, _ = pm.experts(old).duplicate(2)
        new.save(tmp_path / "b")
    with pm.open(tmp_path / "b", raw=True) as new:
        assert new["model.layers.0.mlp.experts.down_proj_blocks"][:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert new["model.layers.0.mlp.experts.down_proj_scales"][:, 1, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert new["model.layers.0.mlp.router.bias"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    found = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (found["num_local_experts"], found["num_experts_per_tok"], found["experts_per_token"]) == (8, 2, 2)


def test_the_text_model_of_another_model(tmp_path):
    tree = {name.replace("model.", "model.language_model.", 1): value for name, value in mixture().items()}
    tree["model.visual.blocks.0.mlp.linear_fc1.weight"] = np.ones((4, 4), "float32")
    config = {"model_type": "qwen3_vl_moe", "text_config": QWEN | {"model_type": "qwen3_vl_moe_text"}}
    with written(tmp_path / "a", tree, config | {"vision_config": {"depth": 1, "num_experts": 4}}) as old:
        new, report = pm.experts(old).drop([3])
        assert pm.config(new)["text_config.num_experts"] == 3
        assert pm.config(new)["vision_config.num_experts"] == 4
        assert report.said == ("text_config.num_experts: 4 -> 3",)
        assert new["model.visual.blocks.0.mlp.linear_fc1.weight"].shape == (4, 4)


def test_a_quantised_router_is_refused():
    tree = mixture(layers=1) | {"model.layers.0.mlp.gate.weight_scale_inv": np.ones((1, 1), "float32")}
    with pytest.raises(pm.errors.Unsupported, match=r"axis of .*weight_scale_inv counts"):
        pm.experts(tree)


def test_experts_of_several_parts_are_refused():
    tree = {f"{part}.{name}": value for part in ("thinker", "talker") for name, value in mixture().items()}
    with pytest.raises(pm.errors.Unsupported, match="several parts"):
        pm.experts(tree)
    both = {
        f"{side}.block.{n}.layer.1.mlp.{leaf}": np.ones((2, 2))
        for side in ("encoder", "decoder")
        for n in (0, 1)
        for leaf in ("router.classifier.weight", "experts.expert_0.wi.weight", "experts.expert_1.wi.weight")
    }
    tree, _ = pm.experts(both).keep([1])
    assert "decoder.block.1.layer.1.mlp.experts.expert_0.wi.weight" in tree
    with pytest.raises(pm.errors.BadArgument, match="same numbers"):
        pm.experts(both).keep({0: [1], 1: [1]})


def test_a_dense_model():
    with pytest.raises(pm.errors.NoMatch, match="no experts"):
        pm.experts({"model.layers.0.mlp.up_proj.weight": np.ones((2, 2))})


def test_a_single_file_leaves_the_configuration(tmp_path):
    written(tmp_path / "a", mixture(), QWEN).close()
    with pm.open(tmp_path / "a" / "model.safetensors") as old:
        _, report = pm.experts(old).keep([0, 1])
    assert any("is not changed; open" in said for said in report.said)


def test_a_module_stays_a_module():
    model = make("mixtral", torch.float32).train()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.generation_config.temperature = 0.25
    state = torch.random.get_rng_state()
    new, _ = pm.experts(model).keep([1, 2])
    assert new.generation_config.temperature == 0.25 and new.generation_config is not model.generation_config
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(new) is type(model)
    assert new.training
    assert not new.model.embed_tokens.weight.requires_grad
    assert new.model.layers[0].mlp.experts.down_proj.requires_grad
    assert new.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert (new.config.num_local_experts, model.config.num_local_experts) == (2, COUNT)
    new(TOKENS).logits.sum().backward()
    with pytest.raises(pm.errors.Unsupported, match="no configuration"):
        pm.experts(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("args", "after", "first"),
    [
        (["--keep", "3,1"], 2, [3, 1]),
        (["--keep", "3,0-1"], 3, [3, 0, 1]),
        (["--drop", '{"0": [0], "1": [1]}'], 3, [1, 2, 3]),
        (["--duplicate", "2"], 8, [0, 0, 1, 1, 2, 2, 3, 3]),
    ],
)
def test_the_command(tmp_path, args, after, first):
    written(tmp_path / "a", mixture(), QWEN).close()
    done = run("experts", tmp_path / "a", *args, "-o", tmp_path / "b", "--html", tmp_path / "page.html", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["after"] == after
    assert json.loads((tmp_path / "b" / "config.json").read_text())["num_experts"] == after
    with pm.open(tmp_path / "b") as new:
        assert experts_of(new, 0) == first


def test_the_command_says_what_is_wrong(tmp_path):
    written(tmp_path / "a", mixture(), QWEN).close()
    wrong = {"x": "'x' is neither", "3-1": "'3-1' is neither", "{": "is not JSON", '{"a": [1]}': "'a'"}
    for args, said in (([], "One of --keep"), *((["--keep", text], said) for text, said in wrong.items())):
        done = run("experts", tmp_path / "a", *args, "--dry-run")
        assert done.exit_code == 2 and said in done.stderr


def test_a_step_of_a_recipe(tmp_path):
    recipe = pm.Recipe.parse("""
version: 1
steps:
  - experts: {keep: {0: [3, 1, 0], 1: [2, 1, 0]}}
  - experts: {drop: [0]}
  - zero: "**/experts/0/**"
""")
    assert pm.Recipe.parse(str(recipe)).to_dict() == recipe.to_dict()
    tree = recipe.apply(mixture())
    assert experts_of(tree, 0) == [0, 0] and experts_of(tree, 1) == [0, 10]
    with written(tmp_path / "a", mixture(), QWEN) as old:
        recipe.apply(old).save(tmp_path / "b", record=True)
    with pm.open(tmp_path / "b") as new:
        assert all(np.array_equal(new[path], tree[path]) for path in new)
        assert pm.config(new)["num_experts"] == 2
    assert pm.verify_record(tmp_path / "b")
    with pytest.raises(pm.errors.BadRecipe, match="there are 4 experts"):
        pm.Recipe([{"experts": {"keep": [7]}}]).apply(mixture())
    with pytest.raises(pm.errors.BadRecipe, match="needs keep or drop or duplicate"):
        pm.Recipe([{"experts": {}}])


def test_edits_that_were_planned_before_come_along(tmp_path):
    with written(tmp_path / "a", mixture(), QWEN) as old:
        edited = pm.at(pm.at(old, "**/layers/0/mlp/gate/*").add(100), "**/layers/0/**/experts/3/**").add(100)
        new, _ = pm.experts(edited).keep([3, 1])
        assert new["model.layers.0.mlp.gate.weight"].tolist() == [[109, 110, 111], [103, 104, 105]]
        assert experts_of(new, 0) == [103, 1]
        again, _ = pm.experts(new).keep([1, 0])
        again.save(tmp_path / "b")
    with pm.open(tmp_path / "b") as new:
        assert experts_of(new, 0) == [1, 103] and experts_of(new, 1) == [11, 13]


@pytest.mark.parametrize("suffix", ["npz", "pt", "msgpack"])
def test_single_files_of_other_formats(tmp_path, suffix):
    pm.save(mixture(), tmp_path / f"old.{suffix}")
    with pm.open(tmp_path / f"old.{suffix}") as old:
        pm.experts(old).keep([2, 0])[0].save(tmp_path / f"new.{suffix}")
    found = pm.load(tmp_path / f"new.{suffix}")
    flat = found if "model.layers.0.mlp.gate.weight" in found else None
    if flat is not None:
        assert experts_of(flat, 1) == [12, 10]
    else:
        assert sorted(found["model"]["layers"]["1"]["mlp"]["experts"]) == ["0", "1"]


def test_kernels_of_all_experts_count_them_first():
    experts = {"up": {"kernel": np.arange(45.0).reshape(3, 5, 3)}, "down": {"kernel": np.ones((3, 3, 5))}}
    layer = {"gate": {"kernel": np.arange(15).reshape(5, 3)}, "experts": experts}
    tree, _ = pm.experts({"params": {"layers_0": {"moe": layer}}}).keep([2, 0])
    new = tree["params"]["layers_0"]["moe"]
    assert np.array_equal(new["experts"]["up"]["kernel"], experts["up"]["kernel"][[2, 0]])
    assert np.array_equal(new["gate"]["kernel"], layer["gate"]["kernel"][:, [2, 0]])


def test_trees_of_lists_and_dicts():
    expert = [{"up": np.full((2, 2), n)} for n in range(3)]
    tree = {"layers": [{"mlp": {"router": {"kernel": np.arange(6).reshape(2, 3)}, "experts": expert}}]}
    new, _ = pm.experts(tree).keep([2, 1])
    mlp = new["layers"][0]["mlp"]
    assert [int(each["up"][0, 0]) for each in mlp["experts"]] == [2, 1]
    assert mlp["router"]["kernel"].tolist() == [[2, 1], [5, 4]]
    assert len(tree["layers"][0]["mlp"]["experts"]) == 3
    same, _ = pm.experts(tree).keep(range(3))
    assert same is tree
