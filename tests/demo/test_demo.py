"""`paramend demo`: run once, each step's data looked at; claims that can fail; folders that are refused."""

import inspect
import json
import shlex
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner

from paramend.checkpoints.checkpoint import Checkpoint
from paramend.cli.main import cli
from paramend.demo import steps, tour
from paramend.demo.patient import prepare
from paramend.demo.step import Outcome, command_in
from paramend.demo.steps import STEPS
from paramend.demo.tour import workplace
from paramend.edits.selection import Selection
from paramend.errors import CannotWrite

pytestmark = pytest.mark.slow

FILES = ["deeper.safetensors", "digits.safetensors", "zeroed-in-memory.safetensors", "zeroed.safetensors"]
HEAD = "params/Dense_3/kernel"


def run(*arguments):
    return CliRunner().invoke(cli, ["demo", *map(str, arguments)])


def tree(file):
    return safetensors.numpy.load_file(file)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The whole demo, as a program would run it."""
    out = tmp_path_factory.mktemp("demo") / "my files"
    result = run("--out", out, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    return SimpleNamespace(out=out, data=data, steps={step["name"]: step for step in data["steps"]}, talk=result.stderr)


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    """The one that `ran` operated on: without a fault all steps hold."""
    return prepare(tmp_path_factory.mktemp("patient"), epochs=tour.EPOCHS, seed=0)


# ---- what it shows ---------------------------------------------------------------------------------------------


def test_every_step_is_told_and_held(ran):
    assert [step["name"] for step in ran.data["steps"]] == [step.name for step in STEPS]
    assert ran.data["held"]
    for step in ran.data["steps"]:
        assert step["claims"]
        assert all(step["claims"].values()), step
    for step in STEPS:
        assert step.title in ran.talk


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("replace", ["params/Dense_0/kernel"]),
        ("zero", [HEAD]),
        ("restore", [HEAD]),
        ("freeze", [f"params/Dense_{n}/{leaf}" for n in (1, 2, 3) for leaf in ("bias", "kernel")]),
        ("zero-gradients", [f"params/Dense_{n}/{leaf}" for n in (0, 1, 2, 3) for leaf in ("bias", "kernel")]),
        ("identity", ["params/Dense_4/kernel"]),
        ("file", [HEAD]),
        ("torch", ["layers.3.weight"]),
        ("init-zero", ["layers.3.weight", "layers.3.bias"]),
    ],
)
def test_what_changed(ran, name, changed):
    assert sorted(ran.steps[name]["changed"]) == sorted(changed)


def test_what_it_did_to_accuracy(ran):
    before, after = ({name: step["accuracy"][when] for name, step in ran.steps.items()} for when in ("before", "after"))
    trained = after["look"]
    assert before["look"] < 0.3 < 0.9 < trained
    assert after["replace"] < trained
    assert after["zero"] == after["file"] == after["torch"] == pytest.approx(0.1, abs=0.01)
    assert after["restore"] == after["identity"] == before["torch"] == trained
    assert after["freeze"] > 0.9
    assert before["graft"] < 0.3
    assert after["init-zero"] == pytest.approx(0.1, abs=0.01)


def test_the_files_hold_what_the_steps_say(ran):
    assert sorted(path.name for path in ran.out.iterdir()) == ran.data["files"] == FILES
    digits, zeroed, deeper = (tree(ran.out / f"{name}.safetensors") for name in ("digits", "zeroed", "deeper"))
    assert list(digits) == list(zeroed)
    for path, leaf in digits.items():
        assert leaf.tobytes() == zeroed[path].tobytes() or path == HEAD
    assert not zeroed[HEAD].any()
    assert (ran.out / "zeroed-in-memory.safetensors").read_bytes() == (ran.out / "zeroed.safetensors").read_bytes()
    assert np.array_equal(deeper["params/Dense_5/kernel"], digits[HEAD])
    assert not deeper["params/Dense_4/kernel"].any()
    assert deeper["params/Dense_3/kernel"].any()


def test_the_commands_that_are_shown_work(ran):
    shown = [step["code"] for step in ran.data["steps"] if step["code"].startswith("paramend ")]
    assert len(shown) == 2
    for command in [*shown, *ran.data["next"]]:
        words = shlex.split(command)[1:]
        if "-o" in words:
            words[-1] = words[-1].replace(".safetensors", "-again.safetensors")
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == 0, f"{command}\n{result.output}"
    again = ran.out / "zeroed-again.safetensors"
    assert again.read_bytes() == (ran.out / "zeroed.safetensors").read_bytes()
    for file in ran.out.glob("*-again.safetensors"):
        file.unlink()


@pytest.mark.parametrize("step", [step for step in STEPS if step.code.startswith("pm.")], ids=lambda step: step.name)
def test_the_code_that_is_shown_is_the_code_that_runs(step):
    def bare(code):
        return "".join(code.split()).replace("pm.", "").replace(",)", ")")

    assert bare(step.code) in bare(inspect.getsource(step.run))


def test_it_is_told_as_text(tmp_path, monkeypatch):
    monkeypatch.setattr(tour, "tour", partial(tour.tour, epochs=2, steps=STEPS[1:4]))
    result = run("--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for step in STEPS[1:4]:
        assert f"    {step.code}\n" in result.stdout
        assert result.stdout.count(step.title) == 2  # when it is done, and in the table
    assert "    changed   1 of 8 leaves: params/Dense_3/kernel\n" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("    paramend scale ")


# ---- claims can fail -------------------------------------------------------------------------------------------


def nothing(selection, value=None):
    return selection._tree.root


def half(selection):
    return selection.multiply(0.5)


def still(tx, selector, how, do=steps.freeze):
    return do(tx, selector)


# For each step but the first, something in the library that goes wrong.
FAULTS = {
    "replace": (Selection, "set", nothing),
    "zero": (Selection, "zero", half),
    "restore": (Selection, "set", nothing),
    "freeze": (steps, "freeze", lambda tx, selector: tx),
    "zero-gradients": (steps, "freeze", still),
    "graft": (steps, "graft", lambda fresh, params, rename: (fresh, SimpleNamespace(copied=[], fresh=[]))),
    "identity": (Selection, "zero", half),
    "file": (Checkpoint, "edited", lambda self, calls: self),
    "torch": (Selection, "zero_", lambda self: self.multiply_(0.5)),
    "init-zero": (steps, "init_zero_", lambda layer: layer),
}


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_a_fault_is_seen(step, patient, monkeypatch):
    if step.name == "look":
        raw = bytearray(patient.file.read_bytes())
        raw[-1] ^= 1
        (patient.folder / "damaged").mkdir()
        patient = replace(patient, folder=patient.folder / "damaged")
        patient.file.write_bytes(raw)
    else:
        monkeypatch.setattr(*FAULTS[step.name])
    assert not all(step.run(patient).claims.values())


@pytest.fixture
def quick(monkeypatch):
    """A demo of one step, which the test gives."""

    def set_step(do):
        step = replace(STEPS[0], run=do)
        monkeypatch.setattr(tour, "tour", partial(tour.tour, epochs=1, steps=[step]))

    return set_step


def test_a_claim_that_does_not_hold_is_exit_status_1(quick, tmp_path):
    quick(lambda patient: Outcome([], 8, 0.5, 0.5, {"water flows": True, "up": False}))
    result = run("--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "    ok        water flows\n    FAILED    up\n" in result.stdout
    assert "1 of 2 claims held" in result.stdout
    assert (tmp_path / "out" / "digits.safetensors").is_file()  # left to be looked at
    result = run("--out", tmp_path / "json", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["held"] is False


# ---- the folder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), RuntimeError(), OSError()])
def test_a_demo_that_is_cut_short_leaves_nothing(quick, tmp_path, error):
    def stop(patient):
        assert patient.file.is_file()
        raise error

    quick(stop)
    assert run("--out", tmp_path / "new" / "out").exit_code != 0
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_files_is_refused(ran, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in ran.out.iterdir()}
    result = run("--out", ran.out)
    assert result.exit_code == 2
    assert "already exists and holds deeper.safetensors" in result.stderr
    assert "--force" in result.stderr
    assert result.stdout == ""
    assert {path: path.stat().st_mtime_ns for path in ran.out.iterdir()} == before


def test_force_replaces_its_files_and_no_others(tmp_path):
    (tmp_path / "digits.safetensors").write_text("old")
    (tmp_path / "thesis.txt").write_text("mine")
    with workplace(tmp_path, force=True) as place:
        (place / "digits.safetensors").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits.safetensors", "thesis.txt"]
    assert (tmp_path / "digits.safetensors").read_text() == "new"
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_an_empty_folder_will_do_and_stays(tmp_path):
    with pytest.raises(RuntimeError), workplace(tmp_path):
        raise RuntimeError
    assert tmp_path.is_dir()
    assert not list(tmp_path.iterdir())


def test_no_folder_at_all_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    result = run("--out", file)
    assert result.exit_code == 2
    assert "file is not a folder" in result.stderr
    assert run("--out", file / "below").exit_code == 2
    assert file.read_text() == "mine"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert run("--out", tmp_path / "link").exit_code == 2


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", refused)
    with pytest.raises(CannotWrite, match="out: Permission denied"), workplace(tmp_path / "out"):
        pass


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    result = run("--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "sklearn is needed to run the demo" in result.stderr
    assert "pip install 'paramend[demo]'" in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_demo_is_not_opened_for_help():
    code = (
        "import sys; from paramend.cli.demo import demo; print({'jax', 'torch', 'sklearn', 'flax'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_commands_are_said_of_the_folder_that_was_asked_for():
    command = "paramend show paramend-demo/digits.safetensors"
    assert shlex.split(command_in(command, Path("a b")))[-1] == "a b/digits.safetensors"
    assert command_in(command, Path("paramend-demo")) == command
