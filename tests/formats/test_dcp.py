"""Distributed checkpoints of torch: read, edited in place and written; torch loads them on any mesh."""

import contextlib
import io
import json
import pickle
import random
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import torch

import paramend as pm
from paramend.errors import BadCheckpoint, ParamendError, RenameClash, Unsupported
from paramend.formats.dcp import writer
from paramend.formats.dcp.metadata import metadata_bytes, moved_path, read_manifest
from paramend.formats.files import OpenFile
from support import distributed
from support.damaging import of_bytes
from support.killing import content


@pytest.fixture
def folder(tmp_path):
    return distributed.write(tmp_path / "step")


WHOLE = {name: tensor for name, (tensor, _) in distributed.tensors().items()}


def check(path, expected):
    """The leaves of a checkpoint are these tensors."""
    with pm.open(path) as checkpoint:
        assert set(checkpoint.paths) == set(expected)
        for name, tensor in expected.items():
            found = checkpoint[name]
            assert list(found.shape) == list(tensor.shape)
            assert str(found.dtype) == str(tensor.dtype).removeprefix("torch.")
            assert found.astype("float64").tolist() == tensor.double().tolist(), name


def nested(state):
    """The tensors of a nested state, by joined names."""
    found = {}
    for key, value in state.items():
        inner = nested(value) if isinstance(value, dict) else {"": value}
        found |= {f"{key}.{name}".rstrip("."): each for name, each in inner.items() if isinstance(each, torch.Tensor)}
    return found


# ---- reading -------------------------------------------------------------------------------------------------------


def test_a_leaf_is_its_global_array(folder):
    check(folder, WHOLE)


def test_a_part_of_a_leaf_is_read_across_chunks(folder):
    with pm.open(folder) as checkpoint:
        source = checkpoint.source
        number = next(n for n in source.index.numbers if source.index.path(n) == "model.grid")
        assert source.read_range(number, 4, 15).tolist() == list(range(4, 15))
        assert source.read_box(number, (slice(1, 3), slice(2, 5))).tolist() == [[8, 9, 10], [14, 15, 16]]


def test_what_is_not_a_tensor_is_shown_and_not_read(folder):
    with pm.open(folder) as checkpoint:
        assert set(checkpoint.source.metadata) == set(distributed.OBJECTS)
        assert "bytes, not read>" in repr(checkpoint.source.metadata["app.epoch"])


def test_chunks_that_several_ranks_wrote_alike_are_one(tmp_path):
    boxes = [((0,), (4,)), ((0,), (4,))]
    path = distributed.write(tmp_path / "x", {"w": (torch.arange(4.0), boxes)}, {})
    check(path, {"w": torch.arange(4.0)})


def test_a_transposed_chunk_is_read_in_order(tmp_path):
    path = distributed.write(tmp_path / "x", {"w": (torch.arange(6.0).reshape(2, 3).T, None)}, {})
    raw = (path / "__0_0.distcp").read_bytes()
    assert zipfile.ZipFile(io.BytesIO(raw)).read("archive/data/0") == np.arange(6, dtype="float32").tobytes()
    check(path, {"w": torch.arange(6.0).reshape(2, 3).T})
    with pytest.raises(Unsupported, match="are not contiguous"):
        pm.patch(path, lambda t: pm.at(t, "w").multiply(2))


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([((0, 0), (2, 4)), ((1, 0), (5, 4))], r"chunks \[0:2, 0:4\] of __0_0.distcp and \[1:6, 0:4\] of __1_0"),
        ([((0, 0), (3, 4)), ((4, 0), (2, 4))], r"no chunk holds its element at \[3, 0\]"),
        ([((0, 0), (3, 4))], r"no chunk holds its element at \[3, 0\]"),
        ([((0, 0), (6, 2))], r"no chunk holds its element at \[0, 2\]"),
    ],
)
def test_chunks_that_overlap_or_are_missing_are_named(boxes, message, tmp_path):
    path = distributed.write(tmp_path / "x", {"model.w": (torch.zeros(6, 4), boxes)}, {})
    with pytest.raises(BadCheckpoint, match=message) as caught:
        pm.open(path)
    assert "model.w" in str(caught.value)


