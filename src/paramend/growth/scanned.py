"""Layers stacked along an axis of each leaf, as in scanned models: an order takes slices of the leaves."""

from collections.abc import Iterable
from typing import Any

from paramend.anatomy import families
from paramend.anatomy.families import modules_of
from paramend.arrays.registry import backend
from paramend.edits.call import Call
from paramend.edits.memory import Memory
from paramend.errors import BadArgument, SpecMismatch
from paramend.growth import identities, numbered
from paramend.growth.depth import order_of
from paramend.growth.report import DeepenReport, LayerRow
from paramend.leaves.paths import common, write_path
from paramend.reports import wording
from paramend.selectors.selector import Sliced, resolve


def deepened_stack(tree: Any, layers: Sliced, order: Any, identity: Any) -> tuple[Any, DeepenReport]:
    """A new tree whose stacked leaves hold the layers of the order, and the report."""
    axis = _axis(layers.index)
    memory = Memory(tree)
    chosen = resolve(layers.part, memory)
    lengths = {memory.spec(number).shape[axis : axis + 1] for number in chosen}
    if len(lengths) != 1 or () in lengths:
        specs = [f"{memory.index.path(number)} {memory.spec(number)}" for number in chosen]
        raise SpecMismatch(
            f"{layers!r}: axis {axis} differs in length among these leaves: {wording.listing(specs, 6)}",
            hint="select only the leaves of the stack, and the axis that counts its layers",
        )
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
        raise BadArgument(
            "`layers` must select all layers of the stack; the order says which of them are taken",
            hint='layers=pm.sel("params/blocks/**")[:], or [:, :] if the second axis counts layers',
        )
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
