"""The two models that a report tells of."""

import weakref
from typing import Any


class Ends:
    """The models that a graft or a growth was between, for as long as someone else holds them."""

    def __init__(self, target: Any = None, source: Any = None) -> None:
        self._refs = tuple(map(_weak, (target, source)))

    @property
    def target(self) -> Any:
        """What it made, or None."""
        return self._refs[0]()

    @property
    def source(self) -> Any:
        """What it was made of, or None."""
        return self._refs[1]()

    def __reduce__(self) -> tuple[Any, ...]:
        return Ends, ()  # another process has other models

    def __deepcopy__(self, memo: object) -> "Ends":
        return self


def _weak(subject: Any) -> Any:
    try:
        return weakref.ref(subject)
    except TypeError:  # dicts
        return lambda: None
