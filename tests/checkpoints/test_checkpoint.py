"""Checkpoints on disk: lazy leaves, plans, the rewriting engine over directories, whole trees."""

import fcntl
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings, strategies as st

import paramend as pm
from paramend.checkpoints import checkpoint as checkpoints
from paramend.cli.main import cli
from paramend.errors import (
    BadArgument,
    BadCheckpoint,
    CannotWrite,
    NoMatch,
    ParamendError,
    RenameClash,
    SpecMismatch,
    Unsupported,
)
from paramend.formats.safetensors import SafetensorsFile
from paramend.leaves.origins import origin as streaming
from paramend.leaves.specs import Spec
from paramend.rewriting.layouts import parse_size
from support.writing import write_header


def read(path):
    """All tensors under a file or a directory, by name, in the order of their bytes."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    tree = {}
    for file in files:
        with SafetensorsFile(file) as opened:
            tree |= {opened.names[n]: np.array(opened.read(n)) for n in opened.index.numbers}
    return tree


def bits(tree):
    return {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in tree.items()}


def run(*args):
    return CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="paramend")


def write_model(folder, tree, shards=3, **metadata):
    """A model as transformers writes it."""
    folder.mkdir()
    names = list(tree)
    weight_map = {}
    for shard in range(shards):
        mine = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        safetensors.numpy.save_file({key: tree[key] for key in mine}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, name)
    total = sum(array.nbytes for array in tree.values())
    index = {"metadata": {"total_size": total} | metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (folder / "config.json").write_text('{"num_hidden_layers": 3}')
    (folder / "tokenizer.json").write_text("{}" * 50)
    return folder


@pytest.fixture
def tree():
    rng = np.random.default_rng(0)
    tree = {"model.embed.weight": rng.normal(size=(8, 4)).astype("float32")}
    for i in range(3):
        tree[f"model.layers.{i}.up.weight"] = rng.normal(size=(4, 4)).astype(ml_dtypes.bfloat16)
        tree[f"model.layers.{i}.up.bias"] = rng.normal(size=4).astype("float16")
    tree["model.norm.weight"] = np.ones(4, "float32")
    return tree


@pytest.fixture
def model(tmp_path, tree):
    return write_model(tmp_path / "model", tree)


def index_of(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())


def check_index(folder):
    """What the index says is what the shards hold, as the library sees them."""
    index = index_of(folder)
    found, total = {}, 0
    for shard in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(shard, "np") as file:
            found |= dict.fromkeys(file.keys(), shard.name)
        with SafetensorsFile(shard) as file:
            total += file.header.data_nbytes
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == total


# ---- lazy leaves -------------------------------------------------------------------------------------------------


def test_a_directory_is_one_tree(model, tree):
    with checkpoints.open(model) as checkpoint:
        assert len(checkpoint) == 8
        assert repr(checkpoint) == f"<{model}: 8 leaves>"
        assert checkpoint.format == "safetensors"
        assert pm.at(checkpoint, "**/layers[-1]/up/weight").paths == ["model.layers.2.up.weight"]
        assert (
            pm.at(checkpoint, "**/layers[-1]/up/weight").one().tobytes() == tree["model.layers.2.up.weight"].tobytes()
        )
        assert pm.param_count(checkpoint) == sum(array.size for array in tree.values())
        assert pm.param_count(checkpoint, pm.sel("**/layers/*/up/weight")[0]) == 12
        assert pm.at(checkpoint, "**/bias").mask() == {name: name.endswith("bias") for name in tree}
        assert pm.labels(checkpoint, {"b": "**/bias", "w": "**"})["model.norm.weight"] == "w"
        assert checkpoint["model.norm.weight"].tolist() == [1, 1, 1, 1]
        assert {path: leaf.tobytes() for path, leaf in pm.at(checkpoint, "**")} == {
            k: v.tobytes() for k, v in tree.items()
        }
        with pytest.raises(NoMatch, match="did you mean"):
            pm.at(checkpoint, "**/layer[-1]/up/weight")


def test_edits_read_and_write_nothing(model, monkeypatch):
    checkpoint = checkpoints.open(model)

    def refuse(*args):
        raise AssertionError

    monkeypatch.setattr(SafetensorsFile, "read", refuse)
    monkeypatch.setattr(SafetensorsFile, "read_range", refuse)
    before = sorted(path.name for path in model.iterdir())
    edited = pm.at(pm.at(checkpoint, "**/bias").zero(), "**/weight").multiply(0.5)
    edited = pm.at(edited, "model.layers.<n>.up.*").rename("model.h.<n>.fc.*")
    edited = pm.at(edited, "model.norm.*").delete()
    assert len(edited) == 7 and len(checkpoint) == 8
    assert str(edited.plan).splitlines()[-1] == "7 of 8 leaves change, 1 is deleted"
    assert "model.h.0.fc.bias    float16[4]     zero(), renamed from model.layers.0.up.bias" in str(edited.plan)
    assert sorted(path.name for path in model.iterdir()) == before


def test_an_edited_leaf_reads_as_it_will_be_saved(model, tmp_path):
    edited = pm.at(checkpoints.open(model), "**/weight").noise(0.1, seed=3)
    edited = pm.at(edited, "**/up/*")[1:].fill(0.25)
    edited = pm.at(edited, "**/norm/*").cast("bfloat16")
    edited.save(tmp_path / "out")
    after = read(tmp_path / "out")
    assert bits(pm.at(edited, "**").get()) == bits(after)
    assert bits(pm.at(checkpoints.open(tmp_path / "out"), "**").get()) == bits(after)


def test_in_place_verbs_are_refused(model):
    with pytest.raises(Unsupported, match="zero_ cannot edit an opened checkpoint in place"):
        pm.at(checkpoints.open(model), "**").zero_()


def test_what_a_plan_cannot_know_is_refused(model):
    checkpoint = checkpoints.open(model)
    with pytest.raises(Unsupported, match="known only when it runs"):
        pm.at(checkpoint, "**").apply(abs, keep_spec=False)
    with pytest.raises(Unsupported, match="needs a JAX leaf"):
        pm.at(checkpoint, "**").reinit(lambda key, shape, dtype: None)
    with pytest.raises(SpecMismatch, match=r"model\.norm\.weight: "):
        pm.at(checkpoint, "model.norm.weight").set(np.ones(3, "float32"))
    pm.at(checkpoint, "model.norm.weight").set(torch.zeros(4))


def test_renames_that_clash(model):
    checkpoint = checkpoints.open(model)
    with pytest.raises(RenameClash, match=r"model\.layers\.1\.up\.bias would go to x"):
        pm.at(checkpoint, pm.sel("model.layers.0.up.bias") | "model.layers.1.up.bias").rename("x")
    swapped = pm.at(checkpoint, "model.layers.<n>.up.bias").rename("model.layers.<2*n>.up.bias")
    assert "model.layers.4.up.bias" in pm.at(swapped, "**/bias").paths


# ---- the same bytes as in memory -----------------------------------------------------------------------------------

SELECTORS = ["**", "**/w", "{a,b}/**", "**/[-1]/**", "layers[-1]/**", "a", "b/**", "**/<n>/w", "*"]
STEPS = st.one_of(
    st.tuples(st.sampled_from(SELECTORS), st.just("zero"), st.just({})),
    st.tuples(
        st.sampled_from(SELECTORS), st.just("fill"), st.sampled_from([{"value": v} for v in (0, 1, -0.5, float("nan"))])
    ),
    st.tuples(
        st.sampled_from(SELECTORS),
        st.sampled_from(["add", "multiply"]),
        st.sampled_from([{"value": v} for v in (0, 2, -0.5)]),
    ),
    st.tuples(
        st.sampled_from(SELECTORS),
        st.just("cast"),
        st.sampled_from([{"dtype": d} for d in ("float16", "bfloat16", "int8")]),
    ),
    st.tuples(st.sampled_from(SELECTORS), st.just("noise"), st.sampled_from([{"std": 0.1, "seed": s} for s in (0, 1)])),
    st.tuples(st.sampled_from(SELECTORS), st.just("delete"), st.just({})),
    st.tuples(
        st.just("**/w"), st.just("rename"), st.sampled_from([{"to": "**/v"}, {"to": "new/**/w"}, {"to": "**/b"}])
    ),
    st.tuples(st.just("<n>/**"), st.just("rename"), st.sampled_from([{"to": "<n+1>/**"}, {"to": "h/<2*n>/**"}])),
)
INDEXES = st.sampled_from([None, None, 0, -1, slice(1, None), slice(None, None, 2), (slice(None), 0)])
KEYS = st.sampled_from(["a", "b", "layers", "w", "0", "1", "10"])


def make(dtype, shape, seed):
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    values = np.random.default_rng(seed).integers(0, 256, int(np.prod(shape)) * kind.itemsize, np.uint8)
    return values.view(kind).reshape(shape)


LEAVES = st.builds(
    make,
    st.sampled_from(["float16", "bfloat16", "float32", "float8_e4m3fn", "int8", "int32"]),
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    st.integers(0, 99),
)
TREES = st.dictionaries(st.lists(KEYS, min_size=1, max_size=3).map(".".join), LEAVES, min_size=1, max_size=7)


def edit(tree, step, index):
    selector, verb, args = step
    chosen = pm.at(tree, selector)
    if index is not None and verb in ("zero", "fill", "add", "multiply", "noise"):
        chosen = chosen[index]
    return getattr(chosen, verb)(**args)


@pytest.mark.filterwarnings("ignore::paramend.errors.ValuesLost")
@given(TREES, st.lists(st.tuples(STEPS, INDEXES), min_size=1, max_size=4), st.integers(1, 9), st.booleans())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_engines_agree_on_any_plan(tmp_path, monkeypatch, tree, steps, chunk, sharded):
    monkeypatch.setattr(streaming, "CHUNK", chunk)
    source, out = tmp_path / "in", tmp_path / "out"
    for path in (source, out):
        remove(path)
    if sharded:
        write_model(source, tree, shards=min(2, len(tree)))
    else:
        safetensors.numpy.save_file(tree, source, metadata={"format": "pt"})
    memory = read(source)
    checkpoint = checkpoints.open(source)
    with np.errstate(all="ignore"):
        for step, index in steps:
            try:
                expected = edit(memory, step, index)
            except ParamendError as error:
                with pytest.raises(type(error)):
                    edit(checkpoint, step, index)
                continue
            memory, checkpoint = flat(expected), edit(checkpoint, step, index)
        assert bits(pm.at(checkpoint, "**").get() if len(checkpoint) else {}) == {
            path.replace("\\", ""): value for path, value in bits(memory).items()
        }
        report = checkpoint.save(out)
    assert bits(read(out)) == bits(memory)
    assert list(read(out)) == [checkpoint.plan.name(row) for row in checkpoint.plan.rows]
    assert set(report.plan.to_dict()) <= {"changed", "deleted", "kept"}
    if sharded:
        check_index(out)
        assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    else:
        safetensors.deserialize(out.read_bytes())
        with SafetensorsFile(out) as file:
            assert file.metadata == {"format": "pt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def flat(tree, above=""):
    """A file is a flat table of names; a dict whose keys hold no separator may grow dicts when they are renamed."""
    out = {}
    for name, leaf in tree.items():
        out |= flat(leaf, f"{above}{name}.") if isinstance(leaf, dict) else {above + name: leaf}
    return out


def remove(path):
    if path.is_dir():
        for inner in path.iterdir():
            inner.unlink()
        path.rmdir()
    elif path.exists():
        path.unlink()


def test_a_slice_of_a_stack_takes_no_memory_for_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK", 10)
    tree = {"w": np.arange(120, dtype="float32").reshape(6, 4, 5)}
    safetensors.numpy.save_file(tree, tmp_path / "in")
    largest = []
    read_range = SafetensorsFile.read_range

    def watch(self, number, start, stop):
        largest.append(stop - start)
        return read_range(self, number, start, stop)

    monkeypatch.setattr(SafetensorsFile, "read_range", watch)
    for name, index in [("a", -2), ("b", slice(1, 3)), ("c", np.int64(0))]:
        pm.at(checkpoints.open(tmp_path / "in"), "w")[index].noise(0.5, seed=1).save(tmp_path / name)
        assert bits(read(tmp_path / name)) == bits(pm.at(tree, "w")[index].noise(0.5, seed=1))
    assert max(largest) == 10
    pm.at(checkpoints.open(tmp_path / "in"), "w")[:, 0].zero().save(tmp_path / "d")
    assert bits(read(tmp_path / "d")) == bits(pm.at(tree, "w")[:, 0].zero())


def test_random_values_are_those_of_a_state_dict(tmp_path):
    state = {"fc.weight": torch.ones(6, 4), "conv.weight": torch.ones(3, 2, 5, 5).bfloat16()}
    safetensors.torch.save_file(state, tmp_path / "in")
    for verb, args in [("reinit", ("lecun_normal",)), ("noise", (0.5,))]:
        getattr(pm.at(checkpoints.open(tmp_path / "in"), "**"), verb)(*args, seed=4).save(tmp_path / verb)
        after, expected = safetensors.torch.load_file(tmp_path / verb), getattr(pm.at(state, "**"), verb)(*args, seed=4)
        assert all(torch.equal(after[name], expected[name]) for name in state)


def test_large_zeros_are_holes_that_read_as_zeros(tmp_path):
    tree = {"a": np.ones(1_000_000, "float32"), "b": np.ones(3, "float32"), "z": np.ones(2_000_000, "float32")}
    safetensors.numpy.save_file(tree, tmp_path / "in")
    report = pm.at(checkpoints.open(tmp_path / "in"), "{a,z}").zero().save(tmp_path / "out")
    after = safetensors.numpy.load_file(tmp_path / "out")
    assert not after["a"].any() and not after["z"].any() and after["b"].all()
    assert report.bytes_computed == 12_000_000
    assert (tmp_path / "out").stat().st_size == (tmp_path / "in").stat().st_size


# ---- directories -------------------------------------------------------------------------------------------------


def test_files_of_torch_read_back_by_torch(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    state = {f"h.{i}.w": torch.randn(4, 4).bfloat16() for i in range(4)} | {"e": torch.ones(3).to(torch.float8_e4m3fn)}
    weight_map = {}
    for i, names in enumerate([["h.0.w", "h.1.w"], ["h.2.w", "h.3.w", "e"]]):
        safetensors.torch.save_file(
            {n: state[n] for n in names}, folder / f"{i}.safetensors", metadata={"format": "pt"}
        )
        weight_map |= dict.fromkeys(names, f"{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    pm.at(pm.at(checkpoints.open(folder), "h[-1]/w").zero(), "h.<n>.w").rename("blocks.<n>.w").save(tmp_path / "out")
    after = {}
    for shard in sorted((tmp_path / "out").glob("*.safetensors")):
        after |= safetensors.torch.load_file(shard)
    assert set(after) == {"blocks.0.w", "blocks.1.w", "blocks.2.w", "blocks.3.w", "e"}
    assert not after["blocks.3.w"].any()
    assert all(torch.equal(after[f"blocks.{i}.w"], state[f"h.{i}.w"]) for i in range(3))
    assert torch.equal(after["e"].view(torch.uint8), state["e"].view(torch.uint8))
    check_index(tmp_path / "out")


@pytest.mark.parametrize("link", [False, True])
def test_untouched_shards_and_sidecars_come_along(model, tmp_path, link):
    os.utime(model / "config.json", (1, 1))
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text("pool")
    (model / ".git").mkdir()
    (model / "pytorch_model.bin").write_bytes(b"stale")
    (model / "consolidated.safetensors").write_bytes(b"stale")
    report = pm.at(checkpoints.open(model), "model.norm.weight").zero().save(tmp_path / "out", link=link)
    out = tmp_path / "out"
    for name in ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
        assert (out / name).samefile(model / name) == link
    assert not (out / "config.json").samefile(model / "config.json")
    assert (out / "model.safetensors.index.json").read_bytes() == (model / "model.safetensors.index.json").read_bytes()
    assert (out / "1_Pooling" / "config.json").read_text() == "pool"
    assert sorted(path.name for path in out.iterdir()) == sorted(
        {path.name for path in model.iterdir()} - {".git", "pytorch_model.bin", "consolidated.safetensors"}
    )
    assert report.left_out == ("consolidated.safetensors (other weights)", "pytorch_model.bin (other weights)")
    assert (report.bytes_linked > 0) == link
    assert "not copied: consolidated.safetensors" in str(report)


def test_symbolic_links_of_a_hub_cache_are_followed_and_others_are_not(model, tmp_path):
    home = tmp_path / "models--x"
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots" / "abc").mkdir(parents=True)
    for file in model.iterdir():
        file.rename(home / "blobs" / file.name)
        (home / "snapshots" / "abc" / file.name).symlink_to(Path("../../blobs") / file.name)
    (home / "snapshots" / "abc" / "secret.txt").symlink_to("/etc/hostname")
    report = pm.at(checkpoints.open(home / "snapshots" / "abc"), "**/bias").zero().save(tmp_path / "out", link=True)
    assert report.left_out == ("secret.txt (a symbolic link)",)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "config.json").is_file()


def test_the_index_stays_true(model, tmp_path):
    index = index_of(model) | {"note": "ü"}
    index["metadata"]["total_parameters"] = 5
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = pm.at(pm.at(checkpoints.open(model), "**/norm/weight").delete(), "**/weight").cast("float64")
    checkpoint.save(tmp_path / "out")
    check_index(tmp_path / "out")
    after = index_of(tmp_path / "out")
    assert after["note"] == "ü"
    assert after["metadata"]["total_parameters"] == 32 + 3 * 20
    pm.at(checkpoints.open(model), ["model.embed.*", "model.layers.0.**"]).delete().save(tmp_path / "less")
    check_index(tmp_path / "less")
    pm.at(checkpoints.open(model), pm.sel("**/layers/2/**") | "**/norm/*").delete().save(tmp_path / "least")
    assert not (tmp_path / "least" / "model-00003-of-00003.safetensors").exists()
    check_index(tmp_path / "least")


def test_without_an_index(model, tree, tmp_path):
    (model / "model.safetensors.index.json").unlink()
    pm.at(checkpoints.open(model), "**/bias").zero().save(tmp_path / "out")
    expected = pm.at(tree, "**/bias").zero()
    assert bits(read(tmp_path / "out")) == bits(expected)
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_several_files_become_one_and_other_sizes(model, tree, tmp_path):
    checkpoints.open(model).save(tmp_path / "one.safetensors")
    assert bits(read(tmp_path / "one.safetensors")) == bits(tree)
    report = checkpoints.open(model).save(tmp_path / "out", max_shard_size="150B")
    assert bits(read(tmp_path / "out")) == bits(tree)
    check_index(tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [shard.name for shard in shards] == [
        f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
    ]
    assert "config.json" in report.files
    checkpoints.open(tmp_path / "one.safetensors").save(f"{tmp_path}/folder/")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["model.safetensors"]
    with pytest.raises(BadArgument, match="is the name of a single file"):
        checkpoints.open(model).save(tmp_path / "x.safetensors", max_shard_size="5GB")


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("2 gib", 2 << 30), (7, 7), ("1.5k", 1500)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 parsecs", "1e9", "nan"])
def test_no_sizes(text):
    with pytest.raises(BadArgument, match="is not a size"):
        parse_size(text)


# ---- where a directory goes ------------------------------------------------------------------------------------------


def test_an_existing_directory_stays_without_force_and_is_exchanged_with_it(model, tmp_path):
    checkpoint = pm.at(checkpoints.open(model), "**/bias").zero()
    (tmp_path / "out").mkdir()
    with pytest.raises(CannotWrite, match="already exists"):
        checkpoint.save(tmp_path / "out")
    (tmp_path / "out" / "diary.txt").write_text("precious")
    with pytest.raises(CannotWrite, match="without a checkpoint, whose content would be lost"):
        checkpoint.save(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "diary.txt").read_text() == "precious"
    (tmp_path / "out" / "diary.txt").unlink()
    checkpoint.save(tmp_path / "out", force=True)
    checkpoints.open(model).save(tmp_path / "out", force=True)
    assert bits(read(tmp_path / "out")) == bits(read(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_without_an_exchange_of_names(model, tmp_path, monkeypatch):
    from paramend.disk import publishing

    monkeypatch.setattr(publishing, "_rename_at_once", lambda *args: False)
    pm.at(checkpoints.open(model), "**/bias").zero().save(tmp_path / "out")
    checkpoints.open(model).save(tmp_path / "out", force=True)
    assert bits(read(tmp_path / "out")) == bits(read(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    with pytest.raises(CannotWrite, match="already exists"):
        checkpoints.open(model).save(tmp_path / "late", progress=lambda event: (tmp_path / "late").mkdir(exist_ok=True))


def test_places_that_cannot_be(model, tmp_path):
    checkpoint = pm.at(checkpoints.open(model), "**/bias").zero()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(model)
    shard = model / "model-00001-of-00003.safetensors"
    for out, message in [
        (model, "is what is being read"),
        (tmp_path / "link", "is what is being read"),
        (tmp_path, "holds the checkpoint that is being read"),
        (tmp_path / "file", "is a file, but the model needs a directory"),
        (tmp_path / "no" / "out", "mkdir -p"),
        (shard, "is the file that is being read"),
    ]:
        with pytest.raises(CannotWrite, match=message):
            checkpoint.save(out, force=True)
    assert bits(read(model))["model.layers.0.up.bias"][2] != bytes(8)


def test_a_source_that_changes_meanwhile(model, tmp_path):
    shard = model / "model-00002-of-00003.safetensors"
    for touch in (
        lambda: os.utime(shard, (1, 1)),
        lambda: safetensors.numpy.save_file({"x": np.ones(3)}, shard),
        lambda: shard.unlink(),
    ):
        checkpoint = pm.at(checkpoints.open(model), "**/bias").add(1)
        raw = shard.read_bytes()
        touch()
        for link in (True, False):
            with pytest.raises((BadCheckpoint, OSError), match=r"changed it|[Nn]o such file"):
                checkpoint.save(tmp_path / "out", link=link)
        shard.write_bytes(raw)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_listener_that_raises_leaves_nothing(model, tmp_path):
    def stop(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pm.at(checkpoints.open(model), "**/bias").zero().save(tmp_path / "out", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_progress_counts_every_byte(model, tmp_path):
    heard = []
    pm.at(checkpoints.open(model), "**/bias").cast("float32").save(tmp_path / "out", progress=heard.append)
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert heard[-1].done == heard[-1].total == written


def test_two_writers_and_what_killed_ones_leave(model, tmp_path):
    checkpoint = pm.at(checkpoints.open(model), "**/bias").zero()

    def second(event):
        with pytest.raises(CannotWrite, match="another program is writing it"):
            checkpoint.save(tmp_path / "out")
        checkpoint.save(tmp_path / "other", force=True)

    checkpoint.save(tmp_path / "out", progress=second)
    left = [tmp_path / f"{name}dead.tmp" for name in prefixes(tmp_path, "out")]
    left[0].mkdir()
    (left[0] / "half").write_bytes(b"x")
    foreign = tmp_path / ".paramend-ffffffff-dead.tmp"
    foreign.mkdir()
    checkpoint.save(tmp_path / "out", force=True)
    assert not left[0].exists() and foreign.exists()


def prefixes(folder, name):
    import zlib

    return [f".paramend-{zlib.crc32(name.encode()):08x}-"]


def test_a_lock_that_the_file_system_lacks(model, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    pm.at(checkpoints.open(model), "**/bias").zero().save(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_many_shards_need_few_descriptors(tmp_path):
    resource = pytest.importorskip("resource")
    tree = {f"layers.{i}.w": np.full(3, i, "float32") for i in range(150)}
    write_model(tmp_path / "model", tree, shards=150)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 150, hard))
    try:
        checkpoint = checkpoints.open(tmp_path / "model")
        pm.at(checkpoint, "**").add(1).save(tmp_path / "out")
        pm.at(checkpoint, "layers.3.w").zero().save(tmp_path / "copy")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert read(tmp_path / "out")["layers.149.w"].tolist() == [150] * 3


# ---- old or new, never a third -----------------------------------------------------------------------------------

KILLED = """
import sys
import paramend as pm
from paramend.checkpoints import checkpoint as checkpoints
print("ready", flush=True)
for line in sys.stdin:
    value, out = line.split()
    pm.at(checkpoints.open(sys.argv[1]), "**/[1]/w").fill(float(value)).save(out, force=True)
