"""`import paramend` against `import numpy`, each in processes of their own, taking turns.

Prints one JSON object: module → ratio to numpy.
"""

import json
import subprocess
import sys
from statistics import median

CODE = "import time; a = time.perf_counter(); import {0}; print(time.perf_counter() - a)"


def seconds(module):
    done = subprocess.run([sys.executable, "-c", CODE.format(module)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure(rounds=11):
    modules = ["numpy", "paramend", "jax"]
    times = {module: [] for module in modules}
    for _ in range(rounds):
        for module in modules:
            times[module].append(seconds(module))
    return {module: round(median(times[module]) / median(times["numpy"]), 2) for module in modules}


if __name__ == "__main__":
    print(json.dumps(measure()))
