"""`calls`: which modules of a model are called, in which order, on what, computed in float64."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from paramend._optional import imported
from paramend.arrays.registry import backend_of, to_numpy
from paramend.errors import BadArgument
from paramend.porting.recorder import Call, Recorder
from paramend.porting.values import Values, arrays, given_as, mapped, noted, wide
from paramend.reports import wording
from paramend.trees.tree import Tree

Change = Callable[[str, Values], Values | None]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Run:
    """What a model returned, and what was called in it.

    Attributes:
        outputs: the arrays that it returned, by their places in what it returned.
        calls: the calls, in the order in which they returned.
    """

    outputs: dict[str, Values]
    calls: list[Call]


# `calls_<name>.py` for each, opened once the user has imported the framework: the library of its arrays, which models
# it owns, `replaced` for them, and `watched`: a context in which a recorder makes the calls of modules.
_FRAMEWORKS = {"torch": "torch", "flax": "linen", "flax.nnx": "nnx", "equinox": "equinox", "haiku": "haiku"}
_LIBRARIES = ("jax", "torch")


def calls(model: object, inputs: object) -> list[Call]:
    """The calls of modules in one run of a model, in the order in which they return.

    A copy of the model runs, in float64: parameters, statistics and mode of the model itself stay. Dropout passes on
    what it is given. A function runs as it is, on float64 inputs.

    Args:
        model: a torch, NNX or Equinox module, a bound linen module, or a function (`functools.partial(f.apply, params,
            None)` for Haiku). An Equinox module that fails on a batch runs on each example.
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
    adapter = adapter_of(model)
    if adapter is None and (not callable(model) or hasattr(model, "init_with_output")):
        what = wording.described(model)
        raise BadArgument(f"{what} cannot run", hint="module.bind(variables) for linen, or a function of the inputs")
    given: Arguments = ((), dict(inputs)) if isinstance(inputs, Mapping) else (_tuple(inputs), {})
    if adapter is None:
        return _first([lambda each=each: _recorded(model, given, each) for each in _libraries(given)])
    twin, library = adapter.replaced(model, lambda _, values: wide(values)), adapter.ARRAYS
    whole = lambda: _recorded(twin, given, library, root=twin)
    each = lambda: _stacked([_recorded(twin, one, library, root=twin) for one in _examples(given)])
    return _first([whole, each] if adapter.__name__.endswith("equinox") else [whole])


def adapter_of(model: object) -> Any:
    """The file for the framework of a model; None for functions and bare trees."""
    return next((adapter for adapter in _adapters() if adapter.owns(model)), None)


def _adapters() -> list[Any]:
    found = [name for framework, name in _FRAMEWORKS.items() if imported(framework)]
    return [importlib.import_module(f"paramend.porting.calls_{name}") for name in found]


@contextmanager
def float64(libraries: Sequence[str] = _LIBRARIES) -> Iterator[None]:
    """A context in which these libraries, if the user has imported them, compute in float64."""
    with ExitStack() as stack:
        for library in filter(imported, libraries):
            stack.enter_context(importlib.import_module(f"paramend.porting.float64_{library}").float64())
        yield


def replaced(tree: Any, change: Change) -> Any:
    """A tree of the same containers with other leaves: path, values → new values, or None for a leaf that stays."""
    leaves, new = Tree(tree), {}
    with float64(["jax"]):  # or JAX would make float32 of them
        for number in leaves.index.numbers:
            if leaves.ties.get(number, number) == number and leaves.spec(number).kind in ("float", "complex"):
                old = leaves.read(number)
                values = change(leaves.index.path(number), to_numpy(old))
                if values is not None:
                    new[number] = getattr(backend_of(type(old)), "from_numpy", np.asarray)(values)
        return leaves.with_leaves(new)


def _tuple(inputs: Any) -> tuple[Any, ...]:
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)


def _libraries(given: Arguments) -> list[str]:
    """The libraries whose arrays a function may take, that of its inputs first."""
    theirs = [getattr(backend_of(type(array)), "__name__", "").rpartition(".")[2] for _, array in arrays(given)]
    return list(dict.fromkeys([*filter(_LIBRARIES.__contains__, theirs), *filter(imported, _LIBRARIES), "numpy"]))


def _first(ways: list[Callable[[], Run]]) -> Run:
    """The first run that does not fail; what the first one raises, if all do."""
    failures: list[Exception] = []
    for way in ways:
        try:
            return way()
        except Exception as error:
            failures.append(error)
    raise failures[0]


def _recorded(model: Any, given: Arguments, library: str, root: Any = None) -> Run:
    recorder = Recorder(root)
    with float64(), ExitStack() as stack:
        args, options = mapped(given, given_as(library))
        for adapter in _adapters():
            stack.enter_context(adapter.watched(recorder))
        outputs = noted(model(*args, **options))
    return Run(outputs or {}, recorder.calls())


def _examples(given: Arguments) -> list[Arguments]:
    """The arguments of each example of a batch: all arrays without their first axis."""
    lengths = {np.shape(array)[:1] for _, array in arrays(given)}
    if len(lengths) != 1 or () in lengths:
        raise ValueError("the inputs have no axis of examples in common")
    return [mapped(given, lambda array, at=at: to_numpy(array)[at]) for at in range(*lengths.pop())]


def _stacked(runs: list[Run]) -> Run:
    """The runs of all examples as one run of the batch."""

    def stacked(parts: list[tuple[Values, ...]]) -> tuple[Values, ...]:
        return tuple(map(np.stack, zip(*parts, strict=True)))

    found = [
        Call(c[0].path, c[0].kind, stacked([x.inputs for x in c]), stacked([x.outputs for x in c]), c[0].composite)
        for c in zip(*(run.calls for run in runs), strict=True)
    ]
    return Run({name: np.stack([run.outputs[name] for run in runs]) for name in runs[0].outputs}, found)
