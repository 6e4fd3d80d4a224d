"""Selector values: text, algebra, functions, classes, masks; and what is said when nothing matches."""

import re
from collections import OrderedDict
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import assume, given, settings, strategies as st

import paramend as pm
from paramend.errors import BadArgument, NoMatch, OutOfRange, SelectorError, Unsupported, WrongCount
from paramend.selectors.selector import resolve, slice_of
from paramend.trees.tree import Tree


def ones(*shape):
    return np.ones(shape, np.float32)


def dense(inner=2, outer=3):
    return {"kernel": ones(inner, outer), "bias": ones(outer)}


FLAX = {
    "params": {**{f"Dense_{i}": dense() for i in range(12)}, "LayerNorm_0": {"scale": ones(3), "bias": ones(3)}},
    "batch_stats": {"BatchNorm_0": {"mean": ones(3), "var": ones(3)}},
}
BARE = FLAX["params"]
HAIKU = {
    "mlp/~/linear_0": {"w": ones(2, 2), "b": ones(2)},
    "mlp/~/linear_1": {"w": ones(2, 2), "b": ones(2)},
    "a//b": {"w": ones(2)},
}
GPT = OrderedDict(
    (f"model.layers.{i}.{name}.weight", torch.ones(2))
    for i in range(4)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "mlp.up_proj")
)
GPT["lm_head.weight"] = torch.zeros(2)
LISTS = {"layers": [{"w": ones(2)}, {"w": ones(2)}, {"w": ones(2)}], "head": {"kernel": ones(2)}}
MIXED = {"w": ones(4, 2), "steps": np.int32(3), "half": np.ones(2, np.float16), "on": np.array([True])}


def paths(tree, selector):
    return pm.at(tree, selector).paths


# ---- algebra

ATOMS = ["**", "**/kernel", "**/bias", "params/**", "**/Dense_[-1]/**", "**/Dense_{0,1}/*", "batch_stats/**"]
selectors = st.recursive(
    st.sampled_from(ATOMS).map(pm.sel),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] & pair[1]),
        inner.map(lambda part: ~part),
        inner.map(lambda part: part.where(ndim=1)),
    ),
    max_leaves=5,
)


def module_with_ties():
    net = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("a", "b", "c")})
    net["c"].weight = net["a"].weight
    return net


TIED = module_with_ties()
TIED_ATOMS = ["**", "a.weight", "c.weight", "b.*", "**.bias", "{b,c}.**"]


def chosen(selector, tree=FLAX):
    """The leaves by number, none if there is no match."""
    leaves = Tree(tree)
    try:
        return {leaves.ties.get(number, number) for number in resolve(selector, leaves)}
    except NoMatch:
        return set()


everything = set(range(len(paths(FLAX, "**"))))


@settings(max_examples=100, deadline=None)
@given(selectors, selectors, selectors)
def test_algebra_is_that_of_sets(a, b, c):
    assume(chosen(a) and chosen(b) and chosen(c))  # in a union each part must match something
    assert chosen(a | b) == chosen(a) | chosen(b)
    assert chosen(a & b) == chosen(a) & chosen(b)
    assert chosen(~a) == everything - chosen(a)
    assert chosen(~(a & b)) == chosen(~a) | chosen(~b)
    assert chosen(~(a | b)) == chosen(~a & ~b)
    assert chosen(~~a) == chosen(a)
    assert chosen(a | (a & b)) == chosen(a) or not chosen(a & b)
    assert chosen(a & (a | b)) == chosen(a)
    assert chosen(a | b) == chosen(b | a)
    assert chosen(a & b) == chosen(b & a)
    assert chosen(a & (b | c)) == chosen(a & b) | chosen(a & c)
    assert chosen((a | b) | c) == chosen(a | (b | c)) == chosen([a, b, c])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(TIED_ATOMS).map(pm.sel), st.sampled_from(TIED_ATOMS).map(pm.sel))
def test_algebra_is_over_leaves_and_a_tied_leaf_is_one(a, b):
    assert chosen(a | b, TIED) == chosen(a, TIED) | chosen(b, TIED)
    assert chosen(a & b, TIED) == chosen(a, TIED) & chosen(b, TIED)
    assert chosen(~a, TIED) == chosen("**", TIED) - chosen(a, TIED)
    assert chosen(~(a | b), TIED) == chosen(~a & ~b, TIED)


