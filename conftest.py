"""What docstring examples may use without importing it."""

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _names(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace["np"] = np