"""


@pytest.mark.far
def test_killed_at_any_moment_a_directory_is_old_or_new(tmp_path):
    tree = {f"layers.{i}.w": np.full(500_000, i, "float32") for i in range(4)}
    source, out = write_model(tmp_path / "in", tree, shards=4), tmp_path / "out"
    states = {}
    for value in (1.0, 2.0):
        pm.at(checkpoints.open(source), "**/[1]/w").fill(value).save(out, force=True)
        states[value] = {path.name: path.read_bytes() for path in out.iterdir()}
    rng, seen = random.Random(0), set()
    for turn in range(12):
        value = float(turn % 2 + 1)
        worker = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(source)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        with worker:
            worker.stdout.readline()
            worker.stdin.write(f"{value} {out}\n")
            worker.stdin.flush()
            time.sleep(rng.random() * 0.05)
            worker.kill()
        now = {path.name: path.read_bytes() for path in out.iterdir()}
        assert now in states.values()
        seen.add(now == states[value])
    print(f"{len(seen)} outcomes")
    pm.at(checkpoints.open(source), "**/[1]/w").fill(1.0).save(out, force=True)  # what was left behind goes now
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


# ---- memory ------------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys
import paramend as pm
from paramend.checkpoints import checkpoint as checkpoints
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
edited = pm.at(checkpoints.open(sys.argv[1]), "big").multiply(0.5)
edited = pm.at(edited, "big")[-1:].noise(0.1)
pm.at(edited, "big").rename("bigger").save(sys.argv[2], force=True)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000)
"""


