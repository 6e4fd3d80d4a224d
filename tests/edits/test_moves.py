"""Verbs that move elements: what numpy makes of the array, in memory and on disk, bit for bit."""

import json
import math
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import paramend as pm
from paramend.cli.main import cli
from paramend.leaves.origins.stored import Stored

RNG = np.random.default_rng(3)
W = RNG.normal(size=(4, 6, 5)).astype("float32")
MASK = np.array([True, False, True, True, False, False])
CASES = {
    "transpose": (lambda at: at.transpose((2, 0, -2)), W.transpose(2, 0, 1)),
    "reshape": (lambda at: at.reshape((-1, 3, 10)), W.reshape(4, 3, 10)),
    "take a list": (lambda at: at.take([3, -1, 0, 0], axis=0), W[[3, -1, 0, 0]]),
    "take a slice": (lambda at: at.take(slice(5, None, -2), axis=1), W[:, 5::-2]),
    "take a mask": (lambda at: at.take(MASK, axis=-2), W[:, MASK]),
    "take places": (lambda at: at.take(np.array([4, 1], "uint8"), axis=2), W[:, :, [4, 1]]),
    "take nothing": (lambda at: at.take([], axis=2), W[:, :, :0]),
    "permute": (lambda at: at.permute([2, 0, 1, 3, 4], axis=2), W[:, :, [2, 0, 1, 3, 4]]),
}
cases = pytest.mark.parametrize(("edit", "right"), CASES.values(), ids=CASES.keys())


def same(found, right):
    found = np.asarray(found)
    assert (found.shape, found.dtype, found.tobytes()) == (right.shape, right.dtype, right.tobytes())


@cases
def test_in_memory(edit, right):
    right = np.ascontiguousarray(right)
    tree = {"w": W.copy(), "b": np.ones(1)}
    made = edit(pm.at(tree, "w"))
    same(made["w"], right)
    assert made["b"] is tree["b"]
    assert not np.shares_memory(made["w"], tree["w"])
    made["w"][...] = 0
    same(tree["w"], W)
    same(edit(pm.at({"w": jnp.asarray(W)}, "w"))["w"], right)
    parameter = torch.nn.Parameter(torch.from_numpy(W.copy()))
    made = edit(pm.at({"w": parameter}, "w"))["w"]
    assert isinstance(made, torch.nn.Parameter)
    assert made.is_contiguous()
    same(made.detach().numpy(), right)


def test_under_jit():
    found = jax.jit(lambda w: pm.at(pm.at({"w": w}, "w").transpose((1, 0, 2)), "w").take([1, 0], axis=2)["w"])(W)
    same(found, np.ascontiguousarray(W.transpose(1, 0, 2)[:, :, [1, 0]]))


@cases
@pytest.mark.parametrize("suffix", ["safetensors", "pt", "npz", "msgpack"])
def test_on_disk(tmp_path, edit, right, suffix):
    pm.save({"w": W, "b": np.ones(3, "int8")}, tmp_path / f"m.{suffix}")
    with pm.open(tmp_path / f"m.{suffix}") as model:
        made = edit(pm.at(model, "w"))
        same(made["w"], np.ascontiguousarray(right))
        made.save(tmp_path / "out.safetensors")
    out = load_file(tmp_path / "out.safetensors")
    same(out["w"], np.ascontiguousarray(right))
    same(out["b"], np.ones(3, "int8"))


def test_runs_that_are_long_are_copied_and_not_computed(tmp_path):
    big = RNG.integers(0, 255, (8, 4, 4096)).astype("uint8")
    save_file({"w": big}, tmp_path / "m.safetensors")
    with pm.open(tmp_path / "m.safetensors") as model:
        moved = pm.at(pm.at(pm.at(model, "w").permute(range(8)[::-1]), "w").transpose((1, 0, 2)), "w").reshape((32, -1))
        report = moved.save(tmp_path / "out.safetensors")
    assert (report.bytes_computed, report.bytes_copied >= big.nbytes) == (0, True)
    same(load_file(tmp_path / "out.safetensors")["w"], big[::-1].transpose(1, 0, 2).reshape(32, -1).copy())


def test_edits_before_and_after(tmp_path):
    wide = W.astype(ml_dtypes.bfloat16)
    pm.save({"w": wide}, tmp_path / "m.safetensors")

    def edited(tree):
        tree = pm.at(tree, "w").multiply(3)
        tree = pm.at(tree, "w").transpose((2, 1, 0))
        tree = pm.at(pm.at(tree, "w")[0].fill(7), "w").noise(0.5, seed=1)
        return pm.at(pm.at(tree, "w").take(slice(0, 4), axis=0), "w").cast("float32")

    with pm.open(tmp_path / "m.safetensors") as model:
        made = edited(model)
        assert [row.spec.shape for row in made.plan.rows] == [(4, 6, 4)]
        made.save(tmp_path / "out.safetensors")
    same(load_file(tmp_path / "out.safetensors")["w"], edited({"w": wide})["w"])


