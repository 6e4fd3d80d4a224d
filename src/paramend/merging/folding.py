"""Folding: adapters added to the weights of their base, so that it computes what both did together."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from paramend.arrays.registry import backend
from paramend.checkpoints.assemble import origin_of
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.checkpoints.config import config as config_of
from paramend.edits.call import Call
from paramend.edits.memory import editable
from paramend.edits.plan import call
from paramend.edits.quantized import check_values
from paramend.errors import BadArgument, NoMatch, SpecMismatch, Unsupported
from paramend.formats.gathered import Gathered
from paramend.growth.deepening import deepen
from paramend.leaves.leaves import Editable, Group, keys_of
from paramend.leaves.origins.combined import Combined, Product, View
from paramend.leaves.origins.moved import join, take
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Made, Stored
from paramend.leaves.origins.texts import quoted
from paramend.leaves.paths import labels, write_path
from paramend.leaves.specs import AnyTree
from paramend.mapping.report import LayoutReport, Moved
from paramend.merging import readings
from paramend.merging.adapters import Adapter, Pieces, Term, adapter
from paramend.merging.destinations import Destinations, Slot
from paramend.reports import wording

T = TypeVar("T")
Into = Literal["embedding"]

_BOTH = 'untie=True gives the head a leaf of its own; into="embedding" changes both'


def fold(
    base: T,
    adapter: AnyTree,
    *,
    scale: float = 1.0,
    untie: bool = False,
    into: Into | None = None,
    rule: Sequence[str] | None = None,
) -> tuple[T, LayoutReport]:
    """A base with adapters added to its weights, and the report.

    A weight becomes `round(W + scale · alpha / rank · B @ A)`, computed in float32, or float64 if that is its dtype,
    and rounded once; the terms of several adapters are added first. Biases and modules that an adapter holds whole take
    the place of those of the base.

    Args:
        base: a model in memory; or a checkpoint from `pm.open`, of which nothing is computed before it is saved, in
            bounded memory, or patched: `pm.patch(path, lambda base: pm.fold(base, adapter)[0])` can be undone.
        adapter: a folder of PEFT, a kohya file, an opened checkpoint, a tree whose leaves are called `lora_A` and
            `lora_B` or `lora_a` and `lora_b`, or what `pm.extract` returns; or a list of these. LoRA and rsLoRA, with
            patterns of ranks and alphas, DoRA; of linear layers, embeddings, convolutions, fused or separate experts.
        scale: a further factor of all terms.
        untie: whether a head that is tied to the embedding gets a leaf of its own where only one of the two changes.
        into: "embedding" where both shall change.
        rule: for trees with other names, the paths of A, of B and of the leaf that they change, with wildcards:
            `("**/lora_a", "**/lora_b", "**/kernel")`. A is (in, rank) there, and B (rank, out).

    Returns:
        The base, of the same type, and a report whose rows are the leaves that changed. All leaves of the adapters are
        in it.

    Raises:
        NoMatch: the base lacks leaves that an adapter changes, or an adapter has leaves of no known kind; the message
            lists all of them.
        SpecMismatch: shapes do not fit, or fit in two ways that mean different things; the message lists all.
        Quantized: a weight of the base is quantised.
        Unsupported: an adapter is no LoRA, or changes one of two tied leaves.
        CannotRead, BadCheckpoint: a file is missing, or damaged.

    Source: PEFT's `merge_and_unload`; arXiv 2106.09685 (LoRA), 2312.03732 (rsLoRA), 2402.09353 (DoRA).

    >>> base = {"fc": {"kernel": np.zeros((2, 2), "float32"), "bias": np.ones(2, "float32")}}
    >>> terms = {"fc": {"lora_a": np.ones((2, 1), "float32"), "lora_b": np.array([[1.0, 2.0]], "float32")}}
    >>> tree, report = pm.fold(base, terms, scale=0.5)
    >>> tree["fc"]["kernel"].tolist(), [row.path for row in report.rows]
    ([[0.5, 1.0], [0.5, 1.0]], ['fc/kernel'])
    """
    if into not in (None, "embedding"):
        raise BadArgument(f"into={into!r} is not a choice", hint='into="embedding"')
    if not math.isfinite(scale):
        raise BadArgument(f"scale={scale!r} is not a finite number", hint="scale=1.0")
    adapters = opened(adapter, rule)
    leaves = _replicated(editable(base), adapters)
    folding = _Folding(leaves, scale, untie=untie, into=into)
    for each in adapters:
        folding.read(each)
    return cast(T, folding.made()), folding.report([each.name for each in adapters])


def opened(given: AnyTree, rule: Sequence[str] | None = None) -> list[Adapter]:
    """The adapters that are given, one or several."""
    several = isinstance(given, list | tuple)
    if several and not given:
        raise BadArgument("an empty list holds no adapters")
    return [adapter(each, rule) for each in (given if several else [given])]


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
    """What becomes of one leaf.

    Attributes:
        whole: what takes its place.
        passes: the products, in passes of `Combined`.
        view: the leaf as matrices.
        did: what was done, in words.
        sources: the leaves of adapters.
    """

    whole: Origin | None = None
    passes: list[list[Product]] = field(default_factory=list)
    view: View | None = None
    sources: list[str] = field(default_factory=list)

    def add(self, product: Product) -> None:
        """Add a product: to those before, unless one of them, or it, sets norms."""
        last = self.passes[-1] if self.passes else None
        if last is None or any(each.magnitude is not None for each in (*last, product)):
            self.passes.append([product])
        else:
            last.append(product)


class _Folding:
    """One fold: what becomes of each leaf of the base, and all that is wrong."""

    def __init__(self, leaves: Editable, scale: float, *, untie: bool, into: Into | None) -> None:
        self.leaves, self.scale, self.untie, self.into = leaves, scale, untie, into
        self.bases = Destinations(leaves)
        self.changes: dict[int | Pieces, _Change] = {}
        self.missing: list[str] = []
        self.unfit: list[str] = []
        self.tied: list[tuple[str, str]] = []
        self.said: list[str] = []

    def read(self, adapter: Adapter) -> None:
        """Enter what an adapter changes."""
        self._check_floats(adapter)
        self.missing += [f"{path}: it is no leaf of an adapter of a known kind" for path in adapter.rest]
        for path, number in adapter.replaced.items():
            self._replace(adapter, path, number)
        for term in adapter.terms:
            with_weight = not self._of_parameters(term)
            if with_weight:
                self._try(adapter, term, lambda term=term: self._weight(adapter, term))  # type: ignore[misc]
        for module in dict.fromkeys(term.module for term in adapter.terms if self._of_parameters(term)):
            self._parameters(adapter, [term for term in adapter.terms if term.module == module])
        trained, own = adapter.said("base_model_name_or_path", ""), str(getattr(self.leaves, "path", ""))
        names = {Path(own).name, Path(str(self.bases.config.get("_name_or_path", ""))).name}
        if trained and own and Path(str(trained)).name not in names:
            self.said.append(f"{adapter.name} was trained on {trained}")

    def _check_floats(self, adapter: Adapter) -> None:
        """Raise if a weight that would change is quantised: to decode it, add, and encode the blocks in which a product
        is not zero would belong here."""
        modules = [self.bases.module(term.module) for term in adapter.terms]
        held = [number for module in modules for number in self.bases.modules.get(module or (), {}).values()]
        check_values(self.leaves, held, "cannot take the terms of an adapter", "pm.dequantize(model) makes it floats")

    def _try(self, adapter: Adapter, term: Term, read: Callable[[], None]) -> None:
        try:
            read()
        except SpecMismatch as error:
            self.unfit.append(f"{'.'.join(term.module)}: {error}")

    def _of_parameters(self, term: Term) -> bool:
        """Whether a term is for parameters of a module that has no weight."""
        module = self.bases.module(term.module)
        return module is not None and not term.leaf and self.bases.weight(module) is None

    def _weight(self, adapter: Adapter, term: Term) -> None:
        module = self.bases.module(term.module)
        number = None if module is None else self.bases.weight(module)
        number = self.bases.modules[module].get(term.leaf) if module is not None and term.leaf else number
        fused = self.bases.fused(term.module) if number is None else None
        if number is None and fused is None and self._tie(term.module) is None:
            self.missing.append(f"{'.'.join((*term.module, term.leaf or 'weight'))}: the base has no such leaf")
            return
        if "tokens" in term.roles:
            self._tokens(adapter, term, number)
            return
        if fused is not None:
            product, view = readings.expert_reading(adapter, term, self.bases, fused)
            self._enter(adapter, term, fused[0], product, view)
            return
        for target in self._targets(term.module, number):
            like = target if isinstance(target, int) else self._tie(term.module)
            assert like is not None
            product, view = readings.weight_reading(adapter, term, self.bases, like)
            self._enter(adapter, term, target, product, view)
        if "bias" in term.roles:
            assert module is not None
            bias = self.bases.modules[module].get("bias")
            if bias is None:
                self.missing.append(f"{'.'.join((*term.module, 'bias'))}: the base has none, and B has one")
                return
            rank = adapter.leaves.spec(term.roles["A"]).shape[0]
            self._enter(adapter, term, bias, *readings.bias_reading(adapter, term, self.leaves.spec(bias), rank))

    def _parameters(self, adapter: Adapter, terms: Sequence[Term]) -> None:
        """Enter the terms of parameters of one module: each is of the only one that its shapes fit."""
        slots, rest = self.bases.parameters(cast(Pieces, self.bases.module(terms[0].module))), list(terms)
        while rest:
            fits = [(term, [slot for slot in slots if self._fits(adapter, term, slot)]) for term in rest]
            sure = next(((term, found[0]) for term, found in fits if len(found) == 1), None)
            if sure is None:
                for term, found in fits:
                    of = f"one of {wording.listing([slot.name for slot in found])}" if found else "none of them"
                    names = wording.listing([f"{slot.name} ({slot.spec})" for slot in slots]) or "nothing"
                    self.unfit.append(f"{'.'.join(term.module)}: it has {names}, and the term fits {of}")
                return
            term, slot = sure
            rest.remove(term)
            slots.remove(slot)

            def enter(term: Term = term, slot: Slot = slot) -> None:
                for number, product, view in readings.parameter_readings(adapter, term, self.bases, slot):
                    self._enter(adapter, term, number, product, view)

            self._try(adapter, term, enter)

    def _fits(self, adapter: Adapter, term: Term, slot: Slot) -> bool:
        if not {"A", "B"} <= term.roles.keys():
            return False
        a, b = (adapter.leaves.spec(term.roles[role]) for role in "AB")
        if slot.spec.ndim == 2:
            return (b.shape[0], a.shape[-1]) == slot.spec.shape
        return slot.spec.ndim == 3 and bool(readings.readings_of(a, b, slot.spec))

    def _tokens(self, adapter: Adapter, term: Term, number: int | None) -> None:
        """Enter rows of an embedding that take the place of those of the base."""
        said, values = adapter.said("trainable_token_indices", []), adapter.origin(term.roles["tokens"])
        if isinstance(said, Mapping):
            said = next((rows for name, rows in said.items() if ".".join(term.module).endswith(name)), [])
        assert number is not None
        rows, spec = list(said), self.leaves.spec(number)
        if len(rows) != values.spec.shape[0] or values.spec.shape[1:] != spec.shape[1:]:
            raise SpecMismatch(f"it is {spec}, and {len(rows):,} rows of it are {values.spec}")
        if not all(type(row) is int and 0 <= row < spec.shape[0] for row in rows):
            raise SpecMismatch(f"it is {spec}, which does not have all rows of trainable_token_indices")
        change = self.changes.setdefault(number, _Change())
        change.whole = _with_rows(change.whole or self._base(number), rows, values)
        change.sources.append(adapter.leaves.index.path(term.roles["tokens"]))

    def _replace(self, adapter: Adapter, path: Pieces, number: int) -> None:
        """Enter a leaf that takes the place of one of the base."""
        target, spec, name = self.bases.path(path), adapter.leaves.spec(number), ".".join(path)
        like = self._tie(path[:-1]) if target is None else target
        if like is None:
            self.missing.append(f"{name}: the base has no such leaf")
            return
        if spec.shape != self.leaves.spec(like).shape:
            self.unfit.append(f"{name}: it is {self.leaves.spec(like)}, and that of the adapter is {spec}")
            return
        for place in self._targets(path[:-1] if path[-1] == "weight" else (), target):
            change = self.changes.setdefault(place, _Change())
            if change.whole is not None:
                self.unfit.append(f"{name}: two adapters replace it")
            change.whole = adapter.origin(number)
            change.sources.append(adapter.leaves.index.path(number))

    def _enter(self, adapter: Adapter, term: Term, number: int | Pieces, product: Product, view: View) -> None:
        change = self.changes.setdefault(number, _Change())
        if change.view not in (None, view):
            self.unfit.append(f"{'.'.join(term.module)}: terms of one leaf take it for matrices of different shapes")
            return
        change.view = view
        factor = product.scale * self.scale
        change.add(Product(**{**vars(product), "scale": factor}))
        change.sources += [adapter.leaves.index.path(at) for at in term.roles.values()]

    # ---- tied heads --------------------------------------------------------------------------------------------------

    def _tie(self, module: Pieces) -> int | None:
        """The embedding that a module shares its weight with, if it is a head or an embedding of a tied model."""
        found = self.bases.tied(module)
        return None if found is None else found[0]

    def _targets(self, module: Pieces, number: int | None) -> list[int | Pieces]:
        """The leaves that change for the weight of a module: its own; of tied ones also both, or a new one."""
        pair = self.bases.tied(module)
        if pair is None:
            assert number is not None
            return [number]
        embedding, head = pair
        if self.into == "embedding":
            shared = head is None or self.leaves.ties.get(head) == self.leaves.ties.get(embedding, -1)
            return [embedding] if shared else [embedding, cast(int, head)]
        if not self.untie:
            path = self.leaves.index.path(embedding)
            self.tied.append((".".join(module), path))
        is_head = number is None or number == head
        own: int | Pieces = module if head is None else head
        return [own] if is_head else [embedding]

    # ---- the result --------------------------------------------------------------------------------------------------

    def made(self) -> Any:
        """The base with all changes; raises if anything is wrong."""
        self._check()
        new = {target: self._origin(target, change) for target, change in self.changes.items()}
        pair = next((found for module in self.bases.modules if (found := self.bases.tied(module))), None)
        parts = {} if pair is None or not self.untie else self._parted(new, pair)
        rest = {cast(int, number): origin for number, origin in new.items() if number not in parts}
        leaves = self.leaves
        operands = Gathered(None, (((str(place),), origin) for place, origin in enumerate(rest.values())))
        calls = {n: call("set", {"value": Stored(operands, place)}) for place, n in enumerate(rest)}
        edited: Any = leaves.edited(cast(Mapping[int, Call], calls)) if calls else getattr(leaves, "root", leaves)
        return self._untied(editable(edited), parts, pair) if parts and pair is not None else edited

    def _check(self) -> None:
        names = wording.listing(list(dict.fromkeys(name for name, _ in self.tied)))
        if self.missing or self.unfit:
            wrong = [*self.missing, *self.unfit]
            count = wording.plural(len(wrong), "thing does", "things do")
            message = f"{count} not fit, and nothing was folded:\n  " + "\n  ".join(wrong)
            raise (NoMatch if self.missing else SpecMismatch)(message)
        if self.tied:
            raise Unsupported(f"{names}: in this model head and embedding are one leaf, {self.tied[0][1]}", hint=_BOTH)

    def _origin(self, target: int | Pieces, change: _Change) -> Origin:
        number = target if isinstance(target, int) else cast(int, self._tie(target))
        spec, base = self.leaves.spec(number), change.whole or self._base(number)
        if not change.passes and base.spec.dtype == spec.dtype:
            return base
        return Combined(base, change.passes, change.view, spec.dtype)

    def _base(self, number: int) -> Origin:
        """Where the values of a leaf of the base are."""
        found = origin_of(self.leaves, number)
        if isinstance(found, Made):  # of a tree in memory
            found.says = quoted(self.leaves.index.path(number))
        return found

    def _parted(self, new: Mapping[int | Pieces, Origin], pair: tuple[int, int | None]) -> dict[int | Pieces, Origin]:
        """The leaves of an embedding and its head that part: those that change, and those that stay."""
        embedding, head = pair
        heads = [target for target in new if not isinstance(target, int) or target == head]
        if embedding not in new and not heads:
            return {}
        last = heads[0] if heads else (head if head is not None else ("lm_head",))
        old = self._base(embedding)
        return {embedding: new.get(embedding, old), last: new.get(last, old)}

    def _untied(self, leaves: Any, parts: Mapping[int | Pieces, Origin], pair: tuple[int, int | None]) -> Any:
        """The base with a leaf for the embedding and one for the head."""
        embedding, head = pair
        (_, first), (target, second) = parts.items()
        index = self.leaves.index
        numbers = (embedding,) if head is None else (embedding, head)
        own = index.paths[embedding]
        path = index.paths[head] if head is not None else (*labels(".".join((*cast(Pieces, target), "weight"))),)

        def make(old: Sequence[Any]) -> list[Any]:
            values: list[Any] = [first, second]
            return values if isinstance(old[0], Origin) else [backend(old[0]).beside(v.read(), old[0]) for v in values]

        both = tuple([(key, depth) for depth, key in enumerate(keys_of(each))] for each in (own, path))
        made = leaves.regrouped([Group(numbers, both, make)])
        self.said.append(f"{write_path(path, index.separator)} has values of its own")
        if isinstance(made, Checkpoint) and self.bases.config:
            inner = self.bases.config.get("text_config")
            nested = isinstance(inner, Mapping) and "tie_word_embeddings" in inner
            keys = ["text_config.tie_word_embeddings"] if nested else []
            keys += ["tie_word_embeddings"] if not nested or "tie_word_embeddings" in self.bases.config else []
            try:
                made = config_of(made).set(dict.fromkeys(keys, False))
            except Unsupported:
                self.said.append("config.json beside it says that they are tied: set tie_word_embeddings to false")
        return made

    def report(self, names: Sequence[str]) -> LayoutReport:
        """What was done."""
        index = self.leaves.index
        rows = []
        places = {number: place for place, number in enumerate(index.numbers)}
        for number, change in sorted(
            self.changes.items(), key=lambda each: places.get(cast(int, each[0]), len(places))
        ):
            like = number if isinstance(number, int) else cast(int, self._tie(number))
            path = index.path(number) if isinstance(number, int) else ".".join((*number, "weight"))
            rows.append(Moved(path, self.leaves.spec(like), str(self._origin(number, change)), tuple(change.sources)))
        changed = {row.path for row in rows}
        kept = tuple(path for number in index.numbers if (path := index.path(number)) not in changed)
        return LayoutReport("fold", tuple(rows), kept, ("changed", "kept"), tuple(self.said))


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
