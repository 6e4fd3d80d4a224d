"""Recipes: read strictly, all problems at once, the same edits in memory, in new files and in place.

`python tests/recipes/test_recipes.py` writes docs/recipe.schema.json.
"""

import json
import re
import shlex
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import jsonschema
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import yaml
from click.testing import CliRunner
from flax import nnx
from hypothesis import given, settings, strategies as st

import paramend as pm
from paramend.cli.main import cli
from paramend.edits.ops import OPS
from paramend.errors import BadRecipe, CannotRead, SelectorError, Unsupported
from paramend.recipes.steps import _example
from paramend.recipes.verbs import VERBS

SCHEMA = Path(__file__).parents[2] / "docs" / "recipe.schema.json"
Recipe = pm.Recipe
validator = jsonschema.Draft202012Validator(Recipe.schema())


def schema_text() -> str:
    return json.dumps(Recipe.schema(), indent=2) + "\n"


def layers(count=3, separator="/"):
    shapes = {"w": (4, 3), "b": (3,)}
    return {
        f"layers{separator}{i}{separator}{name}": np.arange(1, 1 + int(np.prod(shape)), dtype="float32").reshape(shape)
        for i in range(count)
        for name, shape in shapes.items()
    }


def nested(flat):
    tree = {}
    for path, value in flat.items():
        *keys, last = path.split("/")
        node = tree
        for key in keys:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


@pytest.fixture
def tree():
    return nested(layers())


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(layers(), path)
    return path


def problems(make):
    with pytest.raises(BadRecipe) as caught:
        make()
    return {problem.address: problem for problem in caught.value.problems}


def parse(*steps):
    return Recipe.parse("\n".join(["version: 1", "steps:", *(f"  - {step}" for step in steps)]))


# ---- text and data -----------------------------------------------------------------------------------------------

TEXTS = st.text(min_size=1, max_size=8)
SELECTORS = st.sampled_from(["**", "**/w", "layers/[-1]/w", "layers/<n>/*", '"a b"', r"a\*b", "é/{w,b}", "on", "0"])
NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.booleans())
ARRAYS = st.lists(NUMBERS, min_size=1, max_size=3) | st.just([[1, 2], [3, 4.5]]) | st.just([])
DATA = {
    "value": {"fill": NUMBERS, "set": ARRAYS, "add": NUMBERS | ARRAYS, "multiply": NUMBERS | ARRAYS},
    "direction": ARRAYS,
    "strength": NUMBERS,
    "std": st.floats(0, 1e300),
    "seed": st.integers(0, 2**40),
    "dtype": st.sampled_from(["bfloat16", "float32", "bf16", "int8"]),
    "init": st.sampled_from(["lecun_normal", "he_uniform"]),
    "requantize": st.sampled_from(["amax", "keep", "never"]),
    "index": {
        "": st.sampled_from([-1, 0, "0:4", "[0, ::2]", "..., -1", [0, "1:"], ":"]),
        "permute": st.just([1, 0]) | st.just("1, 0"),
    },
    "axes": st.lists(st.integers(-3, 3), max_size=3) | st.just("1, 0"),
    "indices": st.sampled_from([[], [3, -1], [True, False], "0:4", "::-1", "2, 0"]),
    "axis": st.integers(-3, 3),
    "into": {"": st.just("a/b")}
    | dict.fromkeys(("split", "tie"), st.lists(st.sampled_from(["a", "b/<n>"]), min_size=1, max_size=2)),
    "multiple": st.integers(1, 99),
    "length": st.integers(1, 99),
    "scheme": st.sampled_from(["int4", "fp8-block", "bnb-int8"]),
    "group_size": st.integers(-1, 256),
    "rename": st.dictionaries(TEXTS, TEXTS, min_size=1, max_size=2),
    "sizes": st.lists(st.integers(0, 5), min_size=1, max_size=3) | st.just("2, 1"),
    "ndim": st.integers(0, 4),
    "shape": st.lists(st.integers(0, 9), max_size=3),
    "count": st.integers(0, 9),
    "from": TEXTS,
    "source": TEXTS | st.lists(TEXTS, min_size=1, max_size=2),
    "scale": NUMBERS,
    "leaf": st.just("a/b"),
    "except": SELECTORS | st.lists(SELECTORS, min_size=1, max_size=2),
    "where": st.fixed_dictionaries({}, optional={"ndim": st.integers(0, 4), "dtype": st.just("float")}).filter(bool),
}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def steps(draw, verbs=tuple(VERBS)):
    verb = VERBS[draw(st.sampled_from(verbs))]
    at = draw(SELECTORS | st.lists(SELECTORS, min_size=1, max_size=2))
    if verb.name == "rename":
        return {
            "rename": draw(st.sampled_from([{"at": "a/<n>/**", "to": "b/<n+1>/**"}, {"at": ["a", "b"], "to": "c"}]))
        }
    if verb.any_of:
        given = {
            "set": st.dictionaries(TEXTS, VALUES, min_size=1, max_size=3),
            "delete": st.lists(TEXTS, min_size=1, max_size=2),
        }
        return {verb.name: draw(st.fixed_dictionaries({}, optional=given).filter(bool))}
    if verb.keys[0].name != "at":  # of a whole model
        return verb.example
    if verb.short and draw(st.booleans()):
        return {verb.name: at}
    body = {"at": at} if verb.keys[0].name == "at" else {}
    either = draw(st.sampled_from(verb.one_of)) if verb.one_of else None
    for key in verb.keys[len(body) :]:
        source = DATA.get(key.name, DATA["count"])
        source = source.get(verb.name, source.get("")) if isinstance(source, dict) else source
        wanted = key.required or key.name == either or (key.name not in verb.one_of and draw(st.booleans()))
        if wanted and (key.name != "leaf" or either == "from"):
            body[key.name] = draw(source)
    return {verb.name: body}