def test_a_tied_leaf_is_counted_once_and_found_by_each_of_its_paths():
    assert len(pm.at(TIED, "**")) == 5
    assert paths(TIED, "c.weight") == ["c.weight"]
    assert paths(TIED, "{a,c}.weight") == ["a.weight"]
    assert paths(TIED, pm.sel("**") & ~pm.sel("a.weight")) == ["a.bias", "b.weight", "b.bias", "c.bias"]


@settings(max_examples=100, deadline=None)
@given(selectors)
def test_a_selector_prints_as_what_rebuilds_it(selector):
    rebuilt = eval(repr(selector), {"pm": pm})
    assert repr(rebuilt) == repr(selector)
    assert rebuilt == selector
    assert hash(rebuilt) == hash(selector)
    assert chosen(rebuilt) == chosen(selector)


PRINTED = [
    (pm.sel("**/kernel"), 'pm.sel("**/kernel")'),
    (pm.sel('"a/b"/w'), """pm.sel('"a/b"/w')"""),
    (pm.sel(r"a\*b"), r'pm.sel("a\\*b")'),
    (pm.sel("it's"), """pm.sel("it's")"""),
    (pm.sel('"it\'s"'), """pm.sel('"it\\'s"')"""),
    (pm.sel("a\nb"), r'pm.sel("a\nb")'),
    (pm.sel("a") | "b" | "c", 'pm.sel("a") | pm.sel("b") | pm.sel("c")'),
    ("a" & pm.sel("b"), 'pm.sel("a") & pm.sel("b")'),
    ((pm.sel("a") | "b") & ~(pm.sel("c") & "d"), '(pm.sel("a") | pm.sel("b")) & ~(pm.sel("c") & pm.sel("d"))'),
    (pm.sel(["a", "b"]), 'pm.sel("a") | pm.sel("b")'),
    (pm.sel("**").where(dtype="bf16", min_size=2), 'pm.sel("**").where(dtype="bfloat16", min_size=2)'),
    ((pm.sel("a") & "b").where(ndim=2), '(pm.sel("a") & pm.sel("b")).where(ndim=2)'),
    (pm.sel("a")[-1], 'pm.sel("a")[-1]'),
    (pm.sel("a")[:4, ..., ::2], 'pm.sel("a")[:4, ..., ::2]'),
    (pm.sel(re.compile("a|b")), "pm.sel(re.compile('a|b'))"),
    (pm.sel(re.compile("a", re.IGNORECASE)), "pm.sel(re.compile('a', re.IGNORECASE))"),
    (pm.sel(torch.nn.Linear), "pm.sel(torch.nn.modules.linear.Linear)"),
]


@pytest.mark.parametrize(("selector", "text"), PRINTED, ids=[str(text) for _, text in PRINTED])
def test_how_selectors_print(selector, text):
    assert text is None or repr(selector) == text
    assert repr(eval(repr(selector), {"pm": pm, "re": re, "torch": torch})) == repr(selector)


# ---- each text must match something

UNMATCHED = [
    ["**/kernel", "**/nothing"],
    ("**/nothing", "**/kernel"),
    pm.sel("**/kernel") | "nothing",
    pm.sel("**") & "nothing",
    ~pm.sel("nothing"),
    pm.sel("**") & ~pm.sel("nothing"),
    pm.sel("nothing").where(ndim=1),
    pm.sel("**/kernel") & "**/bias",
    ~pm.sel("**"),
    pm.sel("**").where(ndim=9),
    re.compile("kernel"),
    lambda path, spec: False,
    nnx.Linear,
    [pm.sel("**/kernel"), pm.sel("**").where(ndim=9)],
]


@pytest.mark.parametrize("selector", UNMATCHED, ids=[repr(pm.sel(selector)) for selector in UNMATCHED])
def test_what_matches_nothing_is_an_error(selector):
    with pytest.raises(NoMatch) as caught:
        pm.at(FLAX, selector)
    assert isinstance(caught.value, LookupError)
    assert caught.value.code == "no-match"


def test_a_slice_of_positions_that_selects_nothing_is_an_error():
    assert len(pm.at(FLAX, "params/Dense_[10:99]/kernel")) == 2
    with pytest.raises(NoMatch, match=r"Dense_\[99:\]"):
        pm.at(FLAX, "params/Dense_[99:]/kernel")


def test_count_demands_an_exact_number():
    assert len(pm.at(FLAX, "**/kernel", count=12)) == 12
    with pytest.raises(WrongCount) as caught:
        pm.at(FLAX, "**/kernel", count=11)
    assert (caught.value.found, caught.value.wanted) == (12, 11)


