"""`paramend diff`: exit status, text, JSON, and the gate."""

import json

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from paramend.cli.main import cli


def run(*args):
    return CliRunner().invoke(cli, [str(arg) for arg in args])


@pytest.fixture
def models(tmp_path):
    a = {f"layers.{i}.{name}": np.ones(shape, "float32") for i in range(3) for name, shape in (("w", (2, 2)), ("b", 2))}
    save_file(a, tmp_path / "a")
    save_file(a, tmp_path / "same")
    save_file(a | {"layers.2.w": np.zeros((2, 2), "float32")}, tmp_path / "last")
    save_file(a | {"layers.2.w": np.ones((2, 2), ml_dtypes.bfloat16), "new": np.ones(1)}, tmp_path / "other")
    return tmp_path


def test_exit_status_without_a_gate(models):
    same = run("diff", models / "a", models / "same")
    assert (same.exit_code, same.stdout) == (0, "no difference: 6 leaves are identical, 72 B\n")
    last = run("diff", models / "a", models / "last")
    assert run("diff", models / "a", models / "last", "layers[0]/**").exit_code == 0
    assert run("diff", models / "a", models / "last", "layers[-1]/**").exit_code == 1
    assert run("diff", models / "a", models / "last", "leyers[-1]/**").exit_code == 2
    assert last.exit_code == 1 and "layers.2.w  float32[2,2]  all" in last.stdout


def test_the_gate(models):
    a = models / "a"
    assert run("diff", a, models / "last", "--only", "layers[-1]/w").exit_code == 0
    outside = run("diff", a, models / "last", "--only", "layers[0]/**")
    assert outside.exit_code == 1 and "changed outside layers[0]/**" in outside.stdout
    assert run("diff", a, models / "same", "--only", "**").exit_code == 1
    assert run("diff", a, models / "same", "--only", "**", "--allow-noop").exit_code == 0
    assert run("diff", a, models / "last", "--only", "layers[0]/**", "--allow-noop").exit_code == 1
    assert run("diff", a, models / "other", "--only", "**").exit_code == 0
    assert run("diff", a, models / "other", "--only", "layers[-1]/w").exit_code == 1  # `new` is new
    assert run("diff", a, models / "other", "--only", "new").exit_code == 1


def test_json(models):
    done = run("diff", models / "a", models / "other", "--json", "--sort", "path")
    data = json.loads(done.stdout, parse_constant=pytest.fail)
    assert done.exit_code == 1
    assert data["respecified"][0]["dtype_before"] == "float32" and data["respecified"][0]["differing"] == 0
    assert [row["path"] for row in data["added"]] == ["new"]
    assert data["totals"]["identical"]["leaves"] == 5


def test_bad_input_is_2(models):
    a = models / "a"
    for args in (
        [a, models / "nothing"],
        [a, models / "last", "--only", "nope"],
        [a, models / "last", "--only", "[["],
        [a, models / "same", "--allow-noop"],
        [a, models / "same", "--sort", "size"],
        [a],
    ):
        done = run("diff", *args)
        assert done.exit_code == 2 and not done.stdout
    (models / "cut").write_bytes(a.read_bytes()[:-4])
    assert run("diff", a, models / "cut").exit_code == 2
