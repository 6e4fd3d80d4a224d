"""The lesson on starting a bigger model from a smaller one."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from paramend.edits.selection import param_count
from paramend.grafting.graft import graft
from paramend.lessons.last_layer import Stack
from paramend.lessons.lesson import Case, Lesson, edited, mistake
from paramend.lessons.observation import Observation
from paramend.lessons.witness import Handed, Picture, Witness, candidates, layer_names, observe, same

Tower = partial(Stack, bias_init=nn.initializers.zeros)


def partial_init(seed: float, x: Any, num_full_layers: float, num_extra_layers: float, features: float) -> jax.Array:
    """The number of parameters and of layers of a model whose first layers come from a smaller one."""
    x = jnp.asarray(x)
    full, layers = int(num_full_layers), int(num_full_layers) + int(num_extra_layers)
    small_key, big_key = jax.random.split(jax.random.PRNGKey(int(seed)))
    small = Tower(full, int(features)).init(small_key, x)
    big = Tower(layers, int(features)).init(big_key, x)
    params, _ = graft(big, small, only=f"params/Dense_[:{full}]/**")
    return jnp.array([param_count(params), layers])


def _start(seed: float, x: Any, full: float, extra: float, features: float) -> tuple[Any, Any, int, int]:
    x = jnp.asarray(x)
    one, two = jax.random.split(jax.random.PRNGKey(int(seed)))
    small, big = Tower(int(full), int(features)), Tower(int(full + extra), int(features))
    return small.init(one, x), big.init(two, x), int(full), int(extra)


def _answer(params: Any, full: int, extra: int) -> jax.Array:
    return jnp.array([sum(leaf.size for leaf in jax.tree.leaves(params)), full + extra])


def _copied(small: Any, big: Any, sources: dict[int, int]) -> Any:
    """The bigger tree with layer `i` taken from layer `sources[i]` of the small one."""
    layers = {f"Dense_{i}": small["params"][f"Dense_{source}"] for i, source in sources.items()}
    return {"params": {**big["params"], **layers}}


def _solved(edit: Callable[..., Any], *args: float) -> jax.Array:
    """The reference with another copy: the edit takes the small tree, the big one, and their layers."""
    small, big, full, extra = _start(*args)
    return _answer(edit(small, big, full, extra), full, extra)


_edited = partial(edited, _solved)


def _kernels_only(small: Any, big: Any, full: int, extra: int) -> Any:
    layers = {name: {**big["params"][name], "kernel": layer["kernel"]} for name, layer in small["params"].items()}
    return {"params": {**big["params"], **layers}}


def _without_bias(small: Any, big: Any, full: int, extra: int) -> Any:
    layers = {name: {"kernel": layer["kernel"]} for name, layer in small["params"].items()}
    return {"params": {**big["params"], **layers}}


def _renamed(small: Any, big: Any, full: int, name: str) -> Any:
    """The bigger tree with layers called dense_<n>, which are those of the small one that are called `name`_<n>."""
    layers = {f"dense_{i}": small["params"][f"{name}_{i}"] for i in range(full)}
    return {"params": {**big["params"], **layers}}


def _in_turn(small: Any, big: Any, full: int, extra: int) -> Any:
    # Layer 0 reads x and fits nowhere else, so the cycle skips it.
    return _copied(small, big, {i: i if i < full else 1 + (i - full) % (full - 1) for i in range(full + extra)})


def _one_key(seed: float, x: Any, full: float, extra: float, features: float) -> Any:
    x, key = jnp.asarray(x), jax.random.PRNGKey(int(seed))
    small = Tower(int(full), int(features)).init(key, x)
    big = Tower(int(full + extra), int(features)).init(key, x)
    return _answer(_copied(small, big, {i: i for i in range(int(full))}), int(full), int(extra))


def _in_place(small: Any, big: Any, full: int, extra: int) -> Any:
    for i in range(full):
        big["params"][f"Dense_{i}"] = small["params"][f"Dense_{i}"]
    return big


def copy_facts(witness: Witness, seen: Observation) -> dict[str, str]:
    """Where each leaf of the counted tree comes from, and whether the two inits had different keys."""
    if not witness.handed:
        return {}
    small = min(witness.handed, key=lambda handed: len(handed.picture))
    big = max(witness.handed, key=lambda handed: len(handed.picture))
    facts = {"models initialised": "a small one and a bigger one" if small is not big else "one"}
    if small is big:
        return facts
    facts["keys of the two inits"] = "one and the same" if _key(small) == _key(big) else "two"
    count = np.ravel(np.asarray(seen.result))[:1]

    def fits(leaves: Picture) -> bool:
        return bool(sum(int(np.size(leaf)) for leaf in leaves.values()) == count)

    merged = next(candidates(witness, fits), big.picture)
    names, small_names = layer_names(merged), layer_names(small.picture)
    for path, leaf in merged.items():
        ours = any(same(leaf, fresh) for fresh in big.picture.values())
        theirs = [small_names[source] for source, old in small.picture.items() if same(leaf, old)]
        if theirs:
            facts[names[path]] = f"the small model's {theirs[0]}" + (" and its own" if ours else "")
        else:
            facts[names[path]] = "fresh" if ours else "from neither model"
    return facts


def _key(handed: Handed) -> bytes:
    rng = handed.rng.get("params") if isinstance(handed.rng, dict) else handed.rng
    return np.asarray(jax.random.key_data(rng)).tobytes()


def cases(rng: np.random.Generator) -> list[Case]:
    """Inputs whose width differs from that of the layers, so that the first layer fits nowhere else."""
    features, width = (int(n) for n in rng.choice(np.arange(2, 7), size=2, replace=False))
    x = rng.normal(size=(int(rng.integers(1, 5)), width)).astype(np.float32)
    full, extra = rng.integers(2, 5), rng.integers(1, 4)
    return [Case((float(rng.integers(1000)), x, float(full), float(extra), float(features)))]


LESSON = Lesson(
    name="partial_init",
    reference=partial_init,
    cases=cases,
    observe=partial(observe, facts=copy_facts),
    unseen="The two numbers do not show the copy. It is checked on the tree that `solve` holds in a "
    "variable or passes to a function; it cannot be seen if the models are initialised inside `jit`.",
    mistakes=(
        _edited(
            "off by one in the layer name",
            "Layers are numbered from zero: the first N are Dense_0 to Dense_<N-1>, range(N).",
            lambda small, big, full, extra: _copied(small, big, {i: i for i in range(full - 1)}),
            lambda small, big, full, extra: _copied(small, big, {i: i for i in range(1, full)}),
            lambda small, big, full, extra: _copied(small, big, {i: i for i in range(full + 1)}),
            lambda small, big, full, extra: _copied(small, big, {i + 1: i for i in range(full)}),
        ),
        _edited(
            "the bias dropped or left behind",
            "A layer is its kernel and its bias. Copy both.",
            _kernels_only,
            _without_bias,
        ),
        _edited(
            "the outer `params` level lost",
            'The layers are below a key for the collection: params["params"]["Dense_0"]. Merged one level '
            "too high, the trees lose the extra layers or hold the copies twice.",
            lambda small, big, full, extra: {**big, **{f"Dense_{i}": small[f"Dense_{i}"] for i in range(full)}},
            lambda small, big, full, extra: graft(big, small, only=f"Dense_[:{full}]/**")[0],
            lambda small, big, full, extra: {**big, **small["params"]},
            lambda small, big, full, extra: {**big, **small},
        ),
        _edited(
            "`dense_0` for `Dense_0`",
            "Flax names a layer after its class, with a capital letter. Reading another spelling fails; "
            "writing to it adds a layer that nothing reads.",
            lambda small, big, full, extra: _renamed(small, big, full, "dense"),
            lambda small, big, full, extra: _renamed(small, big, full, "Dense"),
        ),
        _edited(
            "the whole tail copied",
            "The copy reached into the last layers. The extra layers have no original in the small model: "
            "they stay fresh.",
            lambda small, big, full, extra: _copied(small, big, {i: min(i, full - 1) for i in range(full + extra)}),
            _in_turn,
            lambda small, big, full, extra: _copied(small, big, {i + extra: i for i in range(full)}),
        ),
        mistake(
            "both inits from one key",
            "With one key the two models start with the same first layers, so the copy changes nothing "
            "and proves nothing. Split the key.",
            _one_key,
        ),
        _edited(
            "nothing copied",
            "The tree that was counted is the bigger model as it was initialised. An edit returns a new tree: keep it.",
            lambda small, big, full, extra: big,
        ),
        _edited(
            "the original dict mutated",
            "The tree is right, but the dict that `init` returned was edited in place, so others that hold "
            "it now have other parameters. Make a new dict.",
            _in_place,
        ),
    ),
)
