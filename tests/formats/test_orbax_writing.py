"""Orbax checkpoints written: copies with other values, and new ones, as Orbax restores them."""

import hashlib
import json
import shutil
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from click.testing import CliRunner
from flax import nnx

import paramend as pm
from paramend.cli.main import cli
from paramend.errors import BadArgument, CannotWrite, MissingExtra, RenameClash, Unsupported
from paramend.formats.orbax import writer as orbax_writer
from paramend.formats.orbax.writer import chunk_shape
from paramend.leaves.specs import BITS, Spec, numpy_dtype

LAYOUTS = {
    "ocdbt": {},
    "zarr": {"use_ocdbt": False},
    "ocdbt-zarr3": {"use_zarr3": True},
    "zarr3": {"use_ocdbt": False, "use_zarr3": True},
}

pytestmark = pytest.mark.filterwarnings("ignore")  # of orbax, about itself


def tree():
    rng = np.random.default_rng(0)
    return {
        "params": {"kernel": jnp.asarray(rng.normal(size=(60, 100)), "float32"), "bias": jnp.ones(5, "bfloat16")},
        "layers": [jnp.arange(4.0), jnp.arange(3)],
        "step": 7,
        "none": None,
        "empty": {},
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with one checkpoint of each layout, and the folder of a manager."""
    folder = tmp_path_factory.mktemp("orbax")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, options in LAYOUTS.items():
            ocp.PyTreeCheckpointer(**options).save(folder / name, tree() | {"text": "hello"})
        with ocp.StandardCheckpointer() as saver:
            saver.save(folder / "standard", tree())
        with ocp.CheckpointManager(folder / "run") as manager:
            for step in (1, 2):
                args = {"state": ocp.args.StandardSave(tree()), "extra": ocp.args.JsonSave({"a": step})}
                manager.save(step, args=ocp.args.Composite(**args))
    return folder


def standard(path, target=None):
    with ocp.StandardCheckpointer() as saver:
        return saver.restore(path, target)


def bits(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(str(path), np.asarray(x).dtype.name, np.shape(x), np.asarray(x).tobytes()) for path, x in flat]


def content(path):
    files = [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# ---- copies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("name", [*LAYOUTS, "standard"])
def test_a_copy_with_other_values(saved, tmp_path, name, link):
    before = content(saved / name)
    out = tmp_path / "out"
    with pm.open(saved / name) as checkpoint:
        report = pm.at(checkpoint, "params/kernel")[1:].zero().save(out, link=link)
    assert content(saved / name) == before
    expected = tree() | ({} if name == "standard" else {"text": "hello"})
    expected["params"]["kernel"] = expected["params"]["kernel"].at[1:].set(0)
    assert bits(ocp.PyTreeCheckpointer().restore(out)) == bits(expected)
    if name == "standard":
        assert bits(standard(out, tree())) == bits(expected)
    after = content(out)
    changed = {file for file in before if after[file] != before[file]}
    assert changed == {
        "zarr": {"params.kernel/0.0"},
        "zarr3": {"params.kernel/c/0/0"},
    }.get(name, {"manifest.ocdbt"})
    assert set(report.files) == set(after)
    assert (report.bytes_linked > 0) == link
    # What was linked is never written through, and the copy can be edited in place where files are not shared.
    if link:
        assert any(file.stat().st_nlink == 2 for file in out.rglob("*") if file.is_file())
    pm.patch(out, lambda t: pm.at(t, "params/kernel").fill(1))
    assert content(saved / name) == before
    pm.undo(out)
    assert content(out) == after


def test_a_copy_of_a_step_has_its_other_items(saved, tmp_path):
    with pm.open(saved / "run") as checkpoint:
        report = pm.at(checkpoint, "params/kernel").zero().save(tmp_path / "out")
        pm.at(checkpoint, "params/kernel").cast("float16").save(tmp_path / "cast")
    assert report.left_out == ("1 (another step)",)
    for name, dtype in [("out", "float32"), ("cast", "float16")]:
        with ocp.CheckpointManager(tmp_path / name) as manager:
            args = {"state": ocp.args.StandardRestore(), "extra": ocp.args.JsonRestore()}
            found = manager.restore(manager.latest_step(), args=ocp.args.Composite(**args))
            assert found.extra == {"a": 2}
            assert found.state["params"]["kernel"].dtype == dtype
            assert found.state["params"]["kernel"].any() == (name == "cast")
            assert found.state["layers"][1].tolist() == [0, 1, 2]
    with pm.open(saved / "run" / "2") as checkpoint:
        checkpoint.save(tmp_path / "2")
    assert content(tmp_path / "2") == content(saved / "run" / "2")


def test_undo_records_stay_behind(saved, tmp_path):
    shutil.copytree(saved / "ocdbt", tmp_path / "x")
    pm.patch(tmp_path / "x", lambda t: pm.at(t, "params/bias").zero())
    with pm.open(tmp_path / "x") as checkpoint:
        checkpoint.save(tmp_path / "y")
    assert pm.history(tmp_path / "y") == []
    assert not ocp.PyTreeCheckpointer().restore(tmp_path / "y")["params"]["bias"].any()


# ---- other specs, other names --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LAYOUTS, "standard"])
def test_structure_and_specs_change_in_a_new_checkpoint(saved, tmp_path, name):
    with pm.open(saved / name) as checkpoint:
        edited = pm.at(checkpoint, "params/kernel").cast("float8_e4m3fn")
        edited = pm.at(edited, "params/bias").rename("params/b")
        edited = pm.at(edited, "layers/<n>").rename("h/<n>")
        edited.save(tmp_path / "out")
    kernel = np.asarray(tree()["params"]["kernel"]).astype(numpy_dtype("float8_e4m3fn"))
    expected = {"params": {"kernel": kernel, "b": np.ones(5, numpy_dtype("bfloat16"))}, "h": tree()["layers"]}
    expected |= {"step": 7, "none": None, "empty": {}} | ({} if name == "standard" else {"text": "hello"})
    found = ocp.PyTreeCheckpointer().restore(tmp_path / "out")
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert bits(found) == bits(expected)
    assert isinstance(found["params"]["b"], jax.Array)
    assert (tmp_path / "out" / "manifest.ocdbt").exists() == ("zarr" not in name or "ocdbt" in name)
    assert list((tmp_path / "out").rglob("zarr.json")) or name != "zarr3"
    with pm.open(tmp_path / "out") as checkpoint:
        pm.at(checkpoint, "h[0]").delete().save(tmp_path / "less")
    assert "1" in ocp.PyTreeCheckpointer().restore(tmp_path / "less")["h"]


# ---- from elsewhere ------------------------------------------------------------------------------------------


def test_trees_in_memory(tmp_path):
    params = {"w": jnp.arange(6.0).reshape(2, 3), "z": jnp.zeros((0, 2))}
    state = {"params": params, "opt": optax.adamw(1e-3).init(params), "blocks": [{"b": jnp.ones(2, "bfloat16")}, {}]}
    state |= {"step": 3, "lr": 0.5, "none": None, "tuple": (), "list": []}
    pm.save(state, tmp_path / "x.orbax")
    found = standard(tmp_path / "x.orbax", state)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert bits(found) == bits(state)
    assert found["step"] == 3 and found["lr"] == 0.5
    found = standard(tmp_path / "x.orbax")
    assert type(found["params"]["w"]) is np.ndarray and type(found["blocks"]) is list
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, params)
    partial = ocp.PyTreeCheckpointer().restore(
        tmp_path / "x.orbax", ocp.args.PyTreeRestore({"params": abstract}, partial_restore=True)
    )
    assert bits(partial["params"]) == bits(params)


def test_from_safetensors_and_back(tmp_path):
    flat = {"model.layers.0.w": np.arange(6, dtype="float32").reshape(2, 3), "model.norm": np.ones(3, "float16")}
    safetensors.numpy.save_file(flat, tmp_path / "x.safetensors")
    run = lambda *args: CliRunner().invoke(cli, [*map(str, args)])
    done = run("convert", tmp_path / "x.safetensors", f"{tmp_path / 'y.orbax'}/")
    assert done.exit_code == 0, done.output
    found = standard(tmp_path / "y.orbax")
    nested = {"model": {"layers": {"0": {"w": flat["model.layers.0.w"]}}, "norm": flat["model.norm"]}}
    assert bits(found) == bits(nested)
    assert run("convert", tmp_path / "y.orbax", tmp_path / "z.safetensors").exit_code == 0
    assert bits(pm.load(tmp_path / "z.safetensors")) == bits(found)
    pm.save({"a": flat["model.norm"], "a.b": flat["model.norm"]}, tmp_path / "flat.orbax")
    assert set(standard(tmp_path / "flat.orbax")) == {"a", "a.b"}


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_or_a_clear_refusal(tmp_path, dtype):
    array = np.array([0, 1, 1, 0, 1]).astype(numpy_dtype(dtype))
    if dtype in ("uint4", "float8_e4m3") or dtype.startswith(("float4_", "float6_")):
        with pytest.raises(Unsupported, match=f"x cannot be written: Orbax cannot hold {dtype}"):
            pm.save({"x": array}, tmp_path / "x.orbax")
        assert list(tmp_path.iterdir()) == []
        return
    pm.save({"x": array, "y": array[:0]}, tmp_path / "x.orbax")
    for found in standard(tmp_path / "x.orbax"), ocp.PyTreeCheckpointer().restore(tmp_path / "x.orbax"):
        assert bits(found["x"]) == bits(array)
        assert found["y"].shape == (0,)


def test_leaves_are_written_in_bounded_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_writer, "MAX_CHUNK", 1000)
    monkeypatch.setattr("paramend.formats.orbax.store.BATCH", 3000)
    arrays = {"a": np.random.default_rng(0).normal(size=(7, 11, 13)), "b": np.arange(2000), "c": np.float32(3)}
    report = pm.save(arrays, tmp_path / "x.orbax")
    assert report.bytes_copied == sum(np.asarray(array).nbytes for array in arrays.values())
    with pm.open(tmp_path / "x.orbax") as checkpoint:
        assert checkpoint.source.chunks(checkpoint.index.numbers[0]) == (1, 9, 13)
    assert bits(standard(tmp_path / "x.orbax")) == bits({k: np.asarray(v) for k, v in arrays.items()})


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (1 << 25,), (3, 1 << 13, 1 << 13), (1 << 14, 5000)])
def test_chunks_hold_neighbours(shape):
    chunks = chunk_shape(Spec(shape, "float32"))
    assert len(chunks) == len(shape) and all(chunks)
    assert np.prod(chunks, dtype=object) * 4 <= 1 << 26
    split = [n for n, (chunk, length) in enumerate(zip(chunks, shape, strict=True)) if chunk < length]
    assert all(chunk == 1 for chunk in chunks[: max(split, default=0)])


# ---- what is refused -----------------------------------------------------------------------------------------


def test_nothing_is_written_where_something_is(saved, tmp_path):
    with pm.open(saved / "ocdbt") as checkpoint:
        checkpoint.save(tmp_path / "x")
        with pytest.raises(CannotWrite, match="already exists"):
            checkpoint.save(tmp_path / "x")
        pm.at(checkpoint, "params/bias").zero().save(tmp_path / "x", force=True)
        with pytest.raises(CannotWrite, match="is what is being read"):
            checkpoint.save(saved / "ocdbt", force=True)
        with pytest.raises(BadArgument, match="cannot have shards of a given size"):
            checkpoint.save(tmp_path / "y.orbax", max_shard_size="1GB")
    assert not ocp.PyTreeCheckpointer().restore(tmp_path / "x")["params"]["bias"].any()
    shutil.copytree(saved / "run", tmp_path / "run")
    with (
        pm.open(saved / "ocdbt") as checkpoint,
        pytest.raises(CannotWrite, match="holds 2 steps, which would all be lost"),
    ):
        checkpoint.save(tmp_path / "run", force=True)
    with pytest.raises(RenameClash, match=r"are both named a\.b in Orbax"):
        pm.save({"a": {"b": np.ones(1)}, "a.b": np.ones(1)}, tmp_path / "clash.orbax")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "x"]


def test_without_tensorstore(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(MissingExtra, match=r"paramend\[orbax\]"):
        pm.save({"a": np.ones(1)}, tmp_path / "x.orbax")
    assert list(tmp_path.iterdir()) == []


# ---- the commands --------------------------------------------------------------------------------------------


def test_the_commands(saved, tmp_path):
    run = lambda *args: CliRunner().invoke(cli, [*map(str, args)])
    source = saved / "standard"
    assert "params/kernel" in run("show", source).output
    for name, args in {
        "zero": ("params/kernel",),
        "cast": ("params/kernel", "bfloat16"),
        "rename": ("params/kernel", "params/w"),
        "delete": ("params/kernel",),
    }.items():
        done = run(name, source, *args, "-o", tmp_path / name)
        assert done.exit_code == 0, done.output
        assert "params" in standard(tmp_path / name)
    assert not standard(tmp_path / "zero")["params"]["kernel"].any()
    assert standard(tmp_path / "cast")["params"]["kernel"].dtype == "bfloat16"
    assert set(standard(tmp_path / "rename")["params"]) == {"w", "bias"}
    assert set(standard(tmp_path / "delete")["params"]) == {"bias"}
    done = run("zero", source, "**/bias", "-o", tmp_path / "linked", "--link", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["bytes_linked"] > 0
    assert run("zero", source, "**/bias", "-o", tmp_path / "no.orbax", "--dry-run").exit_code == 0
    assert not (tmp_path / "no.orbax").exists()


def test_leaves_gathered_around_an_orbax_checkpoint_keep_its_tree(saved, tmp_path):
    from paramend.edits.plan import Plan
    from paramend.formats.gathered import Gathered
    from paramend.leaves.origins.stored import Made, Stored
    from paramend.rewriting.rewrite import write

    with pm.open(saved / "standard") as checkpoint:
        source, paths = checkpoint.source, checkpoint.index.paths
        parts = [(paths[number], Stored(source, number)) for number in checkpoint.index.numbers]
        parts.append((("params", "new"), Made(Spec((2,), "float32"), lambda: np.ones(2, "float32"))))
        write(Plan.of(Gathered(source, parts)), tmp_path / "out")
    found = ocp.PyTreeCheckpointer().restore(tmp_path / "out")
    expected = tree()
    expected["params"]["new"] = np.ones(2, "float32")
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert bits(found) == bits(expected)


# ---- typed keys, and states of NNX -------------------------------------------------------------------------------

KEYS = {"rng": jax.random.key(3), "more": [jax.random.split(jax.random.key(1, impl="rbg"), 2)]}
OTHERS = {"w": jnp.ones(2), "v": jnp.zeros((2, 2)), "step": 3}


def keys_of(tree):
    return [(str(key.dtype), np.asarray(jax.random.key_data(key)).tolist()) for key in (tree["rng"], tree["more"][0])]


@pytest.mark.parametrize("zarr", [True, False])
def test_typed_keys_stay_keys(zarr, tmp_path):
    with ocp.PyTreeCheckpointer(use_ocdbt=not zarr) as checkpointer:
        checkpointer.save(tmp_path / "x", KEYS | OTHERS)
    edits = {
        "rename": lambda c: pm.at(c, "w").rename("deep/u"),
        "cast": lambda c: pm.at(c, "w").cast("bfloat16"),
        "delete": lambda c: pm.at(c, "w").delete(),
        "zero": lambda c: pm.at(c, "w").zero(),
        "nothing": lambda c: c,
    }
    for name, edit in edits.items():
        with pm.open(tmp_path / "x") as checkpoint:
            edit(checkpoint).save(tmp_path / name)
        found = standard(tmp_path / name)
        assert keys_of(found) == keys_of(KEYS) and found["step"] == 3
        loaded = pm.load(tmp_path / name, "jax")
        assert keys_of(loaded) == keys_of(KEYS) and loaded["step"] == 3
    with pm.open(tmp_path / "x") as checkpoint:
        pm.at(checkpoint, "rng").rename("keys/rng").save(tmp_path / "moved")
        pm.graft(checkpoint, {"w": jnp.full(2, 5.0)})[0].save(tmp_path / "grafted")
    assert str(standard(tmp_path / "moved")["keys"]["rng"].dtype) == "key<fry>"
    assert keys_of(standard(tmp_path / "grafted")) == keys_of(KEYS)
    assert standard(tmp_path / "grafted")["w"].tolist() == [5, 5]


def test_trees_with_typed_keys(tmp_path):
    pm.save(KEYS | OTHERS, tmp_path / "x.orbax")
    assert keys_of(standard(tmp_path / "x.orbax")) == keys_of(KEYS)
    abstract = jax.eval_shape(lambda: KEYS | OTHERS)
    assert keys_of(standard(tmp_path / "x.orbax", abstract)) == keys_of(KEYS)
    for suffix in ("safetensors", "npz", "pt", "msgpack"):
        with pytest.raises(Unsupported, match="rng is typed PRNG keys") as caught:
            pm.save(KEYS, tmp_path / f"x.{suffix}")
        assert "jax.random.key_data" in caught.value.hint


def model_of(seed):
    rngs = nnx.Rngs(seed)
    return nnx.Sequential(nnx.Linear(2, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))


def test_states_of_nnx_have_the_names_of_their_model(tmp_path):
    model, other = model_of(0), model_of(1)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "x", nnx.state(model))
    with pm.open(tmp_path / "x") as checkpoint:
        assert "layers/0/kernel" in checkpoint.index.texts.values()
        assert not pm.diff(model, checkpoint) and not pm.diff(nnx.state(model), checkpoint)
        grafted, report = pm.graft(other, checkpoint)
    assert len(report.copied) == 8 and not report.unused
    key, old = (net.layers[2].rngs.key[...] for net in (grafted, model))
    assert key.dtype == old.dtype and (jax.random.key_data(key) == jax.random.key_data(old)).all()
    assert (grafted.layers[0].kernel[...] == model.layers[0].kernel[...]).all()
    assert not pm.diff(model, pm.load(tmp_path / "x", "jax"))
    assert not pm.diff(tmp_path / "x", nnx.state(model)) and not pm.diff(tmp_path / "x", tmp_path / "x")
    assert [row.path for row in pm.diff(other, tmp_path / "x").changed] == ["layers/0/kernel", "layers/2/rngs/key"]
    numbers = jax.tree.map(
        lambda x: jax.random.key_data(x) if x.dtype == key.dtype else x, nnx.to_pure_dict(nnx.state(model))
    )
    assert not pm.diff(tmp_path / "x", numbers)
    pm.graft_(other, pm.open(tmp_path / "x"))
    assert not pm.diff(other, model)


def test_states_of_nnx_are_restored_onto_the_abstract_state(tmp_path):
    model, other = model_of(0), model_of(1)
    abstract = jax.eval_shape(lambda: nnx.state(model))
    kernel = np.asarray(model.layers[0].kernel[...])
    pm.save(nnx.state(model), tmp_path / "state.orbax")
    pm.save(model, tmp_path / "model.orbax")
    with pm.open(tmp_path / "state.orbax") as checkpoint:
        pm.at(checkpoint, "**/kernel").multiply(2).save(tmp_path / "doubled")
        pm.at(checkpoint, "**/kernel").cast("float16").save(tmp_path / "cast")
        pm.graft(checkpoint, other)[0].save(tmp_path / "grafted")
    expected = {"state.orbax": kernel, "model.orbax": kernel, "doubled": kernel * 2, "cast": kernel.astype("float16")}
    expected["grafted"] = np.asarray(other.layers[0].kernel[...])
    for name, values in expected.items():
        found = standard(tmp_path / name, abstract)
        assert jax.tree.structure(found) == jax.tree.structure(abstract)
        assert np.array_equal(np.asarray(found["layers"][0]["kernel"][...]), values.astype("float32"))
    both = {"model": nnx.state(model), "step": 5, "count": jnp.asarray(3)}
    pm.save(both, tmp_path / "both.orbax")
    found = standard(tmp_path / "both.orbax", jax.eval_shape(lambda: both) | {"step": 0})
    assert found["step"] == 5 and isinstance(found["model"], nnx.State)
    with pm.open(tmp_path / "both.orbax") as checkpoint:
        assert "model/layers/0/kernel" in checkpoint.index.texts.values()


def test_a_parameter_called_value_is_one(tmp_path):
    tree = {"head": {"value": np.ones(2)}, "body": {"kernel": np.ones((2, 2))}}
    pm.save(tree, tmp_path / "x.orbax")
    with pm.open(tmp_path / "x.orbax") as checkpoint:
        assert sorted(checkpoint.index.texts.values()) == ["body/kernel", "head/value"]
    assert not pm.diff(tree, pm.load(tmp_path / "x.orbax"))
