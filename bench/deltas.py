"""A delta of a model of which 2 % of the elements changed: its bytes, seconds and memory of each step, beside `cp`.

    python bench/deltas.py [GB] [FOLDER]       1 GB by default

The ways take turns; seconds are medians of three rounds, as ratios to `cp` and sync of the model.
"""

import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

ROUNDS, SHARE, SIDE = 3, 0.02, 4096


def make(folder, gigabytes):
    """Two models in bfloat16; how many elements differ."""
    rng = np.random.default_rng(0)
    shape, layers = (SIDE, SIDE), max(round(gigabytes * 1e9 / (2 * SIDE * SIDE)), 1)
    draw = rng.standard_normal
    leaves = {f"layers.{n}.w": draw(shape, dtype="float32").astype(ml_dtypes.bfloat16) for n in range(layers)}
    safetensors.numpy.save_file(leaves, folder / "a.safetensors")
    for leaf in leaves.values():
        bits = leaf.reshape(-1).view("uint16")
        bits[rng.choice(bits.size, int(bits.size * SHARE), replace=False)] ^= 1
    safetensors.numpy.save_file(leaves, folder / "b.safetensors")
    return layers * int(SIDE * SIDE * SHARE)


def measured(command, folder):
    """(seconds until it is on the disk, peak bytes of memory) of a command."""
    began = time.monotonic()
    child = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, command
    os.sync()
    return time.monotonic() - began, used.ru_maxrss * 1024


def main(gigabytes="1", folder=None):
    paramend = [sys.executable, "-m", "paramend"]
    ways = {
        "cp": ["cp", "a.safetensors", "w.safetensors"],
        "paramend delta a b -o D": [*paramend, "delta", "a.safetensors", "b.safetensors", "-o", "D", "--force"],
        "paramend apply D a -o out": [*paramend, "apply", "D", "a.safetensors", "-o", "out.safetensors", "--force"],
        "paramend apply D w --in-place": [*paramend, "apply", "D", "w.safetensors", "--in-place"],
        "paramend undo w": [*paramend, "undo", "w.safetensors"],
    }
    with tempfile.TemporaryDirectory(dir=folder) as made:
        place = Path(made)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:  # its memory is not ours
            changed = pool.submit(make, place, float(gigabytes)).result()
        runs = {way: [] for way in ways}
        for _ in range(ROUNDS):
            (place / "w.safetensors").unlink(missing_ok=True)
            for way, command in ways.items():
                runs[way].append(measured(command, place))
        model = (place / "a.safetensors").stat().st_size
        size = sum(file.stat().st_size for file in (place / "D").iterdir())
        subprocess.run(["cmp", place / "out.safetensors", place / "b.safetensors"], check=True)
    print(f"{model / 1e6:,.0f} MB, {changed:,} elements differ: {size / 1e6:,.1f} MB, {size / changed:.3f} bytes each")
    reference = statistics.median(seconds for seconds, _ in runs["cp"])
    for way, found in runs.items():
        seconds, peak = statistics.median(s for s, _ in found), max(p for _, p in found)
        print(f"{way:32} {seconds:6.1f} s  {seconds / reference:5.2f} x  {peak / 1e6:6.0f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