def test_chunks_of_no_cuts_say_so(tmp_path):
    wheel = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    path = distributed.write(tmp_path / "x", {"w": (torch.zeros(3, 3), wheel)}, {})
    with pytest.raises(Unsupported, match="do not result from cuts along its axes"):
        pm.open(path)


def test_files_that_are_missing_or_short_are_named(folder):
    file = folder / "__1_0.distcp"
    raw = file.read_bytes()
    file.write_bytes(raw[:-1])
    with pytest.raises(BadCheckpoint, match=r"__1_0.distcp: it has .* bytes, and .* would be at"):
        pm.open(folder)
    file.unlink()
    with pytest.raises(BadCheckpoint, match=r"1 file is missing: __1_0.distcp"):
        pm.open(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(BadCheckpoint, match=r"\.metadata is missing: the checkpoint was not finished"):
        pm.open(folder)


def test_an_item_that_is_another_tensor_says_so(folder):
    first, second = (folder / f"__{n}_0.distcp" for n in (0, 1))
    raw = first.read_bytes()
    name = raw.index(b"archive/data/0")
    torch_file = io.BytesIO()
    torch.save(torch.zeros(4, 4), torch_file)
    start = raw.index(b"PK\x03\x04")
    assert start == 0 < name < len(torch_file.getvalue())
    first.write_bytes(torch_file.getvalue() + raw[len(torch_file.getvalue()) :])
    assert second.exists()
    with pm.open(folder) as checkpoint, pytest.raises(BadCheckpoint):
        checkpoint["model.rows.weight"]


def test_extensions_are_refused_by_name_and_the_rest_is_read(tmp_path):
    def change(metadata):
        index = next(index for index in metadata.storage_data if index.fqn == "model.half")
        metadata.storage_data[index].transform_descriptors = ["stream.zstd"]

    path = distributed.write(tmp_path / "x", change=change)
    with pm.open(path) as checkpoint:
        assert checkpoint["model.scalar"].item() == 2.5
        with pytest.raises(Unsupported, match=r"went through an extension, stream\.zstd"):
            checkpoint["model.half"]
    pm.patch(path, lambda t: pm.at(t, "model.half").rename("model.other"))
    index = pickle.loads((path / ".metadata").read_bytes()).storage_data
    assert [info.transform_descriptors for each, info in index.items() if each.fqn == "model.other"] == [
        ["stream.zstd"]
    ]


def test_an_open_checkpoint_is_pickled_without_its_weights(folder):
    with pm.open(folder) as checkpoint:
        again = pickle.loads(pickle.dumps(checkpoint))
        assert again["model.cols.weight"].tolist() == WHOLE["model.cols.weight"].tolist()
        assert len(pickle.dumps(checkpoint)) < 100_000


def test_parts_of_a_checkpoint_lead_to_it(folder, tmp_path):
    for name in (".metadata", "__0_0.distcp"):
        with pytest.raises(BadCheckpoint, match="it is a part of a distributed checkpoint") as caught:
            pm.open(folder / name)
        assert str(folder) in caught.value.hint
    with pytest.raises(BadCheckpoint, match="a directory without a checkpoint") as caught:
        pm.open(tmp_path)
    assert caught.value.hint == str(folder)


# ---- damage --------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit(99)",)


def test_nothing_in_the_metadata_runs(folder):
    for thing in (Evil(), random.Random, subprocess.run):
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        metadata.planner_data = {"x": thing}
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(BadCheckpoint, match=r"is not among the names that \.metadata may hold"):
            pm.open(folder)
        distributed.write(folder.parent / "again")
        shutil.copy(folder.parent / "again" / ".metadata", folder)
        shutil.rmtree(folder.parent / "again")


@pytest.mark.parametrize(
    "file", ["../x.distcp", "/etc/passwd", "a/../../x", "", ".", "a//b", "x\0y", "..\\x"], ids=repr
)
def test_files_outside_the_folder_are_refused(file, tmp_path):
    def change(metadata):
        next(iter(metadata.storage_data.values())).relative_path = file

    with pytest.raises(BadCheckpoint, match="which is no name within the checkpoint"):
        pm.open(distributed.write(tmp_path / "x", change=change))


def _set(path, value):
    def change(metadata):
        *above, last = path
        for key in above:
            metadata = (
                metadata[key]
                if isinstance(key, str | int) and not hasattr(metadata, str(key))
                else getattr(metadata, key)
            )
        if isinstance(metadata, dict):
            metadata[last] = value
        else:
            setattr(metadata, last, value)

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["state_dict_metadata"], [], "state_dict_metadata is list, not a dict"),
        (["storage_data"], None, "storage_data is NoneType"),
        (["storage_data"], {}, "storage_data does not say where"),
        (["state_dict_metadata", "model.half", "size"], torch.Size([4, 1]), "2 axes"),
        (["state_dict_metadata", "model.half", "size"], torch.Size([1 << 61]), "overflows 64 bits"),
        (["state_dict_metadata", "model.half", "size"], (-1,), "whole numbers"),
        (["state_dict_metadata", "model.half", "chunks"], None, "no list of chunks"),
        (["state_dict_metadata", "model.half", "chunks"], [3], "ChunkStorageMetadata is expected, not int"),
        (["state_dict_metadata", "model.half", "properties"], 3, "TensorProperties is expected"),
        (["state_dict_metadata", 3], 4, "a key that is not text"),
        (["state_dict_metadata", "a." * 250], 4, "more than 200 pieces"),
        (["state_dict_metadata", "x"], 4, "TensorStorageMetadata is expected, not int"),
    ],
    ids=str,
)
def test_metadata_that_says_something_else_is_refused(path, value, message, tmp_path):
    with pytest.raises(BadCheckpoint, match=message):
        pm.open(distributed.write(tmp_path / "x", change=_set(path, value)))