# ---- beside text

OTHERS = [
    (re.compile(r"params/Dense_1\d?/kernel"), FLAX, [f"params/Dense_{i}/kernel" for i in (1, 10, 11)]),
    (re.compile(r".*MEAN", re.IGNORECASE), FLAX, ["batch_stats/BatchNorm_0/mean"]),
    (re.compile(r"model\.layers\.0\..*q_proj.*"), GPT, ["model.layers.0.self_attn.q_proj.weight"]),
    (lambda path, spec: spec.ndim == 2 and "Dense_1" in path, FLAX, [f"params/Dense_{i}/kernel" for i in (1, 10, 11)]),
    (partial(lambda name, path, spec: path == name, "steps"), MIXED, ["steps"]),
    (pm.sel("**").where(dtype="float"), MIXED, ["w", "half"]),
    (pm.sel("**").where(dtype="int"), MIXED, ["steps"]),
    (pm.sel("**").where(dtype=np.dtype("float32")), MIXED, ["w"]),
    (pm.sel("**").where(dtype=np.dtype("float64")), {"w": np.ones(1, "float32"), "v": np.ones(1)}, ["v"]),
    (pm.sel("**").where(dtype=np.dtype("int64")), {"w": np.ones(1, "int32"), "v": np.ones(1, "int64")}, ["v"]),
    (pm.sel("**").where(dtype="bool"), MIXED, ["on"]),
    (pm.sel("**").where(dtype="fp16"), MIXED, ["half"]),
    (pm.sel("**").where(dtype=np.float32), MIXED, ["w"]),
    (pm.sel("**").where(dtype=torch.float16), MIXED, ["half"]),
    (pm.sel("**").where(dtype=jnp.float32), MIXED, ["w"]),
    (pm.sel("**").where(shape=(4, 2)), MIXED, ["w"]),
    (pm.sel("**").where(shape=[4, 2]), MIXED, ["w"]),
    (pm.sel("**").where(ndim=0), MIXED, ["steps"]),
    (pm.sel("**").where(min_size=2, max_size=2), MIXED, ["half"]),
    ({"w": True, "steps": False, "half": True, "on": False}, MIXED, ["w", "half"]),
    ({"layers": [False, True, {"w": True}], "head": False}, LISTS, ["layers/1/w", "layers/2/w"]),
    ({"layers": True, "head": np.bool_(False)}, LISTS, ["layers/0/w", "layers/1/w", "layers/2/w"]),
    (True, LISTS, ["layers/0/w", "layers/1/w", "layers/2/w", "head/kernel"]),
    ([True, {"a": False}], [ones(1), {"a": ones(1)}], ["0"]),
    (torch.nn.BatchNorm1d, torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2, affine=False)),
     ["1.running_mean", "1.running_var", "1.num_batches_tracked"]),
    (torch.nn.Module, torch.nn.Sequential(torch.nn.Linear(2, 2)), ["0.weight", "0.bias"]),
    (list, LISTS, ["layers/0/w", "layers/1/w", "layers/2/w"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("selector", "tree", "expected"), OTHERS, ids=[type(pm.sel(row[0])).__name__ for row in OTHERS]
)
def test_selectors_beside_text(selector, tree, expected):
    assert paths(tree, selector) == expected


def test_an_object_that_can_be_called_is_a_predicate():
    class Big:
        def __call__(self, path, spec):
            return spec.size > 4

    assert paths(MIXED, Big()) == ["w"]


def test_a_function_sees_path_and_spec_of_array_leaves_only():
    seen = {}
    pm.at({**MIXED, "name": "x", "none": None, "lr": 0.1, "f": len}, lambda path, spec: seen.setdefault(path, spec))
    assert {path: str(spec) for path, spec in seen.items()} == {
        "w": "float32[4,2]",
        "steps": "int32[]",
        "half": "float16[2]",
        "on": "bool[1]",
    }


REFUSED = [
    (None, "is not a selector"),
    (3, "is not a selector"),
    ([], "is not a selector"),
    ({"w": True}, "has nothing at steps"),
    ({"w": 1, "steps": True, "half": True, "on": True}, "holds bools"),
    ({"w": {"v": True}, "steps": True, "half": True, "on": True}, "has nothing at w"),
    ({"w": True, "steps": True, "half": True, "on": True, "more": True}, "has more, which is not a leaf"),
    (np.ones(3), "holds bools"),
]


@pytest.mark.parametrize(("what", "words"), REFUSED, ids=[repr(what) for what, _ in REFUSED])
def test_what_is_no_selector(what, words):
    with pytest.raises(BadArgument, match=words):
        pm.at(MIXED, what)


def test_a_source_captures_and_does_not_reckon():
    with pytest.raises(SelectorError, match="only captures") as caught:
        pm.sel("layers/<n+1>/w")
    assert caught.value.span == (7, 12)


# ---- slices


def test_a_slice_belongs_to_the_whole_selection():
    selector, index = slice_of(pm.sel("w")[1:3])
    assert (selector, index) == (pm.sel("w"), slice(1, 3))
    assert slice_of("w") == (pm.sel("w"), None)
    edited = pm.at(MIXED, pm.sel("w")[1:3]).zero()
    assert edited["w"].tolist() == [[1, 1], [0, 0], [0, 0], [1, 1]]


@pytest.mark.parametrize(
    "selector",
    [
        pm.sel("w")[0] | "half",
        pm.sel("w")[0] & "w",
        ~pm.sel("w")[0],
        [pm.sel("w")[0], "half"],
        pm.sel("w")[0][0],
        pm.sel("w")[0].where(ndim=2),
    ],
    ids=repr,
)
def test_a_slice_of_a_part_is_refused_and_not_forgotten(selector):
    with pytest.raises(BadArgument, match="slice"):
        pm.at(MIXED, selector)


def test_a_selector_is_no_sequence():
    with pytest.raises(TypeError, match="not iterable"):
        list(pm.sel("w"))


# ---- near misses: what is offered must match

NEAR = [
    (FLAX, "Params/Dense_0/kernel", NoMatch, ["params/Dense_0/kernel"]),
    (FLAX, "params/dense_0/kernel", NoMatch, ["params/Dense_0/kernel"]),
    (FLAX, "PARAMS/DENSE_0/KERNEL", NoMatch, ["params/Dense_0/kernel"]),
    (FLAX, "params/Dense_12/kernel", NoMatch, ["params/Dense_11/kernel"]),
    (FLAX, "params/Dense_-1/kernel", NoMatch, ["params/Dense_1/kernel"]),
    (FLAX, "Dense_0/kernel", NoMatch, ["params/Dense_0/kernel"]),
    (FLAX, "dense_0/kernel", NoMatch, ["**/Dense_0/kernel"]),
    (FLAX, "params/params/Dense_0/kernel", NoMatch, ["params/Dense_0/kernel"]),
    (FLAX, "model/params/Dense_0/kernel", NoMatch, ["params/Dense_0/kernel"]),
    (BARE, "params/Dense_0/kernel", NoMatch, ["Dense_0/kernel"]),
    (FLAX, "params/Dense_0", NoMatch, ["params/Dense_0/**"]),
    (FLAX, "params.Dense_0", NoMatch, ["params.Dense_0.**"]),
    (FLAX, "params", NoMatch, ["params/**"]),
    (FLAX, "**/Dense_[-1]", NoMatch, ["**/Dense_[-1]/**"]),
    (FLAX, "params/Dense_0/kernal", NoMatch, ["params/Dense_0/kernel"]),
    (FLAX, "params/Dense_0/kernel/w", NoMatch, ["params/Dense_0/kernel"]),
    (FLAX, "params/Dense_0/weight", NoMatch, ["params/Dense_0/**"]),
    (FLAX, "**/kernal", NoMatch, ["**/kernel"]),
    (FLAX, "params/**/Dense_3/krnel", NoMatch, ["params/**/Dense_3/kernel"]),
    (FLAX, "**/Dens_0/**/kernel", NoMatch, ["**/Dense_0/**/kernel"]),
    (FLAX, "**/dense_[-1]/Kernel", NoMatch, ["**/Dense_[-1]/kernel"]),
    (FLAX, "params/Dens_*/kernel", NoMatch, ["params/Dense_*/kernel"]),
    (FLAX, "params/*_3/kernl", NoMatch, ["params/*_3/kernel"]),
    (FLAX, "**/*_Scale", NoMatch, None),
    (FLAX, "**/{kernal,biass}", NoMatch, ["**/{kernel,bias}"]),
    (FLAX, "params/dense_<n>/kernel", NoMatch, ["params/Dense_<n>/kernel"]),
    (FLAX, "params/Dense/0/kernel", NoMatch, ["params/Dense_0/kernel"]),
    (FLAX, "params/Dense0/kernel", NoMatch, ["params/Dense_0/kernel"]),
    (FLAX, "params/Dense[-1]/kernel", NoMatch, ["params/Dense_[-1]/kernel"]),
    (FLAX, "params/layer_norm_0/scale", NoMatch, ["params/LayerNorm_0/scale"]),
    (FLAX, "params/Dense_[20:]/kernel", NoMatch, ["params/Dense_[:]/kernel"]),
    (FLAX, "batch_stats/Dense_0/kernel", NoMatch, ["**/Dense_0/kernel"]),
    (FLAX, "kernel", NoMatch, ["**/kernel"]),
    (FLAX, "something/else", NoMatch, None),
    (FLAX, "params/Dense_[12]/kernel", OutOfRange, ["params/Dense_[11]/kernel"]),
    (FLAX, "params/Dense_[-13]/kernel", OutOfRange, ["params/Dense_[-12]/kernel"]),
    (FLAX, "params/Dense_[99]", OutOfRange, ["params/Dense_[11]/**"]),
    (LISTS, "layers/3/w", NoMatch, ["layers/2/w"]),
    (LISTS, "layers_0/w", NoMatch, ["layers/0/w"]),
    (LISTS, "layers_[-1]/w", NoMatch, ["layers[-1]/w"]),
    (LISTS, "layer[-1]/w", NoMatch, ["layers[-1]/w"]),
    (LISTS, "layers[3]/w", OutOfRange, ["layers[2]/w"]),
    (LISTS, "layers[9]", OutOfRange, ["layers[2]/**"]),
    (HAIKU, "mlp/linear_0/w", NoMatch, ["mlp/~/linear_0/w"]),
    (HAIKU, '"mlp/linear_0"/w', NoMatch, None),
    (HAIKU, '"mlp/~/linear_0/w"', NoMatch, ["mlp/~/linear_0/w"]),
    (HAIKU, "a/b/w", NoMatch, None),
    (GPT, "model.layers.4.mlp.down_proj.weight", NoMatch, ["model.layers.3.mlp.down_proj.weight"]),
    (GPT, "model.layers[4].mlp.down_proj.weight", OutOfRange, ["model.layers[3].mlp.down_proj.weight"]),
    (GPT, "model.layers[0].mlp.down_proj.bias", NoMatch, ["model.layers[0].mlp.down_proj.**"]),
    (GPT, "layers.0.mlp.down_proj.weight", NoMatch, ["model.layers.0.mlp.down_proj.weight"]),
    (GPT, "model.layers.0.mlp.down_proj", NoMatch, ["model.layers.0.mlp.down_proj.**"]),
    (GPT, "model.layers.*.attn.q_proj.weight", NoMatch, ["model.layers.*.self_attn.q_proj.weight"]),
    (GPT, "model/layers_0/mlp/down_proj/weight", NoMatch, ["model/layers/0/mlp/down_proj/weight"]),
    (GPT, "**.{q,k}_prj.weight", NoMatch, None),
    (GPT, "transformer.h.0.mlp.down_proj.weight", NoMatch, ["**.0.mlp.down_proj.weight"]),
    (GPT, re.compile("q_proj"), NoMatch, None),
    (GPT, re.compile('q["_]PROJ', re.IGNORECASE), NoMatch, None),
    (TIED, "fc.weight", NoMatch, None),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "text", "kind", "near"), NEAR, ids=[str(row[1]) for row in NEAR])
