"""Residual writers: which parameters of a block, set to which values, make it the identity, found by trial."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from paramend.arrays.registry import backend, backend_of
from paramend.edits.memory import Memory
from paramend.errors import BadArgument, Unsupported
from paramend.growth import identities, numbered
from paramend.leaves.specs import AnyArray, AnyTree
from paramend.reports import wording
from paramend.trees.lookup import is_torch_module

if TYPE_CHECKING:
    import torch

_Call = tuple[tuple[Any, ...], dict[str, Any]]
_Unit = list[tuple[str, float]]

# How many random inputs a block must leave as they are.
_TRIALS = 3


def residual_writers(
    model: "torch.nn.Module | Callable[[AnyTree, AnyArray], AnyArray]",
    example: AnyTree,
    *,
    layers: str | None = None,
    params: AnyTree | None = None,
) -> dict[str, float]:
    """The leaves of a block that make it the identity, with their values, as `identity=` of `pm.deepen` takes them.

    The block is run on random inputs with all of its parameters at zero (at -1 for the gain of a norm that computes
    1 + w), which makes it the identity if anything does. Then they are restored module by module, in the order in which
    the block uses them, as long as it stays the identity. What cannot be restored is the last module of each branch:
    the projection that writes to the residual stream or, if a norm follows it, the gain of that norm.

    Args:
        model: a torch model, whose block `layers[0]` is tried, or a function `(params, x) -> y` of one block.
        example: an input of the model: a tensor, or a dict of keyword arguments; for a function, an input of the block.
        layers: as in `pm.deepen`; may be left out if the model has only one list of numbered layers. An empty text
            means that the model is the block.
        params: the parameters of the block, if `model` is a function.

    Returns:
        Selector relative to the block → the value that makes it the identity.

    Raises:
        Unsupported: nothing makes the block the identity: it has no residual connection, or a norm follows it.
        BadArgument: the model never calls the block.

    >>> import jax, jax.numpy as jnp
    >>> block = lambda params, x: x + jnp.tanh(x @ params["a"]) @ params["b"]
    >>> residual_writers(block, jnp.ones((2, 3)), params={"a": jnp.ones((3, 4)), "b": jnp.ones((4, 3))})
    {'b': 0.0}
    """
    if is_torch_module(model):
        return _torch_writers(model, example, layers)
    if params is None or not callable(model):
        why = "residual_writers takes a torch model, or a function of one block with params="
        raise BadArgument(why, hint="pm.residual_writers(lambda params, x: block.apply(params, x), x, params=params)")
    tree = Memory(params)
    library: Any = backend(example)
    spec = library.spec(example)
    if not hasattr(library, "key"):
        why = f"a function takes a JAX array as its example, and this is {wording.described(example)}"
        raise Unsupported(why, hint="jnp.asarray(x)")
    inputs = [library.normal(library.key(seed), spec.shape, spec.dtype) for seed in range(_TRIALS)]
    numbers = [number for number in tree.index.numbers if tree.spec(number).kind == "float"]
    units = [[(tree.index.path(number), 0.0)] for number in numbers]
    by_path = {tree.index.path(number): number for number in numbers}

    def is_identity(values: Mapping[str, float]) -> bool:
        trial = tree.edited({by_path[path]: identities.call(value) for path, value in values.items()})
        return all(bool((model(trial, x) == x).all()) for x in inputs)

    return _least(units, is_identity)


def _least(units: Iterable[_Unit], is_identity: Callable[[Mapping[str, float]], bool]) -> dict[str, float]:
    """What is left when all units that the identity does not need are restored, in order."""
    left = [dict(unit) for unit in units]
    merged = {path: value for unit in left for path, value in unit.items()}
    if not left or not is_identity(merged):
        raise Unsupported(
            "no parameters make this block the identity: it has no residual connection, or a norm follows it (post-LN)",
            hint="identity=None copies layers as they are",
        )
    for unit in left:
        trial = {path: value for path, value in merged.items() if path not in unit}
        if is_identity(trial):
            merged = trial
    return merged


def _torch_writers(model: Any, example: Any, layers: str | None) -> dict[str, float]:
    import torch

    block = model
    if layers != "":
        run = numbered.find(Memory(model), layers)[0]
        block = model.get_submodule(".".join((*run.parent, run.piece(run.numbers[0]))))
    calls = _calls(torch, model, block, example)
    twin = copy.deepcopy(block).eval()
    given = [_random(torch, calls, seed) for seed in range(_TRIALS)]
    units = _units(torch, twin, given[0])
    parameters = dict(twin.named_parameters())
    saved = {path: parameter.detach().clone() for path, parameter in parameters.items()}

    def is_identity(values: Mapping[str, float]) -> bool:
        with torch.no_grad():
            for path, parameter in parameters.items():
                if path in values:
                    parameter.fill_(values[path])
                else:
                    parameter.copy_(saved[path])
            return all(torch.equal(_stream(twin(*args, **opts)), _stream(args or opts)) for args, opts in given)

    return _least(units, is_identity)


def _calls(torch: Any, model: Any, block: Any, example: Any) -> _Call:
    seen: list[_Call] = []
    hook = block.register_forward_pre_hook(lambda _, args, options: seen.append((args, options)), with_kwargs=True)
    training = model.training
    try:
        with torch.no_grad():
            model.eval()
            call_with(model, example)
    finally:
        hook.remove()
        model.train(training)
    if not seen:
        raise BadArgument("the model did not call the block on this example", hint="layers=..., or another example")
    return seen[0]


def call_with(model: Any, given: Any) -> None:
    """Call a model with keyword arguments (a mapping), with arguments (a tuple), or with one of them."""
    if isinstance(given, Mapping):
        model(**given)
    else:
        model(*(given if isinstance(given, tuple) else (given,)))


def _random(torch: Any, call: _Call, seed: int) -> _Call:
    """The call with random values for the residual stream, and without a cache."""
    args, options = call
    generator = torch.Generator().manual_seed(seed)

    def fresh(x: Any) -> Any:
        return torch.randn(x.shape, generator=generator).to(x.device, x.dtype)

    kept = {name: value for name, value in options.items() if "past" not in name and "cache" not in name}
    if args:
        return (fresh(args[0]), *args[1:]), kept
    name = next(name for name, value in kept.items() if backend_of(type(value)) is not None)
    return (), {name: fresh(kept[name]), **{other: value for other, value in kept.items() if other != name}}


def _stream(value: Any) -> Any:
    """The residual stream: the first input or output of a block."""
    if isinstance(value, Mapping):
        return next(v for v in value.values() if backend_of(type(v)) is not None)
    return value[0] if isinstance(value, tuple) else value


def _units(torch: Any, block: Any, call: _Call) -> list[_Unit]:
    """The parameters of a block, module by module in the order in which it calls them, with the values to try."""
    order: list[tuple[str, Any]] = []
    hooks = []
    inputs: dict[str, Any] = {}
    for name, module in block.named_modules():
        own = list(module.named_parameters(recurse=False))
        if own:
            # Noted after the call: a module with parameters and submodules uses its own last, as a layer scale does.
            def note(_: Any, args: Any, __: Any, name: str = name, module: Any = module) -> None:
                if name not in inputs:
                    order.append((name, module))
                    inputs[name] = args

            hooks.append(module.register_forward_hook(note))
    try:
        with torch.no_grad():
            block(*call[0], **call[1])
    finally:
        for hook in hooks:
            hook.remove()
    units: list[_Unit] = []
    for name, module in order:
        held = module.named_parameters(recurse=False)
        own = [(f"{name}.{leaf}" if name else leaf, parameter) for leaf, parameter in held]
        gain = _gain(torch, module, inputs[name])
        whole = all(parameter.ndim <= 2 and leaf.rpartition(".")[2] in ("weight", "bias") for leaf, parameter in own)
        pairs = [(path, gain if path.endswith("weight") else 0.0) for path, _ in own]
        units += [pairs] if whole or gain else [[pair] for pair in pairs]
    if not units:
        raise Unsupported(f"the block, a {type(block).__name__}, has no parameters", hint='layers="blocks[*]"')
    return units


def _gain(torch: Any, module: Any, args: Any) -> float:
    """-1 for a norm that computes (1 + w), else 0."""
    own = dict(module.named_parameters(recurse=False))
    weight = own.get("weight")
    if weight is None or weight.ndim != 1 or not args:
        return 0.0
    saved = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(-1.0)
            out = module(*args)
            return -1.0 if backend_of(type(out)) is not None and not out.any() and "bias" not in own else 0.0
    finally:
        with torch.no_grad():
            weight.copy_(saved)
