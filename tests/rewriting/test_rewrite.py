"""The rewriting engine: the same bytes as in memory, nothing half done, bounded memory."""

import errno
import os
import random
import signal
import stat
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
from hypothesis import HealthCheck, example, given, settings, strategies as st

import paramend as pm
from paramend.arrays import initializers
from paramend.edits.call import Call
from paramend.edits.ops import OPS
from paramend.edits.plan import Plan, call
from paramend.errors import BadArgument, BadCheckpoint, CannotWrite, NoMatch, ParamendError, SpecMismatch, Unsupported
from paramend.formats.gathered import Gathered
from paramend.formats.registry import open_source
from paramend.formats.safetensors import SafetensorsFile
from paramend.leaves.origins import origin as streaming
from paramend.leaves.origins.stored import Stored
from paramend.leaves.paths import labels
from paramend.leaves.specs import Spec
from paramend.piecewise.steps import step_of
from paramend.rewriting.rewrite import write
from support.planning import plan
from support.writing import write_header


def rewrite(source, out, selector, op, args=None, **options):
    """One edit of a file, written to another."""
    with open_source(source) as file:
        return write(plan(file, selector, call(op, args or {})), out, **options)


def read(path):
    with SafetensorsFile(path) as file:
        return {file.header.entries[n].name: np.array(file.read(n)) for n in file.index.numbers}


def bits(tree):
    return {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in tree.items()}


@pytest.fixture
def model(tmp_path):
    tree = {
        "embed.weight": np.arange(12, dtype="float32").reshape(4, 3),
        "layers.0.weight": np.full((3, 3), -2, "float32"),
        "layers.0.bias": np.array([np.nan, np.inf, -0.0], ml_dtypes.bfloat16),
        "layers.1.weight": np.ones((3, 3), "float16"),
        "step": np.array(7, "int64"),
    }
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tree, path, metadata={"format": "np", "note": "ü"})
    return path


# ---- the same bytes as in memory ---------------------------------------------------------------------------------

FLOATS = ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"]
DTYPES = [*FLOATS, "int8", "uint8", "int32", "int64", "bool", "complex64"]
KEYS = st.sampled_from(["a", "b", "layers", "w", "bias", "0", "1", "10"])


def array(dtype, shape, seed):
    rng = np.random.default_rng(seed)
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    values = rng.integers(0, 256, int(np.prod(shape)) * kind.itemsize, np.uint8)  # NaN, inf and subnormals come too
    return (values & 1 if dtype == "bool" else values).view(kind).reshape(shape)


LEAVES = st.builds(
    array, st.sampled_from(DTYPES), st.lists(st.integers(0, 9), max_size=3).map(tuple), st.integers(0, 99)
)
TREES = st.dictionaries(st.lists(KEYS, min_size=1, max_size=3).map(".".join), LEAVES, min_size=1, max_size=6)
EDITS = st.one_of(
    st.just(("zero", {})),
    st.builds(lambda v: ("fill", {"value": v}), st.sampled_from([0, 1, 3, -0.5, 0.1, float("nan"), float("inf")])),
    st.builds(lambda v: ("multiply", {"value": v}), st.sampled_from([0, 1, 2, -0.5, 1e-3])),
    st.builds(lambda v: ("add", {"value": v}), st.sampled_from([0, 1, -0.5, 1e-3])),
    st.builds(lambda d: ("cast", {"dtype": d}), st.sampled_from(DTYPES)),
    st.builds(lambda s: ("noise", {"std": 0.1, "seed": s}), st.integers(0, 3)),
    st.just(("apply", {"fn": lambda x: x[::-1] if x.ndim else x})),
)


