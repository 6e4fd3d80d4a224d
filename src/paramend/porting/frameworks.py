"""What a run must know of frameworks: which objects are models, how they are copied, how their calls are watched."""

import copy
import importlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any, NamedTuple, TypeVar

from paramend._optional import imported
from paramend.arrays.registry import backend, to_numpy
from paramend.porting.values import Values
from paramend.trees.lookup import is_torch_module
from paramend.trees.tree import Tree

M = TypeVar("M")
Change = Callable[[str, Values], Values | None]
Around = Callable[[Any, Any, Any, Any, str | None], Any]


class _Framework(NamedTuple):
    """A module with a class `Module`, and the methods of that class which are calls. `path` says where an instance is,
    for a framework that has `intercept_methods`; in the others methods are patched."""

    name: str
    methods: tuple[str, ...] = ("__call__",)
    path: Callable[[Any], str] | None = None


_FRAMEWORKS = (
    _Framework("torch.nn"),
    _Framework("flax.nnx", ("__call__", "attend")),
    _Framework("equinox"),
    _Framework("flax.linen", ("__call__", "attend"), lambda module: "/".join(module.path)),
    _Framework("haiku", path=lambda module: str(module.module_name)),
)
_LIBRARIES = ("jax", "torch")


def runs(model: Any) -> bool:
    """Whether it is a model of a framework, with parameters, that can be called as it is."""
    holding = [row.name for row in _FRAMEWORKS if row.path is None and imported(row.name)]
    modules = tuple(sys.modules[name].Module for name in holding)
    return (is_linen(model) and model.scope is not None) or isinstance(model, modules)


def is_linen(model: Any) -> bool:
    """Whether something is a linen module."""
    return imported("flax.linen") and isinstance(model, sys.modules["flax.linen"].Module)


def rebound(model: Any, variables: Any) -> Any:
    """A linen module bound to other variables, and to the same generators."""
    rngs = {name: rng.as_jax_rng() for name, rng in model.scope.rngs.items()}
    return model.unbind()[0].bind(variables, rngs=rngs, mutable=model.scope.mutable)


def copied(model: M, change: Change) -> M:
    """A copy of a model or a tree with other leaves: path, values → new values, or None for a leaf that stays."""
    anything: Any = model
    if is_linen(model):
        anything = rebound(anything, _tree_copy(anything.variables, change))
    else:
        anything = (_torch_copy if is_torch_module(model) else _tree_copy)(anything, change)
    found: M = anything
    return found


def _torch_copy(model: Any, change: Change) -> Any:
    """A copy on the host, in which buffers that are not saved are others too."""
    model = getattr(model, "_orig_mod", model)  # that of torch.compile
    plain = [each for module in model.modules() for each in vars(module).values() if hasattr(each, "grad_fn")]
    twin = copy.deepcopy(model, {id(each): each.detach().clone() for each in plain}).cpu()  # weight_norm computes some
    for name, tensor in chain(twin.named_parameters(), twin.named_buffers()):
        if tensor.is_floating_point() or tensor.is_complex():
            values = change(name, to_numpy(tensor))
            if values is not None:
                tensor.data = backend(tensor).from_numpy(values)
    return twin


def _tree_copy(tree: Any, change: Change) -> Any:
    leaves, new = Tree(tree), {}
    with float64(["jax"]):  # or JAX would make float32 of them
        for number in leaves.index.numbers:
            if leaves.ties.get(number, number) == number and leaves.spec(number).kind in ("float", "complex"):
                old = leaves.read(number)
                values = change(leaves.index.path(number), to_numpy(old))
                if values is not None:
                    new[number] = backend(old).from_numpy(values)
        return leaves.with_leaves(new)


@contextmanager
def float64(libraries: Sequence[str] = _LIBRARIES) -> Iterator[None]:
    """A context in which these libraries, if the user has imported them, compute in float64."""
    with ExitStack() as stack:
        for library in filter(imported, libraries):
            stack.enter_context(importlib.import_module(f"paramend.porting.float64_{library}").float64())
        yield


_around: ContextVar[Around | None] = ContextVar("around", default=None)


@contextmanager
def watched(around: Around) -> Iterator[None]:
    """A context in which modules, in this thread, are called by `around(module, call, args, options, path)`."""
    token = _around.set(around)
    with ExitStack() as stack:
        stack.callback(_around.reset, token)
        for row in _FRAMEWORKS:
            if imported(row.name):
                framework = sys.modules[row.name]
                if row.path is None:
                    stack.enter_context(_patched((framework.Module, *_below(framework.Module)), row.methods))
                else:
                    stack.enter_context(framework.intercept_methods(_interceptor(row, around)))
        yield


def _interceptor(row: _Framework, around: Around) -> Any:
    def through(call: Any, args: Any, options: Any, context: Any) -> Any:
        if row.path is None or context.method_name not in row.methods:
            return call(*args, **options)
        return around(context.module, call, args, options, row.path(context.module))

    return through


@contextmanager
def _patched(classes: Iterable[type], methods: Collection[str]) -> Iterator[None]:
    inner = ("equinox._", "jaxtyping.")  # such as what `filter_jit` returns
    known = (kind for kind in classes if not kind.__module__.startswith(inner))
    old = [(kind, name, vars(kind)[name]) for kind in known for name in methods if name in vars(kind)]
    try:
        for kind, name, method in old:
            setattr(kind, name, _through(method))
        yield
    finally:
        for kind, name, method in old:
            setattr(kind, name, method)


def _below(kind: type) -> Iterator[type]:
    made: list[type] = type.__subclasses__(kind)
    for each in made:
        yield each
        yield from _below(each)


def _through(method: Any) -> Any:
    def call(self: Any, *args: Any, **options: Any) -> Any:
        around, bound = _around.get(), method.__get__(self, type(self))
        return bound(*args, **options) if around is None else around(self, bound, args, options, None)

    return call
