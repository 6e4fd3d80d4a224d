"""Differences between two trees, leaf by leaf and bit by bit, in memory or on disk."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, Literal

from paramend.checkpoints.checkpoint import open as open_checkpoint
from paramend.checkpoints.keys import matched
from paramend.checkpoints.report import read_by
from paramend.edits.memory import Memory
from paramend.edits.weights import weighed
from paramend.errors import BadArgument, UnexpectedChange, Unsupported
from paramend.evidence.comparisons import Comparer, Pair
from paramend.evidence.differences import PARTS, DiffReport, DiffRow, arranged, said
from paramend.evidence.histograms import histograms as histograms_of
from paramend.evidence.moves import moves
from paramend.evidence.pairing import Match, chosen, matches
from paramend.evidence.permutations import transposed
from paramend.leaves.leaves import Editable
from paramend.leaves.rules import Codec
from paramend.leaves.specs import BITS, AnyTree
from paramend.reports import wording
from paramend.reports.progress import Meter, Progress
from paramend.selectors.selector import SelectorLike

Sort = Literal["change", "path"]
# A leaf, and the list of the report that it belongs in.
Judged = tuple[Match, str]


def diff(
    before: AnyTree,
    after: AnyTree,
    selector: SelectorLike = "**",
    *,
    only: SelectorLike | None = None,
    sort: Sort = "change",
    histograms: bool = False,
    codec: Codec | None = None,
    progress: Progress | None = None,
) -> DiffReport:
    """The differences between two trees: a report that is true if there are any, and prints as a table.

    Each side is a tree of any kind (a Flax, NNX, Equinox or torch module, a state dict, nested dicts), a checkpoint
    from `pm.open`, or the path of one. Names are compared piece by piece, so `fc.weight` in a file is fc → weight in a
    module; a tied leaf is found under any of its paths and counts once. Values are compared bit by bit: NaN equals
    itself, -0.0 differs from +0.0. A leaf with the same bytes under another name is renamed, not removed and added.

    Files are read in pieces on two threads: memory is bounded whatever their size. Leaves on a device are copied to the
    host, and leaves with unsaved edits are computed, one at a time.

    Args:
        before: the first tree.
        after: the second.
        selector: what to compare: leaves that it selects on either side.
        only: a selector of what may differ, resolved in `before`, and for new leaves in `after`. `report.unexpected`
            then lists the rows of all other leaves that differ.
        sort: the order of `changed`: "change" puts the largest first, "path" sorts by name.
        histograms: whether changed leaves are read twice more, for the histograms of the report's page.
        codec: a `pm.Codec`, by which leaves of either side that stand beside each other are one weight.
        progress: called with an `Event` as bytes are compared.

    Returns:
        A `DiffReport`: lists of rows `changed`, `respecified`, `renamed`, `removed`, `added` and `identical`.

    Raises:
        NoMatch: a selector matches nothing on either side.
        Unsupported: the values of a leaf are not available, as for an abstract array.
        CannotRead: a path does not exist.

    >>> old = {"fc": {"kernel": np.ones((2, 3), "float32"), "bias": np.zeros(3)}, "h": np.arange(4)}
    >>> new = {"fc": {"kernel": np.full((2, 3), 1.5, "float32"), "bias": np.zeros(3)}, "head": np.arange(4)}
    >>> report = diff(old, new)
    >>> bool(report), report.changed[0].path, report.changed[0].max_abs, report.renamed[0].was
    (True, 'fc/kernel', 0.5, 'h')
    >>> print(report)
    2 of 3 leaves differ: 1 changed, 1 renamed, 1 identical
    <BLANKLINE>
    changed: 1 leaf
      path       spec          differ  max abs  rel l2  cosine  ulp
      fc/kernel  float32[2,3]  all     0.5      0.5     1       4,194,304
    <BLANKLINE>
    renamed: 1 leaf
      head ◄─ h  int64[4]
    """
    if sort not in ("change", "path"):
        raise BadArgument(f"sort={sort!r} is not an order", hint='sort="change" or sort="path"')
    with _sides(before, after, codec) as (old, new):
        found = matches(old, new)
        if not (isinstance(selector, str) and selector == "**"):
            within = chosen(selector, old, new)
            found = [match for match in found if match.a in within[0] or match.b in within[1]]
        allowed = _allowance(only, old, new)
        comparer = Comparer(Meter(progress, 0))
        judged = _moved(old, new, _judged(old, new, found, comparer), comparer)
        report = DiffReport(only=None if only is None else str(only) if isinstance(only, str) else repr(only))
        for (match, kind), row in zip(judged, _rows(old, new, judged, comparer), strict=True):
            getattr(report, kind).append(replace(row, allowed=allowed(match, kind)))
        if histograms:
            changed = (match for match, kind in judged if kind == "changed")
            pairs = {m.path: Pair(old, m.a, new, m.b) for m in changed if m.a is not None and m.b is not None}
            report.histograms = histograms_of({path: pair.streams() for path, pair in pairs.items()})
        for name in PARTS:
            setattr(report, name, arranged(getattr(report, name), sort if name == "changed" else "path"))
        report.tells_of(read_by(old), read_by(new))
        return report


def verify(before: AnyTree, after: AnyTree, *, only: SelectorLike | None = None) -> list[str]:
    """The paths of the leaves that changed, if all of them were allowed to.

    Leaves are compared as in `pm.diff`: bit by bit, and by name, piece by piece, so a module can be checked against its
    state dict or against the file that it came from.

    Args:
        before: any tree, a checkpoint from `pm.open`, or the path of one.
        after: likewise.
        only: a selector of what may differ, resolved in `before`, and for new leaves in `after`. Without it, nothing
            may differ.

    Raises:
        UnexpectedChange: other leaves changed, were added or removed; each is named, with how far it moved.
        NoMatch: `only` matches nothing.

    >>> old = {"kernel": np.ones(2), "bias": np.zeros(2)}
    >>> verify(old, {**old, "bias": np.ones(2)}, only="bias")
    ['bias']
    >>> verify(old, {**old, "bias": np.ones(2)})
    Traceback (most recent call last):
    paramend.errors.UnexpectedChange: 1 leaf changed that must not
      bias: 2 of 2 values, by at most 1
    """
    with _sides(before, after) as (old, new):
        found = matches(old, new)
        allowed = _allowance(only, old, new)
        comparer = Comparer(Meter(None, 0))
        changed = [each for each in _judged(old, new, found, comparer) if each[1] != "identical"]
        wrong = [(match, kind) for match, kind in changed if only is None or not allowed(match, kind)]
        if wrong:
            rows = _rows(old, new, wrong, comparer)
            raise _unexpected_change([(kind, row) for (_, kind), row in zip(wrong, rows, strict=True)])
        return [path for match, _ in changed for path in (match.path, *match.also)]


def _unexpected_change(rows: Sequence[tuple[str, DiffRow]]) -> UnexpectedChange:
    changes = {path: said(kind, row) for kind, row in rows for path in (row.path, *row.also)}
    lines = [f"  {path}: {what}" for path, what in list(changes.items())[:20]]
    lines += [f"  and {len(changes) - 20:,} more"] if len(changes) > 20 else []
    count = wording.plural(len(changes), "leaf", "leaves")
    return UnexpectedChange("\n".join([f"{count} changed that must not", *lines]), changes=changes)


# ---- the two sides ---------------------------------------------------------------------------------------------


@contextmanager
def _sides(before: Any, after: Any, rule: Codec | None = None) -> Iterator[tuple[Editable, Editable]]:
    """Both sides as leaves, with typed keys of one kind."""
    with _leaves(before) as old, _leaves(after) as new:
        yield weighed(matched(old, new), inputs=True, rule=rule), weighed(matched(new, old), inputs=True, rule=rule)


@contextmanager
def _leaves(tree: Any) -> Iterator[Editable]:
    """Any tree as leaves; a checkpoint given by its path is open meanwhile."""
    if isinstance(tree, str | os.PathLike):
        with open_checkpoint(tree) as checkpoint:
            yield checkpoint
    else:
        yield tree if isinstance(tree, Editable) else Memory(tree)


def _allowance(only: Any, old: Editable, new: Editable) -> Callable[[Match, str], bool]:
    """Whether a leaf may differ: `only` is resolved in the old tree; for added and renamed leaves, in the new one."""
    if only is None:
        return lambda match, kind: True
    before, after = chosen(only, old, new)
    asked = {"added": lambda match: match.b in after, "renamed": lambda match: match.a in before and match.b in after}
    return lambda match, kind: asked.get(kind, lambda match: match.a in before)(match)


# ---- the work --------------------------------------------------------------------------------------------------


def _judged(old: Editable, new: Editable, found: Sequence[Match], comparer: Comparer) -> list[Judged]:
    """The leaves with the list of the report that each belongs in, before renamed leaves are found."""
    kinds = ["added" if match.a is None else "removed" if match.b is None else "" for match in found]
    places, pairs = [], []
    for place, match in enumerate(found):
        if match.a is None or match.b is None:
            continue
        if old.spec(match.a) != new.spec(match.b):
            kinds[place] = "respecified"
        else:
            places.append(place)
            pairs.append(Pair(old, match.a, new, match.b))
    _check_readable(pairs)
    for place, same in zip(places, comparer.equal(pairs), strict=True):
        kinds[place] = "identical" if same else "changed"
    return list(zip(found, kinds, strict=True))


def _moved(old: Editable, new: Editable, found: Sequence[Judged], comparer: Comparer) -> list[Judged]:
    """The same, where a leaf that was removed and added again under another name is renamed."""
    gone = [match.a for match, kind in found if kind == "removed" and match.a is not None]
    come = {match.b: match for match, kind in found if kind == "added" and match.b is not None}
    there = moves(old, gone, new, list(come), comparer)
    arrived = set(there.values())
    judged = []
    for match, kind in found:
        if kind == "removed" and match.a in there:
            judged.append((replace(come[there[match.a]], a=match.a), "renamed"))
        elif not (kind == "added" and match.b in arrived):
            judged.append((match, kind))
    return judged


def _check_readable(pairs: Sequence[Pair]) -> None:
    """Raise for leaves without values, naming all of them: leaving them out would mean that they are equal."""
    problems = []
    for pair in pairs:
        why = "" if pair.same else pair.hindrance
        problems += [f"{pair.new.index.path(pair.b)}: {why}"] * bool(why)
    if problems:
        count = wording.plural(len(problems), "leaf", "leaves")
        raise Unsupported(
            "\n".join([f"{count} cannot be compared", *(f"  {line}" for line in problems[:20])]),
            hint='leave them out: pm.diff(before, after, ~pm.sel("..."))',
        )


def _rows(old: Editable, new: Editable, found: Sequence[Judged], comparer: Comparer) -> list[DiffRow]:
    """The rows of leaves whose kinds are known, in order, with figures if there are two arrays of one shape."""
    rows = []
    for match, kind in found:
        leaves, number = (old, match.a) if match.b is None else (new, match.b)
        assert number is not None
        spec = leaves.spec(number)
        row = DiffRow(match.path, spec.shape, spec.dtype, leaves.nbytes(number), match.also)
        if kind == "respecified" and match.a is not None:
            before = old.spec(match.a)
            row = replace(row, shape_before=before.shape, dtype_before=before.dtype)
        if kind == "renamed" and match.a is not None:
            row = replace(row, was=old.index.path(match.a))
        rows.append(row)
    pairs = {
        place: Pair(old, match.a, new, match.b)
        for place, (match, kind) in enumerate(found)
        if kind in ("changed", "respecified") and match.a is not None and match.b is not None
    }
    pairs = {place: pair for place, pair in pairs.items() if not pair.hindrance}
    measured = [place for place, pair in pairs.items() if _comparable(pair)]
    for place, distance in zip(measured, comparer.distances([pairs[place] for place in measured]), strict=True):
        rows[place] = replace(rows[place], **asdict(distance))
    for place, pair in pairs.items():
        rows[place] = replace(rows[place], transposed=transposed(pair))
    return rows


def _comparable(pair: Pair) -> bool:
    """Whether distances make sense: the specs are equal, or the shapes are and neither dtype is packed."""
    one, two = pair.specs
    return one == two or (one.shape == two.shape and not any(BITS.get(spec.dtype, 1) % 8 for spec in (one, two)))
