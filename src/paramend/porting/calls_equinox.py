"""The calls of Equinox modules."""

from contextlib import AbstractContextManager

import equinox as eqx

from paramend.porting.recorder import Recorder, patched, subclasses


def owns(model: object) -> bool:
    """Whether it is an Equinox module."""
    return isinstance(model, eqx.Module)


def watched(recorder: Recorder) -> AbstractContextManager[None]:
    """A context in which modules are called through the recorder."""
    inner = ("equinox._", "jaxtyping.")  # such as what `filter_jit` returns
    return patched([kind for kind in subclasses(eqx.Module) if not kind.__module__.startswith(inner)], recorder)
