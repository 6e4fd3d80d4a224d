"""What docstring examples may use without importing it, and a state directory for whatever a run notes there."""

import os
import tempfile

import numpy as np
import pytest

import paramend

_STATE = tempfile.TemporaryDirectory(prefix="paramend-state-")
os.environ["XDG_STATE_HOME"] = _STATE.name  # programs that tests start have it too


@pytest.fixture(autouse=True)
def _names(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace["np"] = np
    doctest_namespace["pm"] = paramend