@settings(max_examples=80, deadline=None)
@given(st.lists(steps(), min_size=1, max_size=4))
def test_the_text_and_the_data_of_a_recipe_read_back_as_an_equal_one(data):
    recipe = Recipe(data)
    assert Recipe.parse(str(recipe)) == recipe
    assert Recipe(**recipe.to_dict()) == recipe
    assert Recipe.parse(json.dumps(recipe.to_dict())) == recipe
    assert hash(Recipe.parse(str(recipe))) == hash(recipe)
    validator.validate({"version": 1, "steps": data})
    validator.validate(recipe.to_dict())


def test_recipes_differ_where_their_steps_do():
    assert Recipe([{"zero": "a"}]) != Recipe([{"zero": "b"}])
    assert Recipe([{"fill": {"at": "a", "value": 1}}]) != Recipe([{"fill": {"at": "a", "value": True}}])
    assert Recipe([{"zero": "a"}]) != "version: 1"


def test_scalars_mean_what_they_read_as():
    recipe = parse(
        "zero: on",
        "rename: {at: yes, to: no}",
        "fill: {at: w, value: 1e-3, index: 1:30}",
        "fill: {at: w, value: '1e-3'}",
        "fill: {at: w, value: -.inf}",
        "fill: {at: w, value: true}",
        "noise: {at: w, std: 1e-2, seed: 010}",
        "zero: 'a: # b'",
    )
    assert [next(iter(step.values())) for step in recipe.to_dict()["steps"]] == [
        "on",
        {"at": "yes", "to": "no"},
        {"at": "w", "index": "1:30", "value": 0.001},
        {"at": "w", "value": 0.001},
        {"at": "w", "value": float("-inf")},
        {"at": "w", "value": True},
        {"at": "w", "std": 0.01, "seed": 10},
        "a: # b",
    ]


def test_anchors_are_written_out():
    assert parse("zero: &w 'a/w'", "fill: {at: *w, value: 1}") == parse("zero: a/w", "fill: {at: a/w, value: 1}")


@pytest.mark.parametrize(
    ("text", "line", "message", "hint"),
    [
        ("version: 1\nsteps:\n  - zero: **/bias", 3, "alias", '"**/bias"'),
        ("version: 1\nsteps:\n  - fill: {at: layers[0], value: 1}", 3, "while parsing", '"**/bias"'),
        ('version: 1\nsteps:\n  - zero: "a\\*b"', 3, "unknown escape", r"'a\*b/w'"),
        ("version: 1\nsteps:\n\t- zero: x", 3, r"\t", "spaces"),
        ("version: 1\nsteps: [zero: x]\n---\nversion: 1", 3, "single document", "---"),
        ("version: 1\nsteps:\n - zero: !!python/object/apply:os.system ls", 3, "no tags", ""),
        ("version: 1\nsteps:\n - zero: !mine x", 3, "no tags", ""),
        ("version: 1\nsteps:\n - fill: {at: a, value: 1, at: b}", 3, "twice", ""),
        ("version: 1\nsteps: [zero: w]\nsteps: [zero: x]", 3, "twice", ""),
        ("version: 1\nsteps: [zero: w]\n? [a]\n: 1", 3, "a key is text", ""),
        ('version: 1\nsteps:\n - zero: "\\UFFFFFFFF"', 0, "not a character", ""),
        ("version: 1\nsteps:\n - zero: \x00", 3, "not allowed", ""),
    ],
)
def test_text_that_is_no_yaml_is_told_by_line(text, line, message, hint):
    with pytest.raises(BadRecipe) as caught:
        Recipe.parse(text)
    problem = caught.value.problems[0]
    assert (problem.line, problem.code) == (line, "syntax")
    assert message in problem.message and hint in problem.hint
    assert f"(line {line})" in str(caught.value) or not line


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
        "a: &a [*a]",
        "s: &a " + "x" * 9000 + "\nsteps: [" + ",".join(["*a"] * 3000) + "]",
        "[" * 20000,
        "- " * 20000,
        '{"a":' * 20000,
        "x" * 1_000_001,
        "version: 1\nsteps:\n - set: {at: x, value: " + "[" * 40 + "1" + "]" * 40 + "}",
        "version: 1\nsteps:\n - fill: {at: x, value: " + "9" * 5000 + "}",
        '{"version": 1, "steps": [{"fill": {"at": "x", "value": ' + "9" * 5000 + "}}]}",
        '{"version": 1, "steps": [{"fill": {"at": "x", "value": 1e999}}]}',
        "",
        "[]",
        "version: 1\nsteps:",
        "\ud800",
    ],
    ids=range(15),
)
def test_hostile_and_empty_texts_are_refused(text):
    with pytest.raises(BadRecipe):
        Recipe.parse(text)


def test_nothing_in_a_recipe_runs():
    code = "import sys; sys.path.insert(0, '.'); import paramend as pm\npm.Recipe.parse('''{}''')"
    text = "version: 1\nsteps:\n - apply: {at: x, fn: !!python/name:os.system }"
    done = subprocess.run([sys.executable, "-c", code.format(text)], capture_output=True, text=True)
    assert "BadRecipe" in done.stderr and "runs code" in done.stderr


def test_importing_paramend_does_not_open_yaml():
    code = "import sys, paramend as pm; assert 'yaml' not in sys.modules; pm.Recipe; assert 'yaml' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- what is wrong with the data ---------------------------------------------------------------------------------

