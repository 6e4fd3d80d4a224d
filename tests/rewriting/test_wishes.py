"""Which format the name of an output asks for: mistyped suffixes are refused, and what was written is said."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

import paramend as pm
from paramend.cli.main import cli
from paramend.errors import BadArgument, Unsupported

TREE = {"w": np.ones(2, "float32")}


def run(*args):
    return CliRunner().invoke(cli, [*map(str, args)])


@pytest.fixture
def source(tmp_path):
    pm.save(TREE, tmp_path / "x.npz")
    return tmp_path / "x.npz"


NEAR = {
    "y.safetensor": "y.safetensors",
    "y.safetensr": "y.safetensors",
    "y.SAFETENSOR": "y.safetensors",
    "y.msgpck": "y.msgpack",
    "y.orbx": "y.orbax",
    "y.ckp": "y.ckpt",
    "y.npzz": "y.npz",
    "y.ptt": "y.pt",
}


@pytest.mark.parametrize("name", NEAR)
def test_a_mistyped_suffix_is_refused_everywhere(name, source, tmp_path):
    out = tmp_path / name
    with pytest.raises(BadArgument, match="is not the suffix of a format") as caught:
        pm.save(TREE, out)
    assert caught.value.hint == str(tmp_path / NEAR[name])
    with pm.open(source) as checkpoint, pytest.raises(BadArgument) as caught:
        checkpoint.save(out)
    assert caught.value.hint == str(tmp_path / NEAR[name])
    for command in (("convert", source, out), ("zero", source, "w", "-o", out), ("convert", source, out, "--dry-run")):
        done = run(*command)
        assert done.exit_code == 2 and str(tmp_path / NEAR[name]) in done.stderr
    assert not out.exists()
    pm.save(TREE, caught.value.hint)


@pytest.mark.parametrize("name", ["y.zarr", "y.ggml", "y.pkl", "y.tar", "y.h5"])
def test_other_formats_cannot_be_written(name, source, tmp_path):
    with pytest.raises(Unsupported, match="files cannot be written"):
        pm.save(TREE, tmp_path / name)
    with pm.open(source) as checkpoint, pytest.raises(Unsupported, match="files cannot be written"):
        checkpoint.save(tmp_path / name)
    assert run("convert", source, tmp_path / name).exit_code == 2
    assert not (tmp_path / name).exists()


def test_a_conversion_must_know_its_format(source, tmp_path):
    for name in ("none", "model.v2", "y.weights", "step.100"):
        done = run("convert", source, tmp_path / name)
        assert done.exit_code == 2 and "--to FORMAT" in done.stderr and not (tmp_path / name).exists()
        done = run("convert", source, tmp_path / name, "--to", "torch")
        assert done.exit_code == 0 and pm.open(tmp_path / name).format == "torch"
        assert "as torch" in done.stderr
    done = run("convert", source, tmp_path / "z", "--to", "orbax", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["format"] == pm.open(tmp_path / "z").format == "orbax"
    for suffix in ("safetensors", "pt", "pth.tar", "npz", "msgpack", "orbax"):
        done = run("convert", source, tmp_path / f"a.{suffix}")
        assert done.exit_code == 0 and ", as " not in done.stderr
    assert ", as safetensors" in run("convert", source, f"{tmp_path}/folder/").stderr
    assert run("convert", source, tmp_path / "sized", "--max-shard-size", "1kB").exit_code == 0
    assert run("convert", source, tmp_path / "sized2", "--max-shard-size", "1kB", "--to", "safetensors").exit_code == 0
    for args in (("b.pt", "--to", "npz"), ("b/", "--to", "npz"), ("b", "--to", "npz", "--max-shard-size", "1kB")):
        done = run("convert", source, f"{tmp_path}/{args[0]}", *args[1:])
        assert done.exit_code == 2 and "hint:" in done.stderr
    assert run("convert", source, tmp_path / "c", "--to", "safetensor").exit_code == 2


def test_names_without_a_suffix_keep_the_format_of_an_edit(source, tmp_path):
    for name in ("none", "model.v2", "step.100", "x.bak", "y.old"):
        with pm.open(source) as checkpoint:
            assert pm.at(checkpoint, "w").zero().save(tmp_path / name).format == "npz"
        assert pm.open(tmp_path / name).format == "npz"
    for name in ("plain", "plain.v2", "llama-3.1"):
        assert pm.save(TREE, tmp_path / name).format == "safetensors"
    with pytest.raises(BadArgument, match=r"\.weights is not the suffix of a format"):
        pm.save(TREE, tmp_path / "x.weights")


def test_what_is_left_out_is_printed(tmp_path):
    pm.save({"w": TREE["w"], "step": 3, "lr": 0.1}, tmp_path / "x.pt")
    done = run("convert", tmp_path / "x.pt", tmp_path / "x.safetensors")
    assert "not copied: step (not a tensor), lr (not a tensor)" in done.stderr
    done = run("convert", tmp_path / "x.pt", tmp_path / "y.safetensors", "--dry-run", "--json")
    assert json.loads(done.stdout)["left_out"] == ["step (not a tensor)", "lr (not a tensor)"]
