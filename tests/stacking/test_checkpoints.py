"""Stacks in checkpoints: what is written is what the same in memory holds, and bytes are copied."""

import json
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import torch
from click.testing import CliRunner
from flax import serialization

import paramend as pm
from paramend.cli.main import cli
from paramend.errors import BadArgument, NoMatch, RenameClash, SpecMismatch
from support.numerics import assert_close

X = jnp.linspace(-1, 1, 8).reshape(2, 4)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(4)(nn.LayerNorm()(x)), None


class Scanned(nn.Module):
    layers: int
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=self.layers)
        return nn.Dense(2)(scan(name="layers")(x, None)[0])


class Unrolled(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, x):
        for i in range(self.layers):
            x, _ = Block(name=f"layers_{i}")(x)
        return nn.Dense(2)(x)


def assert_same_outputs(found, wanted):
    """Of each of 3 blocks a mean and a variance over 4 values and a product of as many terms, and the head."""
    assert_close(found, wanted, terms=3 * 12 + 4, scale=4)


def bits(tree):
    return {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in tree.items()}


def in_file(path):
    return bits(pm.load(path, nested=False))


def flat(tree, separator="/"):
    return {
        separator.join(str(key.key) for key in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def layers(count=12, dtype="float32"):
    rng = np.random.default_rng(0)
    tree = {"model.embed": rng.normal(size=(5, 3)).astype(dtype)}
    for i in range(count):
        tree[f"model.layers.{i}.w"] = rng.normal(size=(4, 3)).astype(dtype)
        tree[f"model.layers.{i}.step"] = np.array(i, "int32")
    return tree | {"model.norm": np.ones(3, dtype)}


@pytest.fixture
def folder(tmp_path):
    """Twelve layers in three shards, the layers split across them, with a config beside."""
    path = tmp_path / "model"
    path.mkdir()
    tree = layers(12, ml_dtypes.bfloat16)
    names, weight_map = list(tree), {}
    for place in range(3):
        mine = names[place * 9 : (place + 1) * 9]
        name = f"model-{place + 1:05}-of-00003.safetensors"
        safetensors.numpy.save_file({key: tree[key] for key in mine}, path / name, {"format": "pt"})
        weight_map |= dict.fromkeys(mine, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text("{}")
    return path, tree


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_shards(folder, tmp_path, axis):
    path, tree = folder
    tree = {name: value for name, value in tree.items() if axis in (0, -1) or not name.endswith("step")}
    expected = pm.stack_layers(tree, "model.layers.<n>", axis=axis)
    with pm.open(path) as checkpoint:
        checkpoint = checkpoint if axis in (0, -1) else pm.at(checkpoint, "**/step").delete()
        stacked = pm.stack_layers(checkpoint, "model.layers.<n>", axis=axis)
        report = stacked.save(tmp_path / "out", record=True)
    pm.verify_record(tmp_path / "out")
    assert in_file(tmp_path / "out") == bits(expected)
    assert (tmp_path / "out" / "config.json").exists()
    if axis == 0:
        assert report.bytes_computed == 0
    with pm.open(tmp_path / "out") as checkpoint:
        back = pm.unstack_layers(checkpoint, "model.layers", into="model.layers.<n>", axis=axis)
        report = back.save(tmp_path / "back")
    assert in_file(tmp_path / "back") == bits(tree)
    if axis == 0:
        assert report.bytes_computed == 0


def test_one_file_keeps_the_order_of_trees_in_memory(tmp_path):
    tree = layers(11)
    safetensors.numpy.save_file(tree, tmp_path / "m.safetensors", {"who": "me"})
    with pm.open(tmp_path / "m.safetensors") as checkpoint:
        pm.stack_layers(checkpoint, "model.layers.<n>", into="model.stack").save(tmp_path / "s.safetensors")
    with safetensors.safe_open(tmp_path / "s.safetensors", "np") as file:
        assert file.metadata() == {"who": "me"}
        assert file.get_tensor("model.stack.step").tolist() == list(range(11))
    with pm.open(tmp_path / "s.safetensors") as checkpoint:
        back = pm.unstack_layers(checkpoint, "model.stack", into="model.layers.<n>")
        names = [back.index.name(number) for number in back.index.numbers if "layers" in back.index.name(number)]
        assert [name.split(".")[2] for name in names] == [str(i) for i in range(11) for _ in range(2)]


def test_edits_planned_before_and_after(tmp_path):
    tree = layers(3)
    safetensors.numpy.save_file(tree, tmp_path / "m.safetensors")

    def edit(tree):
        tree = pm.at(tree, "model.layers[1].w").multiply(2)
        tree = pm.at(tree, "model.embed").noise(1.0, seed=1)
        return pm.at(tree, "model.layers[2].w").noise(0.5, seed=3)

    expected = pm.at(pm.stack_layers(edit(tree), "model.layers.<n>"), "model.layers.w")[0].zero()
    with pm.open(tmp_path / "m.safetensors") as checkpoint:
        stacked = pm.stack_layers(edit(checkpoint), "model.layers.<n>")
        pm.at(stacked, "model.layers.w")[0].zero().save(tmp_path / "s.safetensors")
    assert in_file(tmp_path / "s.safetensors") == bits(expected)
    expected = pm.unstack_layers(pm.at(expected, "model.layers.w").add(1), "model.layers", into="h_<n>")
    with pm.open(tmp_path / "s.safetensors") as checkpoint:
        edited = pm.at(checkpoint, "model.layers.w").add(1)
        pm.unstack_layers(edited, "model.layers", into="h_<n>").save(tmp_path / "u.safetensors")
    assert in_file(tmp_path / "u.safetensors") == bits(expected)


@pytest.mark.numeric
@pytest.mark.parametrize("axis", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["msgpack", "orbax"])
def test_a_scanned_model_becomes_an_unrolled_one(tmp_path, kind, axis):
    scanned = Scanned(3, axis)
    variables = scanned.init(jax.random.key(0), X)
    if kind == "msgpack":
        (tmp_path / "m.msgpack").write_bytes(serialization.to_bytes(variables))
        path = tmp_path / "m.msgpack"
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "m", variables)
        path = tmp_path / "m"
    target = jax.eval_shape(Unrolled(3).init, jax.random.key(1), X)
    with pm.open(path) as checkpoint:
        layers = pm.unstack_layers(checkpoint, "params/layers", into="params/layers_<n>", like=target)
        layers.save(tmp_path / "u.safetensors")
        layers.save(tmp_path / "again.msgpack")
    restored = serialization.msgpack_restore((tmp_path / "again.msgpack").read_bytes())
    with pm.open(tmp_path / "u.safetensors") as source:
        unrolled, _ = pm.graft(target, source)
    for params in (unrolled, restored):
        assert_same_outputs(Unrolled(3).apply(params, X), scanned.apply(variables, X))
    with pm.open(tmp_path / "u.safetensors") as source, pm.open(path) as like:
        pm.stack_layers(source, "params/layers_<n>", like=like).save(tmp_path / "s.safetensors")
    assert in_file(tmp_path / "s.safetensors") == bits(flat(variables))


@pytest.mark.numeric
def test_orbax_onto_orbax(tmp_path):
    variables = Unrolled(3).init(jax.random.key(0), X)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "m", variables)
    with pm.open(tmp_path / "m") as checkpoint:
        pm.stack_layers(checkpoint, "params/layers_<n>").save(tmp_path / "out")
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "out", jax.eval_shape(Scanned(3).init, jax.random.key(0), X))
    assert_same_outputs(Scanned(3).apply(restored, X), Unrolled(3).apply(variables, X))


