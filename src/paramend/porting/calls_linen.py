"""Bound linen modules: copies with other variables, and their calls."""

from typing import Any

import flax.linen as nn

from paramend.porting.calls import Change
from paramend.porting.calls import replaced as replaced_tree
from paramend.porting.recorder import Recorder


def owns(model: object) -> bool:
    """Whether it is a linen module that is bound to variables."""
    return isinstance(model, nn.Module) and model.scope is not None


def replaced(model: Any, change: Change) -> Any:
    """A copy of the module that is bound to other variables, and to the same generators."""
    module, variables = model.unbind()
    rngs = {name: rng.as_jax_rng() for name, rng in model.scope.rngs.items()}
    return module.bind(replaced_tree(variables, change), rngs=rngs, mutable=model.scope.mutable)


def watched(recorder: Recorder) -> Any:
    """A context in which modules are called through the recorder."""

    def through(call: Any, args: Any, options: Any, context: Any) -> Any:
        if context.method_name not in ("__call__", "attend"):
            return call(*args, **options)
        return recorder.around(context.module, call, args, options, "/".join(context.module.path))

    return nn.intercept_methods(through)
