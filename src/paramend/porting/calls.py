"""`calls`: which modules of a model are called, in which order, on what, computed in float64."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from paramend._optional import imported
from paramend.arrays.registry import backend_of, to_numpy
from paramend.errors import BadArgument
from paramend.porting.frameworks import copied, float64, runs, watched
from paramend.porting.recorder import Call, Recorder
from paramend.porting.values import Values, arrays, given_as, mapped, noted, wide
from paramend.reports import wording
from paramend.trees.lookup import is_torch_module

Given = tuple[tuple[Any, ...], dict[str, Any]]
_LIBRARIES = ("jax", "torch")


class Run(NamedTuple):
    """The arrays that a model returned, by their places in what it returned, and the calls in it."""

    outputs: dict[str, Values]
    calls: list[Call]


def calls(model: object, inputs: object) -> list[Call]:
    """The calls of modules in one run of a model, in the order in which they return.

    A copy of the model runs, in float64: parameters, statistics and mode of the model itself stay. Dropout passes on
    what it is given. A function runs as it is, on float64 inputs.

    Args:
        model: a torch, NNX or Equinox module, a bound linen module, or a function (`functools.partial(f.apply, params,
            None)` for Haiku). A module that fails on a batch, as those of Equinox do, runs on each example.
        inputs: a tuple of arguments, a dict of keywords, or one argument; with arrays of any library.

    Raises:
        BadArgument: the model cannot run.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh())
    >>> [(call.path, call.kind, call.output.shape, str(call.output.dtype)) for call in calls(model, torch.ones(2, 3))]
    [('0', 'Linear', (2, 4), 'float64'), ('1', 'Tanh', (2, 4), 'float64'), ('', 'Sequential', (2, 4), 'float64')]
    """
    return run(model, inputs).calls


def run(model: Any, inputs: object) -> Run:
    """What a model returns, and the calls in it. Arguments and errors are those of `calls`."""
    if not runs(model):
        if not callable(model) or hasattr(model, "init_with_output"):
            what, hint = wording.described(model), "module.bind(variables) for linen, or a function of the inputs"
            raise BadArgument(f"{what} cannot run", hint=hint)
        return _first([partial(_recorded, model, _given(inputs), each, None) for each in _libraries(inputs)], TypeError)
    library = "torch" if is_torch_module(model) else "jax"
    twin = copied(model, lambda _, values: wide(values))
    return _first([partial(way, twin, _given(inputs), library, twin) for way in (_recorded, _each_recorded)])


def _given(inputs: Any) -> Given:
    """Arguments and keywords."""
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
    examples = [mapped(given, partial(_example, at)) for at in range(*lengths.pop())]
    found = [_recorded(model, each, library, root) for each in examples]
    outputs = {name: np.stack([run.outputs[name] for run in found]) for name in found[0].outputs}
    return Run(outputs, list(map(_stacked, zip(*(run.calls for run in found), strict=True))))


def _example(at: int, array: Any) -> Values:
    found: Values = to_numpy(array)[at]
    return found


def _stacked(calls: tuple[Call, ...]) -> Call:
    inputs, outputs = (zip(*each, strict=True) for each in ([c.inputs for c in calls], [c.outputs for c in calls]))
    return replace(calls[0], inputs=tuple(map(np.stack, inputs)), outputs=tuple(map(np.stack, outputs)))
