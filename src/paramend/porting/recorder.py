"""`Recorder`: makes the calls of modules, and notes what went in and came out."""

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from paramend.leaves.paths import Label, labels, write_path
from paramend.leaves.specs import kind_of
from paramend.porting.values import Values, noted
from paramend.trees.kind import ELIDED
from paramend.trees.lookup import find_kind, is_torch_module


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
    """Makes the calls of modules, and notes them.

    Args:
        root: the model; None if modules are named from the outermost one that is called.
    """

    def __init__(self, root: Any) -> None:
        self._root = root
        self._open: list[Any] = []
        self._found: list[tuple[Any, Call]] = []
        self._traced: set[Any] = set()

    def around(self, module: Any, call: Any, args: Any, options: Any, path: str = "?") -> Any:
        """What `call` returns; noted, unless the module calls a method of its own base class.

        Args:
            module: the module.
            call: its method.
            args: the arguments.
            options: the keywords.
            path: its path, if the framework knows it.
        """
        kind = type(module).__name__
        if self._open and self._open[-1] is module:
            return call(*args, **options)
        if _RANDOM.fullmatch(kind):
            return next(iter((*args, *options.values())))
        inputs, before = noted((args, options)), len(self._found)
        self._open.append(module)
        try:
            with steady(module):
                output = call(*args, **options)
        finally:
            self._open.pop()
        outputs, key = noted(output), id(module) if path == "?" else path
        if inputs is None or outputs is None:
            if key in self._traced:
                return output
            self._traced.add(key)
            inputs = outputs = {}
        root = (*self._open, module)[0] if self._root is None else self._root
        values = tuple(inputs.values()), tuple(outputs.values())
        self._found.append((root, Call(path, kind, *values, len(self._found) > before, module)))
        return output

    def calls(self) -> list[Call]:
        """The calls that were noted. Modules that were made for the call alone have no path, and are left out."""
        names: dict[int, dict[int, str]] = {}
        found: list[Call] = []
        for root, call in self._found:
            if call.path == "?":
                if id(root) not in names:
                    names[id(root)] = paths(root)
                call = replace(call, path=names[id(root)].get(id(call.module), "?"))
            found.append(call)
        return [call for call in found if call.path != "?"]


def paths(root: Any) -> dict[int, str]:
    """The id of each container in a tree → the keys with which the paths of its leaves begin.

    >>> import torch
    >>> model = torch.nn.ModuleDict({"body": torch.nn.Linear(1, 1)})
    >>> paths(model)[id(model["body"])]
    'body'
    """
    separator = "." if is_torch_module(root) else "/"
    found: dict[int, str] = {}
    rest: list[tuple[Any, tuple[Label, ...]]] = [(root, ())]
    while rest:
        node, path = rest.pop()
        kind = find_kind(node)
        if kind is None or id(node) in found:
            continue
        found[id(node)] = write_path(path, separator)
        keys, children, _ = kind.open(node)
        below = [
            (child, path if key is ELIDED else (*path, *labels(key)))
            for key, child in zip(keys or range(len(children)), children, strict=True)
        ]
        rest += reversed(below)
    return found


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


_current: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def patched(classes: Iterable[type], recorder: Recorder, methods: Collection[str] = ("__call__",)) -> Iterator[None]:
    """A context in which calls of methods of these classes, in this thread, go through the recorder."""
    token = _current.set(recorder)
    old = [(kind, name, vars(kind)[name]) for kind in classes for name in methods if name in vars(kind)]
    try:
        for kind, name, method in old:
            setattr(kind, name, _through(method))
        yield
    finally:
        for kind, name, method in old:
            setattr(kind, name, method)
        _current.reset(token)


def _through(method: Any) -> Any:
    def call(self: Any, *args: Any, **options: Any) -> Any:
        recorder, bound = _current.get(), method.__get__(self, type(self))
        return bound(*args, **options) if recorder is None else recorder.around(self, bound, args, options)

    return call


def subclasses(kind: type) -> Iterator[type]:
    """All classes that are made of this one."""
    made: list[type] = kind.__subclasses__()
    for each in made:
        yield each
        yield from subclasses(each)