def shared(depth):
    """A value that would be as large as 2 to the power of its depth if it were written out."""
    found = ()
    for _ in range(depth):
        found = found, found
    return found


@pytest.mark.parametrize("offset", [([],), shared(60)], ids=["list", "shared"])
def test_offsets_are_looked_at_before_they_are_keys(offset, tmp_path):
    def change(metadata):
        (index,) = (each for each in metadata.storage_data if each.fqn == "model.half")
        object.__setattr__(index, "offset", offset)

    with pytest.raises(BadCheckpoint, match="offsets must be whole numbers"):
        pm.open(distributed.write(tmp_path / "x", change=change))


def test_what_is_carried_is_written_once_however_often_it_is_there(tmp_path):
    folder = distributed.write(tmp_path / "x", change=_set(["storage_meta"], shared(60)))
    pm.patch(folder, lambda tree: pm.at(tree, "model.half").rename("model.h"))
    found = pickle.loads((folder / ".metadata").read_bytes())
    assert found.storage_meta[0] is found.storage_meta[1] and len((folder / ".metadata").read_bytes()) < 10_000


def damaged(folder, count, seed):
    raw, rng = (folder / ".metadata").read_bytes(), random.Random(seed)
    for _ in range(count):
        (folder / ".metadata").write_bytes(of_bytes(rng, raw))
        try:
            with pm.open(folder) as checkpoint:
                for path in checkpoint.paths:
                    checkpoint[path]
        except ParamendError:
            pass


def test_damaged_metadata_gives_errors_of_our_own(folder):
    damaged(folder, 200, 0)


# ---- in place ------------------------------------------------------------------------------------------------------


