"""Select one leaf of a tree and edit it: Paramend against what people write today.

`python bench/editing.py LEAVES` prints one JSON object: way → ratio to `tree_map_with_path`.
"""

import json
import sys
import time
from statistics import median

import jax
import numpy as np
from leaf import make_tree

import paramend as pm


def by_path(tree, last):
    def edit(path, leaf):
        return np.zeros_like(leaf) if jax.tree_util.keystr(path, simple=True, separator="/") == last else leaf

    return jax.tree_util.tree_map_with_path(edit, tree)


def by_keys(tree, last):
    """The leanest form: compares keys, builds no string."""
    *_, layer, block, name = last.split("/")

    def edit(path, leaf):
        hit = path[-1].key == name and path[-2].key == block and path[-3].key == layer
        return np.zeros_like(leaf) if hit else leaf

    return jax.tree_util.tree_map_with_path(edit, tree)


def by_paramend(tree, last):
    return pm.at(tree, last).zero()


WAYS = {
    "tree_map_with_path, keystr": by_path,
    "tree_map_with_path, keys compared": by_keys,
    "pm.at, repeated": by_paramend,
    "pm.at, position [-1]": lambda tree, last: pm.at(tree, "params/*layer_[-1]/mlp/kernel").zero(),
}


def seconds(way, tree, last):
    start = time.perf_counter()
    way(tree, last)
    return time.perf_counter() - start


def measure(leaves):
    rounds = 7 if leaves > 1000 else 400
    tree = make_tree(leaves)
    last = f"params/layer_{leaves // 4 - 1}/mlp/kernel"
    times = {name: [] for name in [*WAYS, "pm.at, first edit"]}
    for way in WAYS.values():  # imports and caches of the first call are not what is measured
        way(tree, last)
    for turn in range(rounds):
        for name, way in WAYS.items():
            times[name].append(seconds(way, tree, last))
        fresh = make_tree(leaves, f"t{turn}_")  # names never seen: nothing is remembered of this tree
        times["pm.at, first edit"].append(
            seconds(by_paramend, fresh, f"params/t{turn}_layer_{leaves // 4 - 1}/mlp/kernel")
        )
    reference = median(times["tree_map_with_path, keystr"])
    return {name: round(median(spent) / reference, 3) for name, spent in times.items()}


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
