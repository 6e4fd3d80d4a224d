"""Extraction: what training changed in the matrices of a model, as an adapter of low rank."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paramend.anatomy.beside import EMBEDDINGS
from paramend.anatomy.families import EXPERTS
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.edits.memory import editable, valued
from paramend.edits.quantized import check_values
from paramend.edits.weights import exact, weighed
from paramend.errors import BadArgument, NoMatch, SpecMismatch
from paramend.leaves.leaves import Editable, unique
from paramend.leaves.specs import AnyTree, Array, Spec
from paramend.mapping.report import LayoutReport, Moved
from paramend.merging.adapters import Adapter
from paramend.merging.destinations import WEIGHTS, Destinations

# The version of PEFT whose packing of experts is written.
_VERSION = "0.19.0"


def extract(
    tuned: AnyTree, base: AnyTree, *, rank: int | None = None, energy: float | None = None
) -> tuple[Adapter, LayoutReport]:
    """The difference of two models as an adapter of low rank, and the report. `adapter.save(folder)` writes what PEFT
    loads, and `pm.fold(base, adapter)` adds it again.

    Of each matrix that changed it holds the products of the largest singular values of the difference: no adapter of
    that rank is closer. They are computed in float64 from whole leaves, one at a time.

    Args:
        tuned: the model after training, in memory or opened.
        base: the model before.
        rank: the rank of all terms, or that of the matrix where it is lower.
        energy: instead of it, the share of the sum of squares of each difference that its terms hold at least: the
            smallest rank that does is taken.

    Returns:
        The adapter, and a report with a row for each matrix in it; `said` lists other leaves that changed, such as
        norms and biases, which are not in the adapter.

    Raises:
        BadArgument: not one of rank and energy is given, or it is out of bounds.
        NoMatch: leaves are in one of the models only; the message lists them.
        SpecMismatch: shapes differ, or a difference is not finite.
        Quantized: a weight is quantised in a scheme that cannot be decoded.

    Source: the theorem of Eckart and Young; fused experts are packed as by `ParamWrapper` of PEFT.

    >>> base = {"fc": {"weight": np.zeros((3, 2), "float32")}}
    >>> tuned = {"fc": {"weight": np.outer([1, 2, 3], [1, 1]).astype("float32")}}
    >>> adapter, report = pm.extract(tuned, base, rank=1)
    >>> adapter, pm.fold(base, adapter)[0]["fc"]["weight"].round(5).tolist()
    (<the adapter: 1 term>, [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    """
    _check(rank, energy)
    after, before = weighed(valued(tuned)), weighed(valued(base))
    pairs = _paired(after, before)
    for leaves in (after, before):
        check_values(leaves, list(leaves.index.numbers), "cannot be subtracted", "pm.dequantize(model) makes it floats")
    bases = Destinations(before)
    rows, kept, said, parts = [], [], [], []
    for number in unique(before, before.index.numbers):
        path, spec = before.index.path(number), before.spec(number)
        added = _difference(path, before, number, after, pairs[number])
        why = _refusal(bases, number)
        if not added.any():
            kept.append(path)
        elif why:
            said.append(f"{path} ({spec}) changed, and is not in the adapter: {why}")
        else:
            parts.append(_part(bases, number, added, rank, energy))
            if bases.tie is not None and number in bases.tie[:2] and bases.tie[2]:
                said.append(f'{path} is that of the head too: fold it with into="embedding"')
            rows.append(Moved(path, spec, f"rank {parts[-1].rank}", (after.index.path(pairs[number]),)))
    if not rows:
        raise NoMatch("\n  ".join(("the two models do not differ in any matrix", *said)))
    opened = [each for each in map(editable, (base, tuned)) if isinstance(each, Checkpoint)]
    read = [held for each in opened for held in each.source.stats.values()]
    source = editable(base)
    name = source.path.name if isinstance(source, Checkpoint) else None
    adapter = Adapter("the adapter", editable(_leaves(parts)), _config(bases, parts, name), read=read)
    return adapter, LayoutReport("extract", tuple(rows), tuple(kept), ("extracted", "equal"), tuple(said))


def _check(rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise BadArgument("one of rank= and energy= is needed", hint="rank=16, or energy=0.99")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int | np.integer) or rank < 1):
        raise BadArgument(f"rank={rank!r} is not a positive integer", hint="rank=16")
    if energy is not None and not 0 < energy <= 1:
        raise BadArgument(f"energy={energy!r} is not a share above 0 and up to 1", hint="energy=0.99")


def _paired(after: Editable, before: Editable) -> dict[int, int]:
    """The leaves of the base, each with that of the tuned model."""
    theirs = {after.index.pieces(number): number for number in after.index.numbers}
    ours = {before.index.pieces(number): number for number in before.index.numbers}
    alone = [f"{'.'.join(path)} is in the base alone" for path in ours if path not in theirs]
    alone += [f"{'.'.join(path)} is in the tuned model alone" for path in theirs if path not in ours]
    if alone:
        raise NoMatch("the two do not have the same leaves:\n  " + "\n  ".join(alone), hint="pm.diff(tuned, base)")
    return {number: theirs[path] for path, number in ours.items()}


def _difference(path: str, before: Editable, number: int, after: Editable, other: int) -> Array:
    """What was added to a leaf, in float64; of other leaves than floats, whether anything was."""
    ours, theirs = before.spec(number), after.spec(other)
    if ours.shape != theirs.shape:
        raise SpecMismatch(f"{path} is {ours} in the base, and {theirs} in the tuned model")
    old, new = exact(before, number).read(), exact(after, other).read()
    if ours.kind != "float" or theirs.kind != "float":
        return np.array(ours != theirs or old.tobytes() != new.tobytes())
    found: Array = new.astype(np.float64) - old.astype(np.float64)
    if not np.isfinite(found).all():
        raise SpecMismatch(f"{path}: the difference has values that are not finite")
    return found


@dataclass(frozen=True)
class _Part:
    """The terms of one leaf: its module, the name of the parameter if it is not the module's weight, how the names of A
    and B end, and both, in the shapes that PEFT gives them."""

    module: str
    parameter: str
    sides: tuple[str, str]
    rank: int
    a: Array
    b: Array

    @property
    def target(self) -> str:
        return f"{self.module}.{self.parameter}" if self.parameter else self.module


def _refusal(bases: Destinations, number: int) -> str:
    """Why a leaf cannot be a sum of products of which PEFT knows, or ""."""
    spec, (*module, name) = bases.leaves.spec(number), bases.leaves.index.pieces(number)
    if spec.kind != "float" or spec.ndim < 2 or not module or name.endswith("bias"):
        return "it is not a matrix of floats in a module"
    experts = spec.ndim == 3 and (name in EXPERTS or "experts" in module)
    if experts and _experts_first(bases, spec) is None:
        return "its model_type, which says whether experts have their inputs first, is not known"
    if spec.ndim > 2 and not experts and name != "weight":
        return "which of its axes are inputs is not known"
    return ""


def _experts_first(bases: Destinations, spec: Spec) -> bool | None:
    found = bases.experts_first(_VERSION)
    return bool(found) if spec.shape[1] != spec.shape[2] else found


def _part(bases: Destinations, number: int, added: Array, rank: int | None, energy: float | None) -> _Part:
    spec, (*module, name) = bases.leaves.spec(number), bases.leaves.index.pieces(number)
    path, last, sides = ".".join(module), module[-1], ("lora_A.weight", "lora_B.weight")
    # Routers of experts are parameters of a module of their own, not linear layers.
    parameter = name if name not in WEIGHTS or (name == "weight" and last in ("gate", "router")) else ""
    dtype = "float64" if spec.dtype == "float64" else "float32"
    experts = added.ndim == 3 and name != "weight"
    matrices = added if experts else added.reshape(1, len(added), -1)
    is_rows = not parameter and (last in EMBEDDINGS or "embed" in last or last == "wpe" or name == "embedding")
    if is_rows:
        sides = "lora_embedding_A", "lora_embedding_B"
    plain = added.ndim == 2 and not parameter and bases.inputs_first(number, conv1d=False)
    first = _experts_first(bases, spec) if experts else is_rows or plain
    matrices = matrices.transpose(0, 2, 1) if first else matrices
    parts = [np.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
    rank = int(min(rank or max(_rank(sigma, energy) for _, sigma, _ in parts), len(parts[0][1])))
    roots = [np.sqrt(sigma[:rank]) for _, sigma, _ in parts]
    a = np.concatenate([root[:, None] * v[:rank] for root, (_, _, v) in zip(roots, parts, strict=True)])
    b = np.stack([u[:, :rank] * root for root, (u, _, _) in zip(roots, parts, strict=True)], -1)  # experts take turns
    b = b.reshape(b.shape[0], -1)
    if added.ndim > 2 and not experts:
        a, b = a.reshape(rank, *added.shape[1:]), b.reshape(*b.shape, *(1,) * (added.ndim - 2))
    return _Part(path, parameter, sides, rank, np.ascontiguousarray(a, dtype), np.ascontiguousarray(b, dtype))


def _rank(sigma: Array, energy: float | None) -> int:
    """The smallest rank whose largest values hold this share of the sum of squares."""
    squares = np.cumsum(np.square(sigma))
    return int(np.searchsorted(squares, (energy or 1.0) * squares[-1])) + 1


def _leaves(parts: Sequence[_Part]) -> dict[str, Array]:
    """The leaves of the adapter. Of several parameters of a module the first is wrapped first, deepest in the names."""
    found: dict[str, Array] = {}
    order = list(EXPERTS)
    inner = sorted(parts, key=lambda part: order.index(part.parameter) if part.parameter in order else len(order))
    for part in parts:
        beside = [each.parameter for each in inner if each.module == part.module and each.parameter]
        depth = len(beside) - 1 - beside.index(part.parameter) if part.parameter else 0
        above = ".".join(("base_model.model", part.module, *("base_layer",) * depth))
        found |= {f"{above}.{side}": values for side, values in zip(part.sides, (part.a, part.b), strict=True)}
    return found


def _config(bases: Destinations, parts: Sequence[_Part], base: str | None) -> dict[str, Any]:
    """What `adapter_config.json` says: every alpha is the rank, so the factor of all terms is 1."""
    rank = Counter(part.rank for part in parts).most_common(1)[0][0]
    others = {f"^{re.escape(part.target)}": part.rank for part in parts if part.rank != rank}
    conv1d = [part for part in parts if not part.parameter and bases.is_conv1d(tuple(part.module.split(".")))]
    parameters = [part.target for part in parts if part.parameter]
    return {
        "peft_type": "LORA",
        "peft_version": _VERSION,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": [part.module for part in parts if not part.parameter],
        **({"target_parameters": parameters} if parameters else {}),
        "fan_in_fan_out": bool(conv1d),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
