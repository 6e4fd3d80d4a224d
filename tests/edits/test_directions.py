"""`project_out` and products of low rank: arithmetic of float64, in every tree and in files."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from flax import nnx

import paramend as pm
from paramend.cli.main import cli
from paramend.errors import BadArgument, BadRecipe, OutOfRange, SpecMismatch, ValuesLost
from support.numerics import assert_close

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# shape of a leaf, the axis that a direction is along, and whether `axis=` must say so
SHAPES = [
    ((6, 4), -2, False),
    ((4, 6), -1, False),
    ((3, 6, 4), -2, False),
    ((3, 4, 6), -1, False),
    ((6, 6), 0, True),
    ((6, 6), 1, True),
    ((3, 6, 6), -2, True),
    ((6, 2, 3, 3), 0, True),
    ((2, 3, 5, 6), -1, False),
    ((6,), 0, False),
    ((5, 6, 1), -2, False),
    ((0, 6), -1, False),
    ((6, 0), -2, False),
]


def leaf(shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def without(w, r, axis, strength=1.0):
    """W - strength * r (r^T W), in float64."""
    r = np.asarray(r, np.float64)
    r = r / np.linalg.norm(r)
    w = np.moveaxis(np.asarray(w).astype(np.float64), axis, -1)
    return np.moveaxis(w - strength * (w @ r)[..., None] * r, -1, axis)


def share(w, r, axis):
    return np.moveaxis(np.asarray(w).astype(np.float64), axis, -1) @ (r / np.linalg.norm(r))


R = leaf(6, "float64", 9)


@pytest.mark.numeric
@pytest.mark.parametrize(("shape", "axis", "named"), SHAPES)
def test_a_direction_is_taken_out_of_arrays_of_every_library(shape, axis, named):
    more = {"axis": axis} if named else {}
    for make in (lambda x: x, jnp.asarray, torch.tensor):
        w = make(leaf(shape))
        found = pm.at({"w": w}, "w").project_out(R, 0.75, **more)["w"]
        assert type(found) is type(w) and found.dtype == w.dtype
        assert_close(found, without(w, R, axis, 0.75), terms=8, scale=4, dtype="float32")
        assert_close(share(found, R, axis), 0.25 * share(w, R, axis), terms=12, scale=4, dtype="float32")
    exact = pm.at({"w": leaf(shape, "float64")}, "w").project_out(R.tolist(), strength=0.75, **more)["w"]
    assert_close(exact, without(leaf(shape, "float64"), R, axis, 0.75), terms=8, scale=4)


@pytest.mark.numeric
@pytest.mark.parametrize("make", [lambda x: x, jnp.asarray, lambda x: pm.load(pm.save({"w": x}, "t.pt").path)["w"]])
def test_narrow_leaves_are_rounded_once(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    w = leaf((64, 6), "float32").astype(BFLOAT16)
    found = np.asarray(pm.at({"w": make(w)}, "w").project_out(R)["w"])
    right = without(w, R, -1).astype(np.float32).astype(BFLOAT16)
    # Where float32 is just beside the middle between two numbers, the other one may be met.
    assert (found != right).mean() < 0.01 and np.abs(found.astype("f4") - right.astype("f4")).max() < 2**-6


def test_the_length_of_a_direction_does_not_matter_even_where_its_squares_are_zero_or_infinite():
    w = leaf((5, 4))
    found = [pm.at({"w": w}, "w").project_out(leaf(4, "float64") * by)["w"] for by in (1, 2.0**900, 2.0**-900)]
    assert found[0].tobytes() == found[1].tobytes() == found[2].tobytes()
    whole = pm.at({"w": w}, "w").project_out(torch.tensor([0, 3, 0, 0]))["w"]
    assert whole.tolist() == (w * np.array([1, 0, 1, 1], "f4")).tolist()


@pytest.mark.numeric
def test_modules_and_their_leaves_in_place():
    linear = torch.nn.Linear(4, 6)
    weight, before = linear.weight, linear.weight.detach().numpy().copy()
    assert pm.at(linear, "weight").project_out_(R) is None
    assert linear.weight is weight and weight.requires_grad and weight.grad_fn is None
    assert_close(weight, without(before, R, 0), terms=8, dtype="float32")
    pm.at(linear, "bias").project_out_(R)
    assert_close(linear.bias.detach().numpy() @ R, 0.0, terms=16, scale=1, dtype="float32")

    model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    before = np.asarray(model.kernel[...])
    pm.at(model, "kernel").project_out_(R)
    assert_close(model.kernel[...], without(before, R, 1), terms=8)
    layer = eqx.nn.Linear(4, 6, key=jax.random.key(0))
    assert_close(pm.at(layer, "weight").project_out(R).weight, without(layer.weight, R, 0), terms=8)


@pytest.mark.numeric
def test_inside_jit_with_a_traced_strength_and_of_a_slice():
    w = jnp.asarray(leaf((3, 6, 4)))
    found = jax.jit(lambda tree, by: pm.at(tree, "w")[1].project_out(R, by))({"w": w}, 0.5)["w"]
    assert_close(found[1], without(w[1], R, 0, 0.5), terms=8)
    assert (found[::2] == w[::2]).all()
    with pytest.raises(BadArgument, match="traced"):
        jax.jit(lambda r: pm.at({"w": w}, "w").project_out(r))(jnp.asarray(R))


LR = {  # shapes of a leaf, of B and of A
    "a matrix": ((6, 4), (6, 2), (2, 4)),
    "each expert": ((3, 6, 4), (3, 6, 2), (3, 2, 4)),
    "one factor for all experts": ((3, 6, 4), (6, 2), (3, 2, 4)),
    "rank zero": ((6, 4), (6, 0), (0, 4)),
    "nothing": ((0, 4), (0, 2), (2, 4)),
}


@pytest.mark.numeric
@pytest.mark.parametrize("case", LR)
def test_a_product_is_added(case):
    shape, *factors = LR[case]
    b, a = (leaf(each, "float64", n) for n, each in enumerate(factors, 1))
    for make in (lambda x: x, lambda x: jnp.asarray(x, "float32"), torch.tensor):
        w = leaf(shape)
        found = pm.at({"w": make(w)}, "w").add((make(b), make(a)))["w"]
        assert type(found) is type(make(w)) and str(found.dtype).endswith("float32")
        assert_close(found, w + b @ a, terms=6, scale=8, dtype="float32")
    assert_close(pm.at({"w": leaf(shape, "float64")}, "w").add((b, a))["w"], leaf(shape, "float64") + b @ a, terms=6)


def test_a_pair_of_numbers_or_rows_is_an_array_as_before():
    assert pm.at({"w": np.ones(2)}, "w").add((1.0, 2.0))["w"].tolist() == [2, 3]
    assert pm.at({"w": np.ones((2, 2))}, "w").add((np.zeros(2), np.ones(2)))["w"].tolist() == [[1, 1], [2, 2]]


def test_a_leaf_that_changes_may_be_a_factor():
    tree = {"a": np.eye(2), "w": np.ones((2, 2))}
    pm.at(tree, "**").add_((tree["a"], tree["w"]))
    assert tree["a"].tolist() == [[2, 1], [1, 2]] and tree["w"].tolist() == [[2, 2], [2, 2]]


# ---- what is refused ---------------------------------------------------------------------------------------------

WRONG = {
    "zero": (lambda s: s.project_out(np.zeros(6)), BadArgument, "the direction is zero"),
    "no elements": (lambda s: s.project_out([]), BadArgument, "the direction is zero"),
    "nan": (lambda s: s.project_out([1, 2, 3, 4, 5, np.nan]), BadArgument, "not finite"),
    "inf": (lambda s: s.project_out(np.full(6, np.inf)), BadArgument, "not finite"),
    "a matrix": (lambda s: s.project_out(R.reshape(6, 1)), BadArgument, "the direction is a vector of numbers, and"),
    "text": (lambda s: s.project_out("r.npy"), BadArgument, "the direction is a vector of numbers, and"),
    "complex": (lambda s: s.project_out(R * 1j), BadArgument, "the direction is a vector of numbers, and"),
    "length": (lambda s: s.project_out(R[:5]), SpecMismatch, "has 5 elements, and neither of the last two axes of"),
    "another axis": (lambda s: s.project_out(R, axis=1), SpecMismatch, "axis 1 of float32[6,4] has 4"),
    "no axis": (lambda s: s.project_out(R, axis=2), OutOfRange, "has no axis 2"),
    "strength": (lambda s: s.project_out(R, np.inf), BadArgument, "strength=inf is not a finite number"),
    "text strength": (lambda s: s.project_out(R, "all"), SpecMismatch, "project_out takes a number, and strength is"),
    "inner": (lambda s: s.add((leaf((6, 2)), leaf((3, 4)))), SpecMismatch, "float32[6,2] @ float32[3,4] has not its"),
    "outer": (lambda s: s.add((leaf((4, 2)), leaf((2, 6)))), SpecMismatch, "the leaf is float32[6,4], and"),
    "complex factor": (lambda s: s.add((leaf((6, 2)) * 1j, leaf((2, 4)))), SpecMismatch, "is added to floats"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("where", ["memory", "file"])
def test_what_is_refused(case, where, tmp_path):
    edit, error, says = WRONG[case]
    tree = {"w": leaf((6, 4))}
    if where == "file":
        tree = pm.open(pm.save(tree, tmp_path / "m.safetensors").path)
    with pytest.raises(error) as caught:
        edit(pm.at(tree, "w"))
    assert says in str(caught.value)


def test_leaves_that_do_not_fit_are_refused_by_name():
    tree = {"square": leaf((6, 6)), "codes": np.ones((6, 4), "int8"), "conv": leaf((6, 3, 2, 2)), "0": np.float32(1)}
    with pytest.raises(SpecMismatch, match=r"square: .* axes 0 and 1 of float32\[6,6\] both have 6") as caught:
        pm.at(tree, "square").project_out(R)
    assert caught.value.hint == "axis=-2 or axis=-1"
    with pytest.raises(SpecMismatch, match=r"codes: project_out computes with floats, and the leaf is int8\[6,4\]"):
        pm.at(tree, "codes").project_out(R)
    with pytest.raises(SpecMismatch) as caught:
        pm.at(tree, "conv").project_out(R)
    assert caught.value.hint == "axis=0"
    with pytest.raises(SpecMismatch, match="codes: a product of low rank is added to floats"):
        pm.at(tree, "codes").add((np.ones((6, 1)), np.ones((1, 4))))
    with pytest.raises(SpecMismatch, match="0: the direction"):
        pm.at(tree, "0").project_out([1.0])


def test_what_overflows_is_told():
    tree = {"w": np.full((2, 3), 60000, np.float16)}
    with pytest.warns(ValuesLost, match="6 values overflow"):
        pm.at(tree, "w").project_out([1, 1, 1], strength=3)
    with pytest.warns(ValuesLost, match="6 values overflow"):
        pm.at(tree, "w").add((np.ones((2, 1)), np.full((1, 3), 1e4)))


# ---- on disk -----------------------------------------------------------------------------------------------------

TREE = {
    "rows": leaf((7, 50)),
    "columns": leaf((50, 7), seed=1).astype(BFLOAT16),
    "experts": leaf((4, 7, 30), "float16", seed=2),
    "wide": leaf((3, 30, 7), "float64", seed=3),
    "bias": leaf(7, seed=4),
    "empty": leaf((0, 7)),
    "left": np.arange(14).reshape(2, 7),
}
D = leaf(7, "float64", 5)
FLOATS = pm.sel("**").where(dtype="float")
EDITS = {
    "out": lambda t: pm.at(t, FLOATS).project_out(D, 0.7),
    "twice": lambda t: pm.at(pm.at(t, FLOATS).project_out(D), FLOATS).project_out(D[::-1].copy()),
    "after a product": lambda t: pm.at(pm.at(t, "rows").add((D[:, None], np.ones((1, 50)))), "rows").project_out(
        D, 0.5
    ),
    "between": lambda t: pm.at(pm.at(pm.at(t, "rows").noise(0.5, seed=3), "rows").project_out(D), "rows").multiply(3),
    "after a fill": lambda t: pm.at(pm.at(t, "rows").fill(2), "rows").project_out(D),
    "one expert": lambda t: pm.at(t, "experts")[2].project_out(D),
    "some columns": lambda t: pm.at(t, "{experts,rows}")[..., ::3].project_out(D),
    "of the row": lambda t: pm.at(t, "experts")[..., 3].project_out(D),
    "backwards": lambda t: pm.at(t, "rows")[::-1].project_out(D),
    "chosen": lambda t: pm.at(t, "columns")[[40, 3, 11]].project_out(D),
    "products": lambda t: pm.at(t, "experts")[1:, 2:].add((leaf((3, 5, 2)), leaf((3, 2, 30)))),
}


CASES = [
    *(("safetensors", edit) for edit in EDITS),
    *(("orbax", edit) for edit in ("out", "one expert", "of the row")),
    *((suffix, edit) for suffix in ("npz", "msgpack", "pt", "/") for edit in ("twice", "products")),
]


@pytest.mark.parametrize(("suffix", "edit"), CASES)
def test_files_are_written_and_patched_with_the_bits_of_memory(suffix, edit, tmp_path, monkeypatch):
    edit = EDITS[edit]
    for module in ("arrays.lowrank", "piecewise.steps", "leaves.origins.origin"):
        monkeypatch.setattr(f"paramend.{module}.CHUNK", 60)
    tree = {name: w for name, w in TREE.items() if suffix != "npz" or w.dtype != BFLOAT16}
    if suffix == "npz":
        tree |= {"columns": TREE["columns"].astype("float32")}
    path, out = (tmp_path / f"{name}{suffix if suffix == '/' else f'.{suffix}'}" for name in "mo")
    if suffix == "/":
        pm.save(tree, tmp_path / "m.safetensors")
        pm.open(tmp_path / "m.safetensors").save(f"{path}/", max_shard_size=900)
    else:
        pm.save(tree, path)
    before = {name: np.array(w).tobytes() for name, w in pm.load(path).items()}
    right = {name: np.asarray(w).tobytes() for name, w in edit(tree).items()}
    assert right != {name: w.tobytes() for name, w in tree.items()}
    edit(pm.open(path)).save(f"{out}/" if suffix == "/" else out)
    assert {name: np.array(w).tobytes() for name, w in pm.load(out).items()} == right
    pm.patch(path, edit)
    assert {name: np.array(w).tobytes() for name, w in pm.load(path).items()} == right
    pm.undo(path)
    assert {name: np.array(w).tobytes() for name, w in pm.load(path).items()} == before


def run(line):
    done = CliRunner().invoke(cli, line.split())
    return done.exit_code, done.output


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("d.npy", D)
    pm.save({"rows": D.astype("float32"), "experts": leaf(30, seed=6)}, "each.safetensors")
    pm.save({name: w for name, w in TREE.items() if name in ("rows", "experts", "left")}, "m.safetensors")
    return tmp_path


def saved(path):
    return {name: w.tobytes() for name, w in pm.load(path).items()}


def test_a_step_takes_the_direction_from_a_file_and_records_replay_it(folder):
    text = "version: 1\nsteps:\n  - project_out: {at: experts, from: d.npy, strength: 0.5}\n"
    Path("out.yaml").write_text(text)
    right = pm.at(pm.load("m.safetensors"), "experts").project_out(D, 0.5)
    for tree in (pm.load("m.safetensors"), pm.open("m.safetensors")):
        found = pm.Recipe.load("out.yaml").apply(tree)
        assert np.asarray(found["experts"]).tobytes() == right["experts"].tobytes()
    assert "project_out(float64[7], 0.5)" in str(found.plan)
    found.save("o.safetensors", record=True)
    record = pm.record("o.safetensors")
    assert record.recipe.endswith('project_out: {at: "experts", strength: 0.5, from: "d.npy"}')
    again = pm.Recipe.parse(record.recipe).apply(pm.open("m.safetensors"))
    assert again["experts"].tobytes() == right["experts"].tobytes()


def test_a_step_takes_a_direction_for_each_leaf_and_lists_of_numbers(folder):
    right = pm.at(pm.load("m.safetensors"), "rows").project_out(D.astype("float32"))
    right = pm.at(right, "experts").project_out(leaf(30, seed=6))
    step = {"project_out": {"at": ["rows", "experts"], "from": "each.safetensors"}}
    found = pm.Recipe([step]).apply(pm.open("m.safetensors"))
    assert found["rows"].tobytes() == right["rows"].tobytes()
    assert found["experts"].tobytes() == right["experts"].tobytes()
    listed = {"project_out": {"at": "experts", "index": "1:", "direction": D.tolist(), "axis": -2}}
    found = pm.Recipe([listed]).apply(pm.load("m.safetensors"))
    assert (found["experts"] == pm.at(pm.load("m.safetensors"), "experts")[1:].project_out(D)["experts"]).all()


def test_what_a_step_says_of_a_wrong_direction(folder):
    np.save("zero.npy", np.zeros(7))
    steps = [
        {"at": "rows", "from": "zero.npy"},
        {"at": "rows", "direction": [1, 2]},
        {"at": "left", "from": "d.npy"},
        {"at": "rows", "from": "d.npy", "axis": 1},
    ]
    with pytest.raises(BadRecipe) as caught:
        pm.Recipe([{"project_out": step} for step in steps]).apply(pm.open("m.safetensors"))
    found = [(problem.address, problem.message) for problem in caught.value.problems]
    assert [address for address, _ in found] == [
        "$.steps[0].from",
        "$.steps[1].direction",
        "$.steps[2].from",
        "$.steps[3].from",
    ]
    says = [
        "is zero",
        "has 2 elements, and neither",
        "left: project_out computes with floats",
        "axis 1 of float32[7,50]",
    ]
    assert all(each in message for each, (_, message) in zip(says, found, strict=True))
    with pytest.raises(BadRecipe, match="project_out needs direction or from"):
        pm.Recipe([{"project_out": {"at": "rows"}}])


def test_the_command(folder):
    right = pm.at(pm.load("m.safetensors"), "experts").project_out(D, 0.25)["experts"].tobytes()
    status, said = run("project_out m.safetensors experts d.npy --strength 0.25 --dry-run")
    assert status == 0 and "project_out(float64[7], 0.25)" in said and "1 of 3 leaves changes" in said
    assert run("project_out m.safetensors experts d.npy --strength 0.25 -o o.safetensors --record")[0] == 0
    assert saved("o.safetensors")["experts"] == right
    recipe = pm.Recipe.parse(pm.record("o.safetensors").recipe)
    assert recipe.apply(pm.open("m.safetensors"))["experts"].tobytes() == right
    before = saved("m.safetensors")
    assert run("project_out m.safetensors experts d.npy --strength 0.25 --axis -2 --in-place")[0] == 0
    assert saved("m.safetensors") == before | {"experts": right}
    assert run("undo m.safetensors")[0] == 0 and saved("m.safetensors") == before
    assert run("project_out m.safetensors rows each.safetensors:rows -o p.safetensors")[0] == 0
    right = pm.at(pm.load("m.safetensors"), "rows").project_out(D.astype("float32"))["rows"]
    assert saved("p.safetensors")["rows"] == right.tobytes()


def test_what_the_command_says(folder):
    status, said = run("project_out m.safetensors left d.npy --dry-run")
    assert status == 2 and "left: project_out computes with floats, and the leaf is int64[2,7]" in said
    status, said = run("project_out m.safetensors rows d.npy --axis 1 --dry-run")
    assert status == 2 and "the direction has 7 elements, and axis 1 of float32[7,50] has 50" in said
    assert "Did you mean 'project_out'" in run("project-out m.safetensors rows d.npy")[1]
    status, said = run("project_out m.safetensors rows lost.npy --dry-run")
    assert status == 2 and "lost.npy" in said