EDITS = {
    "scale": (lambda t: pm.at(t, "model.*.weight").multiply(2), lambda n, x: x * 2 if n.endswith("s.weight") else x),
    "all": (lambda t: pm.at(t, "**").zero(), lambda n, x: x * 0),
    "slice": (
        lambda t: pm.at(t, "model.grid")[1:3, 2:4].fill(9),
        lambda n, x: torch.from_numpy(_filled(x.numpy())) if n == "model.grid" else x,
    ),
    "flipped": (
        lambda t: pm.at(t, "model.grid").set(np.ascontiguousarray(WHOLE["model.grid"].numpy()[:, ::-1])),
        lambda n, x: x.flip(1) if n == "model.grid" else x,
    ),
    "function": (
        lambda t: pm.at(t, "model.cols.weight").apply(lambda x: x - x.mean()),
        lambda n, x: x - 9.5 if n == "model.cols.weight" else x,
    ),
}


def _filled(x):
    x = x.copy()
    x[1:3, 2:4] = 9
    return x


@pytest.mark.parametrize("kind", EDITS)
def test_values_change_within_chunks_and_undo_puts_them_back(kind, folder, tmp_path):
    edit, expected = EDITS[kind]
    before = content(folder)
    pm.patch(folder, edit)
    check(folder, {name: expected(name, tensor) for name, tensor in WHOLE.items()})
    for name, tensor in nested(distributed.loaded(folder, tmp_path)).items():
        assert torch.equal(tensor, expected(name, WHOLE[name])), name
    for file in folder.glob("*.distcp"):
        raw = file.read_bytes()
        for info in pickle.loads((folder / ".metadata").read_bytes()).storage_data.values():
            if info.relative_path == file.name:
                piece = io.BytesIO(raw[info.offset : info.offset + info.length])
                assert zipfile.ZipFile(piece).testzip() is None
    assert pm.undo(folder).left == 0
    assert content(folder) == before


def test_only_the_bytes_of_a_slice_are_written(folder):
    report = pm.patch(folder, lambda t: pm.at(t, "model.grid")[1:3, 2:4].fill(9))
    assert report.bytes_written == 4 * 2 + 4 * 18  # an element of each chunk, and its checksum in three places


def test_leaves_get_other_names_or_go_by_metadata_alone(folder, tmp_path):
    before = content(folder)
    files = {file: file.read_bytes() for file in folder.glob("*.distcp")}
    pm.patch(folder, lambda t: pm.at(pm.at(t, "model.rows.weight").rename("model.new.weight"), "optim.**").delete())
    assert files == {file: file.read_bytes() for file in folder.glob("*.distcp")}
    found = distributed.loaded(folder, tmp_path)
    assert torch.equal(found["model"]["new.weight"], WHOLE["model.rows.weight"])
    assert found["optim"] == {"param_groups": [{"lr": 0.1}]}
    assert found["app"] == {"epoch": 3}
    pm.patch(folder, lambda t: pm.at(pm.at(t, "model.half").rename("model.whole"), "model.scalar").fill(1))
    assert distributed.loaded(folder, tmp_path)["model"]["scalar"] == 1
    assert [pm.undo(folder).left for _ in range(2)] == [1, 0]
    assert content(folder) == before


def test_a_name_of_an_object_is_taken(folder):
    before = content(folder)
    with pytest.raises(RenameClash, match=r"app\.epoch"):
        pm.patch(folder, lambda t: pm.at(t, "model.half").rename("app.epoch"))
    with pytest.raises(Unsupported, match="shape and dtype cannot change in place"):
        pm.patch(folder, lambda t: pm.at(t, "model.half").cast("float32"))
    assert content(folder) == before


def test_a_dry_run_writes_nothing(folder):
    before = content(folder)
    report = pm.patch(
        folder, lambda t: pm.at(pm.at(t, "model.cols.weight").multiply(2), "model.half").delete(), dry_run=True
    )
    assert report.dry_run
    assert content(folder) == before


