"""`--raw` on every command that opens a checkpoint, and refusals of quantised weights on the command line."""

import json
import shlex

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import paramend as pm
from paramend.cli.main import ROWS, cli, edits
from support.quantized import ODD, stored, write

WEIGHT, SCALE = "model.layers.0.mlp.fc.weight", "model.layers.0.mlp.fc.weight_scale_inv"


def run(line):
    return CliRunner().invoke(cli, shlex.split(line), prog_name="paramend")


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "m.safetensors", stored(ODD))


def test_every_command_that_opens_a_checkpoint_takes_raw():
    for row in (*ROWS, *edits()):
        options = [name for param in cli.get_command(None, row.name).params for name in param.opts]
        assert ("--raw" in options) == row.opens and options.count("--raw") < 2
    assert {row.name for row in ROWS if not row.opens} == {
        *("undo", "history", "verify", "delta", "demo", "lesson", "explain", "completion", "help")
    }


EDITS = {
    "zero": "",
    "fill": "0.5",
    "add": "1",
    "multiply": "2",
    "project_out": "d.npy",
    "clip": "-1 1",
    "cast": "bfloat16",
    "noise": "0.1",
    "reinit": "lecun_normal",
    "set": "donor.safetensors",
    "transpose": "1,0",
    "reshape": "-1",
    "take": "0:8",
    "permute": ",".join(map(str, range(255, -1, -1))),
}


def test_every_edit_is_refused_with_the_way_out_and_done_with_raw(model):
    write(model.parent / "donor.safetensors", stored(ODD))
    np.save(model.parent / "d.npy", np.ones(200))
    assert EDITS.keys() == {row.name for row in edits()}
    before = model.read_bytes()
    for verb, values in EDITS.items():
        ways = ("-o out.safetensors", "--in-place", "--dry-run")
        for how in ways if verb not in ("cast", "transpose", "reshape", "take", "permute") else ways[::2]:
            done = run(f"{verb} m.safetensors {WEIGHT} {values} {how}")
            assert done.exit_code == 2, done.output
            assert all(said in done.stderr for said in ("fp8", WEIGHT, SCALE, "--raw"))
        done = run(f"{verb} m.safetensors {WEIGHT} {values} --raw -o {verb}.safetensors")
        assert done.exit_code == 0, done.output
    assert model.read_bytes() == before and not (model.parent / "out.safetensors").exists()
    assert not load_file(model.parent / "zero.safetensors")[WEIGHT].view(torch.uint8).any()


def test_an_alias_takes_raw_and_in_place_too(model):
    assert run(f"scale m.safetensors {SCALE} 2 --raw --in-place").exit_code == 0
    assert load_file(model)[SCALE].tolist() == (stored(ODD)[SCALE] * 2).tolist()


@pytest.mark.parametrize(
    ("refused", "raw"),
    [
        (f"delete m.safetensors {SCALE}", True),
        (f"rename m.safetensors {WEIGHT} elsewhere", True),
        ("graft m.safetensors --into plain.safetensors --unused ok", True),
        ("graft plain.safetensors --into m.safetensors", True),
        ("apply zero.yaml m.safetensors", True),
        ("deepen m.safetensors --blocks 1 --identity mlp.fc.weight", True),
        (f"set plain.safetensors {WEIGHT} m.safetensors", False),
    ],
)
def test_every_command_is_refused_and_done_with_raw(refused, raw, model):
    write(model.parent / "plain.safetensors", {WEIGHT: np.ones((256, 200), "float32")})
    (model.parent / "zero.yaml").write_text(f"version: 1\nsteps: [zero: {WEIGHT}]\n")
    done = run(f"{refused} -o out.safetensors")
    assert done.exit_code == 2 and "fp8" in done.stderr and not (model.parent / "out.safetensors").exists()
    if raw:
        done = run(f"{refused} --raw -o out.safetensors")
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("show m.safetensors", 0),
        ("show m.safetensors --stats", 0),
        ("diff m.safetensors m.safetensors", 0),
        ("convert m.safetensors out.pt", 0),
        ("deepen m.safetensors --order 0,0 -o out.safetensors", 0),
        ("stack m.safetensors model.layers[*] -o out.safetensors", 0),
        ("rename m.safetensors model.** m.** -o out.safetensors", 0),
        ("delete m.safetensors **.fc.** -o out.safetensors", 0),
        ("apply rename.yaml m.safetensors -o out.safetensors", 0),
    ],
)
def test_what_moves_bytes_alone_works_with_and_without(line, status, model):
    (model.parent / "rename.yaml").write_text('version: 1\nsteps: [rename: {at: "model.**", to: "m.**"}]\n')
    for raw in ("", " --raw --force" if " -o " in line or "convert" in line else " --raw"):
        done = run(line + raw)
        assert done.exit_code == status, done.output


def test_ablate_is_refused_and_done_with_raw(model):
    (model.parent / "score.py").write_text("def score(tree):\n    return 1.0\n")
    line = "ablate m.safetensors model.layers.<n>.** --score score.py --json"
    done = run(line)
    assert done.exit_code == 2 and "fp8" in done.stderr
    assert json.loads(run(f"{line} --raw").stdout)["baseline"] == 1


def test_a_record_says_that_leaves_were_taken_as_they_are_stored(model):
    assert run(f"zero m.safetensors {WEIGHT} --raw --record -o out.safetensors").exit_code == 0
    told = pm.record("out.safetensors").recipe
    assert told == f'version: 1\nraw: true\nsteps:\n  - zero: "{WEIGHT}"'
    again = pm.Recipe.parse(told).apply(pm.open(model))
    assert again[WEIGHT].tobytes() == bytes(256 * 200)


def test_a_recipe_that_was_applied_with_raw_is_recorded_so(model):
    (model.parent / "zero.yaml").write_text(f"version: 1\nsteps: [zero: {WEIGHT}]\n")
    assert run("apply zero.yaml m.safetensors --raw --record -o out.safetensors").exit_code == 0
    assert pm.record("out.safetensors").recipe.startswith("version: 1\nraw: true\n")


def test_raw_of_one_command_is_not_that_of_the_next(model):
    assert run(f"zero m.safetensors {WEIGHT} --raw --dry-run").exit_code == 0
    assert run(f"zero m.safetensors {WEIGHT} --dry-run").exit_code == 2
    assert isinstance(cli.get_command(None, "zero"), click.Command)
