"""Folding: adapters added to the weights of their base, so that it computes what both did together."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from paramend.checkpoints.checkpoint import Checkpoint
from paramend.checkpoints.tying import untie as untied
from paramend.edits.hands import equal
from paramend.edits.memory import editable, valued
from paramend.edits.plan import call
from paramend.edits.quantized import check_values
from paramend.edits.weights import exact, is_coded, weighed
from paramend.errors import BadArgument, NoMatch, SpecMismatch, Unsupported
from paramend.growth.deepening import deepen
from paramend.leaves.leaves import Editable
from paramend.leaves.origins.combined import Combined, Product, View
from paramend.leaves.origins.moved import join, take
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Made
from paramend.leaves.origins.texts import quoted
from paramend.leaves.specs import AnyTree
from paramend.mapping.report import LayoutReport, Moved
from paramend.merging.adapters import Adapter, Pieces, Term, adapter
from paramend.merging.destinations import Destinations
from paramend.merging.readings import Placed, Reading, of_parameters
from paramend.reports import wording

T = TypeVar("T")


def fold(
    base: T,
    adapter: AnyTree,
    *,
    scale: float = 1.0,
    untie: bool = False,
    into: Literal["embedding"] | None = None,
    rule: Sequence[str] | None = None,
) -> tuple[T, LayoutReport]:
    """A base with adapters added to its weights, and the report.

    A weight becomes `round(W + scale · alpha / rank · B @ A)`, computed in float32, or float64 if that is its dtype,
    and rounded once; the terms of several adapters are added first. Biases and modules that an adapter holds whole take
    the place of those of the base. Of a quantised weight the blocks that change are encoded anew, to the nearest.

    Args:
        base: a model in memory; or a checkpoint from `pm.open`, of which nothing is computed before it is saved, in
            bounded memory, or patched: `pm.patch(path, lambda base: pm.fold(base, adapter)[0])` can be undone.
        adapter: a folder of PEFT, a kohya file, an opened checkpoint, a tree whose leaves are called `lora_A` and
            `lora_B` or `lora_a` and `lora_b`, or what `pm.extract` returns; or a list of these. LoRA and rsLoRA, with
            patterns of ranks and alphas, DoRA; of linear layers, embeddings, convolutions, fused or separate experts.
        scale: a further factor of all terms.
        untie: whether a head that is tied to its embedding gets a leaf of its own if an adapter changes one of the two.
        into: "embedding" where what changes one of the two shall change both.
        rule: for trees with other names, the paths of A, of B and of the leaf that they change, with wildcards:
            `("**/lora_a", "**/lora_b", "**/kernel")`. A is (in, rank) there, and B (rank, out).

    Returns:
        The base, of the same type, and a report whose rows are the leaves that changed. All leaves of the adapters are
        in it.

    Raises:
        NoMatch: the base lacks leaves that an adapter changes, or an adapter has leaves of no known kind; the message
            lists all of them.
        SpecMismatch: shapes do not fit, or fit in two ways that mean different things; the message lists all.
        Quantized: a weight of the base is quantised in a scheme that cannot be decoded.
        Unsupported: an adapter is not a LoRA, or changes one of two tied leaves.
        CannotRead, BadCheckpoint: a file is missing, or damaged.

    Source: PEFT's `merge_and_unload`; arXiv 2106.09685 (LoRA), 2312.03732 (rsLoRA), 2402.09353 (DoRA).

    >>> base = {"fc": {"kernel": np.zeros((2, 2), "float32"), "bias": np.ones(2, "float32")}}
    >>> terms = {"fc": {"lora_a": np.ones((2, 1), "float32"), "lora_b": np.array([[1.0, 2.0]], "float32")}}
    >>> tree, report = pm.fold(base, terms, scale=0.5)
    >>> tree["fc"]["kernel"].tolist(), [row.path for row in report.rows]
    ([[0.5, 1.0], [0.5, 1.0]], ['fc/kernel'])
    """
    if into not in (None, "embedding") or (into and untie):
        raise BadArgument(f"into={into!r} is not a choice here", hint='untie=True, or into="embedding"')
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise BadArgument(f"scale={scale!r} is not a finite number", hint="scale=1.0")
    adapters = opened(adapter, rule)
    folding = _Folding(_replicated(valued(base), adapters), adapters, scale, untie=untie, into=into)
    for each in adapters:
        folding.read(each)
    return cast(T, folding.made()), folding.report()


def opened(given: AnyTree, rule: Sequence[str] | None = None) -> list[Adapter]:
    """The adapters that are given, one or several."""
    if isinstance(given, list | tuple) and not given:
        raise BadArgument("an empty list holds no adapters")
    return [adapter(each, rule) for each in (given if isinstance(given, list | tuple) else [given])]


def _replicated(leaves: Editable, adapters: Sequence[Adapter]) -> Editable:
    """The base with the layers that adapters were trained on: some of them repeated, each with leaves of its own."""
    found = [each.said("layer_replication", []) for each in adapters]
    if not any(found):
        return leaves
    if any(each != found[0] for each in found):
        raise Unsupported("adapters that repeat layers of the base in different ways cannot be folded together")
    try:
        order = [layer for start, stop in found[0] for layer in range(start, stop)]
    except (TypeError, ValueError):
        raise BadArgument(f"layer_replication={found[0]!r} is not a list of pairs of layers") from None
    new: Any = deepen(leaves if isinstance(leaves, Checkpoint) else cast(Any, leaves).root, order=order)[0]
    return editable(new)


@dataclass
class _Change:
    """What becomes of a leaf: what takes its place, the products in passes of `Combined`, and the leaves of adapters
    that it is made of."""

    whole: Origin | None = None
    passes: list[list[Product]] = field(default_factory=list)
    view: View | None = None
    sources: list[str] = field(default_factory=list)

    def add(self, product: Product, view: View) -> None:
        """Add a product to those before, unless one of them, or it, sets norms."""
        if self.view not in (None, view):
            raise SpecMismatch("terms of one leaf take it for matrices of different shapes")
        self.view = view
        last = self.passes[-1] if self.passes else []
        if last and all(each.magnitude is None for each in (*last, product)):
            last.append(product)
        else:
            self.passes.append([product])


class _Folding:
    """One fold: what becomes of each leaf of the base, and all that is wrong."""

    def __init__(
        self, leaves: Editable, adapters: Sequence[Adapter], scale: float, *, untie: bool, into: str | None
    ) -> None:
        self.bases, self.scale, self.into = Destinations(weighed(leaves)), scale, into
        self.names = [each.name for each in adapters]
        self.changes: dict[int, _Change] = {}
        self.missing: list[str] = []
        self.unfit: list[str] = []
        self.said: list[str] = []
        changed = [term.module for each in adapters for term in each.terms if "tokens" not in term.roles]
        # Rows that an adapter replaces are those of a tied head, too.
        changed += [path[:-1] for each in adapters for path in each.replaced if path[-1] == "weight"]
        tied = list(dict.fromkeys(module for module in changed if self.bases.is_tied(module)))
        if tied and untie:
            self._untie(leaves, tied)
        elif tied and into is None:
            assert self.bases.tie is not None
            names, one = wording.listing([".".join(each) for each in tied]), leaves.index.path(self.bases.tie[0])
            hint = 'untie=True gives the head a leaf of its own; into="embedding" changes both'
            raise Unsupported(f"{names}: in this model the head and its embedding are one leaf, {one}", hint=hint)

    def _untie(self, leaves: Editable, tied: Sequence[Pieces]) -> None:
        """Give the head a leaf of its own before anything is added."""
        assert self.bases.tie is not None
        head = next((module for module in tied if self.bases.module(module) is None), ("lm_head",))
        path = ".".join((*head, "weight")) if self.bases.tie[1] is None else leaves.index.path(self.bases.tie[1])
        new: Any = untied(leaves if isinstance(leaves, Checkpoint) else cast(Any, leaves).root, head=path)[0]
        self.bases = Destinations(weighed(editable(new)))
        self.said.append(f"the head, {path}, gets a leaf of its own")

    @property
    def leaves(self) -> Editable:
        return self.bases.leaves

    def read(self, adapter: Adapter) -> None:
        """Enter what an adapter changes."""
        modules = [self.bases.module(term.module) for term in adapter.terms]
        held = [number for module in modules for number in self.bases.modules.get(module or (), {}).values()]
        check_values(self.leaves, held, "cannot take the terms of an adapter")
        self.missing += [f"{path}: it is no leaf of an adapter of a known kind" for path in adapter.rest]
        for path, number in adapter.replaced.items():
            self._tried(".".join(path), lambda p=path, n=number: self._replace(adapter, p, n))  # type: ignore[misc]
        by_module: dict[Pieces, list[Term]] = {}
        for term in adapter.terms:
            by_module.setdefault(term.module, []).append(term)
        owners: dict[int, Pieces] = {}
        for module, terms in by_module.items():
            self._tried(".".join(module), lambda m=module, t=terms: self._module(adapter, m, t, owners))  # type: ignore[misc]
        trained, own = adapter.said("base_model_name_or_path", ""), str(getattr(self.leaves, "path", ""))
        if trained and own:
            names = {Path(own).name, Path(str(self.bases.config.get("_name_or_path", ""))).name}
            self.said += [] if Path(str(trained)).name in names else [f"{adapter.name} was trained on {trained}"]

    def _tried(self, name: str, enter: Callable[[], None]) -> None:
        try:
            enter()
        except (NoMatch, SpecMismatch) as error:
            (self.missing if isinstance(error, NoMatch) else self.unfit).append(f"{name}: {error}")

    def _module(self, adapter: Adapter, named: Pieces, terms: Sequence[Term], owners: dict[int, Pieces]) -> None:
        """Enter the terms of one module; `owners` are those of the adapter so far, each of a leaf."""
        shared = self._shared(named)
        module = shared or self.bases.module(named)
        number = None if module is None else self.bases.weight(module)
        fused = self.bases.fused(named) if number is None else None
        if shared is not None and shared != self.bases.module(named) and adapter.said("ensure_weight_tying"):
            terms, twins = [], terms  # the embedding has the same
            self.changes.setdefault(cast(int, number), _Change()).sources += adapter.paths(twins)
        each = [Reading(adapter, term, self.bases) for term in terms]
        found: list[tuple[Term, Placed]] = []
        if fused is not None:
            found = [(reading.term, reading.of_expert(fused)) for reading in each]
        elif module is not None and number is None and not any(term.leaf for term in terms):
            found = list(of_parameters(each, self.bases.parameters(module)))
        else:
            for reading in each:
                term = reading.term
                leaf = self.bases.modules.get(module or (), {}).get(term.leaf) if term.leaf else number
                if leaf is None:
                    raise NoMatch("the base has no such leaf")
                if owners.setdefault(leaf, named) != named and shared is None:
                    raise SpecMismatch(f"{'.'.join(owners[leaf])} of the adapter means the same leaf")
                if "tokens" in term.roles:
                    self._tokens(adapter, term, leaf)
                else:
                    found += [(term, placed) for placed in reading.of_weight(leaf)]
        for term, (target, product, view) in found:
            change = self.changes.setdefault(target, _Change())
            change.add(replace(product, scale=product.scale * self.scale), view)
            change.sources += adapter.paths([term])

    def _shared(self, module: Pieces) -> Pieces | None:
        """The module of the embedding for the head that shares its weight, and takes the same change."""
        if self.into is None or not self.bases.is_tied(module):
            return None
        assert self.bases.tie is not None
        return self.leaves.index.pieces(self.bases.tie[0])[:-1]

    def _tokens(self, adapter: Adapter, term: Term, number: int) -> None:
        rows, values = adapter.said("trainable_token_indices", []), adapter.origin(term.roles["tokens"])
        if isinstance(rows, Mapping):
            rows = next((each for name, each in rows.items() if ".".join(term.module).endswith(name)), [])
        spec = self.leaves.spec(number)
        rows = rows if isinstance(rows, list) else []
        known = all(type(row) is int and 0 <= row < spec.shape[0] for row in rows)
        if not known or (len(rows), *spec.shape[1:]) != values.spec.shape:
            names = wording.listing(list(map(str, rows)), 4)
            raise SpecMismatch(f"it is {spec}, and the rows {names} of trainable_token_indices are {values.spec}")
        change = self.changes.setdefault(number, _Change())
        change.whole = _with_rows(change.whole or self._base(number), rows, values)
        change.sources.append(adapter.leaves.index.path(term.roles["tokens"]))

    def _replace(self, adapter: Adapter, path: Pieces, number: int) -> None:
        shared = self._shared(path[:-1])
        target, new = self.bases.path(path if shared is None else (*shared, "weight")), adapter.origin(number)
        if target is None:
            raise NoMatch("the base has no such leaf")
        if new.spec.shape != self.leaves.spec(target).shape:
            raise SpecMismatch(f"it is {self.leaves.spec(target)}, and that of the adapter is {new.spec}")
        change = self.changes.setdefault(target, _Change())
        if change.whole is not None and (change.whole.spec != new.spec or not equal(change.whole, new)):
            raise SpecMismatch("it is to be replaced by two leaves that differ")
        change.whole = new
        change.sources.append(adapter.leaves.index.path(number))

    def made(self) -> Any:
        """The base with all changes; raises if anything is wrong."""
        wrong = [*self.missing, *self.unfit]
        if wrong:
            count = wording.plural(len(wrong), "thing does", "things do")
            message = f"{count} not fit, and nothing was folded:\n  " + "\n  ".join(wrong)
            if self.missing:
                hint = "pm.at(pm.open(adapter_file), selector).delete() is an adapter without some leaves"
                raise NoMatch(message, hint=hint)
            raise SpecMismatch(message)
        origins = {number: self._origin(number) for number in self.changes}
        embedding, head, _ = self.bases.tie or (-1, None, False)
        if head is not None and embedding in origins and head not in self.leaves.twins(embedding):
            origins.setdefault(head, origins[embedding])  # each has a leaf, and one counts for both
        return self.leaves.edited({number: call("set", {"value": origin}) for number, origin in origins.items()})

    def _origin(self, number: int) -> Origin:
        change, dtype = self.changes[number], self.leaves.spec(number).dtype
        base, dtype = change.whole or self._base(number), "float32" if is_coded(self.leaves, number) else dtype
        if not change.passes and base.spec.dtype == dtype:
            return base
        return Combined(base, change.passes, change.view, dtype)

    def _base(self, number: int) -> Origin:
        """Where the values of a leaf of the base are."""
        found = exact(self.leaves, number)
        if isinstance(found, Made):  # of a tree in memory
            found.says = quoted(self.leaves.index.path(number))
        return found

    def report(self) -> LayoutReport:
        index, rows, kept = self.leaves.index, [], []
        twins = {twin for number in self.changes for twin in self.leaves.twins(number)} - self.changes.keys()
        for number in (each for each in index.numbers if each not in twins):
            path, change = index.path(number), self.changes.get(number)
            if change is None:
                kept.append(path)
            else:
                made = str(self._origin(number))
                rows.append(Moved(path, self.leaves.spec(number), made, tuple(dict.fromkeys(change.sources))))
        did = ("changed", "kept")
        return LayoutReport(f"fold {wording.listing(self.names, 2)}", tuple(rows), tuple(kept), did, tuple(self.said))


def _with_rows(base: Origin, rows: Sequence[int], values: Origin) -> Origin:
    """A matrix with some rows replaced; of two values for a row the last counts."""
    if values.spec.dtype != base.spec.dtype:
        values = Combined(values, [], dtype=base.spec.dtype)
    parts, at = list[Origin](), 0
    for row, place in sorted({row: place for place, row in enumerate(rows)}.items()):
        parts += [take(base, range(at, row), 0)] if at < row else []
        parts.append(take(values, range(place, place + 1), 0))
        at = row + 1
    parts += [take(base, range(at, base.spec.shape[0]), 0)] if at < base.spec.shape[0] else []
    return join(parts, 0, "concat")
