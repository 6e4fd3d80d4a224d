"""Examples of what the functions of freezing/ give, which import jax."""

import numpy as np

from paramend.freezing.places import moved_by_model, region_of
from paramend.freezing.schedules import Window
from paramend.trees.tree import Tree


def test_region_of():
    assert [mask.shape for mask in region_of((slice(0, 2), Ellipsis, -1), (3, 4, 5))] == [(3, 1, 1), (1, 1, 5)]
    assert region_of(slice(None), (3, 4)) == ()


def test_moved_by_model():
    tree = Tree({"params": {"w": np.ones(1)}, "batch_stats": {"mean": np.ones(1)}})
    assert [tree.index.path(number) for number in moved_by_model(tree)] == ["batch_stats/mean"]


def test_window_holds():
    def held(window):
        return [step for step in range(6) if window.holds(lambda event: step >= event)]  # noqa: B023

    assert held(Window(since=2, until=4)) == [2, 3]
    assert held(Window(since=4, until=2)) == [0, 1, 4, 5]