def test_memory_is_bounded_whatever_the_plan(tmp_path):
    header = write_header({"big": Spec((30, 2_000_000), "float32"), "rest": Spec((20_000_000,), "float32")})
    source = tmp_path / "in"
    source.write_bytes(header.to_bytes())
    os.truncate(source, header.nbytes + header.data_nbytes)  # sparse: it costs no disk
    command = [sys.executable, "-c", PEAK, str(source), str(tmp_path / "out")]
    grown = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 45  # numpy.random comes in too


# ---- whole trees -------------------------------------------------------------------------------------------------

TREE = {
    "params": {"Dense_0": {"kernel": np.ones((2, 3), ml_dtypes.bfloat16), "bias": np.zeros(3, "float32")}},
    "step": np.array(3, "int32"),
    "f8": {"x": np.ones(5, ml_dtypes.float8_e4m3fn), "empty": np.zeros((0, 2), "float16")},
}


def same(a, b):
    assert type(a) is type(b) or isinstance(a, np.ndarray)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return all(same(a[key], b[key]) for key in a)
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.mark.parametrize(
    "tree",
    [
        TREE,
        {"mlp/~/linear_0": {"w": np.ones(2)}, "b": np.ones(1)},
        {"model": {"fc.weight": np.ones(2)}, "epoch": np.array(1)},
        {"fc.weight": np.ones(2), "fc.bias": np.ones(1)},
        {"a/b.c": np.ones(2)},
        {"w": np.ones(1)},
    ],
)
def test_load_gives_back_what_save_took(tmp_path, tree):
    pm.save(tree, tmp_path / "x.safetensors")
    assert same(pm.load(tmp_path / "x.safetensors"), tree)
    safetensors.deserialize((tmp_path / "x.safetensors").read_bytes())
    pm.save(tree, tmp_path / "folder", max_shard_size="10B")
    assert same(pm.load(tmp_path / "folder"), tree)


