"""Commands that are typed wrong: each error leads somewhere."""

import shlex

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner

from paramend.cli.main import cli


def run(*args):
    return CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="paramend")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = {f"layers.{i}.w": np.ones(2, "float32") for i in range(2)}
    safetensors.numpy.save_file(tree, "model one.safetensors")
    (tmp_path / "fix.yaml").write_text("version: 1\nsteps:\n  - zero: '**/w'\n")
    (tmp_path / "vals.txt").write_text("")
    return tmp_path


M = "model one.safetensors"


@pytest.mark.parametrize(
    "args",
    [
        ["zero", "**/w", M, "-o", "out"],
        ["fill", "**/w", M, "-1", "--in-place"],
        ["rename", "layers.<n>.w", M, "h.<n>.w", "--dry-run"],
        ["show", "**/w", M],
        ["delete", "layers[0].w", M, "-o", "out"],
        ["stack", "layers[*]", M, "--dry-run"],
        ["apply", M, "fix.yaml", "-o", "out"],
        ["apply", M, "fix.yaml", "--in-place"],
    ],
)
def test_arguments_in_the_wrong_order_get_the_right_one(folder, args):
    done = run(*args)
    assert done.exit_code == 2, done.output
    hint = done.stderr.rpartition(" comes first: paramend ")[2]
    done = run(*shlex.split(hint))
    assert done.exit_code == 0, done.output


def test_the_shell_took_a_pattern_for_names_of_files(folder):
    for args in (
        ["zero", M, "fix.yaml", "vals.txt", "-o", "out"],
        ["show", M, "vals.txt"],
        ["fill", M, "vals.txt", "1"],
    ):
        done = run(*args, *(["--dry-run"] if args[0] == "fill" else []))
        assert done.exit_code == 2
        assert "is a file here: did the shell" in done.stderr and f"paramend {args[0]} '{M}' '**/bias'" in done.stderr
    # A selector that matches may be the name of a file too: the error is about another.
    (folder / "layers.0.w").write_text("")
    done = run("show", M, "layers.0.w", "layers.0.v")
    assert done.exit_code == 2 and "did the shell" not in done.stderr and "did you mean" in done.stderr
    # A file that an operand names is none of the selectors.
    done = run("set", M, "**/v", "vals.txt", "--dry-run")
    assert done.exit_code == 2 and "did the shell" not in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["history", M, "--html", "x"], "show, diff, delete, rename, apply, config, and "),
        (["diff", M, M, "--stats"], "show, merge have it."),
        (["convert", M, "o.npz", "--in-place"], "apply, config, insert, "),
        (["fill", M, "**", "--value", "3"], "It is an argument, without a name: paramend fill PATH SELECTOR... VALUE"),
        (["zero", M, "--selector", "**"], "It is an argument, without a name: paramend zero PATH SELECTOR..."),
        (["zero", M, "**", "--frob"], "No such option"),
        ([M], f"but a file; to look at it: paramend show '{M}'"),
        (["."], "but a directory; to look at it: paramend show ."),
        (["stats", M], "Did you mean 'show'?"),
        (["rm", M], "Did you mean 'delete'?"),
        (["scale_", M], "Did you mean 'scale'?"),
        (["freeze", M], "There is no command 'freeze': pm.freeze is for Python."),
        (["selectors"], "about selectors: paramend help selectors"),
        (["help", "zoro"], "There is no command 'zoro'. Did you mean 'zero'?"),
        (["undo", "model on.safetensors"], f"hint: did you mean {M}?"),
        (["history", "model on.safetensors"], f"hint: did you mean {M}?"),
        (["verify", "model on.safetensors"], f"hint: did you mean {M}?"),
        (["lesson", "6"], "or their numbers, 1 to 5"),
        (["lesson", "freeze"], "did you mean freeze_first_dense?"),
        (["lesson", "--solution"], "Which lesson? Write paramend lesson NAME --solution"),
        (["lesson", "3", "--solution", "--grade", "x.py"], "grade first, look later"),
    ],
)
def test_dead_ends_lead_on(folder, args, message):
    done = run(*args)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["zero", M, "**", "-o"],
        ["zero", M, "**", "-o", "--force"],
        ["zero", M, "**", "-o", "--"],
        ["zero", M, "**", "--except", "-o", "out"],
        ["graft", M, "--into", "--dry-run"],
        ["zero", M, "**", "-o", ""],
        ["zero", "", "**", "--in-place"],
        ["show", ""],
        ["convert", M, ""],
        ["diff", M, ""],
        ["undo", ""],
    ],
)
def test_what_a_script_left_out_is_not_guessed(folder, args):
    """A variable that is not set, or an option at the end: nothing is written to "--", or edited in this folder."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = run(*args)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "requires an argument." in done.stderr or "An argument is empty" in done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["stack", M, "layers", "--dry-run"], "LAYERS 'layers[*]'"),
        (["stack", M, "layers[*]", "--axis", "9", "--dry-run"], "error[bad-argument]: --axis 9 is not an axis"),
        (["unstack", M, "layers", "--into", "h", "--dry-run"], "hint: --into 'h_<n>'"),
        (["deepen", M, "--drop", "9", "--dry-run"], "hint: --drop 1"),
        (["deepen", M, "--drop", "0", "--layers", "h", "--dry-run"], "hint: --layers 'layers[*]'"),
        (["deepen", M, "--order", "0,9", "--dry-run"], "hint: --order 0,1"),
        (["deepen", M, "--overlap", "9", "--dry-run"], "error[bad-argument]: --overlap 9 leaves nothing"),
        (["deepen", M, "--stack", "0", "--dry-run"], "hint: --stack 2"),
        (["deepen", M, "--interleave", "0", "--dry-run"], "hint: --interleave 2"),
        (["deepen", M, "--blocks", "0", "--dry-run"], "error[bad-argument]: --blocks 0 is not"),
        (["deepen", M, "--blocks", "1", "--dry-run"], "hint: --identity 'self_attn.o_proj.*' --identity"),
        (["graft", M, "--into", M, "--mismatch", "kep", "--dry-run"], "hint: --mismatch keep"),
        (["clip", M, "**", "2", "-1", "--dry-run"], f"hint: paramend clip '{M}' '**' -1 2 -o OUT"),
        (["reinit", M, "**", "he_normal", "--dry-run"], "in a recipe, where: {ndim: 2}"),
        (["fill", M, "**", "1", "2", "--dry-run"], "hint: 1 stands where a SELECTOR does: paramend fill PATH"),
        (["set", M, "**", "2", "--dry-run"], "2 is no file; `paramend fill` takes a number"),
    ],
)
def test_hints_are_in_the_words_of_the_command_line(folder, args, message):
    done = run(*args)
    assert done.exit_code == 2 and message in done.stderr, done.output
    assert "pm." not in done.stderr


def test_help_of_several_things():
    done = run("help", "zero", "selectors")
    assert done.exit_code == 0
    assert (
        "Usage: paramend zero [OPTIONS] PATH SELECTOR..." in done.stdout and "any number of whole keys" in done.stdout
    )
    assert "paramend help selectors" in run("help").stdout
