"""More experts, fewer, or in another order: `pm.experts`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar, cast

import numpy as np

from paramend.anatomy.experts import SHARES, Block, Mixture, experts_of, groups_of, recounted, renumbered
from paramend.anatomy.sections import senses
from paramend.edits import hands
from paramend.edits.decoding import keys
from paramend.edits.moves import whole_numbers
from paramend.edits.plan import call
from paramend.errors import BadArgument, NoMatch, OutOfRange, Unsupported
from paramend.formats.jsontext import CONFIG
from paramend.growth import numbered
from paramend.growth.configured import Configured, copied
from paramend.leaves.leaves import Group
from paramend.leaves.paths import number_of, write_path
from paramend.pages.page import Column, Page
from paramend.pages.paged import Paged
from paramend.reports import wording
from paramend.reports.report import Line, fold, table

T = TypeVar("T")
Ids = Sequence[int] | Mapping[int | str, Sequence[int]]
# The key of a dict for blocks that predict further tokens.
MTP = "mtp"
# Servers spread experts evenly over so many devices.
_DEVICES = 8


@dataclass(frozen=True, repr=False)
class ExpertsReport(Paged):
    """Which experts each layer has.

    Attributes:
        did: "keep", "drop", "duplicate" or "upcycle".
        before: how many experts each layer had; 0 if it was dense.
        after: how many it has.
        layers: the path of each mixture → for each of its experts the old one that it is.
        redrawn: how many hidden units of each expert are new, of those that were dense.
        said: what changes in the configuration, and what else there is to know.
    """

    did: str
    before: int
    after: int
    layers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    redrawn: int = 0
    said: tuple[str, ...] = ()

    def headline(self) -> str:
        """How many experts became how many, in how many layers."""
        layers = wording.plural(len(self.layers), "layer")
        what = f"{self.before} -> {self.after}" if self.before else f"{self.after} instead of a dense layer"
        drawn = f", {wording.plural(self.redrawn, 'unit')} of each redrawn" if self.redrawn else ""
        return f"experts: {what} in {layers}{drawn}"

    def __str__(self) -> str:
        told = [wording.listing(list(map(str, ids)), 12) if self.before else "" for ids in self.layers.values()]
        lines = [Line((path,), (ids,)) for path, ids in zip(self.layers, told, strict=True)]
        return "\n\n".join(filter(None, (self.headline(), table(fold(lines)), "\n".join(self.said))))

    def page(self) -> Page:
        """The mixtures as a map."""
        ids = [", ".join(map(str, each)) for each in self.layers.values()]
        sizes = [self.after] * len(ids)
        return Page("experts", self.headline(), list(self.layers), sizes, [Column("experts", ids, "text")])


def experts(model: T) -> "Experts[T]":
    """The experts of a model, to be kept, left out or repeated, with the configuration.

    Everything that counts experts moves together: their weights, each one's or those of all in one leaf, with biases
    and the scales of quantised ones as they are stored, the rows of the router with its biases, and the blocks for
    multi-token prediction. Shared experts stay.

    Args:
        model: a checkpoint from `pm.open`, of which nothing is written before `.save(out)`; a module of transformers; a
            tree in memory, such as a state dict.

    Raises:
        NoMatch: it has no experts.
        SpecMismatch: leaves and configuration disagree.
        Unsupported: it is not known which leaves belong to them.

    >>> layer = {"gate": {"weight": np.eye(3)}, "experts": {str(n): {"w": np.full(2, n)} for n in range(3)}}
    >>> tree, report = pm.experts({"layers": {"0": {"mlp": layer}}}).keep([2, 0])
    >>> tree["layers"]["0"]["mlp"]["experts"]
    {'0': {'w': array([2, 2])}, '1': {'w': array([0, 0])}}
    >>> print(report)
    experts: 3 -> 2 in 1 layer
    <BLANKLINE>
      layers/0/mlp  2, 0
    """
    return Experts(model)


class Experts(Generic[T]):
    """The experts of a model; `experts` makes it.

    Attributes:
        mixture: what is known of them.
    """

    def __init__(self, model: T) -> None:
        self._configured = Configured(model)
        found = experts_of(self._configured.leaves, self._configured.config)
        if found is None:
            raise NoMatch("this model has no experts", hint="pm.upcycle(model, experts=8, top_k=2) makes them")
        self.mixture: Mixture = found
        self._check()

    def __repr__(self) -> str:
        layers = wording.plural(len(self.mixture.blocks), "layer")
        return f"<{self.mixture.count} experts in {layers}, {self.mixture.storage}>"

    def keep(self, ids: Ids) -> tuple[T, ExpertsReport]:
        """The model with some of its experts, in the order given, and the report.

        It computes what the whole one does where the router never chooses the others: with their logits at minus
        infinity.

        Args:
            ids: the experts of every layer; or a dict from the numbers of layers to those of each. It names each layer
                that has experts, all with as many, and the blocks for multi-token prediction as "mtp".

        Raises:
            OutOfRange: there is no such expert.
            BadArgument: an expert is named twice; a layer is not named, or has none; there would be fewer than a token
                goes to, or groups of experts would no longer be of one size.
        """
        return self._made("keep", self._chosen(ids))

    def drop(self, ids: Ids) -> tuple[T, ExpertsReport]:
        """The model without some of its experts, and the report; otherwise as `keep`."""
        every, gone = range(self.mixture.count), self._chosen(ids)
        return self._made("drop", [[one for one in every if one not in set(each)] for each in gone])

    def duplicate(self, times: int = 2) -> tuple[T, ExpertsReport]:
        """The model with each expert so many times, copies side by side, and the report.

        A token goes to as many times more of them: only so does the model compute what it did, exactly.

        Raises:
            BadArgument: `times` is not a number from 1 on.
            Unsupported: how the model adds experts up is not known, it says nowhere how many a token goes to, or groups
                of experts would be chosen otherwise.
        """
        if type(times) is not int or times < 1:
            raise BadArgument(f"times={times!r} is not a number from 1 on", hint="times=2")
        ids = [one for one in range(self.mixture.count) for _ in range(times)]
        return self._made("duplicate", [ids] * len(self.mixture.blocks), times)

    def _check(self) -> None:
        """Refuse experts of which it is not known what counts them, or that are of several parts of the model."""
        index = self._configured.leaves.index
        for block in self.mixture.blocks:
            where = self._where(block)
            if block.unknown:
                names = wording.listing([index.path(number) for number in block.unknown], 3)
                why = f"it is not known which axis of {names} counts the experts of {where}"
                raise Unsupported(why, hint=f'pm.dequantize(model, "{where}{index.separator}**") if they are quantised')
            if not block.router:
                raise Unsupported(f"the router of {where} is not here, or is of an unknown kind")
        parts = {_part(block): block for block in self.mixture.blocks if not block.predicts}
        if len(parts) > 1 and {path[-2:-1] for path, _ in parts} != {("encoder",), ("decoder",)}:
            paths = list(map(self._where, parts.values()))
            why = f"{wording.listing(paths)} are experts of several parts of the model"
            raise Unsupported(why, hint="pm.part(model, selector)")

    def _where(self, block: Block) -> str:
        index = self._configured.leaves.index
        return write_path(index.paths[next(iter(block.along or block.own))][: len(block.path)], index.separator)

    def _chosen(self, ids: Ids) -> list[list[int]]:
        blocks = self.mixture.blocks
        if not isinstance(ids, Mapping):
            return [self._read(ids, "ids")] * len(blocks)
        numbers = {key: number_of(key) if isinstance(key, str) else None for key in ids}
        by_key = {
            key if number is None else number: self._read(ids[key], f"ids[{key!r}]") for key, number in numbers.items()
        }
        names = list(map(_names, blocks))
        unknown = by_key.keys() - {name for own in names for name in own}
        if unknown:
            layers = [str(block.layer) for block in blocks if not block.predicts]
            raise BadArgument(f"{unknown.pop()!r} is no layer with experts: {wording.listing(layers, 12)}")
        found = [[by_key[name] for name in own if name in by_key] for own in names]
        missing = [repr(own[0]) for own, each in zip(names, found, strict=True) if not each]
        if missing:
            raise BadArgument(
                "a configuration counts the experts of all layers alike, and the keys of ids are without "
                f"{wording.listing(missing, 12)}",
                hint="ids=[0, 1] goes for all of them",
            )
        if len({_part(block) for block in blocks if not block.predicts}) > 1:
            raise BadArgument("encoder and decoder have layers of the same numbers", hint="ids=[0, 1] goes for all")
        return [each[0] for each in found]

    def _read(self, ids: Any, said: str) -> list[int]:
        numbers, count = whole_numbers(ids, said, f"{said}=[0, 1]"), self.mixture.count
        outside = [number for number in numbers if not 0 <= number < count]
        if outside:
            raise OutOfRange(f"{said} has {outside[0]}, and there are {count} experts, 0 to {count - 1}")
        if len(set(numbers)) < len(numbers):
            raise BadArgument(f"{said} names an expert twice", hint="pm.experts(model).duplicate(2)")
        return numbers

    def _made(self, did: str, ids: list[list[int]], times: int = 1) -> tuple[T, ExpertsReport]:
        mixture, model, counts = self.mixture, self._configured, sorted({len(each) for each in ids})
        if len(counts) > 1:
            said = wording.listing(list(map(str, counts)))
            raise BadArgument(f"layers would have {said} experts, and a configuration counts those of all alike")
        count, top = counts[0], (mixture.top_k or 1) * times
        if count < top:
            left = wording.plural(count, "expert")
            raise BadArgument(f"{left} would be left, and a token goes to {top}", hint=f"keep at least {top}")
        if times > 1 and mixture.top_k is None:
            raise Unsupported("nothing says how many experts a token goes to, which would change too")
        recounted(model.config, mixture, count, times)  # for its error, before anything is made
        for each in set(map(tuple, ids)) - {tuple(range(mixture.count))}:
            _check_groups(model.config, mixture, each, times)
        of = {block.path: each for block, each in zip(mixture.blocks, ids, strict=True)}

        def change(file: str, values: dict[str, Any]) -> dict[str, Any]:
            own = recounted(values, mixture, count, times) if file == CONFIG else values
            return dict(renumbered(own, of, mixture.count))

        if times > 1 and mixture.model_type in SHARES:
            # What is added to the scores of experts, where these are chosen.
            every, pieces = (n for block in mixture.blocks for n in block.along), model.leaves.index.pieces
            biases = [number for number in every if pieces(number)[-1].endswith("e_score_correction_bias")]
            model = model.edited(dict.fromkeys(biases, call("multiply", {"value": 1 / times})))
        groups = [group for block in mixture.blocks for group in self._groups(block, of[block.path])]
        new, changed = model.remade(groups, change)
        layers = {self._where(block): tuple(of[block.path]) for block in mixture.blocks}
        told = (*changed, *_warned(mixture.count, count, times))
        return cast(T, new), ExpertsReport(did, mixture.count, count, layers, said=told)

    def _groups(self, block: Block, ids: list[int]) -> Iterator[Group]:
        leaves, count = self._configured.leaves, self.mixture.count
        if ids == list(range(count)):
            return
        for number, along in block.along.items():
            places = along.places(ids, count)
            yield Group((number,), (keys(leaves.index.paths[number]),), partial(_taken, places, along.axis))
        if not block.own:
            return
        numbers = tuple(leaves.index.ordered(block.own))
        of: dict[int, list[int]] = {}
        for place, number in enumerate(numbers):
            of.setdefault(block.own[number], []).append(place)
        at, before = len(block.path) + block.before.count("/"), block.before.rpartition("/")[2]
        picks = [(place, f"{before}{new}") for new, old in enumerate(ids) for place in of[old]]
        paths = [numbered.renumbered(leaves.index.paths[numbers[place]], at, text) for place, text in picks]
        yield Group(numbers, tuple(map(keys, paths)), partial(_picked, [place for place, _ in picks]))


def _taken(places: Sequence[int], axis: int, values: Sequence[Any]) -> list[Any]:
    return [hands.take(values[0], np.asarray(places), axis)]


def _picked(places: Iterable[int], values: Sequence[Any]) -> list[Any]:
    """Some leaves; copies of those that were picked before."""
    met: set[int] = set()
    found = []
    for place in places:
        found.append(copied(values[place]) if place in met else values[place])
        met.add(place)
    return found


def _names(block: Block) -> list[int | str | None]:
    """The keys of a dict that mean a mixture."""
    named = any(piece.startswith(MTP) for piece in block.path)
    return [*([MTP] if block.predicts else []), *([] if named else [block.layer])]


def _part(block: Block) -> tuple[tuple[str, ...], bool]:
    """What a mixture is a part of: the path of the layers, and whether these are for images or sound."""
    return block.layers, senses(block.path)


def _check_groups(config: Mapping[str, Any], mixture: Mixture, ids: Sequence[int], times: int) -> None:
    """Refuse experts that are not the same number of each group, group by group."""
    groups = groups_of(config, mixture)
    if groups.count == 1:
        return
    size, new = mixture.count // groups.count, len(ids) // groups.count
    chunks = [{one // size for one in ids[at : at + new]} for at in range(0, len(ids), new)] if new else []
    if len(ids) % groups.count or sorted(map(sorted, chunks)) != [[group] for group in range(groups.count)]:
        why = f"there are {groups.count} groups of {size} experts: the same number of each, group by group, must stay"
        raise BadArgument(why)
    top = (mixture.top_k or 1) * times
    if new < groups.least:
        raise BadArgument(f"{groups.count} groups would have {new} experts each and are compared by {groups.least}")
    if groups.top * new < top:
        raise BadArgument(f"a token goes to {top} experts, and {groups.top} groups would have {new} each")
    if times > 1 and groups.least > 1 and groups.top < groups.count:
        raise Unsupported("groups of experts are compared by the sum of their best two, which copies would change")


def _warned(before: int, count: int, times: int) -> list[str]:
    said = []
    if before % _DEVICES == 0 and count % _DEVICES:
        said.append(f"{count} is no multiple of {_DEVICES}, over which many servers spread experts")
    if times > 1:
        said.append("only with as many times more experts per token is it exact; copies train apart once they differ")
    return said