@pytest.mark.filterwarnings("ignore::paramend.errors.ValuesLost")
@given(TREES, st.sampled_from(["**", "**/w", "{a,b}/**", "**/[-1]/**", "layers[-1]/**", "a"]), EDITS, st.integers(1, 9))
@example({"a": array("complex64", (7,), 0)}, "**", ("multiply", {"value": -0.5}), 3)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_file_is_edited_as_the_tree_in_memory(tmp_path, monkeypatch, tree, selector, edit, chunk):
    monkeypatch.setattr(streaming, "CHUNK", chunk)
    verb, args = edit
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    safetensors.numpy.save_file(tree, source, metadata={"format": "pt"})
    before = source.read_bytes()
    with np.errstate(all="ignore"):
        try:
            expected = getattr(pm.at(tree, selector), verb)(**args)
        except ParamendError as error:
            with pytest.raises(type(error)):
                rewrite(source, out, selector, verb, args, force=True)
            return
    report = rewrite(source, out, selector, verb, args, force=True)
    assert bits(read(out)) == bits(expected)
    assert source.read_bytes() == before
    safetensors.deserialize(out.read_bytes())  # the reference takes it
    with SafetensorsFile(source) as old, SafetensorsFile(out) as new:
        assert [e.name for e in new.header.entries] == [e.name for e in old.header.entries]
        assert new.header.metadata == {"format": "pt"}
        if verb != "cast":
            assert new.header == old.header
            assert report.bytes_copied + report.bytes_computed == len(before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors", "out.safetensors"]


@pytest.mark.filterwarnings("ignore::paramend.errors.ValuesLost")
@pytest.mark.parametrize("verb", ["multiply", "add"])
@pytest.mark.parametrize("value", [0, 0.5, -3, 1e-3, 1e38, float("inf"), float("nan"), 1e-40])
def test_arithmetic_of_every_bfloat16_is_that_of_ml_dtypes(verb, value):
    every = np.arange(1 << 16, dtype="uint16").view(ml_dtypes.bfloat16)
    step = step_of(Call(OPS[verb], {"value": value}), Spec(every.shape, "bfloat16"), initializers.NOWHERE)
    with np.errstate(all="ignore"):
        expected = getattr(pm.at({"a": every}, "a"), verb)(value)["a"]
        found = step(every, 0)
    assert found.dtype == every.dtype
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("verb", ["multiply", "add"])
@pytest.mark.parametrize(
    "operand", [np.arange(3.0, dtype="float32"), np.array([[1], [2], [3], [4]], "int8"), [0.5, 1, 2]]
)
def test_operands_that_broadcast(model, tmp_path, monkeypatch, verb, operand):
    monkeypatch.setattr(streaming, "CHUNK", 5)
    rewrite(model, tmp_path / "out", "embed.weight", verb, {"value": operand})
    expected = getattr(pm.at(read(model), "embed.weight"), verb)(operand)
    assert bits(read(tmp_path / "out")) == bits(expected)


def test_an_array_of_any_library_is_set(model, tmp_path):
    import torch

    value = torch.full((3, 3), 0.25).half()
    rewrite(model, tmp_path / "out", "layers.1.weight", "set", {"value": value})
    assert read(tmp_path / "out")["layers.1.weight"].tolist() == value.tolist()


def test_selectors_that_are_no_text(model, tmp_path):
    mask = {name: name.endswith("bias") for name in read(model)}
    for n, selector in enumerate(
        [mask, lambda path, spec: path.endswith("bias"), pm.sel("**").where(dtype="bfloat16")]
    ):
        report = rewrite(model, tmp_path / f"out{n}", selector, "zero")
        assert [row.path for row in report.plan.changed] == ["layers.0.bias"]


def test_a_slice_of_a_leaf(model, tmp_path):
    report = rewrite(model, tmp_path / "out", pm.sel("embed.weight")[-1], "zero")
    assert bits(read(tmp_path / "out")) == bits(pm.at(read(model), "embed.weight")[-1].zero())
    assert "[-1] zero()" in str(report)


@st.composite
def slices(draw, shape):
    parts = []
    for length in shape[: draw(st.integers(0, len(shape)))]:
        bound = st.none() | st.integers(-length, length)
        part = st.builds(slice, bound, bound, st.sampled_from([None, 1, 2, 3, -1, -2]))
        part |= st.integers(-length, length - 1)
        part |= st.lists(st.integers(-length, length - 1), min_size=1, max_size=3)
        parts.append(draw(part))
    return (..., *parts) if draw(st.booleans()) and parts and len(parts) == len(shape) else tuple(parts)


@pytest.mark.filterwarnings("ignore::paramend.errors.ValuesLost")
@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_slices_are_edited_as_in_memory_whatever_the_chunks(tmp_path, monkeypatch, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    index = data.draw(slices(shape))
    leaf = array(data.draw(st.sampled_from(["float32", "bfloat16", "float16"])), shape, data.draw(st.integers(0, 9)))
    try:
        part = leaf[index]
    except IndexError:
        return
    verb, args = data.draw(
        st.sampled_from(
            [
                ("zero", {}),
                ("add", {"value": 1}),
                ("noise", {"std": 1.0}),
                ("multiply", {"value": np.arange(part.size).reshape(part.shape).astype(leaf.dtype)}),
                ("set", {"value": np.arange(part.size).reshape(part.shape).astype(leaf.dtype)}),
            ]
        )
    )
    monkeypatch.setattr(streaming, "CHUNK", data.draw(st.sampled_from([1, 3, 7, 64])))
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    safetensors.numpy.save_file({"a": leaf}, source)
    chosen = pm.sel("a")[index]
    with np.errstate(all="ignore"):
        expected = getattr(pm.at({"a": leaf}, chosen), verb)(**args)
    rewrite(source, out, chosen, verb, args, force=True)
    assert bits(read(out)) == bits(expected)


@pytest.mark.parametrize("init", ["lecun_normal", "he_uniform", "kaiming_normal"])
@pytest.mark.parametrize("block", [5, 1 << 18])
def test_fresh_values_do_not_depend_on_chunks(tmp_path, monkeypatch, init, block):
    monkeypatch.setattr(initializers, "_BLOCK", block)
    monkeypatch.setattr(streaming, "CHUNK", 7)
    leaf = np.zeros((11, 4), "float32")
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    safetensors.numpy.save_file({"a": leaf}, source)
    rewrite(source, out, "a", "reinit", {"init": init, "seed": 3})
    place = initializers.Site(("a",), out_first=True)  # a file with "." between keys is one of torch
    expected = initializers.initialize(init, initializers.generator(3, place), Spec((11, 4), "float32"), out_first=True)
    assert bits(read(out)) == bits({"a": expected})


def test_noise_over_many_chunks_is_the_noise_of_the_leaf(tmp_path):
    """One stream of random numbers, drawn in pieces of an odd size, at the real chunk length too."""
    for dtype in ("float32", "float64", "bfloat16"):
        tree = {"w": np.ones((streaming.CHUNK + 4321, 2), getattr(ml_dtypes, dtype, dtype))}
        safetensors.numpy.save_file(tree, tmp_path / "in")
        rewrite(tmp_path / "in", tmp_path / "out", "w", "noise", {"std": 0.3, "seed": 11}, force=True)
        assert bits(read(tmp_path / "out")) == bits(pm.at(tree, "w").noise(0.3, seed=11))


def test_files_of_torch_read_back_by_torch(tmp_path):
    import torch

    tree = {
        "fc.weight": torch.randn(5, 4).bfloat16(),
        "fc.bias": torch.randn(5),
        "f8": torch.ones(3).to(torch.float8_e4m3fn),
    }
    safetensors.torch.save_file(tree, tmp_path / "in.safetensors", metadata={"format": "pt"})
    rewrite(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "fc/**", "multiply", {"value": 0.5})
    after = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert torch.equal(after["fc.weight"], tree["fc.weight"] * 0.5)
    assert torch.equal(after["fc.bias"], tree["fc.bias"] * 0.5)
    assert torch.equal(after["f8"].view(torch.uint8), tree["f8"].view(torch.uint8))


def test_what_is_unknown_or_packed_passes_through(tmp_path):
    text = (
        b'{"a":{"dtype":"I2","shape":[9],"data_offsets":[0,3]},"b":{"dtype":"F4","shape":[2],"data_offsets":[3,4]},'
        b'"c":{"dtype":"U8","shape":[2],"data_offsets":[4,6]}}'
    )
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(1, 7)))
    rewrite(source, out, "c", "fill", {"value": 9})
    assert out.read_bytes() == source.read_bytes()[:-2] + b"\x09\x09"
    rewrite(source, out, "c", "cast", {"dtype": "float32"}, force=True)
    with SafetensorsFile(out) as file:
        assert [str(file.spec(n)) for n in range(3)] == ["raw<I2>[9]", "float4_e2m1fn[2]", "float32[2]"]
    assert out.read_bytes()[-12:] == b"\1\2\3\4" + np.array([5, 6], "float32").tobytes()
    for name in "ab":
        for verb, args in [("zero", {}), ("fill", {"value": 0}), ("multiply", {"value": 1})]:
            with pytest.raises((Unsupported, SpecMismatch)):
                rewrite(source, tmp_path / "never", name, verb, args)
    assert not (tmp_path / "never").exists()


