"""Runs the numeric tests as if on other processors: python tests/portable.py [--quick] [--slow] [--only NAME]

How a sum is rounded depends on what a processor can do, on the number of threads and on what a compiler fuses. Each row
of the table is a run of the tests marked `numeric` in which XLA, torch, numpy, OpenBLAS, oneDNN, MKL and the C library
are held to what an older, narrower or otherwise compiled processor would do. `of its bound` is the largest share of a
bound of `support.numerics` that any comparison used.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np

TESTS = Path(__file__).parent
VECTORS = np.show_config(mode="dicts")["SIMD Extensions"]["found"]  # that numpy would use here, by its own names

# As for users: JAX optimizes and torch has every core, which tests/conftest.py asks them not to do.
COMPILED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"} | dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(os.cpu_count())
)
SSE = {
    "XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "OPENBLAS_CORETYPE": "Nehalem",
    "NPY_DISABLE_CPU_FEATURES": " ".join(VECTORS),
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F,-AVX512DQ,-AVX512VL",
}
AVX2 = {
    "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES": " ".join(name for name in VECTORS if "V4" in name or "512" in name),
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX512DQ,-AVX512VL",
}


def threads(count):
    return {name: str(count) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC")}


# What is set, by name; where nothing is, the machine decides. Libraries that do not meet share a row.
CONFIGURATIONS = {
    "this machine": {},
    "SSE4.2": SSE,
    "AVX2": AVX2,
    "AVX, of XLA and OpenBLAS": {"XLA_FLAGS": "--xla_cpu_max_isa=AVX", "OPENBLAS_CORETYPE": "Sandybridge"},
    "XLA fuses nothing, OpenBLAS as on Nehalem": {
        "XLA_FLAGS": "--xla_disable_hlo_passes=fusion,cpu-instruction-fusion",
        "OPENBLAS_CORETYPE": "Nehalem",
    },
    "XLA optimizes nothing, numpy without vectors": {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "NPY_DISABLE_CPU_FEATURES": SSE["NPY_DISABLE_CPU_FEATURES"],
    },
    "XLA 128 bits wide, torch without vectors": {
        "XLA_FLAGS": "--xla_cpu_prefer_vector_width=128",
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
    },
    "one thread": threads(1) | {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"},
    "two threads": threads(2),
    "sixteen threads": threads(16),
}
# Far from what the machine does by itself, which the tests see anyway. What is fused stays so: where nothing is, two
# programs are more alike than on any processor.
QUICK = {
    "SSE4.2, one thread": SSE | threads(1) | {"XLA_FLAGS": f"{SSE['XLA_FLAGS']} --xla_cpu_multi_thread_eigen=false"}
}


@dataclass
class Run:
    """What came of the tests in a configuration."""

    name: str
    passed: int
    failed: list[str]
    share: float
    seconds: float
    output: str

    @property
    def good(self):
        return bool(self.passed) and not self.failed

    def row(self):
        said = f"{self.passed} passed" + (f", {len(self.failed)} FAILED" if self.failed else "")
        return f"{self.name:47}{said or 'nothing ran':26}{self.share:>8.0%} of its bound{self.seconds:>8.0f} s"


def numeric_files():
    return [str(path) for path in sorted(TESTS.rglob("test_*.py")) if "mark.numeric" in path.read_text()]


def run(name, changes, chosen, files, workers):
    """The tests in a program that sees these variables beside those that are set, XLA's flags in addition."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {changes.get('XLA_FLAGS', '')}".strip()
    began = monotonic()
    with tempfile.TemporaryDirectory() as folder:
        margins = Path(folder) / "margins"
        margins.touch()
        own = {"XLA_FLAGS": flags, "PORTABLE_MARGINS": str(margins)}
        variables = os.environ | COMPILED | changes | own
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", chosen, "-rfE"]
        command += ["-n", str(workers)] if workers > 1 else []
        done = subprocess.run([*command, *files], cwd=TESTS.parent, env=variables, capture_output=True, text=True)
        shares = [float(line.split()[0]) for line in margins.read_text().splitlines()]
    output = done.stdout + done.stderr
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    if done.returncode and not failed:
        failed = [f"pytest ended with {done.returncode}"]
    passed = re.search(r"(\d+) passed", output)
    return Run(name, int(passed[1]) if passed else 0, failed, max(shares, default=0), monotonic() - began, output)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one configuration, far from this machine")
    parser.add_argument("--slow", action="store_true", help="the slow tests too")
    parser.add_argument("--only", action="append", choices=[*CONFIGURATIONS, *QUICK], help="this configuration")
    parser.add_argument("--jobs", type=int, default=2, help="how many programs run at once (2)")
    parser.add_argument("--output", action="store_true", help="print what pytest said where tests fail")
    parser.add_argument("files", nargs="*", help="test files; by default all with numeric tests")
    given = parser.parse_args()
    chosen = "numeric" if given.slow else "numeric and not slow"
    named = {name: (CONFIGURATIONS | QUICK)[name] for name in given.only} if given.only else None
    wanted = named or (QUICK if given.quick else CONFIGURATIONS)
    files = given.files or numeric_files()
    runs, workers = [], given.jobs if len(wanted) == 1 else 1
    with ThreadPoolExecutor(given.jobs) as pool:
        for done in pool.map(lambda name: run(name, wanted[name], chosen, files, workers), wanted):
            runs.append(done)
            print(done.row(), flush=True)
            for test in done.failed:
                print(f"    {test}", flush=True)
            if given.output and not done.good:
                print(done.output)
    return 0 if all(one.good for one in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
