"""`import paramend` against `import numpy`, each in processes of their own, taking turns.

Of paramend also the opening of `pm.at`, which is what a program that edits anything pays.

Prints one JSON object: what is opened → ratio to numpy.
"""

import json
import subprocess
import sys
from statistics import median

CODE = "import time; a = time.perf_counter(); {0}; print(time.perf_counter() - a)"


def seconds(statement):
    done = subprocess.run([sys.executable, "-c", CODE.format(statement)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure(rounds=11):
    modules = {name: f"import {name}" for name in ("numpy", "paramend", "jax")}
    modules["paramend.at"] = "import paramend; paramend.at"
    times = {module: [] for module in modules}
    for _ in range(rounds):
        for module, statement in modules.items():
            times[module].append(seconds(statement))
    return {module: round(median(times[module]) / median(times["numpy"]), 2) for module in modules}


if __name__ == "__main__":
    print(json.dumps(measure()))
