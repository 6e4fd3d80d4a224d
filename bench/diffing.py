"""`paramend diff` of two equal files, and of one with one value changed, against `cmp`, each in processes of their own,
taking turns. The files are in the page cache.

Prints one JSON object: for each case the ratio of times to `cmp` of the equal files, and the peak RSS in MB.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np


def write(path, gigabytes):
    """A safetensors file of layers of 32 MB in float32, each another."""
    layers = max(int(gigabytes * 1e9) >> 25, 1)
    names = {f"layers.{i}.w": [i << 25, i + 1 << 25] for i in range(layers)}
    text = json.dumps({k: {"dtype": "F32", "shape": [1 << 23], "data_offsets": v} for k, v in names.items()}).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for i in range(layers):
            file.write(np.random.default_rng(i).standard_normal(1 << 23, "float32").tobytes())


def cost(*command):
    """Seconds, and peak RSS in MB."""
    began = time.perf_counter()
    child = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return time.perf_counter() - began, usage.ru_maxrss / 1000


def measure(gigabytes=4.0, rounds=5):
    with tempfile.TemporaryDirectory() as folder:
        a, b, c = (Path(folder, name) for name in "abc")
        for path in (a, b, c):
            write(path, gigabytes)
        with c.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(np.float32(9).tobytes())
        diff = (sys.executable, "-m", "paramend", "diff")
        ways = {"cmp": ("cmp", a, b), "equal files": (*diff, a, b), "one value changed": (*diff, a, c)}
        found = {name: [] for name in ways}
        for _ in range(rounds):
            for name, command in ways.items():
                found[name].append(cost(*command))
    base = median(seconds for seconds, _ in found["cmp"])
    return {
        name: {"ratio": round(median(s for s, _ in costs) / base, 2), "rss": round(max(rss for _, rss in costs))}
        for name, costs in found.items()
    }


if __name__ == "__main__":
    print(json.dumps(measure(*map(float, sys.argv[1:2]))))
