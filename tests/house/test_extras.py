"""What needs an extra that is missing says so, and writes nothing; `noxfile.py` runs this where they really are."""

import json
import re
import struct
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import paramend as pm
from paramend.cli.main import cli

TOP = Path(__file__).parents[2]
EXTRAS = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["optional-dependencies"]
MODULES = {"orbax-checkpoint": "orbax", "scikit-learn": "sklearn"}
TREE = {f"h_{n}": {"w": np.full((2, 2), n + 1, "float32")} for n in range(2)}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pm.save(TREE, "m.safetensors")
    pm.save(pm.at(TREE, "h_1/w").zero(), "n.safetensors")
    # One tensor of 32 values in iq4_nl, which is number 20 of the types of GGML: 18 bytes for each 32 values.
    head = struct.pack("<4sIQQ", b"GGUF", 3, 1, 0) + struct.pack("<Q1sIQIQ", 1, b"w", 1, 32, 20, 0)
    Path("m.gguf").write_bytes(head + bytes(-len(head) % 32) + bytes(18))
    value = {"value_type": "jax.Array", "skip_deserialize": False}
    entry = {"key_metadata": [{"key": "a", "key_type": 2}], "value_metadata": value}
    Path("m.orbax").mkdir()
    Path("m.orbax/_METADATA").write_text(json.dumps({"tree_metadata": {"('a',)": entry}, "use_zarr3": False}))
    Path("m.orbax/manifest.ocdbt").touch()
    return tmp_path


@pytest.fixture
def without(monkeypatch):
    def hide(extra):
        named = [re.match(r"[\w-]+", line)[0] for line in EXTRAS[extra] if not line.startswith("paramend[")]
        tops = {MODULES.get(name, name) for name in named}
        for name in tops | {name for name in sys.modules if name.partition(".")[0] in tops}:
            monkeypatch.setitem(sys.modules, name, None)

    return hide


COMMANDS = {
    "jax": ["lesson kernel_replace", "lesson 3 --solution"],
    "torch": ["lesson init_zero"],
    "orbax": [
        "show m.orbax",
        "zero m.orbax a --in-place",
        "convert m.orbax x.npz",
        "convert m.safetensors x.orbax",
        "diff m.safetensors m.orbax",
    ],
    "ray": ["zero m.safetensors ** -o x.safetensors --engine ray", "convert m.safetensors x.npz --engine ray"],
    "remote": [
        *(
            f"show {url}/m.safetensors"
            for url in ("s3://b", "gs://b", "hf://o/n", "http://localhost", "https://localhost")
        ),
        "convert m.safetensors s3://b/x.safetensors",
        "diff m.safetensors s3://b/x.safetensors",
    ],
    "gguf": ["dequantize m.gguf -o x.safetensors", "show m.gguf --stats"],
    "deltas": [
        *(f"delta m.safetensors n.safetensors -o D --checksum {name}" for name in ("blake3", "xxh3-128")),
        "delta m.safetensors n.safetensors -o D --slime",
    ],
    "demo": ["demo", "demo --out D --json"],
}
CALLS = {
    "jax": [lambda: pm.load("m.safetensors", "jax"), lambda: pm.value_and_grad(lambda p: 0.0, "**")],
    "torch": [lambda: pm.load("m.safetensors", "torch")],
    "orbax": [lambda: pm.save(TREE, "x.orbax"), lambda: pm.load("m.orbax")],
    "plot": [lambda: pm.diff(TREE, TREE).plot(), lambda: pm.ablate(TREE, "h_<n>/**", lambda p: 1.0).plot()],
    "ray": [lambda: pm.at(pm.open("m.safetensors"), "**").zero().save("x.safetensors", engine="ray")],
    "remote": [lambda: pm.open("s3://b/m.safetensors"), lambda: pm.save(TREE, "gs://b/x.npz")],
    "gguf": [lambda: pm.load("m.gguf")],
    "deltas": [lambda: pm.delta("m.safetensors", "n.safetensors", checksum="xxh3-128")],
}


def test_every_extra_for_users_is_here():
    assert COMMANDS.keys() | CALLS.keys() == EXTRAS.keys() - {"test", "far", "docs", "all"}


@pytest.mark.parametrize(("extra", "command"), [(extra, row) for extra, rows in COMMANDS.items() for row in rows])
def test_a_command_names_the_extra(folder, without, extra, command):
    before = sorted(folder.iterdir())
    without(extra)
    done = CliRunner().invoke(cli, command.split(), prog_name="paramend")
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert "error[missing-extra]: " in done.stderr and done.stderr.endswith(f"hint: pip install 'paramend[{extra}]'\n")
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(("extra", "call"), [(extra, row) for extra, rows in CALLS.items() for row in rows])
def test_a_function_names_the_extra(folder, without, extra, call):
    before = sorted(folder.iterdir())
    without(extra)
    with pytest.raises(pm.errors.MissingExtra) as caught:
        call()
    assert caught.value.hint == f"pip install 'paramend[{extra}]'"
    assert sorted(folder.iterdir()) == before


def test_without_any_extra_the_rest_works(without):
    for extra in EXTRAS:
        without(extra)
    assert pm.open("m.gguf").keys() == ["w"]
    assert pm.diff("m.safetensors", "n.safetensors").to_html().startswith("<!doctype html>")
    pm.delta("m.safetensors", "n.safetensors").save("D")
    pm.patch("m.safetensors", pm.Delta.load("D").apply)
    assert not pm.diff("n.safetensors", "m.safetensors")
    for name in ("x.npz", "x.msgpack", "x.pt", "x.safetensors"):
        pm.save(TREE, name)
        assert not pm.diff(TREE, pm.load(name))