WRONG = {
    "scale: {at: x, value: 2}": ("$.steps[0].scale", "multiply"),
    "zeros: x": ("$.steps[0].zeros", "zero"),
    "apply: {at: x, fn: print}": ("$.steps[0].apply", "pm.at"),
    "zero": ("$.steps[0]", "zero: ..."),
    "zero:": ("$.steps[0]", "zero:"),
    "zero: []": ("$.steps[0].at", "**"),
    "zero: {at: x, valeu: 1}": ("$.steps[0].valeu", "zero"),
    "fill: x": ("$.steps[0]", "value: 0.5"),
    "fill: {at: x}": ("$.steps[0]", "value: 0.5"),
    "fill: {value: 1}": ("$.steps[0]", "at:"),
    "fill: {at: x, value: one}": ("$.steps[0].value", "1e-3"),
    "fill: {at: x, value: [1]}": ("$.steps[0].value", ""),
    "fill: {at: x, value: null}": ("$.steps[0].value", ""),
    "fill: {at: x, value: 1, index: a}": ("$.steps[0].index", "0:4"),
    "fill: {at: x, value: 1, index: '::0'}": ("$.steps[0].index", ""),
    "set: {at: x, value: 1}": ("$.steps[0].value", "fill"),
    "set: {at: x, value: [1, [2]]}": ("$.steps[0].value", ""),
    "set: {at: x, value: [1], from: f}": ("$.steps[0]", ""),
    "set: {at: x}": ("$.steps[0]", "from"),
    "set: {at: x, value: [1], leaf: y}": ("$.steps[0].leaf", "from"),
    "set: {at: 'x/<n>', from: f, leaf: 'y/<m>'}": ("$.steps[0].leaf", ""),
    "cast: {at: x, dtype: flaot32}": ("$.steps[0].dtype", "float32"),
    "cast: {at: x, dtype: int8, index: 0}": ("$.steps[0].index", ""),
    "noise: {at: x, std: -1}": ("$.steps[0].std", ""),
    "noise: {at: x, std: 1, seed: -1}": ("$.steps[0].seed", ""),
    "noise: {at: x, std: 1, seed: 1.5}": ("$.steps[0].seed", ""),
    "reinit: {at: x, init: lecun}": ("$.steps[0].init", "lecun_normal"),
    "rename: {at: 'a/**', to: b}": ("$.steps[0].to", "each wildcard"),
    "rename: {at: a, to: ''}": ("$.steps[0].to", ""),
    "zero: 'a['": ("$.steps[0].at", ""),
    "zero: [a, 'b[']": ("$.steps[0].at[1]", ""),
    "zero: 0": ("$.steps[0].at", '"0"'),
    "zero: {at: x, where: {dmin: 2}}": ("$.steps[0].where.dmin", "ndim"),
    "zero: {at: x, where: {ndim: two}}": ("$.steps[0].where.ndim", ""),
    "zero: {at: x, where: 2}": ("$.steps[0].where", "where:"),
    "expect: {at: x, count: -1}": ("$.steps[0].count", ""),
    "expect: {at: x, shape: 4}": ("$.steps[0].shape", "[4, 8]"),
    "{zero: x, fill: {at: y, value: 1}}": ("$.steps[0]", "make each a step of its own"),
    "{fill: , at: x, value: 1}": ("$.steps[0]", "indent at, value below fill:"),
}


@pytest.mark.parametrize("step", WRONG, ids=range(len(WRONG)))
def test_a_step_that_is_wrong_says_where_and_what_to_write(step):
    address, hint = WRONG[step]
    found = problems(lambda: parse(step))
    assert list(found) == [address]
    assert hint in found[address].hint
    assert found[address].line == 3


def test_all_that_is_wrong_is_said_at_once():
    text = "\n".join(["version: 2", "stpes: 1", "steps:", *(f"  - {step}" for step in WRONG)])
    found = problems(lambda: Recipe.parse(text))
    addresses = [address.replace("[0]", f"[{n}]", 1) for n, (address, _) in enumerate(WRONG.values())]
    assert list(found) == ["$.stpes", "$.version", *addresses]
    assert found["$.stpes"].hint == "did you mean steps?"
    assert found[addresses[7]].line == 11


# What a schema cannot say: the grammar of selectors, and that rows are equally long.
UNSEEN = [step for step in WRONG if re.search(r"<m>|'a\[|'b\[|'a/|::0|\[1, \[2", step)]


@pytest.mark.parametrize("step", [step for step in WRONG if step not in UNSEEN])
def test_the_schema_refuses_what_the_reader_refuses(step):
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({"version": 1, "steps": [yaml.safe_load(step)]})


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_in_a_hint_is_a_step(verb):
    assert parse(_example(VERBS[verb])).to_dict()["steps"] == [VERBS[verb].example]
    validator.validate({"version": 1, "steps": [VERBS[verb].example]})


@pytest.mark.parametrize("data", [{"steps": [{"zero": "x"}]}, {"version": True, "steps": [{"zero": "x"}]}, [], 3, None])
def test_what_is_no_recipe(data):
    with pytest.raises(BadRecipe):
        Recipe.parse(json.dumps(data))


def test_the_schema_is_valid_and_the_file_is_true():
    jsonschema.Draft202012Validator.check_schema(Recipe.schema())
    assert SCHEMA.read_text() == schema_text(), f"run `python {Path(__file__).relative_to(SCHEMA.parents[1])}`"


def test_every_op_that_data_can_say_is_a_step():
    assert set(OPS) - set(VERBS) == {"apply"}
    for op in OPS.values():
        assert len(op.takes) in (0, len(op.parameters)), op.name


# ---- on trees ----------------------------------------------------------------------------------------------------


