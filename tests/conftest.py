"""Eight host devices for the sharding tests, set before JAX starts; examples that do not change; browsers on demand."""

import os
import sys

import pytest
from hypothesis import HealthCheck, settings

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What XLA optimizes is not what is tested, and costs a fifth of the time; `tests/portable.py` compiles as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

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


LEFT_OUT = pytest.StashKey[int]()


def pytest_collection_modifyitems(config, items):
    """Tests in a browser run when `-m` names them, and fail where there is none; otherwise they are left out."""
    if "browser" in config.option.markexpr:
        return
    browser = [item for item in items if item.get_closest_marker("browser")]
    if browser:
        config.hook.pytest_deselected(items=browser)
        items[:] = [item for item in items if not item.get_closest_marker("browser")]
    config.stash[LEFT_OUT] = len(browser)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter, config):
    if count := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{count} tests in a browser left out; to run them: python -m pytest -m browser")