def test_a_near_miss_is_offered_and_matches(tree, text, kind, near):
    with pytest.raises(NoMatch) as caught:
        pm.at(tree, text)
    error = caught.value
    assert type(error) is kind
    assert (text.pattern if isinstance(text, re.Pattern) else text) in str(error)
    assert error.hint
    if near is not None:
        assert list(error.near) == near
    for offered in [*error.near, *quoted(error.hint)]:
        assert len(pm.at(tree, offered)) > 0


def quoted(hint):
    """The selectors that a hint quotes, or the regular expression that it is."""
    if hint.startswith("re.compile("):
        return [eval(hint)]
    return [eval(found) for found in re.findall(r'r?"[^"]*"|\'[^\']*\'', hint)]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ('"mlp/linear_0"/w', "mlp/~/linear_0/w"),
        ("a/b/w", '"a//b"/w'),
    ],
)
def test_the_best_offer_comes_first(text, first):
    with pytest.raises(NoMatch) as caught:
        pm.at(HAIKU, text)
    assert caught.value.near[0] == first


def test_a_subtree_says_how_many_leaves_it_has():
    with pytest.raises(NoMatch, match=r'"params/Dense_0" names a subtree of 2 leaves') as caught:
        pm.at(FLAX, "params/Dense_0")
    assert 'write "params/Dense_0/**"' in caught.value.hint


