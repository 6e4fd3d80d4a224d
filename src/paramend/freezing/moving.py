"""Moving leaves of JAX models: what the forward pass moves and no optimizer, such as running statistics."""

from paramend.trees.tree import Tree

# Collections of Flax beside "params", which `apply(..., mutable=...)` returns.
_COLLECTIONS = frozenset({"batch_stats", "cache", "intermediates", "perturbations"})


def moved_by_model(tree: Tree) -> frozenset[int]:
    """The numbers of the leaves that the model moves itself: statistics, counts of random keys, caches. They are told
    by their Variables (NNX), by their collection (Flax), or by the state that they are in (Equinox)."""
    index = tree.index
    found = set()
    for kind, start, stop in index.spans:
        if kind.__module__.startswith("equinox.") and kind.__name__ in ("State", "StateIndex"):
            found.update(index.numbers[start:stop])
    tops = {number: index.pieces(number)[:1] for number in index.numbers}
    if ("params",) in tops.values():
        found.update(number for number, top in tops.items() if top and top[0] in _COLLECTIONS)
    if tree.boxes:
        from paramend.freezing.nnx import moves_itself  # imports flax

        found |= moves_itself(tree.boxes)
    return frozenset(found)