def test_a_file_without_padding_and_with_a_tail_of_nothing(tmp_path):
    text = (
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"z":{"dtype":"F32","shape":[0],"data_offsets":[8,8]}} '
    )
    source = tmp_path / "in"
    source.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    rewrite(source, tmp_path / "out", "**", "fill", {"value": 1})
    assert (tmp_path / "out").read_bytes() == source.read_bytes()[:-8] + np.ones(2, "float32").tobytes()


# ---- plan and report ---------------------------------------------------------------------------------------------


def test_the_report(model, tmp_path):
    report = rewrite(model, tmp_path / "out", "**/weight", "cast", {"dtype": "float16"})
    assert str(report).split("\n")[:-1] == [
        "path             spec                          edit",
        "embed.weight     float32[4,3] -> float16[4,3]  cast('float16')",
        "layers.0.weight  float32[3,3] -> float16[3,3]  cast('float16')",
        "layers.1.weight  float16[3,3]                  cast('float16')",
        "",
        "3 of 5 leaves change",
    ]
    data = report.to_dict()
    assert data["changed"][0] == {
        "path": "embed.weight",
        "dtype": "float16",
        "shape": [4, 3],
        "nbytes": 24,
        "dtype_before": "float32",
        "shape_before": [4, 3],
        "edits": ["cast('float16')"],
    }
    assert (data["kept"], data["bytes_computed"], data["bytes_copied"]) == (2, 24 + 18 + 18, 8 + 6)


