"""What other processes run in tests of pickles, and functions that they find by name."""

from typing import Any


def told(value: Any) -> tuple[str, str, Any]:
    """What a value prints, and the value, which goes back."""
    return str(value), repr(value), value


def fail(error: Exception) -> None:
    raise error


def is_matrix(path: str, spec: Any) -> bool:
    return spec.ndim == 2


def double(x: Any) -> Any:
    return x * 2
