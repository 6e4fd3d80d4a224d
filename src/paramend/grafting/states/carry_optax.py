"""Optimizer states carried over: from frozen to thawed, from one optimizer to the next, from a file into a run.

Leaves of a state are identified by what they mean, not by where a wrapper put them. A state is a tree of records
(such as the `ScaleByAdamState` of Adam) with fields; a field is a number, such as a count, or a tree like the
parameters. So a leaf has a record, a field, and possibly a path in the parameters.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramend.arrays.registry import backend
from paramend.errors import BadArgument
from paramend.freezing.places import dtype_of, named
from paramend.grafting.report import GraftReport, GraftRow, refuse_misfits
from paramend.leaves.paths import write_path
from paramend.leaves.specs import Spec
from paramend.reports import wording

Path = tuple[str, ...]


@dataclass(frozen=True)
class Leaf:
    """A leaf of an optimizer state."""

    path: Path  # in the state
    record: Path  # the path of its record, without wrappers
    field: Path  # its field in the record
    param: Path  # its path in the parameters; `()` for a count
    value: Any
    place: int  # its place in JAX's order

    @property
    def name(self) -> tuple[Path, Path, Path]:
        return self.record, self.field, self.param


def carried(fresh_state: Any, state: Any, params: set[Path], mismatch: str) -> tuple[Any, GraftReport]:
    """A fresh state with everything that an earlier state has for it, and the report.

    Args:
        fresh_state: the state as `init` makes it.
        params: the paths of the parameters that the fresh state is for.
        mismatch: "error", or "keep" for what `init` made where shapes differ.
    """
    fresh, old = _read(fresh_state, params), _read(state, params)
    sources = Sources(fresh, old)
    values, structure = jax.tree.flatten(fresh_state)
    report, used = GraftReport(), set[int]()
    for leaf in fresh:
        source = sources.of(leaf)
        if source is None:
            report.fresh.append(_row(leaf, None, "nothing in the earlier state"))
            continue
        used.add(source.place)
        why = _misfit(leaf.value, source.value)
        if why:
            report.mismatched.append(_row(leaf, source, why))
        else:
            values[leaf.place] = _placed(source.value, leaf.value)
            report.copied.append(_row(leaf, source, "copied"))
    report.unused += [_row(leaf, leaf, "no place for it in the new state") for leaf in old if leaf.place not in used]
    if mismatch != "keep":
        hint = 'pm.graft_opt_state(state, old_state, mismatch="keep") starts these as tx.init makes them'
        refuse_misfits([f"{row.path} {row.did}" for row in report.mismatched], hint)
    if fresh and not used:
        said = f"nothing in this state belongs to this optimizer: it has {_shown(old)}, the optimizer {_shown(fresh)}"
        raise BadArgument(said, hint="tx.init(params) starts anew")
    return structure.unflatten(values), report


def _row(leaf: Leaf, source: Leaf | None, did: str) -> GraftRow:
    path, spec = write_path(leaf.path), _spec(leaf.value)
    if source is None:
        return GraftRow.of(path, spec, did)
    theirs = _spec(source.value)
    taken = theirs.size if did == "copied" else 0
    return GraftRow.of(path, spec, did, write_path(source.path), theirs, taken=taken)


def _spec(value: Any) -> Spec:
    return Spec(tuple(jnp.shape(value)), str(dtype_of(value)))


class Sources:
    """Which leaf of an old state a leaf of a new one continues."""

    def __init__(self, fresh: list[Leaf], old: list[Leaf]) -> None:
        self._by_path = {leaf.path: leaf for leaf in old}
        self._by_name: dict[Any, list[Leaf]] = _grouped((leaf.name, leaf) for leaf in old)
        self._fresh_kinds, self._old_kinds = _kinds(fresh), _kinds(old)
        self._of_kind: dict[Any, list[Leaf]] = _grouped(
            ((self._old_kinds[leaf.record], leaf.field, leaf.param), leaf) for leaf in old
        )
        self._records = _grouped((kind, record) for record, kind in self._fresh_kinds.items())

    def of(self, leaf: Leaf) -> Leaf | None:
        """The leaf that it continues, or None."""
        kind = self._fresh_kinds[leaf.record]
        same = self._by_path.get(leaf.path)
        if same is not None and self._old_kinds[same.record] == kind:
            return same
        named_so = self._by_name.get(leaf.name, [])
        alike = [other for other in named_so if self._old_kinds[other.record] == kind]
        if _agree(alike):
            return alike[0]
        # Elsewhere in a chain: the only record with such fields.
        of_kind = self._of_kind.get((kind, leaf.field, leaf.param), [])
        if len(self._records[kind]) == 1 and _agree(of_kind):
            return of_kind[0]
        if same is not None:
            return same
        return named_so[0] if _agree(named_so) else None


def _agree(leaves: list[Leaf]) -> bool:
    """Whether it does not matter which of them is taken: those of the parts of a partition have equal counts."""
    if len(leaves) <= 1:
        return bool(leaves)
    if any(isinstance(leaf.value, jax.core.Tracer) for leaf in leaves):
        return False
    first, *others = (np.asarray(_numbers(leaf.value)) for leaf in leaves)
    return all(first.shape == other.shape and first.tobytes() == other.tobytes() for other in others)


def _numbers(value: Any) -> Any:
    is_key = jnp.issubdtype(getattr(value, "dtype", None) or np.dtype(bool), jax.dtypes.extended)
    return jax.random.key_data(value) if is_key else value


def _read(state: Any, params: set[Path]) -> list[Leaf]:
    """The leaves of a state, which may have been read from a file as dicts and lists."""
    tree, _, places = named(state)
    values = jax.tree.leaves(state)
    leaves = []
    for number in tree.index.numbers:
        path = tree.index.pieces(number)
        place = places[id(tree.values[number])]
        head, param = split(path, params)
        bare = without_wrappers(head)
        leaves.append(Leaf(path, bare[:-1], bare[-1:], param, values[place], place))
    return leaves


def split(path: Path, params: set[Path]) -> tuple[Path, Path]:
    """A path split into that of the field and that in the parameters, or `()`."""
    for start in range(1 if len(path) > 1 else 0, len(path)):
        param = path[start:]
        # Files show the box around a parameter (`nn.Partitioned`, an NNX Variable).
        for found in (param, param[:-1]) if param[-1] == "value" else (param,):
            if found and found in params:
                return path[:start], found
    return path, ()


def without_wrappers(path: Path) -> Path:
    """The path without the records that only wrap another state."""
    bare: list[str] = []
    keys = iter(path)
    for key in keys:
        if key == "inner_states":  # of a partition, by label
            next(keys, None)
        elif key != "inner_state":
            bare.append(key)
    return tuple(bare)


def _kinds(leaves: list[Leaf]) -> dict[Path, frozenset[Path]]:
    """The fields of each record, which tell its kind."""
    return {record: frozenset(each) for record, each in _grouped((leaf.record, leaf.field) for leaf in leaves).items()}


def _grouped(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return groups


def _misfit(fresh: Any, old: Any) -> str:
    """Why an old value cannot replace a fresh one, or ""."""
    ours, theirs = _spec(fresh), _spec(old)
    if ours.shape != theirs.shape:
        return f"is {list(theirs.shape)} in the earlier state, and {list(ours.shape)} is needed"
    if ours.kind != theirs.kind:
        return f"is of kind {theirs.kind} in the earlier state, and {ours.kind} is needed"
    return ""


def _placed(old: Any, fresh: Any) -> Any:
    """The old value as a JAX array of its own; one from a file goes where the fresh one is."""
    if isinstance(old, jax.Array):
        return backend(old).like(old, old)
    if isinstance(fresh, jax.core.Tracer) or not isinstance(fresh, jax.Array):
        return jnp.asarray(old)
    return jax.device_put(old, fresh.sharding)


def _shown(leaves: list[Leaf]) -> str:
    fields = dict.fromkeys(write_path(leaf.record + leaf.field) for leaf in leaves)
    return wording.listing(list(fields), 4) or "nothing"
