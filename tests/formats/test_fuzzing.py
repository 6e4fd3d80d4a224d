"""A slice of the random damage of tests/support/fuzzing.py, and of the random kills of tests/support/killing.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import fuzzing, guided

COUNTS = {
    "gguf": 500,
    "dcp": 200,
    "sharded": 300,
    "safetensors": 500,
    "index": 400,
    "torch": 500,
    "npz": 400,
    "msgpack": 500,
    "orbax": 150,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:orbax")
@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNTS)
def test_damage_gives_errors_of_our_own_and_nothing_else(kind):
    seen = fuzzing.fuzz(kind, COUNTS[kind], seed=1)
    assert seen["refused"] and seen["read"]


@pytest.mark.filterwarnings("ignore")  # a recipe may divide by zero
@pytest.mark.slow
@pytest.mark.parametrize("kind", guided.KINDS)
def test_damage_that_reaches_new_lines_gives_errors_of_our_own(kind):
    assert not guided.search(kind, seconds=0, seed=1, count=10 if kind == "steps" else 50)


CASES = [
    *(("rewrite", "shards", 2), ("rewrite", "structure", 9)),
    *(
        ("patch", "delta", 9),
        ("patch", "dcp-names", 9),
        ("patch", "gguf", 9),
        ("patch", "gguf-long", 9),
        ("patch", "shards", 9),
        ("patch", "torch", 2),
        ("patch", "inserted", 9),
        ("patch", "split", 2),
    ),
]


@pytest.mark.far
@pytest.mark.parametrize(("engine", "kind", "signum"), CASES)
def test_a_stopped_writer_leaves_the_old_state_or_the_new_one(engine, kind, signum):
    kill(engine, kind, 12, signum)


@pytest.mark.far
@pytest.mark.parametrize("kind", ["shards", "gguf", "torch"])
def test_a_stopped_run_is_taken_up_until_it_is_whole(kind):
    kill("resume", kind, 1, 9)


SUPPORT = Path(__file__).parents[1] / "support"
ENV = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(SUPPORT.parent), os.environ.get("PYTHONPATH")]))}


def kill(engine, kind, rounds, signum):
    command = [sys.executable, SUPPORT / "killing.py", engine, kind, str(rounds), str(signum)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=ENV)
    assert done.returncode == 0, done.stderr
    assert f"{rounds} rounds" in done.stdout