def test_progress_counts_every_byte(model, tmp_path):
    heard = []
    rewrite(model, tmp_path / "out", "**/weight", "cast", {"dtype": "float64"}, progress=heard.append)
    assert heard[-1].done == heard[-1].total == (tmp_path / "out").stat().st_size
    assert [e.done for e in heard] == sorted(e.done for e in heard)
    assert "embed.weight" in {e.at for e in heard}


def test_a_listener_that_raises_stops_the_rewrite(model, tmp_path):
    def stop(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewrite(model, tmp_path / "out", "**/weight", "zero", progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("selector", "verb", "args", "error", "message"),
    [
        ("**/wieght", "zero", {}, NoMatch, "did you mean"),
        ("layers", "zero", {}, NoMatch, "names a subtree"),
        ("step", "fill", {"value": 0.5}, SpecMismatch, "step: fill: int64 cannot hold 0.5"),
        ("layers.0.bias", "fill", {"value": [1, 2, 3]}, SpecMismatch, "layers.0.bias: fill takes a scalar"),
        ("**/weight", "cast", {"dtype": "float31"}, BadArgument, "not a known dtype"),
        ("step", "cast", {"dtype": "complex128"}, Unsupported, "cannot hold complex128"),
        ("step", "cast", {"dtype": "int4"}, Unsupported, "cannot hold int4"),
        ("**", "zeros", {}, BadArgument, "'zeros' is not an edit"),
        ("**", "fill", {}, BadArgument, "fill needs value"),
        ("**", "zero", {"value": 1}, BadArgument, "zero has no argument 'value'"),
        ("**", "apply", {"fn": abs, "keep_spec": False}, Unsupported, "known only when it runs"),
        ("step", "apply", {"fn": lambda x: x[None]}, SpecMismatch, "step"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(model, tmp_path, selector, verb, args, error, message):
    with pytest.raises(error, match=message):
        rewrite(model, tmp_path / "out", selector, verb, args)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


# ---- where the output goes ---------------------------------------------------------------------------------------


def test_an_existing_output_stays_without_force(model, tmp_path):
    out = tmp_path / "out"
    out.write_text("precious")
    with pytest.raises(CannotWrite, match="already exists") as error:
        rewrite(model, out, "step", "zero")
    assert isinstance(error.value, OSError)
    assert out.read_text() == "precious"
    rewrite(model, out, "step", "zero", force=True)
    assert read(out)["step"] == 0


def test_an_output_that_comes_while_writing_stays(model, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(CannotWrite, match="already exists"):
        rewrite(model, out, "step", "zero", progress=lambda event: out.write_text("precious"))
    assert out.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "out"]


def test_a_file_system_without_hard_links(model, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    rewrite(model, tmp_path / "out", "step", "zero")
    assert read(tmp_path / "out")["step"] == 0
    late = tmp_path / "late"
    with pytest.raises(CannotWrite, match="already exists"):
        rewrite(model, late, "step", "zero", progress=lambda event: late.write_text("precious"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["late", "model.safetensors", "out"]


def test_the_source_is_never_the_output(model, tmp_path):
    before = model.read_bytes()
    (tmp_path / "symbolic").symlink_to(model)
    (tmp_path / "hard").hardlink_to(model)
    for out in (model, tmp_path / "symbolic", tmp_path / "hard", tmp_path / "." / "model.safetensors"):
        with pytest.raises(CannotWrite, match="is the file that is being read"):
            rewrite(model, out, "step", "zero", force=True)
    assert model.read_bytes() == before


def test_a_symbolic_link_as_input_and_as_output(model, tmp_path):
    (tmp_path / "in").symlink_to(model)
    (tmp_path / "blob").write_text("precious")
    (tmp_path / "out").symlink_to(tmp_path / "blob")
    rewrite(tmp_path / "in", tmp_path / "out", "step", "zero", force=True)
    assert not (tmp_path / "out").is_symlink()  # the name was replaced, not what it pointed to
    assert (tmp_path / "blob").read_text() == "precious"
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CannotWrite, match="already exists"):
        rewrite(model, tmp_path / "dangling", "step", "zero")


def test_places_that_cannot_be_written(model, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for out, message in [
        (tmp_path, "is a directory"),
        (tmp_path / "no" / "out", "does not exist"),
        (model / "out", "is not a directory"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / ("x" * 300), "File name too long"),
        ("/dev/null", "not a regular file"),
    ]:
        with pytest.raises(CannotWrite, match=message) as error:
            rewrite(model, out, "step", "zero", force=True)
        assert str(out) in str(error.value)
    assert Path("/dev/null").is_char_device()


def test_a_folder_without_permission(model, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CannotWrite, match="no permission to write into"):
        rewrite(model, tmp_path / "out", "step", "zero")


def test_a_read_only_file_system(model, tmp_path, monkeypatch):
    def refuse(path, flags, *args):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, flags, *args)

    opened = os.open
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CannotWrite, match="Read-only file system; nothing was written"):
        rewrite(model, tmp_path / "out", "step", "zero")


def test_too_little_space_is_said_before_writing(model, tmp_path, monkeypatch):
    disk = namedtuple("Disk", "f_blocks f_bavail f_frsize")(1000, 0, 4096)
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    with pytest.raises(CannotWrite, match=r"needs .*, and 0 B are free"):
        rewrite(model, tmp_path / "out", "step", "zero")


@pytest.mark.parametrize("call", ["write", "copy_file_range", "fsync"])
def test_a_disk_that_fills_up_leaves_nothing_behind(model, tmp_path, monkeypatch, call):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(CannotWrite, match="the disk is full; nothing was written"):
        rewrite(model, tmp_path / "out", "step", "zero")
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_permissions_are_those_of_the_source(model, tmp_path):
    model.chmod(0o640)
    rewrite(model, tmp_path / "out", "step", "zero")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640


# ---- copying -----------------------------------------------------------------------------------------------------


def refusing(number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize(
    "broken",
    [
        {"copy_file_range": refusing(errno.EXDEV)},
        {"copy_file_range": refusing(errno.ENOSYS), "sendfile": refusing(errno.EINVAL)},
        {"copy_file_range": lambda *args, **kwargs: 0, "sendfile": lambda *args: 0},
        {"copy_file_range": None, "sendfile": None},
    ],
)
def test_every_way_of_copying_gives_the_same_bytes(model, tmp_path, monkeypatch, broken):
    rewrite(model, tmp_path / "expected", "layers.0.weight", "zero")
    for name, stub in broken.items():
        monkeypatch.delattr(os, name) if stub is None else monkeypatch.setattr(os, name, stub)
    rewrite(model, tmp_path / "out", "layers.0.weight", "zero")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "expected").read_bytes()


def test_short_copies_and_short_writes(model, tmp_path, monkeypatch):
    rewrite(model, tmp_path / "expected", "layers.0.weight", "zero")
    copy, put = os.copy_file_range, os.write
    calls = []

    def copy_little(source, target, count, **kwargs):
        calls.append(count)
        if len(calls) == 3:
            raise OSError(errno.EINVAL, "Invalid argument")  # half way
        return copy(source, target, min(count, 7), **kwargs)

    monkeypatch.setattr(os, "copy_file_range", copy_little)
    monkeypatch.setattr(os, "sendfile", lambda *args: 0)
    monkeypatch.setattr(os, "write", lambda target, data: put(target, data[:5]))
    rewrite(model, tmp_path / "out", "layers.0.weight", "zero")
    assert len(calls) == 3
    assert (tmp_path / "out").read_bytes() == (tmp_path / "expected").read_bytes()


def test_neighbours_that_stay_are_copied_as_one_range(tmp_path, monkeypatch):
    tree = {f"w{i:03}": np.full(4, i, "float32") for i in range(100)}
    safetensors.numpy.save_file(tree, tmp_path / "in")
    calls = []
    copy = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda *args, **kwargs: calls.append(args) or copy(*args, **kwargs))
    rewrite(tmp_path / "in", tmp_path / "out", "w050", "zero")
    assert len(calls) == 2


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".msgpack", ".safetensors"])
def test_a_conversion_is_copied_by_the_kernel(tmp_path, monkeypatch, suffix):
    tree = {"a.w": np.arange(1 << 20, dtype="float32"), "b.w": np.arange(6, dtype="float16").reshape(2, 3)}
    safetensors.numpy.save_file(tree, tmp_path / "in.safetensors")
    wrote = []
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: wrote.append(len(data)) or real(fd, data))
    with pm.open(tmp_path / "in.safetensors") as checkpoint:
        report = checkpoint.save(tmp_path / f"out{suffix}")
    assert (report.bytes_computed, report.bytes_copied >= (4 << 20) + 12) == (0, True)
    assert sum(wrote) < 10_000
    found = pm.load(tmp_path / f"out{suffix}", nested=False)
    assert {name: (x.dtype, x.tobytes()) for name, x in found.items()} == {
        name: (x.dtype, x.tobytes()) for name, x in tree.items()
    }
    if suffix in (".npz", ".pt"):
        assert zipfile.ZipFile(tmp_path / f"out{suffix}").testzip() is None


def test_bytes_of_another_format_are_not_written_under_its_codes(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(2, "float32")}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "b.npz", t=np.array(["abc"]))
    one, other = open_source(tmp_path / "a.safetensors"), open_source(tmp_path / "b.npz")
    gathered = Gathered(one, [(labels("a"), Stored(one, 0)), (labels("t"), Stored(other, 0))])
    with pytest.raises(Unsupported, match="t cannot be written: safetensors files cannot hold raw<U3>"):
        write(Plan.of(gathered), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_values_that_a_format_packs_are_not_written_unpacked(tmp_path):
    with pytest.raises(Unsupported, match="pack float4_e2m1fn, 4 bits each"):
        pm.save({"w": np.zeros(4, ml_dtypes.float4_e2m1fn)}, tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_source_that_shrinks_or_changes_meanwhile(tmp_path, monkeypatch):
    source = tmp_path / "in"
    tree = {"a": np.zeros(1000, "float32"), "b": np.zeros(1000, "float32")}
    safetensors.numpy.save_file(tree, source)
    with pytest.raises(BadCheckpoint, match="became shorter"):
        rewrite(source, tmp_path / "out", "a", "add", {"value": 1}, progress=lambda event: os.truncate(source, 5000))
    safetensors.numpy.save_file(tree, source)
    with pytest.raises(BadCheckpoint, match="another program changed it"):
        rewrite(source, tmp_path / "out", "a", "add", {"value": 1}, progress=lambda event: os.utime(source, (1, 1)))
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


# ---- old or new, never a third -----------------------------------------------------------------------------------

KILLED = """
import sys
import paramend as pm
import paramend.rewriting.rewrite
checkpoint = pm.open(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
pm.at(checkpoint, "b").multiply(2).save(sys.argv[2], force=True)
"""


@pytest.mark.far
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_at_any_moment_the_output_is_old_or_new(tmp_path, how):
    source, out = tmp_path / "in", tmp_path / "out"
    tree = {name: np.ones(4_000_000, "float32") for name in "abc"}
    safetensors.numpy.save_file(tree, source)
    rewrite(source, out, "b", "zero")
    old = out.read_bytes()
    rewrite(source, tmp_path / "new", "b", "multiply", {"value": 2})
    new = (tmp_path / "new").read_bytes()
    (tmp_path / "new").unlink()
    rng = random.Random(0)
    for _ in range(5):
        worker = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(source), str(out)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        with worker:
            worker.stdout.readline()
            worker.stdin.write(b"\n")
            worker.stdin.flush()
            time.sleep(rng.random() * 0.15)
            worker.send_signal(how)
        now = out.read_bytes()
        assert now in (old, new)
        left = {p.name for p in tmp_path.iterdir()} - {"in", "out"}
        if how != signal.SIGKILL:
            assert not left
        for name in left:
            assert name.startswith(".paramend-")
            (tmp_path / name).unlink()
        out.write_bytes(old)


# ---- memory ------------------------------------------------------------------------------------------------------

PEAK = """
import re, sys
from pathlib import Path
import ml_dtypes
import ml_dtypes
import numpy as np
import paramend as pm
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1000
source, out, verb, args, index, how = sys.argv[1:]
args, index = eval(args), eval(index)
before = peak()
chosen = pm.sel("big") if index is None else pm.sel("big")[index]
def edit(t):
    return getattr(pm.at(t, chosen), verb)(**args)
if how == "patch":
    pm.patch(source, edit)
else:
    edit(pm.open(source)).save(out, force=True)
print(before, peak())
"""
SHAPE = (512, 65536)  # 67 MB of bfloat16: more than a bounded edit may take
MAPPED = f"np.memmap('mapped', 'bfloat16', 'r', shape={SHAPE})"
LARGE = [
    ("zero", "{}", None),
    ("multiply", "{'value': 0.5}", None),
    ("cast", "{'dtype': 'float32'}", None),
    ("noise", "{'std': 0.5}", None),
    ("reinit", "{'init': 'lecun_normal'}", None),
    ("set", f"{{'value': {MAPPED}}}", None),
    ("add", f"{{'value': {MAPPED}}}", None),
    ("fill", "{'value': 3}", (slice(None), 0)),
    ("add", "{'value': 3}", (slice(None), slice(None, 999))),
    ("noise", "{'std': 1}", (..., -1)),
    ("multiply", "{'value': 2}", (slice(None, None, -2), slice(1, None, 4))),
]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("how", ["save", "patch"])
@pytest.mark.parametrize(("verb", "args", "index"), LARGE, ids=lambda value: value if isinstance(value, str) else None)
def test_memory_is_bounded_whatever_the_size_of_a_leaf(tmp_path, verb, args, index, how):
    if how == "patch" and verb == "cast":
        return
    header = write_header({"big": Spec(SHAPE, "bfloat16"), "small": Spec((4,), "float32")})
    source = tmp_path / "in.safetensors"
    source.write_bytes(header.to_bytes())
    os.truncate(source, header.nbytes + header.data_nbytes)  # sparse: it costs no disk
    (tmp_path / "mapped").touch()
    os.truncate(tmp_path / "mapped", 1 << 26)
    command = [sys.executable, "-c", PEAK, source, tmp_path / "out.safetensors", verb, args, repr(index), how]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    floor, peak = map(float, done.stdout.split())
    print(verb, index, how, floor, peak)
    assert peak < 80 and peak - floor < 40
