"""Growth in width: a model with longer axes that computes what it did."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, cast

import numpy as np

from paramend.anatomy.documents import document_of
from paramend.checkpoints.anatomy import configuration
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.edits.memory import Memory, editable
from paramend.errors import BadArgument, Quantized, Unsupported
from paramend.growth import consumers, following
from paramend.growth.axes import Axes
from paramend.growth.spreads import METHODS, Method, Spreads, configured, growths_of, spreads_of
from paramend.leaves.groups import groups_of
from paramend.leaves.leaves import Editable
from paramend.leaves.specs import AnyTree, Spec
from paramend.pages.page import Page
from paramend.pages.paged import Paged
from paramend.reports import wording
from paramend.reports.ends import Ends
from paramend.reports.report import Line, Section
from paramend.resize.widths import Growth, Widths
from paramend.trees.lookup import find_kind

T = TypeVar("T")
_WAYS = 'pm.widen(tree, features={"params/Dense_0": 16}), or pm.open("model/"), a directory with config.json'


@dataclass(frozen=True, slots=True)
class WidthRow:
    """What became of one leaf.

    Attributes:
        path: its path.
        before: its spec.
        after: its new spec.
        rate: the factor of its values. Multiplied by it, the rate of Adam makes the steps that the old model would
            have made; a decoupled decay is divided by it. None if places have different ones.
    """

    _data: ClassVar = ("path", "before.shape as before", "after.shape as after", "rate")

    path: str
    before: Spec
    after: Spec
    rate: float | None


@dataclass(repr=False)
class WidthReport(Widths, Paged):
    """Which axes of a model have another length, and which leaves follow.

    Attributes:
        verb: "widen" or "narrow".
        sizes: axis → its old length and its new one.
        rows: the leaves that changed.
        config: descriptions of the changes to the model's configuration.
        kept: for `pm.narrow`, axis → the places that were kept, layer by layer.
    """

    _data = ("verb", "sizes", "rows", "config", "kept")

    verb: str = "widen"
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    rows: list[WidthRow] = field(default_factory=list)
    config: list[str] = field(default_factory=list)
    kept: dict[str, list[list[int]]] = field(default_factory=dict)

    def headline(self) -> str:
        """The axes with their lengths, and how many leaves follow."""
        axes = [f"{axis} {old:,} -> {new:,}" for axis, (old, new) in self.sizes.items()]
        before, after = (sum(getattr(row, side).size for row in self.rows) for side in ("before", "after"))
        leaves = wording.plural(len(self.rows), "leaf", "leaves")
        return f"{self.verb}: {wording.listing(axes) or 'nothing'}; {leaves}, {before:,} -> {after:,} parameters"

    def sections(self) -> list[Section]:
        lines = []
        for row in self.rows:
            times = "factors differ" if row.rate is None else f"times {row.rate:g}" if row.rate != 1 else ""
            lines.append(Line((row.path,), (f"{row.before} -> {row.after}", times), row.after.size))
        return [Section("changed", lines)]

    def __str__(self) -> str:
        return "\n\n".join([super().__str__(), *([f"config: {', '.join(self.config)}"] if self.config else [])])

    def page(self) -> Page:
        """The new model as a map, coloured by whether values were multiplied."""
        kinds = ["moved" if row.rate == 1 else "multiplied" for row in self.rows]
        shown = self.verb, self.headline(), self.rows
        return Page.of_rows(*shown, "before", "after", size="after.size", groups=kinds, group_title="kind")


def widen(
    tree: T,
    *,
    hidden: int | None = None,
    mlp: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    features: Mapping[str, int] | None = None,
    method: Method = "tile",
) -> tuple[T, WidthReport]:
    """A model with longer axes that computes what it did, and the report.

    Lengths are absolute; axes that are not given stay, and so does the size of a head. What follows from the axes of a
    family of transformers: every leaf that has one, and the configuration. In plain trees and modules the layers of
    `features` write more, and the next layer reads it.

    - "tile" copies places, and what reads the copies divides by their number (Net2Net, arXiv:1511.05641; HyperCloning,
      arXiv:2409.12903). It is exact for all families; the residual width becomes a multiple of itself, because norms
      see it. A tied head cannot divide: the norm before it does.
    - "split" is the same, with shares that differ for each reader, so that copies get gradients of their own.
    - "zero" puts new places beside the old ones (arXiv:2308.06103). Within a layer they are not read yet; on the
      residual stream they are read, and zero, or for norms that subtract it the mean (LEMON, arXiv:2310.07999), and
      gains and `eps` are scaled so that norms see the same. They have numbers and get gradients from the first steps
      on. For any width, but not for models that put norms on the residual stream itself.

    Args:
        tree: a checkpoint from `pm.open`, of which nothing is computed before it is saved; a model of transformers; for
            `features` any tree or module.
        hidden: the residual width.
        mlp: the width of the feed-forward layers.
        heads: the number of query heads.
        kv_heads: the number of heads of keys and values.
        features: path of a layer → how many features it is to have, as `{"params/Dense_0": 16}`. Norms between it and
            the next layer follow, and the activation must act on each feature alone.
        method: "tile", "split" or "zero".

    Returns:
        A new tree of the same type, and the report. With it `pm.graft_opt_state` and `pm.graft_optimizer_` carry the
        moments of an optimizer over.

    Raises:
        BadArgument: the family of a model is not known, an axis would be shorter, or heads do not fit their groups.
        NoMatch: there is no such layer.
        Quantized: weights are quantised.
        SpecMismatch: a leaf has another shape than the configuration says.
        Unsupported: the method cannot keep what norms see, or the next layer does not read the features.

    >>> params = {"Dense_0": {"kernel": np.ones((3, 2))}, "Dense_1": {"kernel": np.array([[2.0], [4.0]])}}
    >>> tree, report = pm.widen(params, features={"Dense_0": 4})
    >>> tree["Dense_0"]["kernel"].shape, tree["Dense_1"]["kernel"].ravel().tolist()
    ((3, 4), [1.0, 2.0, 1.0, 2.0])
    >>> print(report.headline())
    widen: Dense_0 2 -> 4; 2 leaves, 8 -> 16 parameters
    """
    work = _planned(tree, {"hidden": hidden, "mlp": mlp, "heads": heads, "kv_heads": kv_heads}, features, method)
    return work.carried_out(tree)


def widen_(
    module: AnyTree,
    *,
    hidden: int | None = None,
    mlp: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    features: Mapping[str, int] | None = None,
    method: Method = "tile",
) -> WidthReport:
    """Widen a torch or NNX module in place, and return the report.

    Parameters stay the same objects, with other shapes and without gradients. An optimizer of them holds moments of the
    old shapes: make a new one, and carry them over with `pm.graft_optimizer_(new, old, report)`. On an error the module
    is unchanged.

    Args:
        module: what to change.
        hidden, mlp, heads, kv_heads, features, method: as in `widen`.

    Raises:
        BadArgument, NoMatch, SpecMismatch: as in `widen`.
        Unsupported: as in `widen`, or it is not a module.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
    >>> print(widen_(model, features={"0": 4}).headline())
    widen: 0 2 -> 4; 3 leaves, 10 -> 20 parameters
    >>> model[2]
    Linear(in_features=4, out_features=1, bias=True)
    """
    kind = find_kind(module)
    if kind is None or kind.replace is None:
        what = wording.described(module)
        raise Unsupported(f"{what} cannot be changed in place", hint="tree, report = pm.widen(tree, ...)")
    sizes = {"hidden": hidden, "mlp": mlp, "heads": heads, "kv_heads": kv_heads}
    work = _planned(module, sizes, features, method)
    following.in_place(cast(Memory, work.leaves), work.growths, work.new)
    work.report.ends = Ends(module, module)
    return work.report


def _planned(tree: Any, sizes: Mapping[str, int | None], features: Mapping[str, int] | None, method: Method) -> "Work":
    wanted: dict[str, int] = {axis: size for axis, size in sizes.items() if size is not None}
    if bool(wanted) == bool(features):
        why = "widen takes lengths of the axes of a model, or of features of layers"
        raise BadArgument(why, hint='pm.widen(tree, features={"params/Dense_0": 16}), or pm.widen(model, mlp=4096)')
    if method not in METHODS:
        raise BadArgument(f"method={method!r} is not one of {', '.join(METHODS)}", hint='method="tile"')
    for axis, size in {**wanted, **(features or {})}.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise BadArgument(f"{axis}={size!r} is not a length", hint=f"{axis}=16")
    work = Work(tree, features, "widen")
    wanted |= {path: int(size) for path, size in (features or {}).items() if path in work.axes.sizes}  # without norms
    return work.spread(spreads_of(work.axes, wanted, method))


class Work:
    """A change of width: everything is checked before anything changes."""

    def __init__(self, tree: Any, features: Any, verb: str) -> None:
        self.leaves: Editable = editable(tree)
        self.config: Mapping[str, Any] | None = None
        for group in groups_of(self.leaves)[:1]:
            path, scheme = self.leaves.index.path(group.numbers[0]), group.scheme.name
            why = f"{path} is part of a quantised weight ({scheme}), whose blocks do not fit another shape"
            raise Quantized(why, scheme=scheme, payload=path, hint="model, _ = pm.dequantize(model)")
        if features:
            self.axes = consumers.axes_of(self.leaves, features)
        else:
            self.config = configuration(self.leaves)
            if not self.config:
                why = f"{wording.described(tree)} has no configuration that says which axes its leaves have"
                raise BadArgument(why, hint=_WAYS)
            self.axes = Axes.of(self.leaves, self.config)
        self.growths: dict[int, Growth] = {}
        self.new: dict[str, Any] | None = None
        self.report = WidthReport(verb=verb)

    def spread(self, spreads: Spreads) -> "Work":
        """The work with index maps for some axes."""
        self.growths = growths_of(self.axes, self.leaves, spreads)
        if self.config is not None:
            self.new = configured(self.axes, self.config, spreads)
        sizes = {axis: (each.old, len(each.places)) for (axis, _), each in spreads.items()}
        index, old = self.leaves.index, self.config or {}
        self.report.sizes = sizes
        self.report.config = [f"{k}: {old.get(k)} -> {v}" for k, v in (self.new or {}).items() if old.get(k) != v]
        for number, grown in self.growths.items():
            spec = self.leaves.spec(number)
            lengths = (n if at is None else len(at) for n, at in zip(spec.shape, grown.places, strict=True))
            self.report.rows.append(WidthRow(index.path(number), spec, Spec(tuple(lengths), spec.dtype), grown.rate))
            self.report.growths[index.pieces(number)] = grown
        return self

    def carried_out(self, tree: T) -> tuple[T, WidthReport]:
        if isinstance(self.leaves, Checkpoint):
            new: Any = following.on_disk(self.leaves, self.growths, self._texts(self.leaves))
        else:
            new = following.in_memory(cast(Memory, self.leaves), self.growths, self.new)
        self.report.ends = Ends(new, tree)
        return new, self.report

    def _texts(self, checkpoint: Checkpoint) -> list[Any]:
        document = document_of(checkpoint)
        if document is None or self.new is None:
            return []
        if skipped := document.skipped(checkpoint.path):
            self.report.config = [skipped]
        return [] if skipped else [document.holding(self.new)]
