"""The calls of NNX modules."""

from contextlib import AbstractContextManager

from flax import nnx

from paramend.porting.recorder import Recorder, patched, subclasses


def owns(model: object) -> bool:
    """Whether it is an NNX module."""
    return isinstance(model, nnx.Module)


def watched(recorder: Recorder) -> AbstractContextManager[None]:
    """A context in which modules are called through the recorder."""
    return patched(subclasses(nnx.Module), recorder, ("__call__", "attend"))