def test_what_no_name_can_tell_is_refused(tmp_path):
    with pytest.raises(Unsupported, match="keys contain both separators"):
        pm.save({"a/b": {"c.d": np.ones(1)}}, tmp_path / "x.safetensors")
    safetensors.numpy.save_file({"a": np.ones(1), "a.b": np.ones(1)}, tmp_path / "m")
    with pytest.raises(Unsupported, match="nested=False"):
        pm.load(tmp_path / "m")
    assert set(pm.load(tmp_path / "m", nested=False)) == {"a", "a.b"}
    with pytest.raises(BadArgument, match='"torch"'):
        pm.load(tmp_path / "m", "pytorch")


def test_kinds_of_arrays(tmp_path):
    import jax
    import jax.numpy as jnp

    state = {"fc.weight": torch.randn(2, 3).bfloat16(), "e": torch.ones(3).to(torch.float8_e5m2)}
    pm.save(state, tmp_path / "x.safetensors")
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert torch.equal(file.get_tensor("fc.weight"), state["fc.weight"])
    after = pm.load(tmp_path / "x.safetensors", kind="torch", nested=False)
    assert {name: leaf.dtype for name, leaf in after.items()} == {name: leaf.dtype for name, leaf in state.items()}
    assert torch.equal(after["fc.weight"], state["fc.weight"])
    pm.save({"params": {"k": jnp.ones((2, 2), jnp.bfloat16)}}, tmp_path / "j.safetensors")
    loaded = pm.load(tmp_path / "j.safetensors", kind="jax")["params"]["k"]
    assert isinstance(loaded, jax.Array) and loaded.dtype == jnp.bfloat16
    safetensors.numpy.save_file({"n": np.array([2**40])}, tmp_path / "i")
    with pytest.raises(Unsupported, match="jax_enable_x64"):
        pm.load(tmp_path / "i", kind="jax")