def test_steps_see_what_the_steps_before_left(tree):
    recipe = parse(
        "rename: {at: 'layers/<n>/**', to: 'h/<n+1>/**'}",
        "zero: h/3/w",
        "delete: 'h/2/*'",
        "expect: {at: 'h/*/w', count: 2, shape: [4, 3], dtype: float, ndim: 2}",
        "expect: {at: 'h/2/w', count: 0}",
        "cast: {at: h/1/w, dtype: bf16}",
        "expect: {at: h/1/w, dtype: bfloat16}",
        "multiply: {at: h/1/b, value: [1, 2, 3]}",
        "set: {at: h/3/w, index: 0, value: [1, 2, 3]}",
        "add: {at: '**', value: 1, where: {dtype: float32, max_size: 3}}",
    )
    before = {path: leaf.copy() for path, leaf in pm.at(tree, "**").get().items()}
    found = recipe.apply(tree)
    assert {path: (leaf.dtype.name, leaf.tolist()) for path, leaf in pm.at(found, "**").get().items()} == {
        "h/1/w": ("bfloat16", before["layers/0/w"].tolist()),
        "h/1/b": ("float32", [2, 5, 10]),
        "h/3/w": ("float32", [[1, 2, 3], [0, 0, 0], [0, 0, 0], [0, 0, 0]]),
        "h/3/b": ("float32", [2, 3, 4]),
    }
    assert all((leaf == before[path]).all() for path, leaf in pm.at(tree, "**").get().items())


def test_a_selector_list_takes_each_leaf_once(tree):
    found = parse("add: {at: ['**/b', 'layers/[-1]/*'], value: 1}").apply(tree)
    assert found["layers"]["2"]["b"].tolist() == [2, 3, 4]


def test_all_problems_of_a_tree_at_once(tree):
    recipe = parse(
        "zero: 'layers/[-1]/x'",
        "zero: ['layers/0/w', 'layer/**']",
        "fill: {at: '**/b', index: 7, value: 1}",
        "rename: {at: 'layer/<n>/**', to: 'h/<n>/**'}",
        "zero: h/0/w",
        "set: {at: layers/0/w, value: [1, 2]}",
        "set: {at: '**/b', value: [1, 2]}",
        "expect: {at: '**/w', count: 4, ndim: 1}",
        "reinit: {at: '**', init: he_normal}",
        "fill: {at: '**', value: 1e99}",
        "zero: {at: '**', where: {ndim: 5}}",
        "set: {at: '**/b', from: nothing.npy}",
        "zero: layers/1/w",
    )
    found = problems(lambda: recipe.apply(tree))
    assert list(found) == [
        "$.steps[0].at",
        "$.steps[1].at[1]",
        "$.steps[2].index",
        "$.steps[3].at",
        "$.steps[4].at",
        "$.steps[5].value",
        "$.steps[6].value",
        "$.steps[7].count",
        "$.steps[7].ndim",
        "$.steps[8].init",
        "$.steps[9].value",
        "$.steps[10].where",
        "$.steps[11].from",
    ]
    assert [problem.line for problem in found.values()][:4] == [3, 4, 5, 6]
    assert "2 more leaves" in found["$.steps[2].index"].message
    assert "$.steps[3]" in found["$.steps[4].at"].message
    assert "$.steps[3]" not in found["$.steps[5].value"].message
    assert "ndim: 2" in found["$.steps[8].init"].hint
    assert found["$.steps[7].count"].code == "expect"
    assert not any("pm." in problem.hint for problem in found.values())


@pytest.mark.parametrize(
    ("step", "address"),
    [
        ("expect: {at: '**', count: 5}", "$.steps[0].count"),
        ("expect: {at: '**', count: 0}", "$.steps[0].count"),
        ("expect: {at: '**', shape: [3]}", "$.steps[0].shape"),
        ("expect: {at: '**', dtype: int}", "$.steps[0].dtype"),
        ("expect: {at: '**', min_size: 4}", "$.steps[0].min_size"),
        ("expect: {at: '**', max_size: 3}", "$.steps[0].max_size"),
        ("expect: nothing", "$.steps[0].at"),
    ],
)
def test_an_expectation_that_does_not_hold(tree, step, address):
    assert list(problems(lambda: parse(step).apply(tree))) == [address]
    assert parse("expect: {at: nothing, count: 0}", "expect: {at: '**', count: 6, dtype: float}").apply(tree) is tree


def test_a_path_is_no_tree(model):
    with pytest.raises(Unsupported, match=r"pm\.open"):
        parse("zero: '**'").apply(model)


def test_trees_of_other_libraries():
    recipe = parse("fill: {at: weight, value: 2}", "set: {at: bias, value: [1, 2]}")
    net = torch.nn.Linear(3, 2)
    net.requires_grad_(requires_grad=False)
    assert recipe.apply(dict(net.state_dict()))["bias"].tolist() == [1, 2]
    params = recipe.apply({"weight": jnp.ones((2, 3)), "bias": jnp.zeros(2, jnp.bfloat16)})
    assert params["bias"].dtype == jnp.bfloat16 and params["bias"].tolist() == [1, 2]
    assert isinstance(params["weight"], type(jnp.ones(1)))


def test_in_place_on_torch_and_nnx():
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    weight = net[0].weight
    recipe = parse(
        "fill: {at: '*.bias', value: 1}", "add: {at: '*.bias', value: 1}", "zero: {at: '0.weight', index: -1}"
    )
    recipe.apply_(net)
    assert net[0].weight is weight and weight[-1].tolist() == [0, 0, 0] and weight[0].abs().sum() > 0
    assert net[1].bias.tolist() == [2, 2]

    layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    parse("fill: {at: bias, value: 3}", "multiply: {at: bias, value: 2}").apply_(layer)
    assert layer.bias[...].tolist() == [6, 6]


def test_in_place_everything_is_checked_before_the_first_change():
    net = torch.nn.Linear(3, 2)
    before = net.bias.tolist()
    recipe = parse(
        "zero: bias",
        "cast: {at: weight, dtype: float16}",
        "rename: {at: weight, to: w}",
        "zero: weihgt",
        "set: {at: weight, value: [1]}",
        "expect: {at: '**', count: 3}",
    )
    found = problems(lambda: recipe.apply_(net))
    assert list(found) == [
        "$.steps[1]",
        "$.steps[2]",
        "$.steps[3].at",
        "$.steps[4].value",
        "$.steps[5].count",
    ]
    assert net.bias.tolist() == before
    jax_tree = {"w": jnp.ones(2)}
    assert "never changes" in problems(lambda: parse("zero: w").apply_(jax_tree))["$.steps[0].at"].message


