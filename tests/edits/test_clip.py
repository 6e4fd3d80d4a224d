"""`clip` gives what numpy, JAX and torch give, in the dtype of the leaf, in memory and on disk."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import example, given, settings, strategies as st

import paramend as pm
from paramend.cli.main import cli
from paramend.errors import BadArgument, SpecMismatch, Unsupported

INF, NAN = math.inf, math.nan
VALUES = [-INF, -1e4, -2.5, -1.0, -0.25, 0.5, 1.0, 3.0, 1e4, INF, NAN]
FLOATS = ["float64", "float32", "float16", "bfloat16", "float8_e5m2", "float8_e4m3fn"]
INTS = {
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int32": (-(2**31), 2**31 - 1),
    "uint64": (0, 2**64 - 1),
    "int4": (-8, 7),
}
BOUNDS = [(-1, 1), (-0.3, 2.7), (0.1, 0.1), (-INF, 1), (0.5, INF), (None, 1), (-1, None), (-1e6, 1e6), (None, None)]


def floats(dtype):
    with np.errstate(all="ignore"):
        return np.array(VALUES).astype(getattr(ml_dtypes, dtype, dtype))


def by_hand(values, lo, hi):
    """Bounds are rounded to the dtype, as numpy, JAX and torch round a number of Python; beyond it there are none."""

    def rounded(bound):
        if bound is None or abs(bound) == INF:
            return None
        held = float(np.float64(bound).astype(values.dtype))
        return held if math.isfinite(held) else None

    low, high = rounded(lo), rounded(hi)
    found = []
    for value in values.astype(np.float64).tolist():
        value = low if low is not None and value < low else value
        found.append(high if high is not None and value > high else value)
    return np.array(found).astype(values.dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.filterwarnings("ignore:overflow")
def test_floats_in_every_library(dtype, bounds):
    values = floats(dtype)
    expected = by_hand(values, *bounds)
    found = pm.at({"w": values}, "w").clip(*bounds)["w"]
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found.astype("float64"), expected.astype("float64"))
    if dtype != "float64":
        leaf = jnp.asarray(values)
        found = pm.at({"w": leaf}, "w").clip(*bounds)["w"]
        assert found.dtype == leaf.dtype
        np.testing.assert_array_equal(np.asarray(found).astype("float64"), expected.astype("float64"))
    leaf = torch.tensor(values.astype("float64")).to(getattr(torch, dtype))
    found = pm.at({"w": leaf}, "w").clip(*bounds)["w"]
    assert found.dtype == leaf.dtype
    np.testing.assert_array_equal(found.double().numpy(), expected.astype("float64"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_the_bits_are_those_of_each_library(dtype):
    values = np.random.default_rng(0).normal(size=500).astype(dtype)
    values[:3] = NAN, -0.0, 0.0
    mine = lambda leaf: pm.at({"w": leaf}, "w").clip(-0.7, 0)["w"]
    assert mine(values).tobytes() == np.clip(values, -0.7, 0).tobytes()
    assert (
        np.asarray(mine(jnp.asarray(values))).tobytes() == np.asarray(jnp.clip(jnp.asarray(values), -0.7, 0)).tobytes()
    )
    assert mine(torch.tensor(values)).numpy().tobytes() == torch.clamp(torch.tensor(values), -0.7, 0).numpy().tobytes()


@settings(deadline=None)
@given(
    st.sampled_from([*INTS]), st.floats(-1e20, 1e20) | st.integers(-(2**65), 2**65), st.floats(0, 1e20) | st.just(INF)
)
@example("int8", -0.5, 1.0)
@example("uint8", -3, 2.5)
@example("uint64", 2**63 + 1, 2.0**63)
def test_integers_keep_to_the_integers_between_the_bounds(dtype, lo, width):
    hi = lo + width
    least, most = INTS[dtype]
    within = range(max(math.ceil(lo), least), min(most if hi == INF else math.floor(hi), most) + 1)
    values = [least, least + 1, (least + most) // 2, 0, 1, most - 1, most]
    leaf = np.array(values, dtype=getattr(ml_dtypes, dtype, dtype))
    selection = pm.at({"w": leaf}, "w")
    if not within:
        with pytest.raises(SpecMismatch, match=f"no {dtype} lies between"):
            selection.clip(lo, hi)
        return
    found = selection.clip(lo, hi)["w"]
    assert found.dtype == leaf.dtype
    assert [int(x) for x in found] == [min(max(value, within[0]), within[-1]) for value in values]


def test_integers_of_jax_and_torch():
    for dtype in ("int8", "uint8", "int32"):
        expected = np.clip(np.arange(0, 20).astype(dtype), 3, 7)
        assert (np.asarray(pm.at({"w": jnp.arange(20).astype(dtype)}, "w").clip(2.5, 7.9)["w"]) == expected).all()
        found = pm.at({"w": torch.arange(20).to(getattr(torch, dtype))}, "w").clip(2.5, 7.9)["w"]
        assert found.dtype == getattr(torch, dtype) and found.tolist() == expected.tolist()


REFUSED = {
    "lo above hi": (np.ones(2), (1, -1), BadArgument, ".clip(-1, 1)"),
    "NaN": (np.ones(2), (NAN, 1), BadArgument, "lo is NaN"),
    "bools": (np.ones(2, bool), (0, 1), SpecMismatch, "w: clip needs ordered numbers"),
    "complex": (np.ones(2, complex), (0, 1), SpecMismatch, "w: clip needs ordered numbers"),
    "complex bound": (np.ones(2), (0, 1j), SpecMismatch, "hi=1j is complex"),
    "array": (np.ones(2), (np.zeros(2), 1), SpecMismatch, "clip takes a scalar, and lo is an array of shape (2,)"),
    "too high for lo": (np.ones(2, np.float16), (1e6, 1e7), SpecMismatch, "float16 cannot hold 1000000.0"),
    "no integer": (np.ones(2, np.int8), (0.2, 0.8), SpecMismatch, "no int8 lies between 0.2 and 0.8"),
    "key": (jax.random.key(0), (0, 1), Unsupported, "is not a number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    leaf, bounds, error, message = REFUSED[case]
    with pytest.raises(error) as raised:
        pm.at({"w": leaf}, "w").clip(*bounds)
    assert message in str(raised.value)


def test_slices_numpy_scalars_and_bounds_of_other_libraries():
    values = np.arange(12.0).reshape(3, 4)
    found = pm.at({"w": values}, "w")[1].clip(5, 6)["w"]
    assert found.tolist() == [[0, 1, 2, 3], [5, 5, 6, 6], [8, 9, 10, 11]]
    assert pm.at({"w": np.float32(3)}, "w").clip(0, 1)["w"] == np.float32(1)
    assert type(pm.at({"w": np.float32(3)}, "w").clip(0, 1)["w"]) is np.float32
    assert pm.at({"w": values}, "w").clip(torch.tensor(2), jnp.float32(3.5))["w"].max() == 3.5


def test_a_traced_bound():
    clip = jax.jit(lambda tree, hi: pm.at(tree, "w").clip(-1, hi))
    leaf = jnp.arange(4, dtype=jnp.bfloat16)
    found = clip({"w": leaf}, 2.0)["w"]
    assert found.dtype == leaf.dtype and found.tolist() == [0, 1, 2, 2]


def test_a_parameter_stays_one_and_in_place_it_is_the_same():
    layer = torch.nn.Linear(3, 2)
    weight = layer.weight
    expected = torch.clamp(weight.detach().clone(), -0.1, 0.1)
    edited = pm.at(layer, "weight").clip(-0.1, 0.1)
    assert type(edited.weight) is torch.nn.Parameter and edited.weight.requires_grad
    assert torch.equal(edited.weight, expected)
    assert pm.at(layer, "weight").clip_(-0.1, 0.1) is None
    assert layer.weight is weight and torch.equal(weight, expected)


# ---- on disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tree():
    rng = np.random.default_rng(1)
    tree = {name: (rng.normal(size=(70, 50)) * 3).astype(getattr(ml_dtypes, name, name)) for name in FLOATS}
    return tree | {"int8": rng.integers(-128, 127, (40,), np.int8), "uint8": rng.integers(0, 255, (40,), np.uint8)}


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "msgpack"])
def test_files_in_new_ones_in_place_and_back(tree, tmp_path, suffix, monkeypatch):
    monkeypatch.setattr("paramend.piecewise.steps.CHUNK", 97)
    path, out = tmp_path / f"m.{suffix}", tmp_path / f"out.{suffix}"
    if suffix == "npz":  # which has the dtypes of numpy only
        tree = {name: leaf for name, leaf in tree.items() if leaf.dtype.kind != "V" and name not in FLOATS[3:]}
    pm.save(tree, path)
    before = {name: leaf.tobytes() for name, leaf in pm.load(path).items()}
    expected = {name: leaf.tobytes() for name, leaf in pm.at(tree, "**").clip(-1.5, 2.25).items()}
    pm.at(pm.open(path), "**").clip(-1.5, 2.25).save(out)
    assert {name: leaf.tobytes() for name, leaf in pm.load(out).items()} == expected
    pm.patch(path, lambda checkpoint: pm.at(checkpoint, "**").clip(-1.5, 2.25))
    assert {name: np.array(leaf).tobytes() for name, leaf in pm.load(path).items()} == expected
    pm.undo(path)
    assert {name: np.array(leaf).tobytes() for name, leaf in pm.load(path).items()} == before


def test_the_step_of_a_recipe(tree):
    recipe = pm.Recipe([{"clip": {"at": "**", "lo": "-inf", "hi": 1e-3}}])
    assert str(recipe).endswith('clip: {at: "**", lo: -.inf, hi: 0.001}')
    found = recipe.apply({"w": tree["float32"]})["w"]
    assert found.tobytes() == np.minimum(tree["float32"], np.float32(1e-3)).tobytes()
    assert pm.Recipe.parse("version: 1\nsteps: [{clip: {at: w, lo: -.inf, hi: 0.001}}]")


@pytest.mark.parametrize(
    ("typed", "bounds"),
    [
        (["-1", "1"], (-1, 1)),
        (["-2.5", "-.5"], (-2.5, -0.5)),
        (["-inf", "-1e-1"], (None, -0.1)),
        (["0", "inf"], (0, None)),
        (["--", "-1", "0.5"], (-1, 0.5)),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_the_command(tree, tmp_path, typed, bounds, first):
    model, out = tmp_path / "m.safetensors", tmp_path / "out.safetensors"
    leaf = tree["float32"]
    pm.save({"w": leaf, "b": leaf}, model)
    args = (
        ["clip", "-o", out, model, "w", *typed] if first or "--" in typed else ["clip", model, "w", *typed, "-o", out]
    )
    done = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert done.exit_code == 0, done.output
    found = pm.load(out)
    low, high = (None if bound is None else np.float32(bound) for bound in bounds)
    assert found["w"].tobytes() == np.clip(leaf, low, high).tobytes()
    assert found["b"].tobytes() == leaf.tobytes()


def test_what_the_command_refuses(tmp_path):
    model = tmp_path / "m.safetensors"
    pm.save({"w": np.ones(2)}, model)
    done = CliRunner().invoke(cli, ["clip", str(model), "w", "1", "-1", "--dry-run"])
    assert done.exit_code == 2
    assert "LO 1 is above HI -1" in done.output
    done = CliRunner().invoke(cli, ["clip", str(model), "w", "low", "1", "--dry-run"])
    assert done.exit_code == 2
    assert "Invalid value for 'LO': 'low' is not a number" in done.output.replace("\n", " ")
