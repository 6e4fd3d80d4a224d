"""Trees nested as deep as can be, and deeper."""

import jax.numpy as jnp
import numpy as np
import pytest

import paramend as pm
from paramend.errors import Unsupported
from support.stacks import with_all_calls_left, with_few_calls_left


def nested_to(depth, leaf, wrap):
    tree = {"w": leaf}
    for _ in range(depth - 1):
        tree = wrap(tree)
    return tree


@pytest.mark.parametrize("wrap", [lambda t: {"a": t}, lambda t: [t], lambda t: (t,)])
@pytest.mark.parametrize("make", [np.ones, jnp.ones])
def test_two_hundred_levels_and_no_more(wrap, make):
    deepest = nested_to(200, make(2), wrap)

    def edited():
        (leaf,) = pm.at(pm.at(deepest, "**/w").zero(), "**/w").get().values()
        assert leaf.tolist() == [0, 0]
        assert len(pm.at(pm.at(deepest, "**/w").rename("**/v"), "**/v")) == 1
        assert pm.at(deepest, pm.at(deepest, "**").mask()).one().tolist() == [1, 1]

    with_all_calls_left(edited)
    for depth in (201, 3000):
        tree = nested_to(depth, make(2), wrap)
        for verb in (lambda t: pm.at(t, "**").zero(), lambda t: pm.graft(t, t), lambda t: pm.diff(t, t)):
            with pytest.raises(Unsupported, match="the tree is nested more than 200 levels deep"):
                verb(tree)


def test_a_tree_deeper_than_the_calls_that_are_left():
    tree = nested_to(150, np.ones(2), lambda t: {"a": t})
    with_all_calls_left(lambda: pm.at(tree, "**").zero())  # imports what it needs
    with_all_calls_left(lambda: pm.at(tree, "**/w").rename("**/v"))
    with pytest.raises(Unsupported, match="the tree is nested deeper than the calls that are left"):
        with_few_calls_left(150, lambda: pm.at([tree], "**").zero())
    with pytest.raises(Unsupported, match="the tree is nested deeper than the calls that are left"):
        with_few_calls_left(160, lambda: pm.at([tree], "**/w").rename("**/v"))
    (leaf,) = with_few_calls_left(120, lambda: pm.at([{"a": np.ones(2)}], "**").zero())
    assert leaf["a"].tolist() == [0, 0]
