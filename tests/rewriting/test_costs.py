"""Exact costs of work on disk: memory and bytes written, as the kernel counts them; never time."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from paramend.checkpoints.whole import save
from paramend.leaves.specs import Spec
from support.writing import write_header

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
    pytest.mark.slow,
]

# What a command says, and then what it cost: the highest number of MB in memory, and the bytes that it wrote to files.
RUN = """
import os, re, sys
from pathlib import Path
from paramend.cli.main import cli
try:
    cli(sys.argv[1:], prog_name="paramend")
except SystemExit as end:
    assert not end.code, end.code
sys.stdout.flush()
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1000
written = int(re.search(r"wchar: (\\d+)", Path("/proc/self/io").read_text())[1])
print(peak, written)
"""


def run(*args):
    """(what was printed, peak MB, bytes written, those to the terminal included)"""
    done = subprocess.run([sys.executable, "-c", RUN, *map(str, args)], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    *said, costs = done.stdout.splitlines()
    peak, written = costs.split()
    print(*args, peak, written)
    return said, float(peak), int(written)


@pytest.fixture(scope="module")
def trillion(tmp_path_factory):
    models = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "models.py"))
    folder = tmp_path_factory.mktemp("large") / "model"
    models["write_shards"](folder, models["mixture"](), 400, sparse=True)
    return folder


@pytest.mark.far
def test_a_trillion_parameters_are_listed(trillion):
    said, peak, _ = run("show", trillion)
    assert said[-2:-1] == ["70,335 leaves, 1,038,040,629,248 scalars, 2.1 TB"] or "70,335 leaves" in "\n".join(
        said[-3:]
    )
    assert peak < 200


@pytest.mark.far
def test_an_edit_of_a_trillion_parameters_is_tried(trillion):
    said, peak, _ = run("zero", trillion, "model.layers[-1].mlp.experts[3]/down_proj/weight", "--dry-run")
    assert said[1].startswith("model.layers.60.mlp.experts.3.down_proj.weight  bfloat16[7168,2048]  zero()")
    assert said[-1] == "1 of 70,335 leaves changes"
    assert peak < 200


def test_a_large_file_takes_no_memory(tmp_path):
    header = write_header({"big": Spec((1 << 11, 1 << 15), "bfloat16"), "small": Spec((4,), "float32")})
    path = tmp_path / "model.safetensors"
    path.write_bytes(header.to_bytes())
    os.truncate(path, header.nbytes + header.data_nbytes)  # sparse: it costs no disk
    for edit in (("zero", "big"), ("fill", "small", "1"), ("delete", "small")):
        _, peak, _ = run(*edit[:1], path, *edit[1:], "-o", tmp_path / "out.safetensors", "--force")
        assert peak < 80


@pytest.fixture
def model(tmp_path):
    tree = {f"layers.{n}.weight": np.full((512, 1024), n, "float32") for n in range(8)}  # 2 MB each
    save(tree, tmp_path / "model.safetensors")
    save(tree, tmp_path / "shards", max_shard_size="4.2MB")
    return tmp_path


LEAF = 512 * 1024 * 4
SLACK = 10_000  # header, what is printed, the head of an undo record


def test_zeros_of_a_new_file_are_not_written(model):
    _, _, written = run("zero", model / "model.safetensors", "layers[-1].weight", "-o", model / "out.safetensors")
    assert 7 * LEAF <= written < 7 * LEAF + SLACK
    assert (model / "out.safetensors").stat().st_size == (model / "model.safetensors").stat().st_size


def test_a_new_file_is_written_once(model):
    _, _, written = run("scale", model / "model.safetensors", "**", "0.5", "-o", model / "out.safetensors")
    assert 8 * LEAF <= written < 8 * LEAF + SLACK


def test_in_place_old_and_new_bytes_are_written_and_nothing_else(model):
    _, _, written = run("zero", model / "model.safetensors", "layers[-1].weight", "--in-place")
    assert 2 * LEAF <= written < 2 * LEAF + SLACK


def test_with_links_only_the_touched_shard_is_written(model):
    assert len(list((model / "shards").glob("*.safetensors"))) == 4
    _, _, written = run("scale", model / "shards", "layers[-1].weight", "2", "--link", "-o", model / "out")
    assert 2 * LEAF <= written < 2 * LEAF + SLACK
