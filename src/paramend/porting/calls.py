"""`calls`: which modules of a model are called, in which order, on what, computed in float64."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from paramend._optional import imported
from paramend.arrays.registry import backend_of, to_numpy
from paramend.errors import BadArgument
from paramend.leaves.paths import write_path
from paramend.leaves.specs import kind_of
from paramend.porting.frameworks import copied, float64, runs, watched
from paramend.porting.values import Values, arrays, given_as, mapped, noted, wide
from paramend.reports import wording
from paramend.trees.lookup import is_torch_module
from paramend.trees.walks import containers


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module."""

    path: str  # the module: the keys with which the paths of its leaves begin, for linen those after the collection
    kind: str  # the name of its class
    inputs: tuple[Values, ...]  # the arrays among its arguments, those in containers too, with floats as float64
    # The arrays that it returned. Both are empty if JAX traced it, as in a scan; it is then noted once.
    outputs: tuple[Values, ...]
    composite: bool = False  # whether it called other modules
    module: Any = field(default=None, repr=False, compare=False)


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


Given = tuple[tuple[Any, ...], dict[str, Any]]
_LIBRARIES = ("jax", "torch")


class Run(NamedTuple):
    """The arrays that a model returned, by their places in what it returned, and the calls in it."""

    outputs: dict[str, Values]
    calls: list[Call]


def calls(model: object, inputs: object) -> list[Call]:
    """The calls in one run of a model.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh())
    >>> [(call.path, call.kind, call.outputs[0].shape) for call in calls(model, torch.ones(2, 3))]
    [('0', 'Linear', (2, 4)), ('1', 'Tanh', (2, 4)), ('', 'Sequential', (2, 4))]
    """
    return run(model, inputs).calls


def run(model: Any, inputs: object) -> Run:
    """What a model returns, and the calls of modules in it, in the order in which they return.

    A copy of a torch, NNX or Equinox module or of a bound linen module runs, in float64: parameters, statistics and
    mode of the model itself stay, and dropout passes on what it is given. A module that fails on a batch, as those of
    Equinox do, runs on each example. A function runs as it is, on float64 inputs.
    """
    if not runs(model):
        if not callable(model) or hasattr(model, "init_with_output"):
            what, hint = wording.described(model), "module.bind(variables) for linen, or a function of the inputs"
            raise BadArgument(f"{what} cannot run", hint=hint)
        return _first([partial(_recorded, model, _given(inputs), each, None) for each in _libraries(inputs)], TypeError)
    library = "torch" if is_torch_module(model) else "jax"
    twin = copied(model, lambda _, values: wide(values))
    return _first([partial(way, twin, _given(inputs), library, twin) for way in (_recorded, _each_recorded)])


def _given(inputs: Any) -> Given:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def _libraries(inputs: Any) -> list[str]:
    """The libraries whose arrays a function may take, that of its inputs first."""
    theirs = [getattr(backend_of(type(array)), "__name__", "").rpartition(".")[2] for _, array in arrays(inputs)]
    return list(dict.fromkeys([*filter(_LIBRARIES.__contains__, theirs), *filter(imported, _LIBRARIES), "numpy"]))


def _first(ways: list[Callable[[], Run]], expected: type[Exception] | tuple[()] = ()) -> Run:
    """The first run that does not fail; if all do, the first error is raised, if possible one that was not expected."""
    failures: list[Exception] = []
    for way in ways:
        try:
            return way()
        except Exception as error:
            failures.append(error)
    raise next((each for each in failures if not isinstance(each, expected)), failures[0])


def _recorded(model: Any, given: Given, library: str, root: Any) -> Run:
    recorder = Recorder(root)
    with float64(), watched(recorder.around):
        args, options = mapped(given, given_as(library))
        outputs = noted(model(*args, **options))
    return Run(outputs or {}, recorder.calls)


def _each_recorded(model: Any, given: Given, library: str, root: Any) -> Run:
    """The runs of the examples of a batch as one: all arrays are given without their first axis."""
    lengths = {np.shape(array)[:1] for _, array in arrays(given)}
    if len(lengths) != 1 or () in lengths:
        raise ValueError("the inputs have no axis of examples in common")
    examples = [mapped(given, lambda x: to_numpy(x)[at]) for at in range(*lengths.pop())]  # noqa: B023 - called at once
    found = [_recorded(model, each, library, root) for each in examples]
    outputs = {name: np.stack([run.outputs[name] for run in found]) for name in found[0].outputs}
    return Run(outputs, list(map(_stacked, zip(*(run.calls for run in found), strict=True))))


def _stacked(calls: tuple[Call, ...]) -> Call:
    inputs, outputs = (zip(*each, strict=True) for each in ([c.inputs for c in calls], [c.outputs for c in calls]))
    return replace(calls[0], inputs=tuple(map(np.stack, inputs)), outputs=tuple(map(np.stack, outputs)))