@pytest.mark.parametrize("stop", [1, 4, 9, 14, 20, 30])
def test_a_patch_that_dies_is_taken_back(stop, folder, monkeypatch):
    from support.crashing import Crash, Machine

    def edit(t):
        return pm.at(pm.at(t, "model.*.weight").multiply(2), "model.half").rename("model.other")

    before = content(folder)
    twin = folder.with_name("twin")
    shutil.copytree(folder, twin)
    pm.patch(twin, edit)
    with monkeypatch.context() as patched:
        Machine(patched, stop)
        with contextlib.suppress(Crash):
            pm.patch(folder, edit)
    with pm.open(folder):
        pass
    assert content(folder) in (before, content(twin))


# ---- written -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz", ".msgpack"])
def test_conversion_there_and_back_keeps_all_tensors(suffix, folder, tmp_path):
    pm.open(folder).save(tmp_path / f"x{suffix}") if suffix != ".npz" else pm.save(
        {n: t.float().numpy() for n, t in WHOLE.items()}, tmp_path / "x.npz"
    )
    pm.open(tmp_path / f"x{suffix}").save(tmp_path / "back.dcp")
    with pm.open(tmp_path / f"x{suffix}") as one, pm.open(tmp_path / "back.dcp") as other:
        assert [p.replace("/", ".") for p in one.paths] == [p.replace("/", ".") for p in other.paths]
        assert all(
            (a == b).all()
            for a, b in zip(map(one.__getitem__, one.paths), map(other.__getitem__, other.paths), strict=True)
        )
    assert nested(distributed.loaded(tmp_path / "back.dcp", tmp_path)).keys() == {
        n.replace("/", ".") for n in one.paths
    }


def test_a_new_dtype_takes_a_new_checkpoint_and_keeps_the_objects(folder, tmp_path):
    (folder / "common.pt").write_bytes(b"something")
    report = pm.at(pm.open(folder), "model.*.weight").cast("bfloat16").save(tmp_path / "half.dcp")
    assert "common.pt" in report.files
    found = distributed.loaded(tmp_path / "half.dcp", tmp_path)
    assert found["model"]["cols.weight"].dtype == torch.bfloat16
    assert torch.equal(found["model"]["grid"], WHOLE["model.grid"])
    assert found["optim"]["param_groups"] == [{"lr": 0.1}]
    assert found["app"] == {"epoch": 3}


def test_renamed_and_deleted_leaves_take_links_and_another_metadata(folder, tmp_path):
    made = pm.at(pm.at(pm.open(folder), "model.grid").delete(), "model.half").rename("model.whole")
    report = made.save(tmp_path / "x.dcp", link=True)
    assert report.bytes_linked == sum(file.stat().st_size for file in folder.glob("*.distcp") if file.name < "__2")
    assert sorted(report.files) == [".metadata", "__0_0.distcp", "__1_0.distcp"]  # nothing but the grid was elsewhere
    assert (tmp_path / "x.dcp" / "__0_0.distcp").samefile(folder / "__0_0.distcp")
    found = distributed.loaded(tmp_path / "x.dcp", tmp_path)["model"]
    assert "grid" not in found
    assert torch.equal(found["whole"], WHOLE["model.half"])