def test_a_square_leaf_is_transposed_in_its_file(tmp_path):
    square = np.arange(49, dtype="int32").reshape(7, 7)
    path = tmp_path / "m.safetensors"
    save_file({"w": square, "b": np.ones(2)}, path)
    pm.patch(path, lambda model: pm.at(model, "w").transpose((1, 0)))
    same(load_file(path)["w"], np.ascontiguousarray(square.T))
    pm.undo(path)
    same(load_file(path)["w"], square)


@pytest.mark.parametrize(
    ("edit", "error", "says"),
    [
        (
            lambda at: at.transpose((0, 1)),
            pm.errors.SpecMismatch,
            r"w: transpose takes each axis",
        ),
        (lambda at: at.transpose((0, 1, 1)), pm.errors.SpecMismatch, r"axes is \[0, 1, 1\]"),
        (lambda at: at.transpose((0, 1, 3)), pm.errors.OutOfRange, "w: .* has no axis 3; it has 3 axes"),
        (lambda at: at.transpose((0, 1, 1.5)), pm.errors.BadArgument, "axes .*1.5.* is not a list of whole numbers"),
        (lambda at: at.transpose(1), pm.errors.BadArgument, "axes 1 is not a list"),
        (lambda at: at.reshape(120), pm.errors.BadArgument, "the shape 120 is not a list"),
        (
            lambda at: at.reshape((7, -1)),
            pm.errors.SpecMismatch,
            r"120 elements, which do not fit the shape \[7",
        ),
        (lambda at: at.reshape((-1, -1)), pm.errors.SpecMismatch, "do not fit"),
        (lambda at: at.reshape((-2, -60)), pm.errors.SpecMismatch, "do not fit"),
        (lambda at: at.take([6], axis=1), pm.errors.OutOfRange, r"axis 1 of float32\[4,6,5\] has no place 6; it has 6"),
        (lambda at: at.take(MASK, axis=0), pm.errors.SpecMismatch, "the mask has 6 places, and axis 0"),
        (lambda at: at.take([0.5]), pm.errors.BadArgument, "is not a list of places"),
        (lambda at: at.take(3), pm.errors.BadArgument, "is not a list of places"),
        (lambda at: at.take([0], axis=3), pm.errors.OutOfRange, "has no axis 3"),
        (lambda at: at.permute([0, 0, 1, 2]), ValueError, "permute takes each of the 4 places along axis 0"),
        (lambda at: at.permute([0, 1, 2]), ValueError, r"index is \[0, 1, 2\]"),
        (lambda at: at.permute([0, 1, 2, 4]), ValueError, r"index is \[0, 1, 2, 4\]"),
        (lambda at: at.take(np.array([2**64 - 1], "uint64")), pm.errors.OutOfRange, "no place 18446744073709551615"),
    ],
)
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_what_does_not_fit_is_refused(tmp_path, edit, error, says, where):
    tree = {"w": W}
    if where == "disk":
        save_file(tree, tmp_path / "m.safetensors")
        tree = pm.open(tmp_path / "m.safetensors")
    with pytest.raises(error, match=says):
        edit(pm.at(tree, "w"))


@pytest.mark.parametrize(("dtype", "bits"), [("F4", 4), ("X9", 24)])
def test_whole_bytes_of_unread_dtypes_move(tmp_path, dtype, bits):
    rows = RNG.bytes(4 * bits)
    header = {"w": {"dtype": dtype, "shape": [4, 8], "data_offsets": [0, len(rows)]}}
    text = json.dumps(header).encode()
    path, out = tmp_path / "m.safetensors", tmp_path / "out.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + rows)
    moved = np.frombuffer(rows, "u1").reshape(2, 2, -1).transpose(1, 0, 2).reshape(4, -1)[[3, 0, 1, 2]][:3]
    with pm.open(path) as model:
        for verb, given in (("reshape", (2, 2, 8)), ("transpose", (1, 0, 2)), ("reshape", (4, -1))):
            model = getattr(pm.at(model, "w"), verb)(given)
        model = pm.at(pm.at(model, "w").permute([3, 0, 1, 2]), "w").take(slice(3))
        assert str(pickle.loads(pickle.dumps(model)).plan) == str(model.plan)
        model.save(out)
    assert out.read_bytes().endswith(moved.tobytes())
    assert pm.open(out).spec(0).shape == (3, 8)
    with pm.open(path) as model, pytest.raises(pm.errors.Unsupported, match="w cannot"):
        pm.at(model, "w").multiply(2)
    if dtype == "F4":
        with pm.open(path) as model, pytest.raises(pm.errors.Unsupported, match="w cannot be made of transpose"):
            pm.at(model, "w").transpose((1, 0))


