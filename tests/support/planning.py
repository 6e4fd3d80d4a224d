"""Plans of one edit, as an engine gets them."""

from dataclasses import replace

from paramend.edits.plan import Plan
from paramend.selectors.selector import resolve, slice_of


def plan(leaves, selector, edit):
    """The plan of one edit of the selected leaves."""
    selector, index = slice_of(selector)
    edit = edit if index is None else replace(edit, index=index)
    return Plan.of(leaves).edited(dict.fromkeys(resolve(selector, leaves), edit))
