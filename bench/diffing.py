"""`paramend diff` against `cmp`, each in processes of their own, taking turns: of two equal files, and of two that
differ in one value. The files are in the page cache.

Prints one JSON object: for each case the ratio of times, the start of Python counted in, and the peak RSS in MB.
"""

import compileall
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__)


def write(path, gigabytes):
    """A safetensors file of layers of 32 MB in float32, each another."""
    import numpy as np  # not in the process that measures: a child's peak memory begins with that of its parent

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


def turns(a, b, rounds):
    """The costs of `cmp` and of ours, and the ratio of their times."""
    commands = ("cmp", a, b), (sys.executable, "-m", "paramend", "diff", a, b)
    base, ours = zip(*([cost(*command) for command in commands] for _ in range(rounds)), strict=True)
    ratio = median(seconds for seconds, _ in ours) / median(seconds for seconds, _ in base)
    return {"ratio": round(ratio, 2), "rss": round(max(rss for _, rss in ours))}


def measure(gigabytes=4.0, rounds=5):
    with tempfile.TemporaryDirectory() as folder:
        a, b = Path(folder, "a"), Path(folder, "b")
        for path in (a, b):
            subprocess.run([sys.executable, HERE, "write", path, str(gigabytes)], check=True)
        # Packages that pip installs are compiled; of one that runs from a clone every start would pay for it.
        compileall.compile_dir(importlib.util.find_spec("paramend").submodule_search_locations[0], quiet=1)
        found = {"equal files": turns(a, b, rounds)}
        with b.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\0\x10\x41")
        return found | {"one value changed, the last": turns(a, b, rounds)}


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"]:
        write(Path(sys.argv[2]), float(sys.argv[3]))
    else:
        print(json.dumps(measure(*map(float, sys.argv[1:2]))))
