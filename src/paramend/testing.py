"""Assertions for your own tests: only what may change does."""

from paramend.errors import UnexpectedChange
from paramend.evidence.diff import diff
from paramend.leaves.specs import AnyTree
from paramend.selectors.selector import SelectorLike


def assert_only_changed(before: AnyTree, after: AnyTree, only: SelectorLike, *, allow_noop: bool = False) -> None:
    """Assert that some of the leaves that a selector matches differ, and no others.

    Args:
        before: a tree of any kind, a checkpoint, or the path of one.
        after: likewise.
        only: a selector of what may differ; it is resolved in `before`, and in `after` for new leaves.
        allow_noop: whether it passes if nothing differs at all.

    Raises:
        UnexpectedChange: other leaves differ, or nothing does. It is an `AssertionError`; its text is the table of
            `pm.diff`, and its `changes` maps each path to what happened.
        NoMatch: the selector matches nothing.

    >>> old = {"kernel": np.ones(2), "bias": np.zeros(2)}
    >>> assert_only_changed(old, {**old, "bias": np.ones(2)}, only="bias")
    >>> assert_only_changed(old, dict(old), only="bias")
    Traceback (most recent call last):
    paramend.errors.UnexpectedChange: no difference: 2 leaves are identical, 32 B; nothing in bias
    """
    report = diff(before, after, only=only)
    if report.unexpected or not (report or allow_noop):
        raise UnexpectedChange(str(report), changes=report.changes)


def assert_identical(before: AnyTree, after: AnyTree, selector: SelectorLike = "**") -> None:
    """Assert that no leaf differs in any bit.

    Args:
        before: a tree of any kind, a checkpoint, or the path of one.
        after: likewise.
        selector: what to compare.

    Raises:
        UnexpectedChange: a leaf differs. It is an `AssertionError`; its text is the table of `pm.diff`.
        NoMatch: the selector matches nothing on either side.

    >>> assert_identical({"w": np.array([np.nan])}, {"w": np.array([np.nan])})
    >>> assert_identical({"w": np.array([0.0])}, {"w": np.array([-0.0])})
    Traceback (most recent call last):
    paramend.errors.UnexpectedChange: 1 of 1 leaf differs: 1 changed
    ...
    """
    report = diff(before, after, selector)
    if report:
        raise UnexpectedChange(str(report), changes=report.changes)