def test_a_torch_file_with_a_tie_outside_of_the_layers(tmp_path):
    shared = torch.ones(2, 3)
    state = {"emb": shared, "head": shared, **{f"h.{i}.w": torch.full((2, 3), i).t() for i in range(3)}}
    torch.save(state, tmp_path / "m.pt")
    with pm.open(tmp_path / "m.pt") as checkpoint:
        stacked = pm.stack_layers(checkpoint, "h.<n>")
        assert pm.at(stacked, "emb").fill(2)["head"].tolist() == [[2, 2, 2]] * 2
        stacked.save(tmp_path / "s.pt")
    out = torch.load(tmp_path / "s.pt", weights_only=True)
    assert torch.equal(out["h"]["w"] if "h" in out else out["h.w"], torch.stack([state[f"h.{i}.w"] for i in range(3)]))


def test_dtypes_that_nobody_can_read_stay_together(tmp_path):
    header = {f"h.{i}.w": {"dtype": "X9", "shape": [2, 2], "data_offsets": [i * 6, i * 6 + 6]} for i in range(3)}
    text = json.dumps(header).encode()
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(18)))
    with pm.open(tmp_path / "m.safetensors") as checkpoint:
        pm.stack_layers(checkpoint, "h.<n>").save(tmp_path / "s.safetensors")
        pm.stack_layers(checkpoint, "h.<n>", axis=1).save(tmp_path / "rows.safetensors")  # three bytes each
        with pytest.raises(pm.errors.Unsupported, match=r"h.w cannot be made of stack\(h.0.w, h.1.w, h.2.w, axis=2\)"):
            pm.stack_layers(checkpoint, "h.<n>", axis=2)
    rows = np.arange(18, dtype="u1").reshape(3, 2, 3).swapaxes(0, 1)
    assert (tmp_path / "rows.safetensors").read_bytes()[-18:] == rows.tobytes()
    assert (tmp_path / "s.safetensors").read_bytes()[-18:] == bytes(range(18))
    with pm.open(tmp_path / "s.safetensors") as checkpoint:
        pm.unstack_layers(checkpoint, "h", into="h.<n>").save(tmp_path / "u.safetensors")
    assert (tmp_path / "u.safetensors").read_bytes()[-18:] == bytes(range(18))