def test_a_tree_in_memory_is_written_as_torch_nests_it(tmp_path):
    tree = {
        "model": {"fc": {"weight": np.arange(6.0).reshape(2, 3)}},
        "groups": [{"m": np.ones(2)}, {"m": np.zeros(2)}],
    }
    pm.save(tree, tmp_path / "x.dcp")
    found = distributed.loaded(tmp_path / "x.dcp", tmp_path)
    assert found["model"]["fc"]["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert [group["m"].tolist() for group in found["groups"]] == [[1, 1], [0, 0]]
    check(
        tmp_path / "x.dcp",
        nested({"model.fc.weight": found["model"]["fc"]["weight"]})
        | {"groups.0.m": torch.ones(2, dtype=torch.float64), "groups.1.m": torch.zeros(2, dtype=torch.float64)},
    )


def test_large_leaves_are_cut_into_chunks_and_files(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "MAX_CHUNK", 40)
    monkeypatch.setattr(writer, "MAX_FILE", 2000)
    tree = {"w": np.arange(60, dtype="float32").reshape(15, 4), "v": np.arange(3, dtype="uint8"), "s": np.float64(1)}
    pm.save(tree, tmp_path / "x.dcp")
    assert len(list((tmp_path / "x.dcp").glob("*.distcp"))) > 3
    check(tmp_path / "x.dcp", {name: torch.from_numpy(np.asarray(array)) for name, array in tree.items()})
    found = distributed.loaded(tmp_path / "x.dcp", tmp_path)
    assert all(found[name].tolist() == array.tolist() for name, array in tree.items())


def test_metadata_written_again_says_the_same(folder):
    manifest = read_manifest(OpenFile(folder / ".metadata"))
    (folder / ".metadata").write_bytes(metadata_bytes(manifest))
    again = read_manifest(OpenFile(folder / ".metadata"))
    assert {n: (e.spec, e.chunks) for n, e in again.tensors.items()} == {
        n: (e.spec, e.chunks) for n, e in manifest.tensors.items()
    }
    assert (again.objects, again.paths) == (manifest.objects, manifest.paths)
    torch_sees = pickle.loads((folder / ".metadata").read_bytes())
    assert torch_sees.storage_meta.save_id == "an id"
    assert str(torch_sees.storage_meta.checkpoint_id) == str(folder)


def test_the_keys_of_a_new_name_are_cut_as_the_old_ones_are():
    assert moved_path(("groups", 0, "m"), "groups.x.m") == ("groups", "x", "m")
    assert moved_path(("a", "b"), "c") == ("c",)


# ---- Hugging Face's shards -----------------------------------------------------------------------------------------


def shards(folder, **more):
    folder.mkdir()
    whole = np.arange(24, dtype="float32").reshape(6, 4)
    for rank in (1, 2):
        info = {"w": {"saved_offsets": [3 * rank - 3, 0], **more}, "v": {"saved_offsets": [0, 2 * rank - 2]}}
        parts = {"w": whole[3 * rank - 3 : 3 * rank], "v": np.ascontiguousarray(whole[:, 2 * rank - 2 : 2 * rank])}
        metadata = {"DCP_SHARDING_INFO": json.dumps(info), "DCP_VERSION": "1.0", "format": "pt"}
        name = f"shard-{rank:05}-model-00001-of-00001.safetensors"
        safetensors.numpy.save_file(parts, folder / name, metadata)
    return folder, {"w": whole, "v": whole}


def test_shards_of_hugging_face_are_one_model_of_whole_tensors(tmp_path):
    folder, whole = shards(tmp_path / "x")
    check(folder, {name: torch.from_numpy(array) for name, array in whole.items()})
    (folder / "config.json").write_text("{}")
    pm.open(folder).save(tmp_path / "plain")
    assert (tmp_path / "plain" / "config.json").read_text() == "{}"
    pm.at(pm.open(folder), "w").rename("u").save(tmp_path / "one.safetensors")
    assert (safetensors.numpy.load_file(tmp_path / "one.safetensors")["u"] == whole["w"]).all()
    found = safetensors.numpy.load_file(tmp_path / "plain" / "model.safetensors")
    assert all((found[name] == array).all() for name, array in whole.items())
    before = content(folder)
    pm.patch(folder, lambda t: pm.at(t, "**").multiply(2))
    check(folder, {name: torch.from_numpy(array) * 2 for name, array in whole.items()})
    pm.undo(folder)
    assert content(folder) == before


def test_shards_that_are_missing_are_named(tmp_path):
    folder, _ = shards(tmp_path / "x", shape=[6, 4])
    last = folder / "shard-00002-model-00001-of-00001.safetensors"
    raw = last.read_bytes()
    last.unlink()
    with pytest.raises(BadCheckpoint, match=r"w: no chunk holds its element at \[3, 0\]"):
        pm.open(folder)
    last.write_bytes(raw)
    (folder / "shard-00001-model-00001-of-00001.safetensors").unlink()
    last.rename(folder / "shard-999999999-model-00001-of-00001.safetensors")  # which takes no time to refuse
    with pytest.raises(BadCheckpoint, match="no file is named shard-00001"):
        pm.open(folder)


# ---- several processes, and large files ----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks") / "step"
    distributed.in_ranks("save_spread", 2, folder)
    return folder


KEPT = ("rows.weight", "cols.weight", "uneven", "one", "shared", "plain")


@pytest.mark.far
@pytest.mark.slow
def test_another_mesh_loads_what_was_edited(saved, tmp_path):
    folder = tmp_path / "step"
    shutil.copytree(saved, folder)
    with pm.open(folder) as checkpoint:
        expected = nested(distributed.loaded(folder, tmp_path))
        assert {n: a.astype("float64").tolist() for n, a in ((p, checkpoint[p]) for p in checkpoint.paths)} == {
            name: tensor.double().tolist() for name, tensor in expected.items()
        }
    pm.patch(folder, lambda t: pm.at(t, "model.**").multiply(2))
    pm.patch(folder, lambda t: pm.at(pm.at(t, "model.cols.weight").rename("model.c.weight"), "optim.**").delete())
    names = {name: "c.weight" if name == "cols.weight" else name for name in KEPT}
    pm.open(folder).save(tmp_path / "x.safetensors")
    pm.open(tmp_path / "x.safetensors").save(tmp_path / "back.dcp")
    pm.at(pm.open(folder), "model.**").multiply(2).save(tmp_path / "new.dcp")
    for count in (1, 2):
        distributed.in_ranks("check_spread", count, tmp_path, names, {"step": 2, "new.dcp": 4})
    assert distributed.loaded(tmp_path / "back.dcp", tmp_path).keys() >= {"model.c.weight"}
    assert pm.undo(folder).left == 1
    pm.undo(folder)
    assert content(folder) == content(saved)


@pytest.mark.slow
def test_what_hugging_faces_writer_saves_is_one_model(tmp_path):
    folder = tmp_path / "hf"
    distributed.in_ranks("save_hugging_face", 2, folder)
    with pm.open(folder) as checkpoint:
        assert checkpoint["rows.weight"].tolist() == torch.arange(24.0).reshape(6, 4).tolist()
        assert checkpoint["cols.weight"].tolist() == torch.arange(20.0).reshape(4, 5).tolist()
        assert checkpoint["shared"].astype("float32").tolist() == [0, 1, 2, 3]


MEASURED = """
import pathlib, re, sys, paramend as pm
_, source, out, how = sys.argv
def double(tree):
    return pm.at(tree, "**").multiply(2)
if how == "patch":
    pm.patch(source, double)
else:
    with pm.open(source) as checkpoint:
        (double(checkpoint) if how == "edit" else checkpoint).save(out)
print(int(re.search("VmHWM: *\\t* *([0-9]+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1000)
"""


@pytest.mark.far
@pytest.mark.slow
def test_a_gigabyte_takes_little_memory(tmp_path):
    rows = [((n * 4096, 0), (4096, 8192)) for n in range(4)]
    columns = [((0, n * 2048), (16384, 2048)) for n in range(4)]
    whole = torch.arange(16384 * 8192, dtype=torch.float32).reshape(16384, 8192)
    path = distributed.write(tmp_path / "x", {"rows": (whole, rows), "columns": (whole, columns)}, {})
    del whole
    for out, how in (("x.safetensors", "copy"), ("x.dcp", "edit"), ("", "patch")):
        command = [sys.executable, "-c", MEASURED, path, tmp_path / out, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert float(done.stdout) < 120, (how, done.stdout)
    with pm.open(tmp_path / "x.dcp") as one, pm.open(path) as other:
        assert all((one[name] == other[name]).all() for name in ("rows", "columns"))
