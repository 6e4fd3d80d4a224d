"""`Anatomy`: what configuration, names and shapes say of a model, as a report."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from paramend.anatomy.bodies import Body, Pieces
from paramend.anatomy.sections import counts_of
from paramend.leaves.paths import common
from paramend.pages.page import Column, Page
from paramend.pages.paged import Paged
from paramend.reports import wording
from paramend.reports.tables import aligned


@dataclass(frozen=True, repr=False)
class Anatomy(Paged):
    """What a configuration, names and shapes say of a model. What is absent or not known is None.

    Paths hold `*` where each layer has one, so that they are selectors: `f"{a.experts['where']}.**"`.

    Attributes:
        body: the model, or the part of it whose layers these are: its text model, its decoder.
        bodies: all parts that have layers, by name.
        others: the other parts of a model of several: name → path.
        texts: number → path of each leaf.
        tied: path of a weight that is another → the path of that one: a head that is the embedding.
        groups: scheme → how many quantised weights there are.
        separator: that between the keys of paths.
    """

    body: Body
    bodies: Mapping[str, Body]
    others: Mapping[str, Pieces]
    texts: Mapping[int, str]
    tied: Mapping[Pieces, Pieces]
    groups: Mapping[str, int] | None
    separator: str = "."

    @property
    def layers(self) -> dict[str, Any] | None:
        """How many layers there are (`count`), the kind of each (`kinds`), and their path (`where`)."""
        return self._layers(self.body)

    @property
    def mtp(self) -> dict[str, Any] | None:
        """Blocks that predict further tokens: their `count`, and the path of each (`where`)."""
        blocks = [self._path(path) for path in self.body.blocks]
        return {"count": len(blocks), "where": blocks} if blocks else None

    @property
    def experts(self) -> dict[str, Any] | None:
        """`count`, `top_k`, how they are stored (`storage`: "stacked" along an axis, or "separate"), and the paths of
        `router`, `shared` experts and all others (`where`)."""
        found = self.body.experts
        return found and {key: self._path(one) if isinstance(one, tuple) else one for key, one in found.items()}

    @property
    def heads(self) -> dict[str, int | None] | None:
        """How many heads of queries (`query`) and of keys and values (`key_value`) there are, and their size
        (`head_dim`); where queries and values differ in size, that of queries."""
        return self._heads(self.body)

    @property
    def hidden(self) -> int | None:
        """The width of the residual stream."""
        return self.body.sizes.get("hidden")

    @property
    def mlp(self) -> int | None:
        """The width inside an MLP; of experts, where all layers have them and nothing else is said."""
        return self.body.sizes.get("mlp")

    @property
    def vocabulary(self) -> int | None:
        """How many tokens the embedding holds."""
        return self.body.sizes.get("vocabulary")

    @property
    def ties(self) -> dict[str, str] | None:
        """Path of a weight that is another, such as a head that is the embedding → the path of that one."""
        return {self._path(one): self._path(of) for one, of in self.tied.items()} or None

    @cached_property
    def parts(self) -> dict[str, Any] | None:
        """The parts of a model of several, by name: their paths (`where`), layers and widths."""
        found: dict[str, Any] = {}
        for name, body in self.bodies.items():
            sizes = {key: body.sizes.get(key) for key in ("hidden", "mlp", "vocabulary")}
            above = body.stack.run.parent[:1] if body.stack else ()
            inner = [leaf.path for leaf in body.leaves.values() if leaf.path[: len(above)] == above]
            where = self._path(common(inner))
            found[name] = {"where": where, "layers": self._layers(body), "heads": self._heads(body), **sizes}
        return {**found, **{name: {"where": self._path(path)} for name, path in self.others.items()}} or None

    def to_dict(self) -> dict[str, Any]:
        """The anatomy as data that JSON can hold."""
        names = ("layers", "mtp", "experts", "heads", "hidden", "mlp", "vocabulary", "ties", "parts", "groups")
        return {name: dict(found) if isinstance(found := getattr(self, name), Mapping) else found for name in names}

    def headline(self) -> str:
        """A line for each of these that is known."""
        return "\n".join(aligned(self._rows()))

    def page(self) -> Page:
        """The leaves as a map, by the kinds of their layers."""
        bodies = {number: body for body in (*self.bodies.values(), self.body) for number in body.leaves}
        shapes = [bodies[n].leaves[n].shape if n in bodies else () for n in self.texts]
        kinds = [bodies[n].kind_of(n) if n in bodies else "" for n in self.texts]
        columns = [Column("shape", [str(list(shape)) for shape in shapes], "text")]
        return Page("anatomy", self.headline(), [*self.texts.values()], [*map(prod, shapes)], columns, kinds, "kind")

    def _rows(self) -> list[tuple[str, str]]:
        layers, mtp, experts, heads = self.layers, self.mtp, self.experts, self.heads
        told = {
            "layers": layers and _layered(layers),
            "mtp": mtp and f"{mtp['count']} in {wording.listing(mtp['where'], 3)}",
            "experts": experts and ", ".join(_expertly(experts)),
            "heads": heads and ", ".join(f"{key.replace('_', '-')} {n}" for key, n in heads.items() if n is not None),
            **{name: f"{size:,}" for name in ("hidden", "mlp", "vocabulary") if (size := getattr(self, name))},
            "ties": self.ties and wording.listing([f"{one} = {other}" for one, other in self.ties.items()], 3),
            **{f"part {name}": _partly(part) for name, part in (self.parts or {}).items()},
            "groups": self.groups
            and wording.listing([f"{wording.plural(n, 'weight')} as {of}" for of, n in self.groups.items()]),
        }
        return [(name, str(text)) for name, text in told.items() if text] or [("nothing", "is known of it")]

    def _layers(self, body: Body) -> dict[str, Any] | None:
        keys = counts_of(body.section, body.stack.run.parent if body.stack else ())
        said = next((body.section[key] for key in keys if type(body.section.get(key)) is int), None)
        count = len(body.inside) or said
        where = self._path(body.stack.where) if body.stack else None
        return {"count": count, "kinds": body.kinds, "where": where} if count else None

    def _heads(self, body: Body) -> dict[str, int | None] | None:
        names = {"query": "heads", "key_value": "kv_heads", "head_dim": "head_dim"}
        found = {key: body.sizes.get(name) for key, name in names.items()}
        return found if any(found.values()) else None

    def _path(self, path: Pieces) -> str:
        return self.separator.join(path)


def _layered(layers: Mapping[str, Any]) -> str:
    kinds = Counter(layers["kinds"] or ())
    said = f": {', '.join(f'{n} {kind}' for kind, n in kinds.items())}" if kinds else ""
    where = f" in {layers['where']}" if layers["where"] else ""
    return f"{layers['count']}{where}{said}"


def _expertly(experts: Mapping[str, Any]) -> list[str]:
    count, top = experts["count"], experts["top_k"]
    told = [f"{count} {experts['storage']} in {experts['where']}", f"top {top}" if top else ""]
    told += [f"{name} {experts[name]}" for name in ("router", "shared") if experts[name]]
    return [text for text in told if text]


def _partly(part: Mapping[str, Any]) -> str:
    layers = part.get("layers")
    told = [
        part["where"],
        _layered(layers) + " layers" if layers else "",
        f"hidden {part['hidden']:,}" if part.get("hidden") else "",
    ]
    return ", ".join(filter(None, told))