@cases
def test_of_abstract_arrays(edit, right):
    made = edit(pm.at({"w": jax.ShapeDtypeStruct(W.shape, W.dtype)}, "w"))["w"]
    assert (made.shape, made.dtype, type(made)) == (right.shape, right.dtype, jax.ShapeDtypeStruct)


@pytest.mark.parametrize(("verb", "shape"), [(pm.concat, (8, 6, 5)), (pm.interleave, (8, 6, 5))])
def test_joins_of_abstract_arrays(verb, shape):
    one = jax.ShapeDtypeStruct(W.shape, W.dtype)
    assert verb({"a": one, "b": one}, ["a", "b"], into="c")["c"].shape == shape
    assert pm.stack_layers({"h0": one, "h1": one}, "h<n>", into="h")["h"].shape == (2, *W.shape)


def test_a_slice_keeps_its_shape():
    with pytest.raises(pm.errors.SpecMismatch, match="a slice of a leaf must keep it"):
        pm.at({"w": W}, "w")[0].transpose((1, 0))


def test_in_a_recipe_and_as_commands(tmp_path):
    path, out = tmp_path / "m.safetensors", tmp_path / "out.safetensors"
    save_file({"w": W}, path)
    steps = [
        {"transpose": {"at": "w", "axes": [1, 0, 2]}},
        {"reshape": {"at": "w", "shape": [3, -1]}},
        {"take": {"at": "w", "indices": "1:", "axis": 0}},
        {"permute": {"at": "w", "index": [1, 0]}},
    ]
    right = W.transpose(1, 0, 2).reshape(3, -1)[1:][[1, 0]]
    recipe = pm.Recipe(steps)
    with pm.open(path) as model:
        recipe.apply(model).save(out)
    same(load_file(out)["w"], np.ascontiguousarray(right))
    same(recipe.apply({"w": W})["w"], np.ascontiguousarray(right))
    for number, words in enumerate((["transpose", "1,0,2"], ["reshape", "3,-1"], ["take", "1:"], ["permute", "1,0"])):
        source, target = tmp_path / f"{number}.safetensors", tmp_path / f"{number + 1}.safetensors"
        source = path if not number else source
        done = CliRunner().invoke(cli, [words[0], str(source), "w", words[1], "-o", str(target)])
        assert done.exit_code == 0, done.output
    same(load_file(tmp_path / "4.safetensors")["w"], np.ascontiguousarray(right))
    done = CliRunner().invoke(cli, ["take", str(path), "w", "5,0", "--axis", "-1", "-o", str(out), "--dry-run"])
    assert (done.exit_code, "axis 2 of float32[4,6,5] has no place 5" in done.output) == (2, True)
    done = CliRunner().invoke(
        cli, ["transpose", str(path), "w", "[2, 1, 0]", "-o", str(tmp_path / "new.npz"), "--dry-run"]
    )
    assert "w     float32[4,6,5] -> float32[5,6,4]  transpose([2, 1, 0])" in done.output


def test_boxes_of_an_edited_leaf_are_computed_alone_and_what_they_lose_is_counted_once(tmp_path, monkeypatch):
    """A transposed leaf is read in tiles: the edits before it do not need the whole leaf in memory."""
    monkeypatch.setattr("paramend.leaves.origins.origin.CHUNK", 1 << 10)
    monkeypatch.setattr("paramend.leaves.origins.moved.TILE", 1 << 12)
    big = np.random.default_rng(0).standard_normal((300, 70)).astype("float32")
    big[7, 3] = big[299, 69] = 1e6
    save_file({"w": big}, tmp_path / "m.safetensors")
    sizes = []
    read = Stored.read_box
    monkeypatch.setattr(Stored, "read_box", lambda self, box: sizes.append(math.prod(map(len, box))) or read(self, box))
    with pm.open(tmp_path / "m.safetensors") as model:
        edit = pm.at(pm.at(model, "w").multiply(0.5), "w").cast("float16")
        edit = pm.at(pm.at(edit, "w").transpose((1, 0)), "w").take(slice(None, None, -1))
        for _ in range(2):
            report = edit.save(tmp_path / "out.safetensors", force=True)
            assert report.plan.rows[0].damage.overflowed == 2
    with np.errstate(over="ignore"):
        right = (big * np.float32(0.5)).astype("float16").T[::-1]
    assert load_file(tmp_path / "out.safetensors")["w"].tobytes() == np.ascontiguousarray(right).tobytes()
    assert max(sizes) < big.size / 4
