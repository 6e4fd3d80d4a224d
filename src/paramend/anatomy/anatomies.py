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

    Attributes:
        body: the model, or the part of it whose layers these are: its text model, its decoder.
        bodies: all parts that have layers, by name.
        others: the other parts of a model of several: name → path.
        texts: number → path of each leaf.
        tied: path of a weight that is another → the path of that one: a head that is the embedding.
        experts: their `count`, `top_k` and `storage`, the leaves of the `router`, the modules of `shared` ones, and
            `where` each mixture is.
        groups: scheme → how many quantised weights there are.
        separator: that between the keys of paths.
    """

    _data = ("layers", "mtp", "experts", "heads", "hidden", "mlp", "vocabulary", "ties", "parts", "groups")

    body: Body
    bodies: Mapping[str, Body]
    others: Mapping[str, Pieces]
    texts: Mapping[int, str]
    tied: Mapping[Pieces, Pieces]
    experts: Mapping[str, Any] | None
    groups: Mapping[str, int] | None
    separator: str = "."

    @property
    def layers(self) -> dict[str, Any] | None:
        """How many layers there are (`count`), the kind of each (`kinds`), and their path (`where`)."""
        return self._layers(self.body)

    @property
    def mtp(self) -> dict[str, Any] | None:
        """Blocks that predict further tokens: their `count`, and the path of each (`where`)."""
        blocks = [*map(self.separator.join, self.body.blocks)]
        return {"count": len(blocks), "where": blocks} if blocks else None

    @property
    def heads(self) -> dict[str, int | None] | None:
        """How many heads there are for queries (`query`) and for keys and values (`key_value`), and their size
        (`head_dim`); that of queries, where it differs."""
        return _heads(self.body)

    @property
    def hidden(self) -> int | None:
        """The width of the residual stream."""
        return self.body.sizes.get("hidden")

    @property
    def mlp(self) -> int | None:
        """The width inside an MLP."""
        return self.body.sizes.get("mlp")

    @property
    def vocabulary(self) -> int | None:
        """How many tokens the embedding holds."""
        return self.body.sizes.get("vocabulary")

    @property
    def ties(self) -> dict[str, str] | None:
        """Path of a weight that is another, such as a head that is the embedding → the path of that one."""
        return {self.separator.join(one): self.separator.join(of) for one, of in self.tied.items()} or None

    @cached_property
    def parts(self) -> dict[str, Any] | None:
        """The parts of a model of several, by name: their paths (`where`), layers and widths."""
        found: dict[str, Any] = {}
        for name, body in self.bodies.items():
            sizes = {key: body.sizes.get(key) for key in ("hidden", "mlp", "vocabulary")}
            above = body.stack.run.parent[:1] if body.stack else ()
            where = common(leaf.path for leaf in body.leaves.values() if leaf.path[: len(above)] == above)
            found[name] = {"where": where, "layers": self._layers(body), "heads": _heads(body), **sizes}
        found |= {name: {"where": path} for name, path in self.others.items()}
        return {name: part | {"where": self.separator.join(part["where"])} for name, part in found.items()} or None

    def headline(self) -> str:
        """A line for each of these that is known, and for each part."""
        found = {**self.to_dict(), "parts": None, **{f"part {name}": part for name, part in (self.parts or {}).items()}}
        rows = [(name, _shown(value)) for name, value in found.items() if value is not None]
        return "\n".join(aligned(rows or [("nothing", "is known of it")]))

    def page(self) -> Page:
        """The leaves as a map, by the kinds of their layers."""
        bodies = {number: body for body in (*self.bodies.values(), self.body) for number in body.leaves}
        shapes = [bodies[n].leaves[n].shape if n in bodies else () for n in self.texts]
        kinds = [bodies[n].kind_of(n) if n in bodies else "" for n in self.texts]
        columns = [Column("shape", [str(list(shape)) for shape in shapes], "text")]
        return Page("anatomy", self.headline(), [*self.texts.values()], [*map(prod, shapes)], columns, kinds, "kind")

    def _layers(self, body: Body) -> dict[str, Any] | None:
        keys = counts_of(body.section, body.stack.run.parent if body.stack else ())
        said = next((body.section[key] for key in keys if type(body.section.get(key)) is int), None)
        count = len(body.inside) or said
        where = self.separator.join(body.stack.where) if body.stack else None
        return {"count": count, "kinds": body.kinds, "where": where} if count else None


def _heads(body: Body) -> dict[str, int | None] | None:
    names = {"query": "heads", "key_value": "kv_heads", "head_dim": "head_dim"}
    found = {key: body.sizes.get(name) for key, name in names.items()}
    return found if any(found.values()) else None


def _shown(value: Any) -> str:
    """A part of the table: numbers, texts, lists whose equal entries are counted, and maps of these."""
    if isinstance(value, Mapping):
        told = {key: f"({_shown(one)})" if isinstance(one, Mapping) else _shown(one) for key, one in value.items()}
        return ", ".join(f"{key}: {text}" for key, text in told.items() if value[key] is not None)
    if isinstance(value, list):
        return wording.listing([f"{n} {one}" if n > 1 else str(one) for one, n in Counter(value).items()], 4)
    return f"{value:,}" if isinstance(value, int) else str(value)