W = np.ones((2, 2), "float32")


@pytest.mark.parametrize(
    ("tree", "layers", "error"),
    [
        ({"h_0/w": W, "h_2/w": W}, "h_<n>", BadArgument),
        ({"h_0/w": W, "h_1/v": W}, "h_<n>", BadArgument),
        ({"h_0/w": W, "h_1/w": W[:1]}, "h_<n>", SpecMismatch),
        ({"h_0/w": W, "h_1/w": W, "h/w": W}, "h_<n>", RenameClash),
        ({"h_0/w": W}, "g_<n>", NoMatch),
    ],
)
def test_errors_are_those_of_trees_in_memory(tmp_path, tree, layers, error):
    safetensors.numpy.save_file(tree, tmp_path / "m.safetensors")
    with pytest.raises(error) as in_memory:
        pm.stack_layers(tree, layers)
    with pm.open(tmp_path / "m.safetensors") as checkpoint, pytest.raises(error) as on_disk:
        pm.stack_layers(checkpoint, layers)
    if error is not RenameClash:
        assert str(on_disk.value) == str(in_memory.value)


def test_clashes_of_unstacked_layers(tmp_path):
    safetensors.numpy.save_file({"h/w": W, "h_1/w": W, "x_0": W}, tmp_path / "m.safetensors")
    with pm.open(tmp_path / "m.safetensors") as checkpoint:
        for into in ("h_<n>", "x_<n>"):
            with pytest.raises(RenameClash, match="would collide with others"):
                pm.unstack_layers(checkpoint, "h", into=into)


MEASURE = """
import resource, sys
import paramend as pm

with pm.open(sys.argv[1]) as checkpoint:
    verb, out = sys.argv[2:]
    if verb == "stack":
        made = pm.stack_layers(checkpoint, "h.<n>")
    elif verb == "edited":
        made = pm.stack_layers(pm.at(checkpoint, "**").multiply(2), "h.<n>")
    else:
        made = pm.unstack_layers(checkpoint, "h", into="h.<n>")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made.save(out)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_is_bounded(tmp_path):
    """96 MB, of which one leaf is 8 MB, and a stack of them all 96 MB."""
    safetensors.numpy.save_file({f"h.{i}.w": np.full((4, 1 << 19), i, "f4") for i in range(12)}, tmp_path / "m.st")
    (tmp_path / "m.st").rename(tmp_path / "m.safetensors")
    for verb, source, out in (("stack", "m", "s"), ("edited", "m", "e"), ("unstack", "s", "u")):
        command = [
            sys.executable,
            "-c",
            MEASURE,
            tmp_path / f"{source}.safetensors",
            verb,
            tmp_path / f"{out}.safetensors",
        ]
        grown = subprocess.run(command, capture_output=True, text=True, check=True)
        assert int(grown.stdout) < 40 << 10, verb
    assert in_file(tmp_path / "u.safetensors") == in_file(tmp_path / "m.safetensors")
    with pm.open(tmp_path / "e.safetensors") as file:
        assert file["h.w"].shape == (12, 4, 1 << 19)
        assert (file["h.w"][:, 0, 0] == 2 * np.arange(12)).all()


# ---- the command line ------------------------------------------------------------------------------------------


def run(*args):
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def test_command_line(tmp_path):
    tree = layers(3)
    file, out = tmp_path / "m.safetensors", tmp_path / "s.safetensors"
    safetensors.numpy.save_file(tree, file)
    dry = run("stack", file, "model.layers.<n>", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "8 leaves before, 4 after" in dry.stdout
    assert "model.layers.{0..2}.w" in dry.stdout
    assert run("stack", file, "model.layers.<n>").exit_code == 2
    done = run("stack", file, "model.layers.<n>", "--into", "model.all", "-o", out, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    origin = "stack(model.layers.0.w, model.layers.1.w, model.layers.2.w, axis=0)"
    assert {"path": "model.all.w", "dtype": "float32", "shape": [3, 4, 3], "origin": origin} in said["to"]
    assert "model.layers.0.w" in said["from"]
    assert said["kept"] == 2
    assert said["bytes_computed"] == 0
    again = run("stack", file, "model.layers.<n>", "-o", out)
    assert again.exit_code == 2
    assert "exists" in again.output
    back = run(
        "unstack", out, "model.all", "--into", "model.layers.<n>", "--like", file, "-o", tmp_path / "b.safetensors"
    )
    assert back.exit_code == 0, back.output
    assert in_file(tmp_path / "b.safetensors") == bits(tree)
    wrong = run("unstack", out, "model.al", "--into", "model.layers.<n>", "-o", out)
    assert wrong.exit_code == 2
    assert "model.all" in wrong.output