def test_a_module_is_saved_as_its_state_dict(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    pm.save(module, tmp_path / "m.safetensors")
    module.load_state_dict(safetensors.torch.load_file(tmp_path / "m.safetensors"))


# ---- the command line --------------------------------------------------------------------------------------------


def test_every_verb_takes_a_directory(model, tmp_path):
    assert "8 leaves" in run("show", model).stdout
    data = json.loads(run("show", model, "--json").stdout)
    assert (data["format"], data["count"], data["metadata"]) == ("safetensors", 8, {"format": "pt"})
    for i, args in enumerate(
        [["zero"], ["fill", "1"], ["scale", "2"], ["noise", "1"], ["cast", "float32"], ["delete"]]
    ):
        done = run(args[0], model, "**/bias", *args[1:], "-o", tmp_path / f"out{i}", "--link")
        assert done.exit_code == 0, done.output
        check_index(tmp_path / f"out{i}")
    done = run("rename", model, "model.layers.<n>.**", "model.h.<n+1>.**", "-o", tmp_path / "renamed")
    assert done.exit_code == 0, done.output
    assert "model.h.3.up.bias    float16[4]     renamed from model.layers.2.up.bias" in done.stdout
    assert "model.h.1.up.weight" in read(tmp_path / "renamed")
    dry = run("delete", model, "**/bias", "--dry-run", "--json")
    assert len(json.loads(dry.stdout)["deleted"]) == 3
    assert run("rename", model, "**/bias", "x", "--dry-run").exit_code == 2


def test_show_what_is_no_tensor(tmp_path):
    state = {"w": torch.ones(2), "epoch": 3, "note": "x" * 500} | {f"k{i}": (i, None) for i in range(40)}
    torch.save(state, tmp_path / "x.pt")
    text = run("show", tmp_path / "x.pt").stdout
    assert "epoch=3" in text and "xxx..." in text and " more\n" in text
    data = json.loads(run("show", tmp_path / "x.pt", "--json").stdout)
    assert (data["format"], data["metadata"]["epoch"]) == ("torch", 3)


def test_convert(model, tree, tmp_path):
    done = run("convert", model, tmp_path / "one.safetensors")
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr.startswith("wrote ")
    assert bits(read(tmp_path / "one.safetensors")) == bits(tree)
    assert run("convert", tmp_path / "one.safetensors", tmp_path / "many", "--max-shard-size", "100B").exit_code == 0
    check_index(tmp_path / "many")
    data = json.loads(run("convert", model, f"{tmp_path}/again/", "--dry-run", "--json").stdout)
    assert data["kept"] == 8 and not (tmp_path / "again").exists()
    assert run("convert", model, tmp_path / "one.safetensors").exit_code == 2
    assert "is not a size" in run("convert", model, tmp_path / "x", "--max-shard-size", "much").stderr


def test_convert_to_torch_and_back(model, tree, tmp_path):
    done = run("convert", model, tmp_path / "one.pt")
    assert done.exit_code == 0, done.output
    state = torch.load(tmp_path / "one.pt", weights_only=True)
    assert torch.equal(state["model.norm.weight"], torch.ones(4))
    assert run("convert", tmp_path / "one.pt", tmp_path / "back.safetensors").exit_code == 0
    assert bits(read(tmp_path / "back.safetensors")) == bits(tree)


# ---- files of torch ----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    weight = torch.randn(6, 4)
    state = {"model": {"fc.weight": weight, "tied": weight, "big": torch.ones(400_000)}, "epoch": 7, "lr": [0.1]}
    torch.save(state, tmp_path / "x.pt")
    return tmp_path / "x.pt", state


def test_a_torch_file_keeps_all_that_is_no_tensor(saved, tmp_path):
    path, state = saved
    edited = pm.at(checkpoints.open(path), "model.fc.weight")[0].multiply(0.5)
    report = pm.at(edited, "**/big").zero().save(tmp_path / "out.pt")
    after = torch.load(tmp_path / "out.pt", weights_only=True)  # checks the checksums
    assert (after["epoch"], after["lr"]) == (7, [0.1])
    assert torch.equal(after["model"]["fc.weight"][0], state["model"]["fc.weight"][0] * 0.5)
    assert torch.equal(after["model"]["fc.weight"][1:], state["model"]["fc.weight"][1:])
    assert after["model"]["tied"].data_ptr() == after["model"]["fc.weight"].data_ptr()
    assert not after["model"]["big"].any()
    assert report.bytes_copied + report.bytes_computed == path.stat().st_size
    import zipfile

    assert zipfile.ZipFile(tmp_path / "out.pt").testzip() is None


def test_what_a_new_file_cannot_hold_is_named(saved, tmp_path):
    path, _ = saved
    report = pm.at(checkpoints.open(path), "**/big").delete().save(tmp_path / "out.safetensors")
    assert "epoch (not a tensor)" in report.left_out
    assert "epoch (not a tensor)" in report.to_dict()["left_out"]
    assert checkpoints.open(tmp_path / "out.safetensors")["model.fc.weight"].shape == (6, 4)


def test_a_directory_of_torch_shards(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    weight_map = {}
    for i in range(2):
        torch.save({f"h.{i}.w": torch.full((3,), float(i + 1))}, folder / f"pytorch_model-{i}.bin")
        weight_map[f"h.{i}.w"] = f"pytorch_model-{i}.bin"
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    pm.at(checkpoints.open(folder), "h[-1]/w").zero().save(tmp_path / "out", link=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in folder.iterdir())
    assert (tmp_path / "out" / "pytorch_model-0.bin").samefile(folder / "pytorch_model-0.bin")
    assert torch.load(tmp_path / "out" / "pytorch_model-1.bin")["h.1.w"].tolist() == [0, 0, 0]
    pm.at(checkpoints.open(folder), "h.<n>.w").rename("x.<n>.w").save(tmp_path / "renamed", max_shard_size="1GB")
    assert read(tmp_path / "renamed")["x.1.w"].tolist() == [2, 2, 2]
    assert (tmp_path / "renamed" / "config.json").exists()


# ---- files of numpy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [np.savez, np.savez_compressed])
def test_files_of_numpy(tmp_path, pack):
    tree = {"fc/kernel": np.ones((3, 2), "float32"), "fc/bias": np.arange(3.0)}
    pack(tmp_path / "x.npz", **tree)
    pm.at(checkpoints.open(tmp_path / "x.npz"), "fc/bias").multiply(2).save(tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as file:
        after = dict(file)
    assert after["fc/bias"].tolist() == [0, 2, 4] and after["fc/kernel"].tolist() == tree["fc/kernel"].tolist()
    pm.at(checkpoints.open(tmp_path / "x.npz"), "fc/*").rename("head/*").save(tmp_path / "moved.npz")
    assert set(np.load(tmp_path / "moved.npz")) == {"head/kernel", "head/bias"}
    checkpoints.open(tmp_path / "out.npz").save(tmp_path / "y.safetensors")
    assert safetensors.numpy.load_file(tmp_path / "y.safetensors")["fc/bias"].tolist() == [0, 2, 4]
    nested = {"a": {"kernel": np.ones((2, 3), "float16"), "bias": np.zeros(3, "float32")}, "step": np.array(3)}
    pm.save(nested, tmp_path / "n.npz")
    assert same(pm.load(tmp_path / "n.npz"), nested)


def test_files_of_flax(tmp_path):
    serialization = pytest.importorskip("flax.serialization")
    tree = {"params": {"kernel": np.ones((3, 2), "float32"), "bias": np.arange(3.0)}, "step": 5}
    (tmp_path / "x.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    checkpoint = checkpoints.open(tmp_path / "x.msgpack")
    pm.at(checkpoint, "**/bias").multiply(2).save(tmp_path / "out.msgpack")
    after = serialization.msgpack_restore((tmp_path / "out.msgpack").read_bytes())
    assert after["params"]["bias"].tolist() == [0, 2, 4] and after["step"] == 5
    report = checkpoint.save(tmp_path / "y.safetensors")
    assert report.left_out == ("step (not a tensor)",)
    assert same(pm.load(tmp_path / "y.safetensors"), {"params": tree["params"]})


def test_what_a_format_cannot_hold_is_said_before_writing(model, tmp_path):
    np.savez(tmp_path / "x.npz", w=np.ones(2, "complex128"))
    with pytest.raises(Unsupported, match="w cannot be written: safetensors files cannot hold complex128"):
        checkpoints.open(tmp_path / "x.npz").save(tmp_path / "y.safetensors")
    with pytest.raises(
        Unsupported, match=r"y\.onnx: \.onnx files cannot be written\n\nhint: a name that ends in \.safet"
    ):
        checkpoints.open(tmp_path / "x.npz").save(tmp_path / "y.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "x.npz"]
