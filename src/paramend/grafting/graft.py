"""Grafts: a model starts from the leaves of another, and a report lists what became of each leaf.

A graft is planned from names and specs; if the plan has no conflicts, every new value is made; only then does anything
change. So a refused graft changes nothing.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from paramend.checkpoints.keys import matched, numbered
from paramend.checkpoints.report import read_by
from paramend.errors import Unsupported
from paramend.grafting import engine
from paramend.grafting.numbers import Counted, is_state, left_in_file, with_numbers
from paramend.grafting.options import Dtype, Mismatch, Missing, Options, Place, Renames, Unused
from paramend.grafting.quantized import adapted
from paramend.grafting.report import GraftReport, GraftRow
from paramend.leaves.leaves import Editable, Leaves
from paramend.leaves.specs import AnyTree, Spec
from paramend.reports.ends import Ends
from paramend.resize.rules import Resize
from paramend.selectors.selector import SelectorLike
from paramend.trees.lookup import find_kind

T = TypeVar("T")


def graft(
    target: T,
    source: AnyTree,
    *,
    rename: Renames | None = None,
    only: SelectorLike = "**",
    mismatch: Mismatch | Mapping[Any, Mismatch] = "error",
    place: Place | Mapping[Any, Place] = "corner",
    resize: Mapping[Any, Resize] | None = None,
    unused: Unused = "error",
    missing: Missing = "fresh",
    dtype: Dtype = "target",
    raw: bool = False,
) -> tuple[T, GraftReport]:
    """The target with the values of the source where their names agree, and a report.

    Names are compared piece by piece: `fc.weight` in a state dict is fc → weight in a module. Values arrive in the
    library, on the device, in the sharding, container and (unless told otherwise) dtype of the target; tied leaves stay
    tied.

    Args:
        target: the tree to start warm: nested dicts, Flax, NNX, Equinox or torch modules, train states, state dicts; or
            a checkpoint from `pm.open`: then a checkpoint is returned, to be written by its `.save(out)`. Leaves may be
            abstract, from `jax.eval_shape(model.init, ...)`, `nnx.eval_shape` or torch's meta device: then each must
            get its values from the source, and memory holds the model once.
        source: the tree to start from, of any of these kinds, or a checkpoint from `pm.open`.
        rename: source pattern → target path, as in `{"h/<n>/**": "layers/<n>/**"}`. If several rules match a leaf, the
            first counts; an unmatched leaf keeps its name. All names change at once, so rules may rotate or swap. An
            index on the left counts in the source, one on the right in the target: `{"Dense_[-1]/**": "Dense_[-1]/**"}`
            takes the last layer to the last. None instead of a path leaves a source leaf behind on purpose.
        only: a selector over the target. Other leaves stay as they are, and source leaves for them are left behind.
        mismatch: when shapes differ: "error"; "keep" leaves the target's leaf as it is; "overlap" copies what fits both
            shapes and leaves the rest as it is; "resize" makes a value of the target's shape by the rule of `pm.resize`
            that the leaf's name and shapes suggest, and raises if the choice is ambiguous. Or selector → one of these,
            for leaves of the target: the first that matches counts, and "error" applies to other leaves.
        place: where leaves overlap: in the "corner" where indices begin; in the "center", with the smaller half of an
            odd difference before; or as a "tile" that is repeated to fill the target. Or selector → one of these, which
            implies "overlap" there.
        resize: selector → rule of `pm.resize`, which implies "resize" there. It comes before `place` and `mismatch`.
        unused: when a source leaf goes nowhere: "error" or "ok".
        missing: when a target leaf has no source: "fresh" leaves it as it is; "error".
        dtype: when dtypes differ: "target" converts to the target's dtype, and values that overflow or are lost are
            counted; "source" adopts the source's dtype; "error".
        raw: whether leaves are taken as they are stored. Without it, leaves of a quantised weight go only together,
            onto one of the same scheme.

    Returns:
        A new tree of the target's type, and the report. Leaves that were not grafted are the same objects.

    Raises:
        GraftRefused: the two do not fit, nothing would be copied, or an abstract leaf would get no values; every case
            is listed, and `report` on the error covers every leaf. Nothing was changed.
        Quantized: codes of a quantised weight would become values, or values codes. Nothing was changed.

    >>> small = {"Dense_0": {"kernel": np.ones((2, 2))}, "Dense_1": {"kernel": np.full((2, 1), 5.0)}}
    >>> big = {f"Dense_{i}": {"kernel": np.zeros((2, 1 if i == 2 else 2))} for i in range(3)}
    >>> tree, report = graft(big, small, rename={"Dense_[-1]/**": "Dense_[-1]/**"})
    >>> tree["Dense_2"]["kernel"].ravel()
    array([5., 5.])
    >>> print(report)
    graft: 2 of 3 leaves copied, 6 of 10 parameters; 0 leaves of the source unused
    <BLANKLINE>
    copied: 2 leaves
      Dense_0/kernel                    float64[2,2]  copied
      Dense_2/kernel ◄─ Dense_1/kernel  float64[2,1]  copied
    <BLANKLINE>
    fresh: 1 leaf
      Dense_1/kernel  float64[2,2]  nothing in the source
    """
    tree, leaves = engine.leaves_of(target), engine.leaves_of(source)
    leaves = numbered(matched(leaves, tree), tree)
    options = Options(rename, only, mismatch, place, resize, unused, missing, dtype, raw=raw)
    leaves, fits = adapted(tree, leaves, options)
    if isinstance(tree, Counted):
        values, report = _planned(tree, leaves, options)
        new: Any = tree.with_leaves(values)
        report.ends = Ends(new, source)
    else:
        from paramend.grafting.checkpoints import grafted  # imports the rewriting engine

        plan = engine.planned(tree, leaves, options)
        new, report = grafted(plan), plan.report()
        report.fresh += [
            GraftRow.of(path, Spec((), type(value).__name__), "a number in the file, which a graft leaves as it is")
            for path, value in left_in_file(tree, leaves).items()
        ]
    report.encoded = fits
    report.tells_of(read_by(target), read_by(source))
    return new, report


def graft_(
    module: AnyTree,
    source: AnyTree,
    *,
    rename: Renames | None = None,
    only: SelectorLike = "**",
    mismatch: Mismatch | Mapping[Any, Mismatch] = "error",
    place: Place | Mapping[Any, Place] = "corner",
    resize: Mapping[Any, Resize] | None = None,
    unused: Unused = "error",
    missing: Missing = "fresh",
    dtype: Dtype = "target",
    raw: bool = False,
) -> GraftReport:
    """The report of a graft in place: a torch or NNX module, or a tree of numpy arrays, takes values of the source.

    Parameters stay the same objects, so optimizers go on working. All or nothing: on an error the module is as it was.

    Args:
        module: what to change.
        source: the tree to start from, of any kind.
        rename, only, mismatch, place, resize, unused, missing, dtype, raw: as in `graft`.

    Raises:
        GraftRefused: the two do not fit; every case is listed. Nothing was changed.

    >>> weights = {"w": np.zeros(2)}
    >>> report = graft_(weights, {"w": np.ones(2)})
    >>> weights["w"], [row.path for row in report.copied]
    (array([1., 1.]), ['w'])
    """
    if isinstance(module, Editable):
        kind = find_kind(source)
        swapped = kind is not None and kind.replace is not None  # a module, which does change in place
        raise Unsupported(
            "the files of a checkpoint are not grafted in place",
            hint="pm.graft_(module, checkpoint): the model first"
            if swapped
            else "tree, report = pm.graft(target, source); tree.save(out)",
        )
    tree = Counted(module)
    leaves = matched(engine.leaves_of(source), tree)
    options = Options(rename, only, mismatch, place, resize, unused, missing, dtype, in_place=True, raw=raw)
    leaves, fits = adapted(tree, leaves, options)
    values, report = _planned(tree, leaves, options)
    report.encoded = fits
    engine.put_in(tree, values)
    report.ends = Ends(module, source)
    return report


def _planned(tree: Counted, source: Leaves, options: Options) -> tuple[dict[int, Any], GraftReport]:
    """The new leaves of a tree in memory by number, and the report; states of optimizers that both have go along."""
    leaves = with_numbers(source, tree) if isinstance(source, Editable) else source
    if any(start < stop and is_state(kind) for kind, start, stop in tree.index.spans):
        from paramend.grafting.states.graft_optax import graft_whole  # imports jax

        done = graft_whole(tree, leaves, options)
        if done is not None:
            engine.refuse_abstract(tree, *done)
            return done
    plan = engine.planned(tree, leaves, options)
    return engine.values(plan), plan.report()
