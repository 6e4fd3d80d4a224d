"""NNX modules: copies with other leaves, and their calls."""

from contextlib import AbstractContextManager

from flax import nnx

from paramend.porting.calls import replaced as replaced
from paramend.porting.recorder import Recorder, patched, subclasses

ARRAYS = "jax"


def owns(model: object) -> bool:
    """Whether it is an NNX module."""
    return isinstance(model, nnx.Module)


def watched(recorder: Recorder) -> AbstractContextManager[None]:
    """A context in which modules are called through the recorder."""
    return patched(subclasses(nnx.Module), recorder, ("__call__", "attend"))
