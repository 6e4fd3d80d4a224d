"""Growth in depth: a model with more layers, or fewer, made from the layers that it has."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast

from paramend.anatomy import families
from paramend.anatomy.families import modules_of
from paramend.anatomy.layers import followed
from paramend.anatomy.moves import Move
from paramend.anatomy.sections import enter
from paramend.arrays.registry import backend
from paramend.checkpoints.report import read_by
from paramend.edits.call import Call
from paramend.edits.memory import Memory
from paramend.errors import BadArgument, SpecMismatch, Unsupported
from paramend.growth import identities, numbered
from paramend.growth.depth import Order, order_of
from paramend.growth.identities import Identity
from paramend.growth.planning import DepthPlan
from paramend.growth.rebuilding import Rebuilder
from paramend.growth.report import DeepenReport, LayerRow
from paramend.leaves.leaves import Editable
from paramend.leaves.paths import common, write_path
from paramend.leaves.specs import AnyTree
from paramend.reports import wording
from paramend.selectors.selector import SelectorLike, Sliced, resolve, sel
from paramend.trees.lookup import find_kind, is_torch_module

T = TypeVar("T")


def deepen(
    tree: T,
    *,
    order: Order | Iterable[int],
    layers: SelectorLike | None = None,
    identity: Identity = "auto",
    config: Mapping[str, object] | None = None,
) -> tuple[T, DeepenReport]:
    """The model with its layers in another order, repeated or left out, and the report.

    With an order such as `pm.depth.blocks(12, count=4)` some layers become the identity: copies whose last projections
    are zero, so that the model computes what it did, bit for bit, and has more to train. Which leaves these are depends
    on the family of the model; for known families `identity="auto"` finds them.

    Args:
        tree: nested dicts, Flax parameters, an NNX state or module, a torch module or state dict, an optimizer state.
        order: for each new layer the old one that it is made of, or an `Order` of `pm.depth`.
        layers: which layers: `model.layers[*]`, `model.layers.<n>` or `params/layers_<n>`; `params/Dense_[:-1]`
            excludes the last one, which stays last and is renumbered. May be left out if the tree has only one list of
            numbered layers, or siblings such as `Dense_<n>` with equal specs. For layers stacked along an axis of each
            leaf, as in scanned models, a slice of a selector: `pm.sel("params/blocks/**")[:]`, or `[:, :]` if the
            second axis counts layers.
        identity: how a layer becomes the identity: "auto"; the name of a family; selectors, relative to the layer, of
            leaves that become zero, or a dict from these to values; None copies layers as they are.
        config: for a model with a configuration: key → value in the configuration of the outcome, where these are not
            to follow from the order; dots lead into parts, as in `text_config.layer_types`. With `config`, which may be
            empty, layers also go to places that had other leaves.

    Returns:
        A new tree of the same type, and the report. Layers that stay are the same objects. The configuration of a torch
        module or a checkpoint, if it has one, and the layer numbers in modules are updated: what it says of single
        layers follows them, and kinds that it tells by numbers are written out.

    Raises:
        NoMatch: there are no such layers, or no such leaves in them.
        BadArgument: the order does not fit, or it is unknown which leaves make a layer the identity.
        Unsupported: no leaves do (post-LN), the container has fixed entries, the model scales layers by their number, a
            layer would be of another kind in its new place and the configuration cannot say otherwise, or it would have
            other leaves than that place.

    >>> params = {"Dense_0": {"w": np.ones(2)}, "Dense_1": {"w": np.full(2, 5.0)}, "Dense_2": {"w": np.ones(1)}}
    >>> tree, report = deepen(params, layers="Dense_[:-1]", order=[0, 1, 1])
    >>> {name: layer["w"].tolist() for name, layer in tree.items()}
    {'Dense_0': [1.0, 1.0], 'Dense_1': [5.0, 5.0], 'Dense_2': [5.0, 5.0], 'Dense_3': [1.0]}
    >>> print(report)
    deepen: 2 layers -> 3, 2 kept, 1 copied
    <BLANKLINE>
      Dense_{0,1}         2 × kept
      Dense_2 ◄─ Dense_1  copied
    """
    layers = layers if layers is None or isinstance(layers, str) else sel(layers)
    if isinstance(tree, Editable):
        from paramend.growth.checkpoints import deepened  # imports the rewriting engine

        new, report = deepened(cast(Any, tree), layers, order, identity, config)
        report.tells_of(read_by(tree))
        return cast(T, new), report
    if isinstance(layers, Sliced):
        if config is not None:
            raise BadArgument(f"config={dict(config)!r} is given, and stacked layers have no configuration")
        return deepened_stack(tree, layers, order, identity)
    memory = Memory(tree)
    work = DepthPlan(memory, layers, order, identity, partial(configuration, tree), config)
    new, report = _finished(work, Rebuilder(memory, work.runs, work.order).rebuilt(tree))
    for mine, values in _configured(new, work):
        enter(mine, mine.to_dict(), values)
    return new, report


def deepen_(
    module: AnyTree,
    *,
    order: Order | Iterable[int],
    layers: SelectorLike | None = None,
    identity: Identity = "auto",
    config: Mapping[str, object] | None = None,
) -> DeepenReport:
    """Change the depth of a torch or NNX module in place, and return the report.

    Layers that stay are the same objects with the same parameters, so an optimizer can go on with them; add the new
    ones to it. The configuration and the layer numbers in the modules are updated. On an error the module is unchanged.

    Args:
        module: what to change; its layers are in a ModuleList, a Sequential, an nnx.List.
        order, layers, identity, config: as in `deepen`.

    Raises:
        NoMatch, BadArgument: as in `deepen`.
        Unsupported: as in `deepen`, or it is not a module.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    >>> print(deepen_(model, layers="[*]", order=[0, 1, 1]))
    deepen: 2 layers -> 3, 2 kept, 1 copied
    <BLANKLINE>
      {0,1}   2 × kept
      2 ◄─ 1  copied
    """
    kind = find_kind(module)
    if kind is None or kind.replace is None:
        why = f"{wording.described(module)} cannot be changed in place"
        raise Unsupported(why, hint="tree, report = pm.deepen(tree, layers=..., order=...)")
    if isinstance(layers, Sliced):
        raise Unsupported("stacked layers cannot be deepened in place", hint="module, report = pm.deepen(module, ...)")
    memory = Memory(module)
    work = DepthPlan(memory, layers, order, identity, partial(configuration, module), config)
    rebuilder = Rebuilder(memory, work.runs, work.order)
    rebuilder.check()
    new = _configured(module, work)
    rebuilder.rebuild_(module)
    report = _finished(work, module)[1]
    for mine, values in new:
        enter(mine, mine.to_dict(), values)
    return report


def _finished(work: DepthPlan, new: Any) -> tuple[Any, DeepenReport]:
    tree = Memory(new)
    calls, report = work.finished(tree)
    kind = find_kind(new)
    if calls and kind is not None and kind.replace is not None:
        tree.edited_(calls)  # edits only copies: an identity is never a layer of the old model
    elif calls:
        new = tree.edited(calls)
    return new, report


def configuration(tree: Any, where: Sequence[str]) -> dict[str, Any] | None:
    """The configuration of a torch model of Hugging Face whose layers are at a path, or None."""
    found = _configs(tree, where)
    return found[0].to_dict() if found else None


def _configs(tree: Any, where: Sequence[str]) -> list[Any]:
    """The configurations of the modules on the path to the layers, except those that are parts of an outer one."""
    if not is_torch_module(tree):
        return []
    found: list[Any] = []
    known: set[int] = set()
    module = tree
    for name in ("", *where):
        module = module._modules.get(name) if name else module
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict") and hasattr(config, "model_type") and id(config) not in known:
            found.append(config)
            known |= {id(config), *map(id, vars(config).values())}
    return found


def _configured(tree: Any, work: DepthPlan) -> list[tuple[Any, dict[str, Any]]]:
    """The configurations to update, each with its new values."""
    found = []
    for place, config in enumerate(_configs(tree, work.runs[0].parent)):
        old = config.to_dict()
        new = _followed(old, work.moves)
        if place:  # that of one side of an encoder-decoder model also counts the layers of that side as its own
            own = _followed({**old, "is_encoder_decoder": False}, work.moves)
            new |= {key: value for key, value in own.items() if key != "is_encoder_decoder" and value != old.get(key)}
        found.append((config, new))
    return found


def _followed(config: dict[str, Any], moves: Sequence[Move]) -> dict[str, Any]:
    for move in moves:
        config = followed(config, move)[0]
    return config


def deepened_stack(tree: Any, layers: Sliced, order: Any, identity: Any) -> tuple[Any, DeepenReport]:
    """A new tree whose stacked leaves hold the layers of the order, and the report."""
    axis = _axis(layers.index)
    memory = Memory(tree)
    chosen = resolve(layers.part, memory)
    lengths = {memory.spec(number).shape[axis : axis + 1] for number in chosen}
    if len(lengths) != 1 or () in lengths:
        specs = [f"{memory.index.path(number)} {memory.spec(number)}" for number in chosen]
        why = f"{layers!r}: axis {axis} differs in length among these leaves: {wording.listing(specs, 6)}"
        raise SpecMismatch(why, hint="select only the leaves of the stack, and the axis that counts its layers")
    count = lengths.pop()[0]
    order = order_of(order, count)
    new = Memory(memory.with_leaves({n: backend(v := memory.read(n)).take(v, order.sources, axis) for n in chosen}))
    calls: dict[int, Call] = {}
    family = ""
    values: dict[int, float] = {}
    if order.identity and identity is not None:
        family, values = _stack_values(memory, chosen, identity)
        index = (*[slice(None)] * axis, list(order.identity))
        calls = {number: identities.call(value, index) for number, value in values.items()}
    where = repr(layers.part)
    sets = {memory.index.path(n): value for n, value in values.items()}
    rows = [
        LayerRow(
            f"{axis * ':, '}{target}",
            f"{axis * ':, '}{source}",
            "kept"
            if order.kept.get(source) == target
            else "identity"
            if target in order.identity and calls
            else "copied",
            sets if target in order.identity else {},
            sum(memory.spec(n).size for n in chosen) // count,
        )
        for target, source in enumerate(order.sources)
    ]
    report = DeepenReport(order, rows, family=family, stacked=where)
    if order.new:
        report.new = Sliced(layers.part, (*[slice(None)] * axis, list(order.new)) if axis else list(order.new))
    return (new.edited(calls) if calls else new.root), report


def _axis(index: Any) -> int:
    parts = index if isinstance(index, tuple) else (index,)
    if not parts or any(part != slice(None) for part in parts):
        why = "`layers` must select all layers of the stack; the order says which of them are taken"
        raise BadArgument(why, hint='layers=pm.sel("params/blocks/**")[:], or [:, :] if the second axis counts layers')
    return len(parts) - 1


def _stack_values(memory: Memory, chosen: Iterable[int], identity: Any) -> tuple[str, dict[int, float]]:
    """The family that determines the identity, or "", and leaf of the stack → value that makes layers the identity."""
    pieces = {number: memory.index.pieces(number) for number in chosen}
    start = common([path[:-1] for path in pieces.values()])
    family = ""
    rules = identities.rules_of(identity)
    strict = rules is not None
    if rules is None:
        row = identities.family_of(modules_of(path[len(start) :] for path in pieces.values()), identity, None)
        family, rules = row.name, families.values(row)
    names = numbered.under(memory.index.names, start)
    calls = identities.calls(memory, names, rules, write_path(start, memory.index.separator), strict=strict)
    return family, {n: float(call.args.get("value", 0.0)) for n, call in calls.items() if n in pieces}
