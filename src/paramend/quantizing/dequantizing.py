"""Quantised weights as floats: `pm.dequantize`."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

from paramend.anatomy.quantization import stated
from paramend.edits.decoding import floated
from paramend.edits.memory import editable
from paramend.edits.weights import Weights, chosen, weighed
from paramend.errors import BadArgument, NoMatch
from paramend.leaves.groups import Group, groups_of
from paramend.leaves.leaves import Editable
from paramend.leaves.paths import write_path
from paramend.leaves.rules import Codec
from paramend.leaves.specs import BITS, DtypeLike, Spec, dtype_name
from paramend.leaves.weights import labels_of, weight_of
from paramend.pages.page import Page
from paramend.pages.paged import Paged
from paramend.reports import wording
from paramend.reports.report import Line, Section
from paramend.selectors.selector import SelectorLike, sel

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Coded:
    """A weight.

    Attributes:
        path: its path, as one leaf.
        scheme: the name of its scheme.
        spec: its shape and dtype as floats.
        leaves: the paths of the leaves that it is stored in when it is quantised.
        relative_l2: how far its values are from what they were, as a share of their norm; None if they are the same.
        max_abs: the greatest difference of a value; None likewise.
    """

    path: str
    scheme: str
    spec: Spec
    leaves: tuple[str, ...] = ()
    relative_l2: float | None = None
    max_abs: float | None = None

    @property
    def error(self) -> str:
        """Both, as a table shows them."""
        return "" if self.relative_l2 is None else f"relative L2 {self.relative_l2:.3g}, max {self.max_abs:.3g}"


@dataclass(frozen=True, repr=False)
class QuantizeReport(Paged):
    """What became of weights that got another code.

    Attributes:
        did: "dequantised", "quantised" or "simulated".
        rows: the weights, in the order of the tree.
        kept: other quantised weights, which stay as they are: path → scheme.
        others: the number of other leaves, which are the same.
        said: what changes in the configuration beside the weights, and what should.
    """

    _data = ("did", "rows as weights", "kept", "others", "said")

    did: str
    rows: tuple[Coded, ...]
    kept: dict[str, str]
    others: int
    said: tuple[str, ...] = ()

    def headline(self) -> str:
        """How many weights of which schemes."""
        schemes = wording.listing(sorted({row.scheme for row in self.rows}))
        more = f", {len(self.kept):,} stay quantised" if self.kept else ""
        rest = wording.plural(self.others, "other leaf", "other leaves")
        counted = wording.plural(len(self.rows), "weight", "weights")
        return "\n".join((f"{counted} {self.did} ({schemes}){more}, {rest} kept", *self.said))

    def sections(self) -> list[Section]:
        """The weights, each with its scheme and its error, and those that stay quantised."""
        kept = [Line((path,), (scheme,)) for path, scheme in self.kept.items()]
        return [Section.of(self.did, self.rows, "spec", "scheme", "error"), Section("still quantised", kept)]

    def page(self) -> Page:
        """The weights as a map, with their schemes and errors."""
        shown = f"{self.did} weights", self.headline(), self.rows, "relative_l2 as relative L2", "max_abs", "spec"
        return Page.of_rows(*shown, groups="scheme", group_title="scheme")


def dequantize(
    model: T, selector: SelectorLike = "**", dtype: DtypeLike | None = "bfloat16", *, codec: Codec | None = None
) -> tuple[T, QuantizeReport]:
    """A model with quantised weights as floats, each one leaf, and the report.

    A weight is codes times scales, computed in float32 and rounded once. Its leaf is `<module>.weight`, of shape (out,
    in) also where GPTQ, AWQ or bitsandbytes store it otherwise; scales and zero points go. All other leaves stay what
    they are. Beside a checkpoint, `quantization_config` goes with the last quantised weight; before that, the modules
    join its list of those that are not quantised.

    Args:
        model: a checkpoint from `pm.open`, of which nothing is computed before it is saved, in bounded memory; or a
            tree in memory: dicts, a state dict, an NNX State.
        selector: the weights, by the names that they will have, or by those of the leaves that they are stored in.
        dtype: that of the new leaves; None for the one that the library of each scheme gives.
        codec: a `pm.Codec`, by which leaves that stand beside each other are one weight.

    Returns:
        The model, of the same type, and which weights were decoded, of which schemes, and which ones stay quantised.

    Raises:
        NoMatch: the selector names no quantised weight.
        Quantized: a scheme is recognised and cannot be decoded.
        SpecMismatch: leaves disagree with the configuration, or with each other.
        RenameClash: the name of a weight is taken.
        Unsupported: the tree is a module, whose class determines what it holds, or a configuration cannot say which
            of its modules are quantised.

    >>> model = {"fc": {"weight_packed": np.array([[0x76543210]], "int32"), "weight_scale": np.ones((1, 1), "float32")}}
    >>> tree, report = pm.dequantize(model, dtype="float32")
    >>> tree["fc"]["weight"].tolist(), report.rows[0].scheme
    ([[-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0]], 'int4')
    """
    name = "" if dtype is None else dtype_name(dtype)
    if name and (not name.startswith(("float", "bfloat")) or BITS.get(name, 0) < 16):
        raise BadArgument(f"dtype={name!r} is no float of 16 bits or more", hint='dtype="bfloat16"')
    leaves = editable(model)
    weights = whole(leaves, codec)
    chosen = selected(weights, selector)
    groups = {number: weights.groups[number] for number in chosen}
    kept = [group for number, group in weights.groups.items() if number not in groups]
    kept += [group for group in groups_of(leaves) if group.payload not in weights.groups]
    found = {number: weights.weight(number) for number in chosen}
    tree, said = floated(leaves, found, kept, dict.fromkeys(chosen, name))
    specs = {number: Spec(each.spec.shape, name or each.spec.dtype) for number, each in found.items()}
    stored = {number: tuple(map(leaves.index.path, each.group.numbers)) for number, each in found.items()}
    rows = tuple(Coded(each.path, each.scheme, specs[n], stored[n]) for n, each in found.items())
    others = len(weights.index.numbers) - len(rows) - len(kept)
    return cast(T, tree), QuantizeReport("dequantised", rows, named(leaves, kept), others, said)


def whole(leaves: Editable, rule: Codec | None = None) -> Weights:
    """A model as its weights, also if none is quantised or it was opened raw."""
    found = weighed(leaves.as_stored(False), rule=rule)
    return found if isinstance(found, Weights) else Weights(leaves, (), rule=rule)


def selected(weights: Weights, selector: SelectorLike) -> list[int]:
    """The numbers of the quantised weights that a selector means, in order, with those that are tied to them."""
    selector = sel(selector)
    numbers = chosen(selector, weights)
    twins = {twin for number in numbers for twin in weights.twins(number)}
    says = partial(stated, weights.quantization)
    for group in groups_of(weights.stored, twins):
        if group.numbers[0] not in weights.groups:
            weight_of(weights.stored, group, weights.stored.expression, says)
    found = twins & weights.groups.keys()
    if not found:
        near = [weights.index.path(number) for number in weights.groups][:1]
        why = f"{selector!r} names {wording.plural(len(twins), 'leaf', 'leaves')}, none of which is quantised"
        raise NoMatch(why, hint=f'"{near[0]}"' if near else "")
    return weights.index.ordered(found)


def named(leaves: Editable, groups: Iterable[Group]) -> dict[str, str]:
    """Path → scheme of some weights."""
    return {_path(leaves, group): group.scheme.name for group in groups}


def _path(leaves: Editable, group: Group) -> str:
    if group.payload is None:
        return leaves.index.path(group.numbers[0])
    return write_path(labels_of(leaves, group), leaves.index.separator)