# ---- values from other files -------------------------------------------------------------------------------------


@pytest.fixture
def donor(tmp_path):
    path = tmp_path / "donor.safetensors"
    values = {name: leaf + 100 for name, leaf in layers(separator=".").items()}
    safetensors.numpy.save_file(values | {"head": np.full((4, 3), 7, "float32")}, path)
    np.save(tmp_path / "b.npy", np.array([7, 8, 9], ">f4"))
    return path


def load(folder, *steps):
    path = folder / "fix.yaml"
    path.write_text("\n".join(["version: 1", "steps:", *(f"  - {step}" for step in steps)]))
    return Recipe.load(path)


def test_values_come_from_other_files(tmp_path, donor, tree, model):
    recipe = load(
        tmp_path,
        "set: {at: 'layers/[:2]/w', from: donor.safetensors}",
        "set: {at: 'layers/2/w', from: donor.safetensors, leaf: head}",
        "set: {at: '**/b', from: b.npy}",
        "add: {at: 'layers/<n>/b', from: donor.safetensors, leaf: 'layers/<n>/b'}",
        "set: {at: 'layers/0/w', index: '0, :', from: b.npy}",
    )
    expected = {f"layers/{i}/w": layers()["layers/0/w"] + 100 for i in range(2)}
    expected["layers/0/w"][0] = [7, 8, 9]
    expected |= {"layers/2/w": np.full((4, 3), 7)} | {f"layers/{i}/b": [108, 110, 112] for i in range(3)}
    recipe.apply(pm.open(model)).save(tmp_path / "out.safetensors")
    in_memory = recipe.apply(tree)
    pm.patch(model, recipe.apply)
    for found in (
        pm.at(in_memory, "**").get(),
        *map(safetensors.numpy.load_file, (tmp_path / "out.safetensors", model)),
    ):
        assert found.keys() == expected.keys()
        for path, leaf in expected.items():
            np.testing.assert_array_equal(found[path], leaf)
    in_memory["layers"]["2"]["w"][0] = 1  # no map of a file
    assert in_memory["layers"]["2"]["b"].dtype == np.dtype("<f4")


@pytest.mark.parametrize("verb", ["set", "add", "multiply"])
@pytest.mark.parametrize("index", ["", "index: 1, ", 'index: "1:3, :", ', 'index: "..., 0", '])
def test_slices_from_other_files(tmp_path, tree, model, verb, index):
    shape = {"": (4, 3), "index: 1, ": (3,), 'index: "1:3, :", ': (2, 3), 'index: "..., 0", ': (4,)}[index]
    values = np.arange(np.prod(shape), dtype="float32").reshape(shape)
    safetensors.numpy.save_file({"v": values}, tmp_path / "v.safetensors")
    recipe = load(tmp_path, f"{verb}: {{at: layers/1/w, {index}from: v.safetensors, leaf: v}}")
    expected = recipe.apply(tree)["layers"]["1"]["w"]
    with pm.open(model) as checkpoint:
        edited = recipe.apply(checkpoint)
        assert edited["layers/1/w"].tolist() == expected.tolist()
        edited.save(tmp_path / "out.safetensors")
    pm.patch(model, recipe.apply)
    for path in (model, tmp_path / "out.safetensors"):
        assert safetensors.numpy.load_file(path)["layers/1/w"].tolist() == expected.tolist()


def test_the_other_file_is_read_in_pieces(tmp_path):
    for name in ("a", "b"):
        safetensors.numpy.save_file({"w": np.ones((8, 1 << 20), "float32")}, tmp_path / name)
    recipe = load(tmp_path, "set: {at: w, from: b}", "add: {at: w, from: b}")
    tracemalloc.start()
    try:
        with pm.open(tmp_path / "a") as checkpoint:
            recipe.apply(checkpoint).save(tmp_path / "out")
        pm.patch(tmp_path / "a", recipe.apply)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out").read_bytes() == (tmp_path / "a").read_bytes()


def test_a_checkpoint_gives_values_to_itself(tmp_path, model):
    # In place, the second step must not see what the first one wrote.
    pm.patch(model, parse("fill: {at: layers/0/b, value: 5}").apply)
    swap = load(
        tmp_path,
        "set: {at: layers/0/b, from: model.safetensors, leaf: layers/1/b}",
        "set: {at: layers/1/b, from: model.safetensors, leaf: layers/0/b}",
    )
    pm.patch(model, swap.apply)
    found = safetensors.numpy.load_file(model)
    assert found["layers/0/b"].tolist() == [1, 2, 3] and found["layers/1/b"].tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    ("body", "address", "message"),
    [
        ("from: nothing.safetensors", "from", "no such file"),
        ("from: broken.safetensors", "from", "broken.safetensors"),
        ("from: broken.npy", "from", "no array"),
        ("from: objects.npy", "from", "no array"),
        ("from: text.npy", "from", "not numbers"),
        ("from: .", "from", "."),
        ("from: b.npy", "from", "the array is float32[3]"),
        ("from: b.npy, leaf: x", "leaf", "without a name"),
        ("from: donor.safetensors, leaf: haed", "leaf", 'donor.safetensors: "haed" matches none of 7 leaves'),
        ("from: donor.safetensors, leaf: 'layers.0'", "leaf", "subtree"),
        ("from: donor.safetensors, leaf: 'blocks.<n>.w'", "leaf", "blocks.0.w, blocks.1.w, blocks.2.w"),
        ("from: half.safetensors", "from", "layers.0.w, layers.1.w"),
        ("from: half.safetensors, leaf: layers.2.w", "from", "bfloat16[4,3]"),
    ],
)
def test_values_that_cannot_be_had(tmp_path, donor, model, body, address, message):
    (tmp_path / "broken.safetensors").write_bytes(b"123456789")
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY\x01\x00")
    np.save(tmp_path / "objects.npy", np.array([print]), allow_pickle=True)
    np.save(tmp_path / "text.npy", np.array(["a"]))
    safetensors.numpy.save_file({"layers.2.w": np.ones((4, 3), ml_dtypes.bfloat16)}, tmp_path / "half.safetensors")
    recipe = load(tmp_path, f"set: {{at: 'layers/<n>/w', {body}}}")
    with pm.open(model) as checkpoint:
        found = problems(lambda: recipe.apply(checkpoint))
    assert list(found) == [f"$.steps[0].{address}"]
    assert message in found[f"$.steps[0].{address}"].message