def test_a_miss_says_how_many_leaves_there_are():
    with pytest.raises(NoMatch, match=r'"Dens_\[-1\]/kernel" matches none of 28 leaves'):
        pm.at(FLAX, "Dens_[-1]/kernel")


@pytest.mark.parametrize("tree", [{}, [], None, {"a": {}, "b": "text", "c": 0.1}], ids=repr)
def test_a_tree_without_arrays_matches_nothing(tree):
    with pytest.raises(NoMatch, match="holds no arrays"):
        pm.at(tree, "**")
    assert pm.param_count(tree) == 0


def test_in_a_large_tree_the_likeliest_repairs_are_tried_and_no_more(monkeypatch):
    """The search for near misses ends at its deadline, here at once."""
    block = [f"Dense_{j}" for j in range(25)]
    tree = {f"block_{i}": {key: {"kernel": ones(), "bias": ones()} for key in block} for i in range(1000)}
    monkeypatch.setattr("paramend.selectors.misses._SECONDS", 0.0)
    for text, near in [("block_1000/Dense_3/kernel", "block_999/Dense_3/kernel"), ("**/kernal", "**/kernel")]:
        with pytest.raises(NoMatch) as caught:
            pm.at(tree, text)
        assert caught.value.near[0] == near
    with pytest.raises(NoMatch, match="50,000 leaves") as caught:
        pm.at(tree, "foo/bar/baz")


