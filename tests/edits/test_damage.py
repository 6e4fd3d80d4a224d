"""Values that a dtype cannot hold are counted and said: by a warning in memory, by the report on disk."""

import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import paramend as pm
from paramend.arrays import losses
from paramend.cli.main import cli
from paramend.errors import ValuesLost

F4 = np.array([1e5, 1.0, -2.0, np.nan, np.inf, 1e-9, 0.5], "float32")
I1, U1 = np.array([100, 2, -100, 0], "int8"), np.array([200, 2, 3, 255], "uint8")
F2 = np.array([1000, 1, -60000, np.inf], "float16")

# name: values, the edit, how many overflow, how many are lost
EDITS = {
    "float16": (F4, lambda at: at.cast("float16"), 1, 1),
    "bfloat16 of the greatest float": (np.array([3.4e38, 1e-45, 1]).astype("f4"), lambda at: at.cast("bf16"), 1, 1),
    "float8 beyond 448": (np.array([500, 448, 449, 1e-9], "f4"), lambda at: at.cast("float8_e4m3fn"), 1, 1),
    "int8": (F4, lambda at: at.cast("int8"), 3, 2),
    "uint8": (F4, lambda at: at.cast("uint8"), 4, 2),
    "unsigned of negative integers": (I1, lambda at: at.cast("uint8"), 1, 0),
    "float16 of a great integer": (np.array([70000, 1], "i4"), lambda at: at.cast("float16"), 1, 0),
    "bools": (F4, lambda at: at.cast("bool"), 0, 6),
    "int8 times 2": (I1, lambda at: at.multiply(2), 2, 0),
    "int8 plus 100": (I1, lambda at: at.add(100), 1, 0),
    "uint8 times 2": (U1, lambda at: at.multiply(2), 2, 0),
    "uint8 plus an array": (U1, lambda at: at.add(np.array([100, 1, 1, 1], "u1")), 2, 0),
    "a slice": (I1, lambda at: at[:2].multiply(2), 1, 0),
    "some places": (I1, lambda at: at[[0, 3]].add(50), 1, 0),
    "float16 times 100": (F2, lambda at: at.multiply(100), 2, 0),
    "float16 plus itself": (F2, lambda at: at.add(F2), 1, 0),
    "float32 times 1e30": (np.array([1e30, 1], "f4"), lambda at: at.multiply(1e30), 1, 0),
    "noise": (np.full(99, 65504, "float16"), lambda at: at.noise(0.0), 0, 0),
    "nothing": (F4[1:3], lambda at: at.cast("float16"), 0, 0),
    "a wider dtype": (F2, lambda at: at.cast("float32"), 0, 0),
}
LIBRARIES = {"numpy": np.array, "jax": jnp.array, "torch": lambda x: torch.tensor(x)}


def sentence(overflowed, lost):
    parts = [f"{overflowed} value{'s overflow' if overflowed > 1 else ' overflows'} (w)"] if overflowed else []
    what = f"{lost}" if overflowed else f"{lost} value{'s' if lost > 1 else ''}"
    parts += [f"{what} {'are' if lost > 1 else 'is'} lost (w)"] if lost else []
    return ", ".join(parts)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_in_memory_warns_of_what_it_could_not_hold(name, library):
    values, edit, overflowed, lost = EDITS[name]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        edit(pm.at({"w": LIBRARIES[library](values), "other": LIBRARIES[library](values)}, "w"))
    said = [str(each.message).partition(": ")[2] for each in told]
    assert said == ([sentence(overflowed, lost)] if overflowed else [])  # what is merely lost is in reports alone
    assert all(each.category is ValuesLost and each.filename == __file__ for each in told)


@pytest.mark.parametrize("form", ["safetensors", "npz", "pt", "msgpack", "orbax"])
def test_the_report_of_a_save_says_so_and_so_does_that_of_a_patch(form, tmp_path):
    path = tmp_path / f"m.{form}"
    pm.save({"w": F4, "i": I1, "other": np.ones(2, "f4")}, path)
    edited = pm.at(pm.at(pm.open(path), "{w,other}").cast("float16"), "i").multiply(2)
    report = edited.save(tmp_path / f"new.{form}")
    assert "; 3 values overflow (" in report.summary and ", 1 is lost (w)" in report.summary
    rows = {row["path"]: row for row in report.to_dict()["changed"]}
    assert (rows["w"]["overflowed"], rows["w"]["lost"], rows["i"]["overflowed"]) == (1, 1, 2)
    assert "overflowed" not in rows["other"]
    assert "cast('float16'): 1 overflow, 1 lost" in str(report)
    for dry_run in (True, False):
        report = pm.patch(path, lambda t: pm.at(t, "i").multiply(2), dry_run=dry_run)
        assert "; 2 values overflow (i)" in report.summary
    assert pm.load(path)["i"].tolist() == [-56, 4, 56, 0]
    assert "overflow" not in pm.patch(path, lambda t: pm.at(t, "i")[1:2].add(1)).summary


def test_the_command_line_says_so_in_a_dry_run_too(tmp_path):
    path = tmp_path / "m.safetensors"
    pm.save({"w": F4}, path)
    for more in (["--dry-run"], ["-o", str(tmp_path / "new.safetensors")]):
        result = CliRunner().invoke(cli, ["cast", str(path), "w", "float16", *more])
        assert "1 of 1 leaf changes, 1 value overflows (w), 1 is lost (w)" in result.output


def test_pieces_add_up_and_a_second_run_counts_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("paramend.leaves.origins.origin.CHUNK", 7)
    monkeypatch.setattr("paramend.piecewise.steps.CHUNK", 7)
    path = tmp_path / "m.safetensors"
    pm.save({"w": np.tile(I1, 25).reshape(10, 10)}, path)
    edited = pm.at(pm.open(path), "w").add(np.full((10, 1), 100, "int8"))
    for name in ("a", "b"):
        report = edited.save(tmp_path / f"{name}.safetensors")
        assert report.to_dict()["changed"][0]["overflowed"] == 25
    pm.at(edited, "w").one()
    assert "25 overflow" in str(edited.plan)


def test_traced_values_are_not_counted():
    made = jax.jit(lambda tree, by: pm.at(pm.at(tree, "w").cast("float16"), "i").multiply(by))(
        {"w": jnp.array(F4), "i": jnp.array(I1)}, jnp.int8(2)
    )
    assert jnp.isinf(made["w"][0])


@pytest.mark.parametrize("dtype", ["int4", "int8", "uint8", "int16", "int32", "uint32", "int64", "uint64"])
@pytest.mark.parametrize("verb", ["add", "multiply"])
def test_integers_wrap_where_those_of_python_leave_the_range(verb, dtype):
    info = ml_dtypes.iinfo(dtype if dtype != "int4" else ml_dtypes.int4)
    ends = [info.min, info.min + 1, info.min // 2, 0, 1, 2, 3, info.max // 2, info.max // 2 + 1, info.max - 1, info.max]
    ends += [-1] if info.min else [4]
    pairs = [(int(a), int(b)) for a in ends for b in ends]
    x, y = (np.array(part, dtype=object).astype(info.dtype) for part in zip(*pairs, strict=True))
    exact = [a + b if verb == "add" else a * b for a, b in pairs]
    with np.errstate(all="ignore"):
        after = getattr(np, verb)(x, y)
    assert losses.overflow(verb, x, y, after) == sum(not info.min <= value <= info.max for value in exact)
