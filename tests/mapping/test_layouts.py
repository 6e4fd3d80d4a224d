"""Layouts: what transformers' own modules hold is what a layout makes of its files, and the way back is exact."""

import pickle

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.numpy import save_file
from safetensors.torch import load_file

import paramend as pm
from paramend.cli.main import cli
from paramend.errors import RenameClash

SMALL = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "moe_intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
GROUPED = {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
MLA = {"q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
FAMILIES = {
    "mixtral": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 6},
    "qwen3_moe": {},
    "deepseek_v3": GROUPED | MLA,
    "glm4_moe": GROUPED,
}


def equal(found, right):
    return found.keys() == right.keys() and all(torch.equal(found[name], right[name]) for name in right)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_other_way_is_what_the_module_of_transformers_holds(tmp_path, family):
    config = transformers.AutoConfig.for_model(family, **SMALL, **FAMILIES[family])
    module = transformers.AutoModelForCausalLM.from_config(config)
    module.save_pretrained(tmp_path / "hf")
    files = load_file(tmp_path / "hf" / "model.safetensors")
    layout = pm.layout(f"{family}_4_to_5")
    with pm.open(tmp_path / "hf") as model:
        layout.to(model)[0].save(tmp_path / "fused")
    fused = load_file(tmp_path / "fused" / "model.safetensors")
    assert fused.keys() != files.keys()
    assert equal(fused, module.state_dict())
    assert equal(layout.to(files)[0], fused)
    with pm.open(tmp_path / "fused") as model:
        tree, report = layout.back(model)
        tree.save(tmp_path / "back")
    assert equal(load_file(tmp_path / "back" / "model.safetensors"), files)
    assert {row.path for row in report.rows} == files.keys() - fused.keys()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert equal(again.state_dict(), module.state_dict())


def test_the_experts_of_gpt_oss_are_its_columns_in_turns():
    rng = np.random.default_rng(0)
    fused = {
        "model.layers.0.mlp.experts.gate_up_proj": rng.normal(size=(3, 4, 10)),
        "model.layers.0.mlp.experts.gate_up_proj_bias": rng.normal(size=(3, 10)),
        "model.layers.0.mlp.experts.down_proj": rng.normal(size=(3, 5, 4)),
        "model.layers.0.mlp.experts.down_proj_bias": rng.normal(size=(3, 4)),
        "model.norm.weight": rng.normal(size=4),
    }
    layout = pm.layout("gpt_oss_4_to_5")
    apart, report = layout.back(fused)
    for e in range(3):
        at = f"model.layers.0.mlp.experts.{e}"
        gate_up, bias = (fused[f"model.layers.0.mlp.experts.gate_up_proj{end}"][e] for end in ("", "_bias"))
        assert (apart[f"{at}.gate_proj.weight"] == gate_up[:, 0::2].T).all()
        assert (apart[f"{at}.up_proj.weight"] == gate_up[:, 1::2].T).all()
        assert (apart[f"{at}.gate_proj.bias"] == bias[0::2]).all()
        assert (apart[f"{at}.down_proj.weight"] == fused["model.layers.0.mlp.experts.down_proj"][e].T).all()
    assert (len(apart), report.kept) == (19, ("model.norm.weight",))
    again = layout.to(apart)[0]
    assert all((again[name] == fused[name]).all() for name in fused)


# ---- rules of one's own --------------------------------------------------------------------------------------------

RULES = [
    {"from": ["h.<n>.q", "h.<n>.k"], "to": "h.<n>.qk", "do": [{"concat": {"axis": 0, "sizes": [4, 2]}}]},
    {"from": "h.<n>.w", "to": "layers.<n>.kernel", "do": [{"transpose": [1, 0]}]},
    {"from": "h.<n>.c", "to": "layers.<n>.c", "do": [{"reshape": {"shape": [2, 3, 2], "back": [6, 2]}}]},
    {"from": "h.<n>.p", "to": "layers.<n>.p", "do": [{"permute": {"index": [2, 0, 1]}}]},
    {"from": "h.<n>.s", "to": "stack.s", "do": [{"stack": {"axis": 1}}]},
    {"from": "norm", "to": "ln.scale"},
    {"from": "h.<n>.f", "to": "layers.<n>.f", "do": [{"flip": [-1]}]},
    {
        "from": ["h.<n>.b", "h.<n>.zero"],
        "to": ["layers.<n>.b", "layers.<n>.e"],
        "do": [{"concat": {"parts": [2]}}, {"split": {"parts": [4]}}, {"sum": {"groups": [[0, 2], [1, 3]]}}],
    },
]


def model():
    rng = np.random.default_rng(1)
    shapes = {"q": (4, 3), "k": (2, 3), "w": (2, 5), "c": (6, 2), "p": (3,), "s": (4,)}
    tree = {f"h.{n}.{name}": rng.normal(size=shape) for n in range(3) for name, shape in shapes.items()}
    tree |= {f"h.{n}.{name}": rng.normal(size=(4, 2)) for n in range(3) for name in "fb"}
    return tree | {f"h.{n}.zero": np.zeros((4, 2)) for n in range(3)} | {"norm": rng.normal(size=3)}


def test_every_step_and_its_inverse(tmp_path):
    tree, layout = model(), pm.Layout(RULES, name="mine")
    found, report = layout.to(tree)
    assert (found["h.1.qk"] == np.concatenate([tree["h.1.q"], tree["h.1.k"]])).all()
    assert (found["layers.2.kernel"] == tree["h.2.w"].T).all()
    assert (found["layers.0.c"] == tree["h.0.c"].reshape(2, 3, 2)).all()
    assert (found["layers.0.p"] == tree["h.0.p"][[2, 0, 1]]).all()
    assert (found["stack.s"] == np.stack([tree[f"h.{n}.s"] for n in range(3)], 1)).all()
    assert (found["ln.scale"] == tree["norm"]).all()
    assert (found["layers.1.f"] == tree["h.1.f"][:, ::-1]).all()
    assert (found["layers.1.e"] == tree["h.1.b"][2:]).all()
    row = next(row for row in report.rows if row.path == "stack.s")
    assert (row.origin, row.sources) == ("stack(h.0.s, h.1.s, h.2.s, axis=1)", ("h.0.s", "h.1.s", "h.2.s"))
    back = layout.back(found)[0]
    assert back.keys() == tree.keys()
    assert all((back[name] == tree[name]).all() for name in tree)
    save_file(tree, tmp_path / "m.safetensors")
    with pm.open(tmp_path / "m.safetensors") as opened:
        layout.to(opened)[0].save(tmp_path / "out.safetensors")
    assert all((load_file(tmp_path / "out.safetensors")[name].numpy() == array).all() for name, array in found.items())


def test_sums_on_disk_and_what_must_be_zero(tmp_path):
    rng = np.random.default_rng(0)
    tree = {name: rng.normal(size=6) for name in ("ih", "hh")}
    save_file(tree, tmp_path / "m.safetensors")
    layout = pm.Layout([{"from": ["ih", "hh"], "to": "b", "do": ["sum"]}])
    with pm.open(tmp_path / "m.safetensors") as opened:
        made, report = layout.to(opened)
        made.save(tmp_path / "out.safetensors")
    assert report.rows[0].origin == "(ih + hh)"
    assert (load_file(tmp_path / "out.safetensors")["b"].numpy() == tree["ih"] + tree["hh"]).all()
    with pm.open(tmp_path / "out.safetensors") as opened:
        layout.back(opened)[0].save(tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert (back["ih"].numpy() == tree["ih"] + tree["hh"]).all() and not back["hh"].any()
    strict = pm.Layout([{"from": ["ih", "hh"], "to": "b", "do": [{"sum": {"groups": [[0]], "zero": [1]}}]}])
    for subject in (tree, pm.open(tmp_path / "m.safetensors")):
        with pytest.raises(ValueError, match="must be zero"):
            strict.to(subject)
    assert strict.to(tree | {"hh": np.zeros(6)})[0].keys() == {"b"}


@pytest.mark.parametrize("stored", ["flat", "nested"])
@pytest.mark.parametrize("path", ["x", "x.y"])
def test_leaves_that_are_stored_anew_do_not_take_the_place_of_others(stored, path):
    layout = pm.Layout([{"from": "a", "to": "x"}, {"from": "b", "to": path}], stored={"to": stored})
    tree = {"a": np.zeros(1), "b": np.ones(1)}
    if (stored, path) == ("flat", "x.y"):  # two names
        assert layout.to(tree)[0] == {"x": tree["a"], "x.y": tree["b"]}
        return
    with pytest.raises(RenameClash, match=path):
        layout.to(tree)


def test_leaves_that_one_side_lacks_are_dropped():
    layout = pm.Layout([{"from": "a.w", "to": "b.w"}], drop=["**/steps"], stored={"from": "flat", "to": "nested"})
    assert layout == pm.Layout.of(layout.to_data()) == pm.Layout.of({**layout.to_data(), "drop": "**/steps"})
    made = layout.to({"a.w": np.ones(2), "a.steps": np.array(3)})[0]
    assert made["b"]["w"].tolist() == [1.0, 1.0]
    assert layout.to({"a.w": np.ones(2)})[0].keys() == {"b"}
    assert layout.back(made)[0].keys() == {"a.w"}
    for stored in ({"from": "folded"}, "flat"):
        with pytest.raises(ValueError, match="is not a choice"):
            pm.Layout([{"from": "a", "to": "b"}], stored=stored)


def test_a_layout_is_data(tmp_path):
    layout = pm.Layout(RULES, name="mine", rest="keep")
    layout.save(tmp_path / "mine.yaml")
    assert pm.Layout.load(tmp_path / "mine.yaml") == layout == pickle.loads(pickle.dumps(layout))
    assert pm.Layout.load(tmp_path / "mine.yaml") != pm.Layout(RULES, name="mine")


def test_as_a_command(tmp_path):
    save_file(model(), tmp_path / "m.safetensors")
    pm.Layout(RULES).save(tmp_path / "mine.yaml")

    def run(*words, status=0):
        done = CliRunner().invoke(cli, list(map(str, words)))
        assert done.exit_code == status, done.output
        return done.output

    run("layout", tmp_path / "mine.yaml", tmp_path / "m.safetensors", "-o", tmp_path / "out.safetensors")
    run("layout", tmp_path / "mine.yaml", tmp_path / "out.safetensors", "-o", tmp_path / "back.npz", "--back")
    with np.load(tmp_path / "back.npz") as found:
        assert all((found[name] == array).all() for name, array in model().items())
    said = run("layout", "mixtrl_4_to_5", tmp_path / "m.safetensors", "-o", tmp_path / "no", status=2)
    assert "there is no layout 'mixtrl_4_to_5'" in said
    assert "mixtral_4_to_5" in said.partition("hint:")[2]


@pytest.mark.parametrize(
    ("rules", "error", "says"),
    [
        ([{"from": "a"}], ValueError, r"rules\[0\]: .* is not a rule"),
        ([{"from": "a", "to": "b", "if": 1}], ValueError, "there is no key 'if'"),
        ([{"from": [], "to": "b"}], ValueError, "neither a path nor a list"),
        ([{"from": ["a", "b"], "to": "c"}], ValueError, "is not a rename"),
        ([{"from": "a.<n>", "to": "c"}], ValueError, "is not a rename"),
        ([{"from": "a", "to": "c", "do": ["stakc"]}], ValueError, r"rules\[0\].do: there is no step 'stakc'"),
        ([{"from": "a", "to": "c", "do": [{"stack": {"axs": 0}}]}], ValueError, "stack takes axis"),
        ([{"from": "a", "to": "c", "do": [{"transpose": ["x"]}]}], ValueError, "axes cannot be"),
        ([{"from": ["a", "b"], "to": "c", "do": [{"sum": {"groups": [[0, 0]]}}]}], ValueError, "groups cannot be"),
        ([], ValueError, "a layout is a list of rules"),
    ],
)
def test_a_rule_that_is_none_is_refused(rules, error, says):
    with pytest.raises(error, match=says):
        pm.Layout(rules)


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize(
    ("rules", "error", "says"),
    [
        ([{"from": "norms", "to": "x"}], LookupError, "norm"),
        ([{"from": "h.<n>.**", "to": "x.<n>.**"}], ValueError, "no rule takes 1 leaf:\n  norm"),
        ([{"from": "**", "to": "x.**"}, {"from": "norm", "to": "y"}], ValueError, "norm is taken by two rules"),
        (
            [{"from": ["h.<n>.q", "h.<n>.w"], "to": "h.<n>.x", "do": [{"concat": {"axis": 0}}]}],
            ValueError,
            r"h.0.q, h.0.w: concat along axis 0: float64\[4,3\] and float64\[2,5\] do not fit",
        ),
        (
            [{"from": "h.<n>.q", "to": ["h.<n>.a", "h.<n>.b", "h.<n>.c"], "do": [{"split": {"axis": 0}}]}],
            ValueError,
            "cannot be cut into 3 equal parts",
        ),
        ([{"from": "h.<n>.q", "to": "norm", "do": [{"stack": {"axis": 0}}]}], ValueError, "would collide"),
    ],
)
def test_what_a_layout_cannot_do_is_refused(tmp_path, rules, error, says, where):
    tree = model()
    if where == "disk":
        save_file(tree, tmp_path / "m.safetensors")
        tree = pm.open(tmp_path / "m.safetensors")
    with pytest.raises(error, match=says):
        pm.Layout(rules, rest="keep" if "collide" in says else "error").to(tree)


def test_numbers_with_a_hole_are_no_stack():
    layout = pm.Layout([{"from": "h.<n>", "to": "h", "do": ["stack"]}])
    with pytest.raises(ValueError, match="are numbered 0, 2, not 0 to 1"):
        layout.to({"h.0": np.ones(1), "h.2": np.ones(1)})


def test_what_belongs_to_a_weight_is_not_left_behind():
    layout = pm.Layout([{"from": "e.<n>.weight", "to": "e.weight", "do": ["stack"]}], rest="keep")
    tree = {f"e.{n}.{name}": np.ones(2) for n in range(2) for name in ("weight", "weight_scale")}
    with pytest.raises(ValueError, match=r"e\.0\.weight_scale, e\.1\.weight_scale would stay behind"):
        layout.to(tree)


def test_what_ships_is_listed():
    assert pm.layouts() == sorted(pm.layouts())
    for family in ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "glm4_moe", "gpt_oss"):
        assert any(family in name for name in pm.layouts())
    for name in pm.layouts():
        assert pm.layout(name).name == name


def test_a_plan_says_what_leaves_are_made_of(tmp_path):
    tree = {f"h.{n}.{name}": np.full((2, 3), n, "f4") for n in range(2) for name in "qk"} | {"e": np.ones((2, 3))}
    pm.save(tree, tmp_path / "m.safetensors")
    rules = [
        {"from": ["h.<n>.q", "h.<n>.k"], "to": "h.<n>.q", "do": [{"concat": {"axis": 0}}]},
        {"from": "e", "to": "e", "do": [{"transpose": [1, 0]}]},
    ]
    pm.Layout(rules).save(tmp_path / "own.yaml")
    lines = [
        "e ◄─ transpose(e, [1, 0])",
        "h.0.q ◄─ concat(h.0.q, h.0.k, axis=0)",
        "h.1.q ◄─ concat(h.1.q, h.1.k, axis=0)",
    ]
    with pm.open(tmp_path / "m.safetensors") as model:
        made = pm.at(pm.Layout(rules).to(model)[0], "e").zero()
    words = [" ".join(line.split()) for line in str(made.plan).splitlines()]
    assert [word.replace("float32[4,3] ", "").replace("float64[3,2] ", "") for word in words[1:4]] == [
        f"{lines[0]}, zero()",
        *lines[1:],
    ]
    assert words[-1] == "1 of 3 leaves changes, 2 are made of others"
    assert sorted(row["origin"] for row in made.plan.to_dict()["changed"]) == [
        "concat(h.0.q, h.0.k, axis=0)",
        "concat(h.1.q, h.1.k, axis=0)",
        "transpose(e, [1, 0])",
    ]
    assert str(pickle.loads(pickle.dumps(made.plan.told()))) == str(made.plan)
    done = CliRunner().invoke(cli, ["layout", str(tmp_path / "own.yaml"), str(tmp_path / "m.safetensors"), "--dry-run"])
    assert all(line.replace("h.0", "h.{0,1}") in done.output for line in lines[:2]), done.output


def test_another_name_of_a_leaf_that_is_taken_is_told_too():
    tied = np.ones((2, 3))
    tree, rules = {"words": tied, "out": tied}, [{"from": "words", "to": "embed"}]
    with pytest.raises(pm.errors.BadArgument, match="no rule takes 1 leaf:\n  out"):
        pm.Layout(rules).to(tree)
    assert pm.Layout(rules, rest="keep").to(tree)[1].kept == ("out",)
