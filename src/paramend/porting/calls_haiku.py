"""Haiku: the calls of modules in a transformed function."""

from typing import Any

import haiku as hk

from paramend.porting.recorder import Recorder


def owns(model: object) -> bool:
    """False: modules of Haiku exist only while a transformed function runs."""
    return False


def watched(recorder: Recorder) -> Any:
    """A context in which modules are called through the recorder."""

    def through(call: Any, args: Any, options: Any, context: Any) -> Any:
        if context.method_name != "__call__":
            return call(*args, **options)
        return recorder.around(context.module, call, args, options, context.module.module_name)

    return hk.intercept_methods(through)
