"""`Recorder`: makes the calls of modules, and notes what went in and came out."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paramend.leaves.paths import write_path
from paramend.leaves.specs import kind_of
from paramend.porting.values import Values, noted
from paramend.trees.lookup import is_torch_module
from paramend.trees.walks import containers


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module.

    Attributes:
        path: the module: the keys with which the paths of its leaves begin, for linen those after the collection.
        kind: the name of its class.
        inputs: the arrays among its arguments, those in containers too, with floats as float64.
        outputs: the arrays that it returned. Both are empty if JAX traced it, as in a scan; it is then noted once.
        composite: whether it called other modules.
        module: the module.
    """

    path: str
    kind: str
    inputs: tuple[Values, ...]
    outputs: tuple[Values, ...]
    composite: bool = False
    module: Any = field(default=None, repr=False, compare=False)

    @property
    def output(self) -> Values | None:
        """The first array that it returned, or None."""
        return self.outputs[0] if self.outputs else None


# Modules that draw numbers: they pass on what they are given.
_RANDOM = re.compile(r"(Alpha|Feature|FeatureAlpha)?Dropout([123]d)?|DropPath|StochasticDepth")


class Recorder:
    """Makes the calls of modules, and notes them."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._open: list[Any] = []
        # The calls that were noted. Modules that were made for the call alone have no path, and are left out.
        self.calls: list[Call] = []
        self._count = 0
        self._traced: set[Any] = set()
        self._names: dict[int, dict[int, str]] = {}

    def around(self, module: Any, call: Any, args: Any, options: Any, path: str | None) -> Any:
        """What a method returns; noted, unless the module calls a method of its own base class."""
        kind = type(module).__name__
        if self._open and self._open[-1] is module:
            return call(*args, **options)
        if _RANDOM.fullmatch(kind):
            return next(iter((*args, *options.values())))
        inputs, before = noted((args, options)), self._count
        self._open.append(module)
        path = self._named(module) if path is None else path
        try:
            with steady(module):
                output = call(*args, **options)
        finally:
            self._open.pop()
        outputs = noted(output)
        if inputs is None or outputs is None:
            key = id(module) if path is None else path
            if key in self._traced:
                return output
            self._traced.add(key)
            inputs = outputs = {}
        if path is not None:
            values = tuple(inputs.values()), tuple(outputs.values())
            self.calls.append(Call(path, kind, *values, self._count > before, module))
        self._count += 1
        return output

    def _named(self, module: Any) -> str | None:
        root = self._open[0] if self._root is None else self._root
        if id(root) not in self._names:
            separator = "." if is_torch_module(root) else "/"
            names = self._names[id(root)] = {}
            for path, node, _ in containers(root):
                names.setdefault(id(node), write_path(path, separator))
        return self._names[id(root)].get(id(module))


# What a module may say of its arithmetic → what it says during a run: the same function, rounded less.
_STEADY = {"use_fast_variance": False, "force_fp32_for_softmax": False, "dropout_rate": 0.0, "dropout": 0.0}
_DTYPES = ("dtype", "param_dtype")


@contextmanager
def steady(module: Any) -> Iterator[None]:
    """A context in which a module, and the cells that it holds, compute in float64 and without chance."""
    old: list[tuple[Any, str, Any]] = []
    members: list[Any] = [module, *vars(module).values()]
    for each in members:
        held = getattr(each, "__dict__", {})
        if each is module or ("param_dtype" in held and not isinstance(each, type)):
            old += [(each, name, held[name]) for name in _DTYPES if _is_float(held.get(name))]
            old += [(each, name, held[name]) for name, value in _STEADY.items() if type(held.get(name)) is type(value)]
    try:
        for each, name, _ in old:
            object.__setattr__(each, name, _STEADY.get(name, np.float64))
        yield
    finally:
        for each, name, value in old:
            object.__setattr__(each, name, value)


def _is_float(dtype: Any) -> bool:
    try:
        return dtype is not None and kind_of(np.dtype(dtype).name) == "float"
    except TypeError:
        return False