def test_the_hint_on_another_dtype_works(tmp_path, model):
    safetensors.numpy.save_file({"layers/0/w": np.ones((4, 3), ml_dtypes.bfloat16)}, tmp_path / "half.safetensors")
    body = "set: {at: layers/0/w, from: half.safetensors}"
    with pm.open(model) as checkpoint:
        hint = problems(lambda: load(tmp_path, body).apply(checkpoint))["$.steps[0].from"].hint
        step = re.match(r"(cast: \{.*\}) in a step before it, and back to float32 in one after it$", hint)[1]
        recipe = load(tmp_path, step, body, "cast: {at: layers/0/w, dtype: float32}")
        assert recipe.apply(checkpoint)["layers/0/w"].tolist() == np.ones((4, 3)).tolist()


# ---- all but -----------------------------------------------------------------------------------------------------


def test_except_leaves_out_what_at_selects(tree, model, tmp_path):
    recipe = parse("zero: {at: ['**/w', 'layers/0/b'], except: ['layers/[-1]/*', 'layers/1/b']}")
    zeroed = {"layers/0/w", "layers/1/w", "layers/0/b"}
    recipe.apply(pm.open(model)).save(tmp_path / "out.safetensors")
    written = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    edited = recipe.apply(tree)
    for path, before in layers().items():
        _, number, name = path.split("/")
        expected = np.zeros_like(before) if path in zeroed else before
        assert edited["layers"][number][name].tobytes() == written[path].tobytes() == expected.tobytes()
    gone = parse("delete: {at: '**/w', except: 'layers/0/w'}").apply(tree)["layers"]
    assert [number for number in gone if "w" in gone[number]] == ["0"]
    moved = parse("rename: {at: 'layers/<n>/w', except: 'layers/1/w', to: 'layers/<n>/kernel'}").apply(tree)["layers"]
    assert ["kernel" in moved[number] for number in "012"] == [True, False, True]
    counts = ("expect: {at: '**', except: '**/b', count: 3, ndim: 2}", "expect: {at: '**/b', except: '**/b', count: 0}")
    parse(*counts).apply(tree)


def test_except_counts_a_tied_leaf_under_any_of_its_names():
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(1, 1), "b": torch.nn.Linear(1, 1)})
    module["a"].bias = module["b"].bias = torch.nn.Parameter(torch.ones(1))
    parse("fill: {at: '**', except: 'b.bias', value: 3}").apply_(module)
    assert module["a"].bias.item() == 1 and module["a"].weight.item() == module["b"].weight.item() == 3


def test_what_is_wrong_with_an_exception_is_said_with_its_address(tree):
    found = problems(
        lambda: parse(
            "zero: {at: '**/b', except: '**/b'}",
            "zero: {at: '**/b', except: ['layers/0/b', '**/v']}",
            "expect: {at: '**/b', except: '**'}",
        ).apply(tree)
    )
    assert list(found) == ["$.steps[0].except", "$.steps[1].except[1]", "$.steps[2].except"]
    assert found["$.steps[0].except"].code == "no-match" and found["$.steps[2].except"].code == "expect"
    assert '"**/v" matches none of 6 leaves' in found["$.steps[1].except[1]"].message
    found = problems(lambda: parse("zero: {at: '**/b', except: []}", "zero: {at: '**/b', except: 'a['}"))
    assert list(found) == ["$.steps[0].except", "$.steps[1].except"]
    assert found["$.steps[0].except"].hint == "leave except out"


# ---- three engines -----------------------------------------------------------------------------------------------

KEEPS = [name for name, verb in VERBS.items() if not verb.changes and verb.keys[0].name == "at"]
LEAVES = {"layers/0/w": (4, 3), "layers/1/w": (4, 3), "layers/0/b": (3,), "layers/1/b": (3,)}
PLACES = {"layers/*/w": (4, 3), "layers/[-1]/w": (4, 3), "**/b": (3,), "layers/0/b": (3,)}


