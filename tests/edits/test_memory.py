"""Edits in place where leaves share memory, and edits that give each leaf memory of its own."""

import numpy as np
import pytest
import torch

import paramend as pm
from paramend.errors import Unsupported


def halves():
    """Trees whose leaves `a` and `b` share two elements, each with a function that reads them."""
    x, t = np.arange(10.0), torch.arange(10.0)
    mixed = np.arange(10.0)
    return {
        "numpy": {"a": x[:6], "b": x[4:]},
        "torch": {"a": t[:6], "b": t[4:]},
        "numpy and torch": {"a": mixed[:6], "b": torch.from_numpy(mixed)[4:]},
    }


def listed(tree):
    return {path: leaf.tolist() for path, leaf in pm.at(tree, "**").get().items()}


@pytest.mark.parametrize("name", halves())
@pytest.mark.parametrize("selector", ["a", "b", "*"])
def test_views_that_overlap_are_refused_in_place_and_edited_apart_in_a_new_tree(name, selector):
    tree = halves()[name]
    before = listed(tree)
    with pytest.raises(Unsupported, match="a and b share memory, and an edit in place of one changes the other"):
        pm.at(tree, selector).multiply_(2)
    assert listed(tree) == before
    edited = pm.at(tree, selector).multiply(2)
    for path in "ab":
        factor = 2 if selector in (path, "*") else 1
        assert edited[path].tolist() == [factor * value for value in before[path]]
    assert listed(tree) == before


def test_a_transposed_view_and_a_flat_one_share_memory_too():
    weight = torch.arange(6.0).reshape(2, 3)
    for other in (weight.t(), weight.view(-1), weight[1], weight[:, ::2], weight.view(torch.int32)):
        with pytest.raises(Unsupported, match="share memory"):
            pm.at({"w": weight, "other": other}, "other").zero_()
    assert weight.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_parts_of_one_buffer_that_do_not_meet_are_edited_in_place():
    x, t = np.arange(6.0), torch.arange(6.0)
    tree = {"even": x[::2], "odd": x[1::2], "head": t[:3], "tail": t[3:]}
    pm.at(tree, "{even,head}").zero_()
    assert listed(tree) == {"even": [0, 0, 0], "odd": [1, 3, 5], "head": [0, 0, 0], "tail": [3, 4, 5]}


def test_one_numpy_array_at_two_places_is_edited_in_place_under_both_names_or_not_at_all():
    shared = np.ones(2)
    tree = {"params": shared, "ema": shared, "view": np.ones(1)}
    with pytest.raises(Unsupported, match="params and ema are one array, and an edit in place changes both") as caught:
        pm.at(tree, "ema").zero_()
    assert shared.tolist() == [1, 1]
    assert "pm.at(tree, ['params', 'ema'])" in caught.value.hint
    pm.at(tree, ["params", "ema"]).multiply_(2)
    assert shared.tolist() == [2, 2]
    with pytest.raises(Unsupported, match="params and ema are one array, which cannot take two values"):
        pm.at(tree, ["params", "ema"]).set_({"params": np.ones(2), "ema": np.zeros(2)})
    assert shared.tolist() == [2, 2]


def test_tied_tensors_are_edited_in_place_under_either_name():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    module[1].weight = module[0].weight
    pm.at(module, "1.weight").fill_(3)
    assert module[0].weight.tolist() == [[3, 3], [3, 3]]
    state = {"a": module[0].weight.detach(), "b": module[0].weight.detach()}
    pm.at(state, "a").multiply_(2)
    assert state["b"].tolist() == [[6, 6], [6, 6]]


@pytest.mark.parametrize(
    "leaf",
    [
        torch.ones(3, 1).expand(3, 4),
        torch.arange(4.0).as_strided((3, 2), (1, 1)),
        np.lib.stride_tricks.as_strided(np.arange(4.0), (3, 2), (8, 8)),
    ],
    ids=["expanded", "windows of torch", "windows of numpy"],
)
def test_a_leaf_that_repeats_its_elements_is_refused_in_place(leaf):
    before = leaf.tolist()
    with pytest.raises(Unsupported, match="w cannot change in place: it is expanded"):
        pm.at({"w": leaf}, "w").add_(1)
    assert leaf.tolist() == before
    edited = pm.at({"w": leaf}, "w").add(1)["w"]
    assert edited.tolist() == [[value + 1 for value in row] for row in before]


@pytest.mark.parametrize("library", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_operands_that_are_leaves_of_the_tree_are_read_before_they_change(library):
    tree = {"a": library([1.0, 2.0]), "b": library([3.0, 4.0])}
    pm.at(tree, "*").set_({"a": tree["b"], "b": tree["a"]})
    assert listed(tree) == {"a": [3, 4], "b": [1, 2]}
    pm.at(tree, "*").add_(tree["a"])
    assert listed(tree) == {"a": [6, 8], "b": [4, 6]}
    pm.at(tree, "*").multiply_(tree["a"][:1])
    assert listed(tree) == {"a": [36, 48], "b": [24, 36]}
