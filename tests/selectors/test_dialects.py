"""Paths as JAX and Flax write them are read; patterns of other tools get what to write instead."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

import paramend as pm
from paramend.errors import BadArgument, NoMatch, SelectorError


def params():
    return {"params": {f"Dense_{n}": {"kernel": jnp.full((2, 2), n), "bias": jnp.full(2, n)} for n in range(4)}}


TREES = {
    "dicts": params,
    "an optax state": lambda: optax.adam(1e-3).init(params()),
    "Equinox": lambda: eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0)),
    "an NNX state": lambda: nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
    "odd keys": lambda: {"it's": {'a "b"': [np.ones(1)], "c/d": np.ones(1), "e\\f": np.ones(1)}, "w*": np.ones(1)},
}


@pytest.mark.parametrize("name", TREES)
def test_paths_that_jax_writes_find_the_leaves_that_they_name(name):
    tree = TREES[name]()
    leaves = [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if hasattr(leaf, "shape")]
    assert leaves
    for path, leaf in leaves:
        assert pm.at(tree, jax.tree_util.keystr(path)).one() is leaf
        if "nnx" not in str(type(tree)) and "State" not in type(tree).__name__:
            assert pm.at(tree, path).one() is leaf


def test_a_position_at_the_root_stays_a_position():
    assert pm.at({"1": {"w": np.ones(1)}, "2": {"w": np.ones(1)}}, "[0].w").paths == ["1/w"]
    assert pm.at({"a": [np.ones(1)]}, ".a[0]").paths == ["a/0"]


def test_tuples_of_keys_as_in_flattened_dicts():
    tree = params() | {"list": [jnp.ones(1), jnp.zeros(1)]}
    for keys, leaf in flatten_dict(params()).items():
        assert pm.at(tree, keys).paths == ["/".join(keys)]
        assert jnp.array_equal(pm.at(tree, keys).one(), leaf)
    assert pm.at(tree, ("list", 1)).paths == ["list/1"]
    both = [("params", "Dense_0", "bias"), ("params", "Dense_3", "bias")]
    assert pm.at(tree, both).paths == ["params/Dense_0/bias", "params/Dense_3/bias"]
    assert pm.at(tree, ("params/Dense_0/bias", "**/Dense_3/*")).paths == [
        "params/Dense_0/bias",
        "params/Dense_3/kernel",
        "params/Dense_3/bias",
    ]
    assert pm.at({"a": np.ones(1), "b": np.ones(1)}, ("a", "b")).paths == ["a", "b"]
    with pytest.raises(NoMatch, match='"params/Dense_9/bias" matches none'):
        pm.at(tree, ("params", "Dense_9", "bias"))
    selector = pm.sel(("params", "Dense_0", "bias"))
    assert repr(selector) == "pm.sel(('params', 'Dense_0', 'bias'))" and eval(repr(selector)) == selector


def test_a_flattened_dict_is_selected_edited_and_renamed_like_the_nested_one(tmp_path):
    flat = flatten_dict(params())
    assert pm.at(flat, "**").paths == pm.at(params(), "**").paths
    for edit in (
        lambda tree: pm.at(tree, "params/Dense_[-1]/kernel").zero(),
        lambda tree: pm.at(tree, "params/Dense_0/**").delete(),
        lambda tree: pm.at(tree, "params/Dense_<n>/**").rename("params/layers_<n+1>/**"),
    ):
        found = edit(flat)
        wanted = flatten_dict(edit(params()))
        assert list(found) == list(wanted)
        assert all(jnp.array_equal(found[key], wanted[key]) for key in wanted)
    pm.save(flat, tmp_path / "m.safetensors")
    assert list(pm.load(tmp_path / "m.safetensors")) == ["/".join(keys) for keys in flat]


INSTEAD = {
    "params/Dense_[0-2]/kernel": ('"params/Dense_[0:3]/kernel"', 3),
    "params/Dense_[0,2-3]/kernel": ('"params/Dense_[0,2,3]/kernel"', 3),
    "params/Dense_{0..2}/kernel": ('"params/Dense_[0:3]/kernel"', 3),
    "params/Dense_?/kernel": ('"params/Dense_*/kernel"', 4),
    ".*kernel": ("re.compile('.*kernel')", 4),
    r"params/Dense_\d/kernel": (r"re.compile('params/Dense_\\d/kernel')", 4),
    "^params/Dense_0": ("re.compile('^params/Dense_0.*')", 2),
    "params/Dense_0/(kernel|bias)": ("re.compile('params/Dense_0/(kernel|bias)')", 2),
    "kernel$": ("re.compile('.*kernel$')", 4),
    "~**/kernel": ('~pm.sel("**/kernel")', 4),
    "!params/Dense_0/kernel": ('~pm.sel("params/Dense_0/kernel")', 7),
    "not **/kernel": ('~pm.sel("**/kernel")', 4),
    "**/kernel|**/bias": ('pm.sel("**/kernel") | pm.sel("**/bias")', 8),
    "params/Dense_0/kernel | params/Dense_1/bias": (
        'pm.sel("params/Dense_0/kernel") | pm.sel("params/Dense_1/bias")',
        2,
    ),
    "**/kernel && **/Dense_0/*": ('pm.sel("**/kernel") & pm.sel("**/Dense_0/*")', 1),
    "**/kernel, **/Dense_0/*": ('["**/kernel", "**/Dense_0/*"]', 5),
}


@pytest.mark.parametrize("text", INSTEAD)
def test_text_in_another_dialect_gets_what_to_write_instead(text):
    code, count = INSTEAD[text]
    with pytest.raises((NoMatch, SelectorError)) as caught:
        pm.at(params(), text)
    assert code in caught.value.hint
    assert len(pm.at(params(), eval(code, {"pm": pm, "re": re}))) == count


def test_a_hint_never_offers_far_more_than_was_typed():
    llama = {f"model.layers.{n}.{name}.weight": np.ones(1) for n in range(4) for name in ("mlp", "attn", "norm")}
    llama |= {"model.embed_tokens.weight": np.ones(1), "model.norm.weight": np.ones(1)}
    for text in (
        "lm_head.weight",
        "**.lm_head.weight",
        "model.lm_head.weight",
        "lm_head.*",
        "lm_head.**",
        "hd.weight",
        "weight",
    ):
        with pytest.raises(NoMatch) as caught:
            pm.at(llama, text)
        assert all(len(pm.at(llama, near)) == 1 for near in caught.value.near)
        assert "**.weight" not in str(caught.value)


BIG = np.arange(10_000.0).reshape(100, 100)


@pytest.mark.parametrize(
    "misuse",
    [
        lambda tree: pm.at("**/kernel", tree),
        lambda tree: pm.at(tree, tree),
        lambda tree: pm.at(tree, BIG),
        lambda tree: pm.at(tree, {"w": BIG}),
        lambda tree: pm.param_count("**", tree),
        lambda tree: pm.labels(tree, BIG),
        lambda tree: pm.labels({"a": "**"}, tree),
        lambda tree: pm.at(tree, "w").cast(BIG),
        lambda tree: pm.at(tree, "w").noise(0.1, seed=BIG),
        lambda tree: pm.at(tree, "w").noise(BIG),
        lambda tree: pm.at(tree, "w").reinit(BIG),
        lambda tree: pm.at(tree, "w").apply(BIG),
        lambda tree: pm.at(tree, "w").add({"w": BIG}),
        lambda tree: pm.at(tree, "w").fill(BIG.tolist()),
        lambda tree: pm.at(tree, "w").rename(BIG),
        lambda tree: pm.at(tree, "w")[{"w": BIG}],
    ],
)
def test_a_message_never_holds_the_elements_of_an_array(misuse):
    with pytest.raises(pm.errors.ParamendError) as caught:
        misuse({"w": BIG})
    assert len(str(caught.value)) < 300 and "..." not in str(caught.value) and "[0.0" not in str(caught.value)


def test_what_is_no_tree_but_has_one(tmp_path):
    import flax.linen as nn
    import torch

    pm.save({"w": np.ones(1)}, tmp_path / "m.safetensors")
    for given, said, hint in (
        (nn.Dense(2), "holds no parameters itself.*pass its params", "model.init"),
        (nn.Dense, "this is the class flax.linen", "its parameters"),
        (torch.nn.Linear, "this is the class torch.nn", "an instance"),
        (lambda params: params, "this is a function: pass its params", "pm.at(params, ...)"),
        (optax.adam(1e-3), "an optimizer holds no arrays; its state does", "tx.init(params)"),
        (str(tmp_path / "m.safetensors"), "is a path", "pm.open("),
        (tmp_path / "m.safetensors", "is a path", "pm.open("),
        ("**/kernel", 'the tree comes first, then the selector "\\*\\*/kernel"', 'pm.at(tree, "**/kernel")'),
        (re.compile("w"), "the tree comes first", "pm.at(tree, re.compile('w'))"),
    ):
        for use in (lambda it: pm.at(it, "**/w"), pm.param_count):
            with pytest.raises(BadArgument, match=said) as caught:
                use(given)
            assert hint in caught.value.hint
    assert pm.param_count({}) == pm.param_count([]) == 0


def test_in_place_verbs_on_jax_arrays_name_the_verb_that_works():
    tree = params()
    with pytest.raises(pm.errors.Unsupported, match="cannot change in place: a JAX array never changes") as caught:
        pm.at(tree, "**/Dense_0/kernel")[0].fill_(3)
    code = caught.value.hint.partition("tree: ")[2]
    assert code == 'tree = pm.at(tree, "params/Dense_0/kernel")[0].fill(3)'
    scope = {"pm": pm, "tree": tree}
    exec(code, scope)
    assert scope["tree"]["params"]["Dense_0"]["kernel"].tolist() == [[3, 3], [0, 0]]
