"""Selectors, recipes, plans, reports and errors go to other processes and come back; copies are what they are of."""

import copy
import importlib
import inspect
import multiprocessing
import pickle
import pkgutil
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, is_dataclass
from functools import partial

import cloudpickle
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import paramend
import paramend as pm
from paramend import errors
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.edits.plan import Plan, call
from paramend.pages.paged import Paged
from paramend.reports.report import Report
from paramend.trees.tree import Tree
from support.planning import plan
from support.sending import double, fail, is_matrix, told


@pytest.fixture(scope="module")
def other():
    """Another process, which knows nothing of this one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def copies(value):
    """The value copied in every way that stays in this process."""
    yield from (pickle.loads(pickle.dumps(value, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1))
    yield copy.copy(value)
    yield copy.deepcopy(value)


def raised(kind, function, *args, **options):
    """The error that a call raises."""
    with pytest.raises(kind) as caught:
        function(*args, **options)
    return caught.value


# ---- selectors ---------------------------------------------------------------------------------------------------

TREE = {"a": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}, "b": [np.ones((3, 1), "float32"), np.ones(1)]}
SELECTORS = {
    "text": pm.sel("a/**"),
    "positions": pm.sel("b/[-1]"),
    "quoted": pm.sel('"a"/{kernel,bias}'),
    "regex": pm.sel(re.compile("A/.*", re.IGNORECASE)),
    "class": pm.sel(list),
    "function": pm.sel(is_matrix),
    "partial": pm.sel(partial(is_matrix)),
    "mask": pm.sel({"a": {"kernel": True, "bias": False}, "b": True}),
    "union": pm.sel(["a/kernel", re.compile("b.*")]),
    "both": pm.sel("**") & ~pm.sel("b/**"),
    "where": pm.sel("**").where(ndim=2, dtype="float", min_size=2, max_size=9, shape=(2, 3)),
    "sliced": pm.sel("a/kernel")[-1],
    "sliced by all there is": pm.sel("a/kernel")[..., 0:2:1],
    "sliced by a list": pm.sel("a/kernel")[[0, 1]],
    "sliced by an array": pm.sel("a/kernel")[np.array([0, 1])],
}


@pytest.mark.parametrize("name", SELECTORS)
def test_a_selector_stays_what_it_is(name, other):
    selector = SELECTORS[name]
    chosen = pm.at(TREE, selector).get()
    text, shown, back = other.submit(told, selector).result()
    assert (text, shown) == (str(selector), repr(selector))
    for twin in (back, *copies(selector)):
        assert (twin, hash(twin), repr(twin)) == (selector, hash(selector), repr(selector))
        found = pm.at(TREE, twin).get()
        assert found.keys() == chosen.keys() and all(np.array_equal(found[path], chosen[path]) for path in chosen)


def test_selectors_that_differ_are_not_equal():
    assert len(set(SELECTORS.values())) == len(SELECTORS) - 1  # a list and an array of the same numbers are one slice
    assert pm.sel("a")[:2] != pm.sel("a")[:3] and pm.sel("a")[0] != pm.sel("b")[0]
    assert pm.sel({"a": True}) != pm.sel({"a": False}) and pm.sel({"a": True}) != pm.sel("a")


@pytest.mark.parametrize("make", [lambda: lambda path, spec: True, lambda: type("Local", (), {})])
def test_what_has_no_name_is_refused_with_the_way_out(make):
    for selector in (pm.sel(make()), pm.sel("a/**") & ~pm.sel(make())):
        with pytest.raises(pm.errors.Unsupported, match="does not find <") as caught:
            pickle.dumps(selector)
        assert "top level of a module" in caught.value.hint
        assert copy.copy(selector) == selector == copy.deepcopy(selector)  # within a process all is well


def test_a_pickler_that_sends_code_may_send_a_lambda():
    selector = cloudpickle.loads(cloudpickle.dumps(pm.sel(lambda path, spec: path == "a/bias") & ~pm.sel("b/**")))
    assert pm.at(TREE, selector).paths == ["a/bias"]


# ---- recipes and plans ---------------------------------------------------------------------------------------------


def test_a_recipe_stays_what_it_is(tmp_path, other):
    (tmp_path / "fix.yaml").write_text('version: 1\nsteps:\n  - fill: {at: ["a/**"], value: 0.5, where: {ndim: 2}}')
    for recipe in (
        pm.Recipe([{"zero": "b/**"}, {"cast": {"at": "**", "dtype": "bf16"}}]),
        pm.Recipe.load(tmp_path / "fix.yaml"),
    ):
        want = recipe.apply(TREE)
        for twin in (other.submit(told, recipe).result()[2], *copies(recipe)):
            assert (twin, hash(twin), str(twin), repr(twin)) == (recipe, hash(recipe), str(recipe), repr(recipe))
            assert not pm.diff(twin.apply(TREE), want)
            said = [str(raised(pm.errors.BadRecipe, each.apply, {"z": np.ones(1)})) for each in (recipe, twin)]
            assert said[0] == said[1]


def test_a_plan_of_a_tree_in_memory_takes_its_tree_along(other):
    made = plan(Tree(TREE), "a/kernel", call("apply", {"fn": double}))
    for twin in (other.submit(told, made).result()[2], *copies(made)):
        assert (str(twin), repr(twin), twin.rows) == (str(made), repr(made), made.rows)
        assert all(np.array_equal(twin.leaves.read(row.source), made.leaves.read(row.source)) for row in made.rows)


def test_a_plan_of_a_checkpoint_goes_by_its_path(tmp_path, monkeypatch, other):
    big = np.ones(1 << 16, "float32")
    pm.save({"a": big, "b": {"c": big}}, tmp_path / "m.safetensors")
    monkeypatch.chdir(tmp_path)
    edited = pm.at(pm.at(pm.at(pm.open("m.safetensors"), "a").zero(), "b/c").delete(), "a").rename("z")
    assert len(pickle.dumps(edited.plan)) < 2000
    for number, twin in enumerate((other.submit(told, edited.plan).result()[2], *copies(edited.plan))):
        assert (str(twin), twin.rows, twin.deleted) == (str(edited.plan), edited.plan.rows, edited.plan.deleted)
        Checkpoint(twin.leaves, twin).save(f"{number}.safetensors")
        assert not pm.load(f"{number}.safetensors")["z"].any()
    sent = pickle.dumps(edited.plan)
    monkeypatch.chdir("/")
    assert str(pickle.loads(sent)) == str(edited.plan)
    for other_tree in ({"a": np.ones(3), "b": {"c": big}}, {"a": big, "b": {"d": big}}, {"a": big, "b": {"c": big}}):
        pm.save(other_tree, tmp_path / "m.safetensors", force=True)
        twin = pickle.loads(sent)
        with pytest.raises(pm.errors.BadCheckpoint, match="changed it since it was opened"):
            twin.leaves.read(0)


def test_a_leaf_of_a_donor_goes_by_its_path_too(tmp_path, other):
    pm.save({"w": np.zeros(1 << 16)}, tmp_path / "m.npz")
    pm.save({"w": np.arange(1 << 16, dtype="float64")}, tmp_path / "donor.npz")
    (tmp_path / "fix.yaml").write_text("version: 1\nsteps:\n  - set: {at: w, from: donor.npz}")
    made = pm.Recipe.load(tmp_path / "fix.yaml").apply(pm.open(tmp_path / "m.npz")).plan
    assert len(pickle.dumps(made)) < 2000
    for twin in (other.submit(told, made).result()[2], *copies(made)):
        assert str(twin) == str(made)
        assert np.array_equal(Checkpoint(twin.leaves, twin)["w"], np.arange(1 << 16))
    sent = pickle.dumps(made)
    pm.save({"w": np.zeros(3)}, tmp_path / "donor.npz", force=True)
    twin = pickle.loads(sent)
    with pytest.raises(pm.errors.BadCheckpoint, match=r"donor\.npz.*changed it since it was opened"):
        Checkpoint(twin.leaves, twin).read(0)


def test_a_plan_of_several_checkpoints_opens_them_again(tmp_path, other):
    pm.save({"layers": [{"w": np.ones(2)}, {"w": np.ones(2)}]}, tmp_path / "m.safetensors")
    deeper = pm.deepen(pm.open(tmp_path / "m.safetensors"), layers="layers[*]", order=[0, 1, 1], identity=None)[0]
    for twin in (other.submit(told, deeper.plan).result()[2], *copies(deeper.plan)):
        assert str(twin) == str(deeper.plan)
        assert [Checkpoint(twin.leaves, twin).read(number).tolist() for number in twin.index.numbers] == [[1, 1]] * 3


def test_a_plan_with_a_lambda_is_refused_with_the_way_out():
    with pytest.raises(pm.errors.Unsupported, match=r"pickled: a/\w+ is edited by apply\(<function .*<lambda>"):
        pickle.dumps(plan(Tree(TREE), "a/*", call("apply", {"fn": lambda x: x})))


def test_a_plan_with_a_lambda_is_copied_and_goes_where_code_is_sent(tmp_path):
    pm.save({"w": np.ones(2)}, tmp_path / "m.npz")
    made = pm.at(pm.open(tmp_path / "m.npz"), "w").apply(lambda x: x * 2)
    for twin in (copy.copy(made), copy.deepcopy(made), cloudpickle.loads(cloudpickle.dumps(made))):
        assert twin["w"].tolist() == [2, 2]
    assert copy.deepcopy(made.plan).rows == made.plan.rows


# ---- reports and errors --------------------------------------------------------------------------------------------


def small():
    """A checkpoint, edited so that its report meets a function, an array, a slice and a removal."""
    edited = pm.open("m.safetensors")
    edited = pm.at(edited, "a.w").apply(lambda x: x * 2)
    edited = pm.at(edited, "a.w")[0].fill(3)
    edited = pm.at(edited, "b.w").set(np.arange(2.0))
    return pm.at(edited, "b.b").delete()


def refused():
    return raised(errors.GraftRefused, pm.graft, {"w": np.zeros(3)}, {"w": np.ones(2)})


def port_refused():
    return raised(errors.PortRefused, pm.port, {"a": {"kernel": np.ones((2, 2))}}, {"b.weight": np.ones((2, 3))})


def example_reports():
    """A report of each class, made as users make it."""
    old = {"a": {"w": np.ones(2), "b": np.ones(3)}, "b": {"w": np.ones(2), "b": np.ones(1)}}
    new = {"a": {"w": np.zeros(2), "b": np.ones(4)}, "c": {"w": np.ones(2)}, "d": np.ones(3, "int8")}
    saved = pm.save(torch.nn.ModuleDict({"a": torch.nn.Linear(1, 1)}).state_dict(), "other.safetensors")
    weights = {"a.w": torch.ones(2, 2), "b.w": torch.ones(2).double(), "b.b": torch.ones(2)}
    pm.save(weights, "m.safetensors")
    written = small().save("out.safetensors", record=True)
    patched = pm.patch("m.safetensors", lambda t: pm.at(t, "a.w").apply(lambda x: x * 2))
    history = pm.history("m.safetensors")
    undone = pm.undo("m.safetensors")
    target = {"w": np.zeros(3), "v": np.zeros(2), "u": np.zeros(1)}
    layout = pm.Layout([{"from": "a.w", "to": "b.w"}], rest="keep").to({"a": {"w": np.ones(2), "b": np.ones(1)}})[1]
    grafted = pm.graft(target, {"w": np.ones(2), "v": np.ones(2), "x": np.ones(1)}, mismatch="overlap", unused="ok")
    simulated = pm.quantize({"w": np.ones((8, 8), "float32")}, "w", scheme="int8", simulate=True)[1]
    layers = {"layers": [{"w": np.ones(2)}, {"w": np.ones(2)}]}
    mixture = {"0": {"gate": {"weight": np.ones((2, 2))}, "experts": {"w": np.ones((2, 2, 2))}}}
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    delta = pm.delta(old, new)
    return [
        saved,
        written,
        patched,
        undone,
        *history,
        pm.record("out.safetensors"),
        pm.anatomy(layers, {"num_hidden_layers": 2}),
        pm.diff(old, new, histograms=True, only="a/**"),
        delta,
        pm.stats(old, spectral=True, histograms=True),
        grafted[1],
        simulated,
        refused().report,
        pm.port({"a": {"kernel": np.ones((2, 2))}}, {"b.weight": np.ones((2, 2))})[1],
        port_refused().report,
        pm.deepen(layers, layers="layers[*]", order=[0, 1, 1], identity=None)[1],
        pm.widen({f"Dense_{n}": {"kernel": np.ones((2, 2))} for n in range(2)}, features={"Dense_0": 3})[1],
        pm.experts(mixture).keep([1])[1],
        pm.vocabulary({"wte": {"weight": np.ones((2, 2))}}).keep([1])[1],
        pm.frozen(params, pm.freeze(optax.adam(1e-3), "a")),
        pm.check_live(params, lambda p: p["a"].sum()),
        pm.ablate(old, {"a": "a/**", "b": "b/**"}, lambda tree: float(tree["a"]["w"].sum()), pairs=True),
        pm.freeze_(torch.nn.Linear(2, 2), "weight"),
        layout,
        pm.prove(torch.nn.Tanh(), torch.nn.ReLU(), torch.ones(2)),
    ]


def example_errors():
    recipe = raised(errors.BadRecipe, pm.Recipe.parse, "version: 1\nsteps: [zeroo: w, {fill: {at: w}}]")
    return [
        errors.ParamendError("what", hint="how"),
        raised(errors.SelectorError, pm.sel, "a["),
        raised(errors.NoMatch, pm.at, TREE, "a/kernl"),
        raised(errors.OutOfRange, pm.at, TREE, "b/[7]"),
        raised(errors.WrongCount, pm.at, TREE, "a/*", count=3),
        raised(errors.SpecMismatch, pm.at(TREE, "a/bias").set, np.ones(2)),
        raised(errors.Unsupported, pickle.dumps, pm.sel(lambda path, spec: True)),
        raised(
            errors.Quantized, pm.at({"weight": np.zeros((1, 8), "int8"), "weight_scales": np.ones(8)}, "weight").zero
        ),
        raised(errors.BadArgument, pm.sel, None),
        recipe,
        raised(errors.RenameClash, pm.at(TREE, "a/kernel").rename, "a/bias"),
        refused(),
        port_refused(),
        raised(errors.UnexpectedChange, pm.verify, {"a": np.ones(1)}, {"a": np.zeros(1)}),
        errors.BadCheckpoint("m.npz: damaged", hint="download it again"),
        raised(errors.CannotRead, pm.open, "/nothing/here"),
        raised(errors.CannotWrite, pm.save, TREE, "/nothing/here/m.npz"),
        errors.Busy("m.npz: another program is writing to it", hint="wait"),
        errors.MissingExtra("ray is not installed", hint="pip install ray"),
    ]


def public_classes():
    """Every class of a report, of a row of one, and of an error, wherever it stands."""
    for info in pkgutil.walk_packages(paramend.__path__, "paramend."):
        if not info.name.startswith(("paramend.cli", "paramend.demo", "paramend.lessons", "paramend.__main__")):
            for name, kind in inspect.getmembers(importlib.import_module(info.name), inspect.isclass):
                told = name.endswith(("Report", "Row", "RecordedLeaf")) and is_dataclass(kind)
                if told or issubclass(kind, errors.ParamendError | Report):
                    yield kind


BASES = {"Report", "Paged", "Outcome"}  # what reports share


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("reports"))
        return [*example_reports(), *example_errors()]


def held(value):
    """The value and all dataclasses in it."""
    yield value
    if is_dataclass(value):
        inside = [getattr(value, field.name) for field in fields(value)]
    else:
        inside = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    for each in inside:
        yield from held(each)


def test_there_is_an_example_of_every_class_of_reports_and_errors(examples):
    there = {type(each) for example in examples for each in held(example)}
    missing = {kind for kind in public_classes() if kind not in there and kind.__name__ not in BASES}
    assert not missing, "give an example of these in example_reports or example_errors"


def test_reports_and_errors_stay_what_they_are(examples, other):
    for example in examples:
        text, shown, back = other.submit(told, example).result()
        assert (text, shown) == (str(example), repr(example))
        for twin in (back, *copies(example)):
            assert type(twin) is type(example)
            assert (str(twin), repr(twin)) == (str(example), repr(example))
            if isinstance(example, Report):
                assert twin == example and twin.to_dict() == example.to_dict()
            if isinstance(example, Paged):
                assert twin.to_html() == example.to_html()


def data(error):
    """What an error carries for programs."""
    return {name: str(value) for name, value in vars(error).items()} | {"code": error.code, "args": error.args}


def test_an_error_keeps_what_it_says_and_what_it_carries(examples, other):
    for error in (example for example in examples if isinstance(example, Exception)):
        raised = other.submit(fail, error).exception()
        for twin in (raised, *copies(error)):
            twin.__dict__.pop("__notes__", None)
            assert data(twin) == data(error) and twin.hint == error.hint


def test_a_report_says_in_a_line_what_it_is(examples):
    for example in examples:
        if isinstance(example, Report):
            assert len(repr(example)) < 400 and "lambda" not in repr(example).replace("<lambda>", "")


def test_a_report_of_a_save_holds_neither_arrays_nor_files(tmp_path):
    tree = {"w": np.ones(1 << 18)}
    report = pm.save(tree, tmp_path / "m.npz")
    assert len(pickle.dumps(report)) < 2000
    assert isinstance(report.plan, Plan)
    with pytest.raises(pm.errors.Unsupported, match="a report tells of w and does not hold it"):
        report.plan.leaves.read(0)
