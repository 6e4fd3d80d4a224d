"""Several selectors, and all but some, on every command that takes a selector."""

import json
import shlex

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner

import paramend as pm
from paramend.cli.main import cli

NAMES = ["layers.0.w", "layers.1.w", "layers.0.b", "layers.1.b", "head.w"]


def run(*args):
    return CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="paramend")


@pytest.fixture
def model(tmp_path):
    safetensors.numpy.save_file({name: np.full((2, 2), 3, "float32") for name in NAMES}, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def changed(path, value):
    return {name for name, leaf in safetensors.numpy.load_file(path).items() if (leaf == np.float32(value)).all()}


@pytest.mark.parametrize(
    ("verb", "operands", "value"),
    [("zero", [], 0), ("fill", ["-7"], -7), ("scale", ["2"], 6), ("add", ["1"], 4), ("clip", ["-1", "1"], 1)],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_several_selectors_stand_before_the_operands(model, tmp_path, verb, operands, value, in_place):
    out = model if in_place else tmp_path / "out.safetensors"
    how = ["--in-place"] if in_place else ["-o", out, "--record"]
    given = ["**/w", "layers[0].b", *operands, "--except", "head.*", "--except", "layers[1].w", *how]
    done = run(verb, model, *given)
    assert done.exit_code == 0, done.output
    assert changed(out, value) == {"layers.0.w", "layers.0.b"}
    if not in_place:  # the record says the same, and does the same again
        again = pm.Recipe.parse(pm.record(out).recipe).apply(pm.open(model))
        assert {row.path for row in again.plan.changed} == {"layers.0.w", "layers.0.b"}


def test_structure_takes_them_too(model, tmp_path):
    assert run("delete", model, "**/w", "**/b", "--except", "layers[0].*", "-o", tmp_path / "less").exit_code == 0
    assert sorted(safetensors.numpy.load_file(tmp_path / "less")) == ["layers.0.b", "layers.0.w"]
    args = ["layers.<n>.w", "layers.<n>.b", "h.<n>.x", "--except", "layers.*.b", "-o", tmp_path / "moved"]
    assert run("rename", model, *args).exit_code == 0
    assert sorted(safetensors.numpy.load_file(tmp_path / "moved")) == [
        "h.0.x",
        "h.1.x",
        "head.w",
        "layers.0.b",
        "layers.1.b",
    ]


def test_show_takes_them_too(model):
    def paths(*args):
        return [leaf["path"] for leaf in json.loads(run("show", model, *args, "--json").stdout)["leaves"]]

    assert paths("layers.*.b", "head.w") == ["head.w", "layers.0.b", "layers.1.b"]
    assert paths("--except", "layers.**") == ["head.w"]
    assert paths("**/w", "--except", "layers[0].*") == ["head.w", "layers.1.w"]


def test_an_exception_that_means_nothing_is_an_error(model, tmp_path):
    for args, message in (
        (["**/w", "--except", "**/v"], '"**/v" matches none of 5 leaves'),
        (["**/w", "**/v"], '"**/v" matches none of 5 leaves'),
        (["**/w", "head.w", "--except", "**"], 'nothing is left: "**" excepts the 3 leaves that "**/w" or "head.w"'),
    ):
        for command in (["zero"], ["show"], ["delete"]):
            more = [] if command == ["show"] else ["-o", tmp_path / "out"]
            done = run(*command, model, *args, *more)
            assert done.exit_code == 2 and message in done.stderr, done.output
    assert not (tmp_path / "out").exists()


# ---- two sides -------------------------------------------------------------------------------------------------


def test_diff_compares_all_but_what_only_one_side_has(model, tmp_path):
    """A selector of a leaf that one side lacks takes away nothing else from the comparison."""
    tree = safetensors.numpy.load_file(model)
    new = {**tree, "lora.a": np.ones(2, "float32")}
    safetensors.numpy.save_file(new, tmp_path / "new")
    assert run("diff", model, tmp_path / "new").exit_code == 1
    for one, other in ((model, tmp_path / "new"), (tmp_path / "new", model)):
        assert run("diff", one, other, "--except", "lora.*").exit_code == 0
        done = run("diff", one, other, "lora.*", "head.w", "--json")
        assert json.loads(done.stdout)["totals"]["identical"]["leaves"] == 1
    del new["head.w"]  # removed: `~lora` finds it on one side only
    safetensors.numpy.save_file(new, tmp_path / "less")
    report = json.loads(run("diff", model, tmp_path / "less", "--except", "lora.*", "--json").stdout)
    assert [row["path"] for row in report["removed"]] == ["head.w"] and not report["added"]
    report = pm.diff(model, tmp_path / "less", ~pm.sel("lora.*"))
    assert [row.path for row in report.removed] == ["head.w"] and not report.added
    assert [row.path for row in pm.diff(model, tmp_path / "less", ["lora.*", "**/w"]).removed] == ["head.w"]
    done = run("diff", model, tmp_path / "new", "--except", "nope")
    assert done.exit_code == 2 and '"nope" matches none' in done.stderr


def test_the_gate_of_diff_takes_them_too(model, tmp_path):
    assert run("zero", model, "**/b", "head.w", "-o", tmp_path / "new").exit_code == 0
    gate = ["diff", model, tmp_path / "new"]
    assert run(*gate, "--only", "**/b", "--only", "head.*").exit_code == 0
    assert run(*gate, "--only", "**/b").exit_code == 1
    assert run(*gate, "--only", "**", "--except", "layers.*.w").exit_code == 0
    # What is excepted from --only is compared, and must not differ.
    done = run(*gate, "--only", "**", "--except", "head.w")
    assert done.exit_code == 1 and "1 outside ** except head.w" in done.stdout


def test_graft_takes_them_too(model, tmp_path):
    assert run("fill", model, "**", "9", "-o", tmp_path / "nine").exit_code == 0
    graft = ["graft", tmp_path / "nine", "--into", model]
    args = ["--only", "**/w", "--only", "**/b", "--except", "layers[0].*", "--unused", "ok"]
    done = run(*graft, *args, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert changed(tmp_path / "out", 9) == {"layers.1.w", "layers.1.b", "head.w"}
    assert run(*graft, "--except", "head.w", "-o", tmp_path / "rest").exit_code == 0
    assert changed(tmp_path / "rest", 9) == {*NAMES} - {"head.w"}


def test_the_hint_of_a_refused_graft_keeps_the_choice(model, tmp_path):
    tree = {**safetensors.numpy.load_file(model), "layers.1.w": np.ones(2, "float32")}
    safetensors.numpy.save_file(tree, tmp_path / "more it")
    graft = ["graft", tmp_path / "more it", "--into", model, "--only", "**/w", "--only", "**/b", "--except", "head.w"]
    done = run(*graft, "-o", tmp_path / "out")
    assert done.exit_code == 2
    hint = shlex.split(done.stderr.strip().splitlines()[-1])
    assert [hint[at + 1] for at, word in enumerate(hint) if word in ("--only", "--except")] == [
        "**/w",
        "**/b",
        "head.w",
    ]
    done = run(*hint[hint.index("graft") :])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out").exists()


def test_ablate_takes_exceptions(model, tmp_path):
    score = tmp_path / "score.py"
    score.write_text("def score(tree): return sum(float(x.sum()) for x in tree.values())\n")
    args = ["ablate", model, "layers.<n>.*", "head.w", "--score", score, "--flat", "--json"]

    def deltas(*more):
        done = run(*args, *more)
        assert done.exit_code == 0, done.output
        return {row["name"]: row["delta"] for row in json.loads(done.stdout)["rows"]}

    assert deltas() == {"layers.0.*": -24, "layers.1.*": -24, "head.w": -12}
    assert deltas("--except", "layers.*.b") == {"layers.0.*": -12, "layers.1.*": -12, "head.w": -12}
    done = run(*args, "--except", "nope")
    assert done.exit_code == 2 and '"nope" matches none' in done.stderr
