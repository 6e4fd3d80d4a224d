"""Eight host devices for the sharding tests, set before JAX starts; examples that do not change; tests on demand."""

import gc
import os
import re
import sys

import pytest
from hypothesis import HealthCheck, settings

# What collecting tests imports lives to the end: looking for garbage in it costs a tenth of the time.
gc.disable()

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

# A slow machine is no fault, and a test that passes here passes there: the examples do not change from run to run.
# `--hypothesis-profile=search` draws others.
patient = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("repeat", derandomize=True, database=None, **patient)
settings.register_profile("search", derandomize=False, **patient)
settings.load_profile("repeat")


@pytest.fixture(autouse=True)
def _seeded():
    """What a test draws from torch does not depend on the tests before it."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


# Markers of tests that need more than a machine may have: they run when `-m` names them, and fail where it is missing.
ON_DEMAND = {
    "browser": "in a browser",
    "mounts": "on file systems that they mount",
    "far": "with Ray, a server of objects, several processes, kills at random moments, or gigabytes",
    "gpu": "on an accelerator",
}
# What XLA optimizes is not what is tested, and costs a fifth of the time; `tests/portable.py` compiles as users do.
HOST = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
# Threads of torch spin while they wait for each other, and workers fill the cores: models took it four times as long.
HOST |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# A program that two workers compile, processes that tests start, or the next run: once is enough.
COMPILED = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
# torch needs some of the memory too.
ACCELERATOR = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
LEFT_OUT = pytest.StashKey[dict[str, int]]()


def pytest_configure(config):
    asked = re.search(r"(?<!not )\bgpu\b", config.option.markexpr)
    for name, value in (ACCELERATOR if asked else HOST | COMPILED).items():
        os.environ.setdefault(name, value)
    if not asked and hasattr(config, "cache"):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("compiled")))
    # A program that another process is just writing is compiled.
    config.addinivalue_line("filterwarnings", "ignore:Error (read|writ)ing persistent compilation cache:UserWarning")


def pytest_collection_modifyitems(config, items):
    """Leave out what runs on demand, and was not asked for."""
    config.stash[LEFT_OUT] = counts = {}
    for marker in ON_DEMAND:
        if marker in config.option.markexpr:
            continue
        if left := [item for item in items if item.get_closest_marker(marker)]:
            config.hook.pytest_deselected(items=left)
            items[:] = [item for item in items if not item.get_closest_marker(marker)]
            counts[marker] = len(left)


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", {})


def pytest_terminal_summary(terminalreporter, config):
    for marker, count in config.stash.get(LEFT_OUT, {}).items():
        says = f"{count} tests {ON_DEMAND[marker]} left out; to run them: python -m pytest -m {marker}"
        terminalreporter.write_line(says)