@st.composite
def fitting(draw):
    """A step that fits the leaves of `LEAVES`."""
    verb = draw(st.sampled_from(KEEPS))
    at = draw(st.sampled_from([place for place, shape in PLACES.items() if verb != "reinit" or len(shape) == 2]))
    body = {"at": at}
    small = st.floats(-4, 4, width=16) | st.integers(-4, 4)
    if verb in ("fill", "add", "multiply"):
        body["value"] = draw(small)
    if verb == "set" or (verb in ("add", "multiply") and draw(st.booleans())):
        shape = PLACES[at]
        body["value"] = (
            np.array(draw(st.lists(small, min_size=12, max_size=12)))[: np.prod(shape)].reshape(shape).tolist()
        )
    elif verb in ("zero", "fill", "add", "multiply", "noise") and draw(st.booleans()):
        body["index"] = draw(st.sampled_from([-1, "1:", "..., 0", "::2"]))
    if verb == "noise":
        body |= {"std": 0.5, "seed": draw(st.integers(0, 9))}
    if verb == "reinit":
        body |= {"init": "he_uniform", "seed": draw(st.integers(0, 9))}
    if verb == "clip":
        body |= {"lo": draw(st.floats(-4, 0, width=16)), "hi": draw(st.floats(0, 4, width=16))}
    if verb == "project_out":
        length = draw(st.sampled_from([3, PLACES[at][0]]))
        body |= {"direction": [1, -2, 0.5, 3][:length], "strength": draw(small)}
    if len(body) == 1 and not VERBS[verb].short and verb != "expect":  # a row of the table that is new
        body = {**VERBS[verb].example[verb], "at": at}
    return {verb: body}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(fitting(), min_size=1, max_size=5),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.booleans(),
)
def test_in_memory_in_a_new_file_and_in_place_the_bytes_are_the_same(tmp_path_factory, data, dtype, changes):
    folder = tmp_path_factory.mktemp("engines")
    rng = np.random.default_rng(0)
    tree = {path: rng.normal(size=shape).astype(getattr(ml_dtypes, dtype, dtype)) for path, shape in LEAVES.items()}
    path = folder / "model.safetensors"
    safetensors.numpy.save_file(tree, path)
    if changes:
        data = [
            *data,
            {"cast": {"at": "**/b", "dtype": "float64"}},
            {"rename": {"at": "layers/<n>/**", "to": "h/<n>/**"}},
        ]
    recipe = Recipe(data)
    expected = {
        name: (leaf.dtype, leaf.tobytes()) for name, leaf in pm.at(recipe.apply(nested(tree)), "**").get().items()
    }
    with pm.open(path) as checkpoint:
        recipe.apply(checkpoint).save(folder / "out.safetensors")
    written = [folder / "out.safetensors"]
    if not changes:
        pm.patch(path, recipe.apply)
        written.append(path)
    for file in written:
        found = safetensors.numpy.load_file(file)
        assert {name: (leaf.dtype, leaf.tobytes()) for name, leaf in found.items()} == expected


# ---- files and commands ------------------------------------------------------------------------------------------


def run(*args):
    return CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="paramend")


def test_files(tmp_path):
    (tmp_path / "a.yaml").write_bytes("\ufeffversion: 1\r\nsteps:\r\n  - zero: é\r\n".encode())
    assert Recipe.load(tmp_path / "a.yaml") == Recipe([{"zero": "é"}])
    (tmp_path / "a.json").write_text('{\n\t"version": 1,\n\t"steps": [{"zero": "w"}]\n}')
    assert Recipe.load(tmp_path / "a.json") == Recipe([{"zero": "w"}])
    assert repr(Recipe.load(tmp_path / "a.json")) == "<a.json: 1 step>"
    (tmp_path / "bad.json").write_text('{"version": 1,\n "steps": [{"zero": }]}')
    assert problems(lambda: Recipe.load(tmp_path / "bad.json"))["$"].line == 2
    (tmp_path / "twice.json").write_text('{"version": 1, "steps": [{"fill": {"at": "a", "at": "b", "value": 1}}]}')
    assert "twice" in problems(lambda: Recipe.load(tmp_path / "twice.json"))["$"].message
    (tmp_path / "latin.yaml").write_bytes(b"version: 1\nsteps: [zero: \xe9]")
    assert "UTF-8" in problems(lambda: Recipe.load(tmp_path / "latin.yaml"))["$"].message
    (tmp_path / "large.yaml").write_bytes(b"#" * 1_000_001)
    assert "too many" in problems(lambda: Recipe.load(tmp_path / "large.yaml"))["$"].message
    with pytest.raises(CannotRead, match=re.escape("a.yaml?")):
        Recipe.load(tmp_path / "a.yml")
    with pytest.raises(CannotRead, match="directory"):
        Recipe.load(tmp_path)


def test_apply_writes_and_shows(tmp_path, model):
    recipe = tmp_path / "fix.yaml"
    recipe.write_text('version: 1\nsteps:\n  - zero: "layers/[-1]/w"\n  - fill: {at: "**/b", value: 0.5}\n')
    before = model.read_bytes()
    dry = run("apply", recipe, model, "-o", tmp_path / "out.safetensors", "--dry-run")
    assert dry.exit_code == 0 and not (tmp_path / "out.safetensors").exists()
    done = run("apply", recipe, model, "-o", tmp_path / "out.safetensors")
    assert done.exit_code == 0 and done.stdout == dry.stdout and model.read_bytes() == before
    assert "zero()" in done.stdout and "4 of 6 leaves change" in done.stdout
    assert run("apply", recipe, model, "-o", tmp_path / "out.safetensors").exit_code == 2
    data = json.loads(run("apply", recipe, model, "-o", tmp_path / "out.safetensors", "--force", "--json").stdout)
    assert len(data["changed"]) == 4
    assert run("apply", recipe, model, "--in-place").exit_code == 0
    assert model.read_bytes() == (tmp_path / "out.safetensors").read_bytes()
    assert run("undo", model).exit_code == 0 and model.read_bytes() == before
    assert run("apply", recipe, model).exit_code == 2


def test_apply_tells_expectations_from_mistakes(tmp_path, model):
    recipe = tmp_path / "fix.yaml"
    recipe.write_text('version: 1\nsteps:\n  - expect: {at: "**", count: 7}\n  - expect: nope\n')
    done = run("apply", recipe, model, "-o", tmp_path / "out")
    assert done.exit_code == 1 and "$.steps[0].count (line 3)" in done.stderr and not (tmp_path / "out").exists()
    recipe.write_text('version: 1\nsteps:\n  - expect: {at: "**", count: 7}\n  - zero: nope\n')
    done = run("apply", recipe, model, "--in-place")
    assert done.exit_code == 2 and "$.steps[1].at (line 4)" in done.stderr
    recipe.write_text("version: 1\nsteps:\n  - cast: {at: '**', dtype: float16}\n")
    done = run("apply", recipe, model, "--in-place")
    assert done.exit_code == 2 and "-o OUT" in done.stderr


