"""Every new leaf has a buffer of its own: a step that donates the result takes nothing else away."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import paramend as pm


def tree():
    return {"a": jnp.arange(4.0), "b": jnp.arange(4.0) + 1, "l": {str(n): {"w": jnp.full((2, 2), n)} for n in range(2)}}


def buffers(*trees):
    arrays = [jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(trees)]
    return [x.unsafe_buffer_pointer() for x in arrays if isinstance(x, jax.Array)]


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def check_own(made, *others):
    own = buffers(made)
    assert len(own) == len(set(own)) > 0
    assert not set(own) & set(buffers(*others))


X = np.arange(4.0, dtype="float32")
EDITS = {
    "set": lambda at, x: at.set(x),
    "set by path": lambda at, x: at.set(dict.fromkeys(at.paths, x)),
    "set a slice": lambda at, x: at[:].set(x),
    "an empty slice": lambda at, x: at[:0].zero(),
    "apply of a constant": lambda at, x: at.apply(lambda leaf: x),
    "apply of another spec": lambda at, x: at.apply(lambda leaf: x.reshape(2, 2), keep_spec=False),
    "apply of the identity": lambda at, x: at.apply(lambda leaf: leaf),
    "cast to the same": lambda at, x: at.cast("float32"),
    "clip to nothing": lambda at, x: at.clip(None, None),
    "an initializer": lambda at, x: at.reinit(lambda key, shape, dtype: x),
    "a slice of everything": lambda at, x: at[...].get(),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_gives_each_leaf_a_buffer_of_its_own(name):
    x, params = jnp.asarray(X), {"a": jnp.ones(4), "b": jnp.ones(4)}
    check_own(EDITS[name](pm.at(params, "*"), x), x, params)


@pytest.mark.parametrize("name", [name for name in EDITS if name != "an initializer"])
@pytest.mark.parametrize("library", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_a_later_edit_in_place_changes_one_leaf_alone(name, library):
    x, params = library(X), {"a": library(X), "b": library(X)}
    made = EDITS[name](pm.at(params, "*"), x)
    before = made["b"].tolist()
    made["a"][...] = 9
    assert made["b"].tolist() == before
    assert all(leaf.tolist() == X.tolist() for leaf in (x, *params.values()))


def test_a_step_that_donates_the_result_leaves_what_it_came_from():
    x, params = jnp.asarray(X), tree()
    made = pm.at(params, ["a", "b"]).set(x)
    jax.jit(lambda p: jax.tree.map(jnp.add, p, p), donate_argnums=0)({name: made[name] for name in "ab"})
    assert x.tolist() == X.tolist() and params["a"].tolist() == X.tolist()


def test_a_graft_gives_each_leaf_a_buffer_of_its_own():
    x, zero = jnp.arange(4.0), jnp.zeros((2, 2))
    source = {"a": x, "b": x, "l": {"0": {"w": zero}, "1": {"w": zero}}}
    for target in (tree(), jax.eval_shape(tree)):
        check_own(pm.graft(target, source)[0], source, target if target is not source else ())
    check_own(pm.graft(jax.tree.map(lambda x: x.astype("bfloat16"), tree()), source, dtype="source")[0], source)
    keys = {"a": jax.random.key(0), "b": jax.random.key(1)}
    check_own(pm.graft(keys, dict.fromkeys("ab", jax.random.key(2)))[0], keys)


def test_a_graft_of_optimizer_states_does_too():
    tx = optax.adam(1e-3)
    new, old = (pm.graft_opt_state(tx.init(tree()), state := tx.init(tree()))[0], state)
    check_own(new, old)
    counts = tx.init(tree()), tx.init(tree())
    check_own(pm.graft({"params": tree(), "opt": counts[0]}, {"params": tree(), "opt": counts[1]})[0], counts[1])


class Blocks(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(n)) for n in range(2)])


def test_the_copies_of_a_deeper_model_have_buffers_of_their_own():
    order = {"order": [0, 0, 1, 1], "identity": None}
    check_own(pm.deepen(tree(), layers="l[*]", **order)[0])
    check_own(pm.deepen(nnx.state(Blocks()), layers="layers[*]", **order)[0])
    model = Blocks()
    check_own(nnx.state(pm.deepen(model, layers="layers[*]", **order)[0]))
    pm.deepen_(model, layers="layers[*]", **order)
    check_own(nnx.state(model))
    assert len(buffers(nnx.state(model))) == 8


def test_layers_stacked_and_taken_apart_have_buffers_of_their_own():
    layers = {f"layers_{n}": {"w": jnp.full((2, 2), n)} for n in range(2)}
    stacked = pm.stack_layers(layers, "layers_<n>", into="layers")
    check_own(stacked, layers)
    check_own(pm.unstack_layers(stacked, "layers", into="layers_<n>"), stacked)
    one = {"layers": {"w": jnp.ones((1, 2)), "b": jnp.ones(1)}}
    check_own(pm.unstack_layers(one, "layers", into="layers_<n>"), one)


def test_tied_tensors_of_a_file_are_one_array_each_in_jax(tmp_path):
    shared = torch.ones(3)
    torch.save({"a": shared, "b": shared}, tmp_path / "m.pt")
    check_own(pm.load(tmp_path / "m.pt", "jax"))
    tied = pm.load(tmp_path / "m.pt", "torch")
    assert tied["a"].data_ptr() == tied["b"].data_ptr()
