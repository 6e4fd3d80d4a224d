"""`paramend delta`, and `paramend apply` with deltas, on files of torch and safetensors."""

import json

import numpy as np
import pytest
import safetensors.numpy
import torch
from click.testing import CliRunner

import paramend as pm
from paramend.cli.main import cli


def run(*args, status=0):
    done = CliRunner().invoke(cli, list(map(str, args)))
    assert done.exit_code == status, done.output
    return done


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """Four versions of a model, v0 to v3, and a delta from each to the next."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    tree = {f"layers.{n}.w": rng.normal(size=(20, 10)).astype("float32") for n in range(3)}
    for n in range(4):
        safetensors.numpy.save_file(tree, f"v{n}.safetensors")
        tree = {name: array.copy() for name, array in tree.items()}
        tree["layers.1.w"].reshape(-1)[rng.integers(0, 200, 5)] = n
    for n in range(3):
        run("delta", f"v{n}.safetensors", f"v{n + 1}.safetensors", "-o", f"D{n}")
    return tmp_path


def data(path):
    return (path if path.suffix else path.with_suffix(".safetensors")).read_bytes()


def test_a_delta_is_written_and_applied(chain):
    done = run("delta", "v0.safetensors", "v1.safetensors", "-o", "D")
    assert "layers.1.w  float32[20,10]" in done.stdout and "wrote D" in done.stderr
    assert "wrote out.safetensors" in run("apply", "D", "v0.safetensors", "-o", "out.safetensors").stderr
    assert data(chain / "out") == data(chain / "v1")
    old = data(chain / "v0")
    assert "dry run" in run("apply", "D", "v0.safetensors", "--in-place", "--dry-run").stderr
    assert data(chain / "v0") == old
    assert "patched v0.safetensors" in run("apply", "D", "v0.safetensors", "--in-place").stderr
    assert data(chain / "v0") == data(chain / "v1")
    assert "v0.safetensors is the outcome of D already" in run("apply", "D", "v0.safetensors", "--in-place").stderr
    run("undo", "v0.safetensors")
    assert data(chain / "v0") == old


def test_deltas_become_one(chain):
    run("delta", "squash", "D0", "D1", "D2", "-o", "D")
    run("apply", "D", "v0.safetensors", "-o", "out.safetensors")
    assert data(chain / "out") == data(chain / "v3")
    assert "not for the outcome of the one before" in run("delta", "squash", "D1", "D0", "-o", "E", status=2).stderr
    assert not (chain / "E").exists()


def test_what_a_delta_holds(chain):
    assert "1 changed, 2 kept" in run("delta", "D0").stdout
    found = json.loads(run("delta", "D0", "--json").stdout)
    assert [row["path"] for row in found["changed"]] == ["layers.1.w"] and found["kept"] == 2 and found["path"] is None
    found = json.loads(run("delta", "v0.safetensors", "v3.safetensors", "-o", "D", "--json").stdout)
    assert (found["path"], found["encoding"], found["checksum"]) == ("D", "overwrite", "sha256")


def test_nothing_is_written_in_a_dry_run(chain):
    assert "1 changed" in run("delta", "v0.safetensors", "v1.safetensors", "--dry-run", "-o", "E").stdout
    assert not (chain / "E").exists()


def test_another_base_has_status_2(chain):
    done = run("apply", "D0", "v2.safetensors", "-o", "out.safetensors", status=2)
    assert "v2.safetensors is not the base of the delta, nor its outcome: 1 leaf\n  layers.1.w" in done.stderr
    assert not (chain / "out.safetensors").exists()


def test_what_is_missing_is_said(chain):
    assert "-o OUT is needed" in run("delta", "v0.safetensors", "v1.safetensors", status=2).stderr
    assert "A and B are needed" in run("delta", "a", "b", "c", "-o", "D", status=2).stderr
    assert "already exists" in run("delta", "v0.safetensors", "v1.safetensors", "-o", "D0", status=2).stderr
    run("delta", "v0.safetensors", "v2.safetensors", "-o", "D0", "--force")
    assert "PATH is needed" in run("apply", "D0", "-o", "out.safetensors", status=2).stderr


def test_in_place_only_values_change(chain):
    tree = safetensors.numpy.load_file(chain / "v0.safetensors")
    torch.save({name: torch.from_numpy(array) for name, array in tree.items()}, "a.pt")
    torch.save({"new": torch.ones(2)} | {name: torch.from_numpy(array) for name, array in tree.items()}, "b.pt")
    run("delta", "a.pt", "b.pt", "-o", "D")
    done = run("apply", "D", "a.pt", "--in-place", status=2)
    assert "only values can change in place" in done.stderr and "paramend apply D a.pt -o OUT" in done.stderr
    run("apply", "D", "a.pt", "-o", "out.pt")
    assert not pm.diff("out.pt", "b.pt")


def test_slime(chain):
    run("delta", "v0.safetensors", "v1.safetensors", "--slime", "-o", "weight_v000003")
    table = json.loads((chain / "weight_v000003" / "model.safetensors.index.json").read_text())
    wanted = {"version": "000003", "base_version": "000002", "delta_encoding": "xor", "compression_format": "zstd"}
    assert table["metadata"] == wanted | {"checksum_format": "xxh3-128"}
    run("apply", "weight_v000003", "v0.safetensors", "-o", "out.safetensors")
    assert data(chain / "out") == data(chain / "v1")