# ---- caching


def test_the_match_is_found_once_for_each_structure(monkeypatch):
    calls = []
    pattern = pm.sel("**/kernel_of_this_test").pattern
    find = type(pattern).find
    monkeypatch.setattr(type(pattern), "find", lambda self, names: (calls.append(self), find(self, names))[1])
    for _ in range(3):
        pm.at({"a": {"kernel_of_this_test": ones(2)}}, "**/kernel_of_this_test").zero()
    assert len(calls) == 1
    pm.at({"b": {"kernel_of_this_test": ones(2)}}, "**/kernel_of_this_test").zero()
    assert len(calls) == 2


def test_a_selector_becomes_a_filter_of_nnx_with_the_model():
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)])

    model = Model(nnx.Rngs(0))

    def state(selector):
        return sorted(pm.at(nnx.state(model, pm.nnx_filter(model, selector)), "**").paths)

    assert state("**/kernel") == ["layers/0/kernel", "layers/1/kernel"]
    assert state(pm.sel("**").where(ndim=2) & ~pm.sel("layers/0/**")) == ["layers/1/kernel"]
    assert state(re.compile(".*bias")) == ["layers/0/bias", "layers/1/bias"]
    assert state("layers[-1]/**") == ["layers/1/bias", "layers/1/kernel"]
    _, first, rest = nnx.split(model, nnx.All(nnx.Param, pm.nnx_filter(model, "layers[0]/**")), ...)
    assert sorted(pm.at(first, "**").paths) == ["layers/0/bias", "layers/0/kernel"]
    assert len(pm.at(rest, "**")) == 2
    with pytest.raises(NoMatch, match="did you mean"):
        pm.nnx_filter(model, "layer/0/**")
    with pytest.raises(OutOfRange):
        pm.nnx_filter(model, "layers[2]/**")


def test_a_selector_alone_is_not_a_filter_of_nnx():
    from flax import nnx

    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with pytest.raises(Unsupported, match="one Variable at a time") as info:
        nnx.state(model, pm.sel("kernel"))
    kernel = eval(info.value.hint, {"nnx": nnx, "pm": pm, "model": model})
    assert pm.at(kernel, "**").paths == ["kernel"]


def test_a_selector_as_the_filter_of_a_training_step():
    import jax
    import optax
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(3)])

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = Model(nnx.Rngs(0))
    before = nnx.clone(model)
    wrt = nnx.All(nnx.Param, pm.nnx_filter(model, "layers[-1]/**"))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-1), wrt=wrt)

    @nnx.jit
    def step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean(), argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, grads)
        return loss

    for _ in range(3):
        step(model, optimizer, jax.numpy.ones((4, 2)))
    assert sorted(pm.verify(before, model, only="layers[-1]/**")) == ["layers/2/bias", "layers/2/kernel"]