def test_set_takes_leaves_from_other_files(tmp_path, donor, model):
    out = tmp_path / "out.safetensors"
    for value, selector, path, expected in [
        (tmp_path / "b.npy", "layers/0/b", "layers/0/b", [7, 8, 9]),
        (donor, "**/b", "layers/2/b", [101, 102, 103]),
        (f"{donor}:layers[1]/b", "layers/0/b", "layers/0/b", [101, 102, 103]),
        (f"{donor}:layers.<n>.b", "layers/<n>/b", "layers/1/b", [101, 102, 103]),
    ]:
        done = run("set", model, selector, value, "-o", out, "--force")
        assert done.exit_code == 0, done.stderr
        assert safetensors.numpy.load_file(out)[path].tolist() == expected
    assert run("set", model, "layers/0/b", tmp_path / "b.npy", "--in-place").exit_code == 0
    assert safetensors.numpy.load_file(model)["layers/0/b"].tolist() == [7, 8, 9]


def test_set_refuses_what_does_not_fit_and_says_what_would(tmp_path, donor, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    half = {name: leaf.astype(ml_dtypes.bfloat16) for name, leaf in layers().items()}
    safetensors.numpy.save_file(half, tmp_path / "half:1.safetensors")
    np.save("half.npy", np.ones(3, "float16"))
    for value in ("half:1.safetensors", "half:1.safetensors:layers/0/b", "half.npy"):
        done = run("set", "model.safetensors", "layers/*/b", value, "-o", "out.safetensors")
        assert done.exit_code == 2 and "2 more leaves do not fit" in done.stderr
        hint = done.stderr.partition("hint: paramend ")[2].strip()
        (tmp_path / "OUT.safetensors").unlink(missing_ok=True)
        assert run(*shlex.split(hint.replace("OUT", "OUT.safetensors"))).exit_code == 0, hint
    assert run("set", "model.safetensors", "layers/0/b", "OUT.safetensors", "-o", "x.safetensors").exit_code == 2
    for value, message in [
        ("nope.npy", "no such file"),
        ("donor.safetensors:nope", "nope"),
        ("b.npy:x", "without a name"),
    ]:
        done = run("set", "model.safetensors", "layers/0/b", value, "-o", "y.safetensors")
        assert done.exit_code == 2 and message in done.stderr
    assert not Path("y.safetensors").exists()
    assert run("set", "model.safetensors", "layers/0/w", "b.npy", "-o", "y.safetensors").exit_code == 2


def test_selector_errors_keep_their_caret():
    found = problems(lambda: parse("zero: 'a[b'"))
    assert "^" in found["$.steps[0].at"].message and found["$.steps[0].at"].code == SelectorError.code


if __name__ == "__main__":
    SCHEMA.write_text(schema_text())


def test_what_is_wrong_with_a_file_and_with_its_fit_are_listed_together(tmp_path):
    tree = {"a": {"bias": np.ones(2)}, "b": np.ones(3)}
    safetensors.numpy.save_file({"a.bias": tree["a"]["bias"], "b": tree["b"]}, tmp_path / "m.safetensors")
    recipe = tmp_path / "fix.yaml"
    recipe.write_text(
        "version: 1\nsteps:\n  - zero: c\n  - fil: {at: b, value: 1}\n  - fill: {at: a.bias, value: high}\n"
    )
    with pytest.raises(BadRecipe) as error:
        pm.Recipe.apply_file(recipe, tree)
    assert [problem.address for problem in error.value.problems] == [
        "$.steps[0].at",
        "$.steps[1].fil",
        "$.steps[2].value",
    ]
    done = CliRunner().invoke(cli, ["apply", str(recipe), str(tmp_path / "m.safetensors"), "-o", str(tmp_path / "o")])
    assert done.exit_code == 2
    assert all(address in done.stderr for address in ("$.steps[0].at", "$.steps[1].fil", "$.steps[2].value"))
    recipe.write_text("version: 1\nsteps:\n  - zero: b\n")
    assert not pm.Recipe.apply_file(recipe, tree)["b"].any()


# ---- quantised weights -------------------------------------------------------------------------------------------

QUANTISED = {"fc": {"weight": np.ones((1, 8), "int8"), "weight_scales": np.ones(8, "float16"), "bias": np.ones(8)}}


def test_steps_on_quantised_weights_are_refused_each_with_its_address():
    recipe = Recipe(
        [{"zero": "fc/bias"}, {"zero": "fc/*"}, {"delete": "fc/weight_scales"}, {"cast": {"at": "**", "dtype": "f32"}}]
    )
    with pytest.raises(BadRecipe) as caught:
        recipe.apply(QUANTISED)
    problems = caught.value.problems
    assert [problem.address for problem in problems] == ["$.steps[1].at", "$.steps[2].at", "$.steps[3].at"]
    assert {problem.code for problem in problems} == {"quantized"}
    assert {problem.hint for problem in problems} == {"raw: true beside steps takes leaves as they are stored"}


def test_raw_is_a_key_of_a_recipe():
    recipe = Recipe.parse("version: 1\nraw: true\nsteps: [zero: fc/weight, delete: fc/weight_scales]")
    assert recipe.apply(QUANTISED)["fc"]["weight"].sum() == 0
    assert Recipe.parse(str(recipe)) == recipe and Recipe(**recipe.to_dict()) == recipe
    assert str(recipe).startswith("version: 1\nraw: true\nsteps:")
    tree = {"fc": {"weight": np.ones((1, 8), "int8"), "weight_scales": np.ones(8, "float16")}}
    with pytest.raises(BadRecipe, match="eetq"):
        Recipe([{"zero": "**"}]).apply_(tree)
    assert tree["fc"]["weight"].sum() == 8
    Recipe([{"zero": "**"}], raw=True).apply_(tree)
    assert tree["fc"]["weight"].sum() == 0
    with pytest.raises(BadRecipe, match=r"\$\.raw .*raw is true or false"):
        Recipe.parse("version: 1\nraw: please\nsteps: [zero: w]")
