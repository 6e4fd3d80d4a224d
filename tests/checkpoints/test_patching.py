"""Patches in place: exactly the chosen bytes, taken back exactly, whatever happens in between."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner
from hypothesis import HealthCheck, assume, given, settings, strategies as st

import paramend as pm
from paramend.checkpoints.checkpoint import open as open_checkpoint
from paramend.checkpoints.patching import patch
from paramend.cli.undo import history as history_command, undo as undo_command
from paramend.errors import (
    BadArgument,
    BadCheckpoint,
    Busy,
    CannotRead,
    CannotWrite,
    OutOfRange,
    ParamendError,
    SpecMismatch,
    Unsupported,
)
from paramend.formats.registry import open_source
from paramend.journal import records
from paramend.journal.store import UndoStore
from paramend.journal.undo import drop, history, recover, undo
from paramend.piecewise import steps as computing
from paramend.piecewise.regions import region
from support.crashing import Crash, Machine, crash_everywhere

INDEX = '{{"metadata": {{"total_size": {}}}, "weight_map": {}}}'


def patched(path, selector, verb, /, **args):
    """One edit in place."""
    return patch(path, lambda tree: getattr(pm.at(tree, selector), verb)(**args))


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "embed.weight": rng.normal(size=(8, 6)).astype("float32"),
        "layers.0.weight": rng.normal(size=(5, 4)).astype(ml_dtypes.bfloat16),
        "layers.0.bias": rng.normal(size=4).astype("float16"),
        "layers.1.weight": rng.normal(size=(5, 4)).astype(ml_dtypes.bfloat16),
        "layers.1.bias": rng.normal(size=4).astype("float16"),
        "steps": np.array(7, "int64"),
        "empty": np.zeros((0, 3), "float32"),
    }


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tree(), path, metadata={"format": "pt"})
    return path


@pytest.fixture
def sharded(tmp_path):
    return make_shards(tmp_path / "model")


def make_torch_shards(folder):
    import torch

    folder.mkdir()
    weight_map = {}
    for n, names in enumerate((["embed.weight", "layers.0.bias"], ["layers.1.weight", "layers.1.bias"])):
        name = f"pytorch_model-0000{n + 1}-of-00002.bin"
        torch.save({key: torch.full((5, 4), float(n)) for key in names} | {"epoch": 3}, folder / name)
        weight_map |= dict.fromkeys(names, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def make_shards(folder):
    folder.mkdir()
    weight_map = {}
    for n, half in enumerate(
        (["embed.weight", "layers.0.weight", "layers.0.bias"], ["layers.1.weight", "layers.1.bias"])
    ):
        name = f"model-0000{n + 1}-of-00002.safetensors"
        safetensors.numpy.save_file({key: tree()[key] for key in half}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(half, name)
    size = sum(tree()[key].nbytes for key in weight_map)
    index = INDEX.format(size, json.dumps(weight_map))
    (folder / "model.safetensors.index.json").write_text(index)
    (folder / "config.json").write_text("{}")
    return folder


def read(path):
    """All tensors, by the reference library."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {name: array for file in files for name, array in safetensors.numpy.load_file(file).items()}


def bits(arrays):
    return {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in arrays.items()}


def content(path):
    """The digest of all that is not an undo record."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()


INDICES = [
    None,
    0,
    -1,
    slice(1, 3),
    slice(None, None, -2),
    (slice(None), 0),
    (slice(None), slice(1, 3)),
    (slice(None), [2, 0]),
    [3, 0, -1],
    [1, 1, 0],
    ([0, 1, 0], [1, 1, 1]),
    (None, slice(2, 4)),
    (..., 1),
    (2, 1),
    (2, [0, 3]),
    np.array([True, False, True, True, False]),
    slice(5, 5),
]
VERBS = [
    ("zero", {}),
    ("fill", {"value": -1.5}),
    ("add", {"value": 0.25}),
    ("multiply", {"value": np.array([1.0, 2.0, -1.0, 0.5], ml_dtypes.bfloat16)}),
    ("noise", {"std": 0.5, "seed": 3}),
    ("apply", {"fn": lambda x: np.sort(x.reshape(-1)).reshape(x.shape)}),
    ("reinit", {"init": "glorot_uniform", "seed": 1}),
]


# ---- what is written ---------------------------------------------------------------------------------------


def test_one_leaf_changes_and_nothing_else(model):
    before = model.read_bytes()
    with open_source(model) as source:
        number = next(n for n in source.index.numbers if source.index.path(n) == "layers.1.weight")
        extent = source.extent(number)
    report = patched(model, "layers[-1]/weight", "zero")
    after = model.read_bytes()
    changed = [at for at in range(len(before)) if before[at] != after[at]]
    assert extent.start <= changed[0] and changed[-1] < extent.start + extent.nbytes
    assert after == before[: extent.start] + bytes(extent.nbytes) + before[extent.start + extent.nbytes :]
    assert report.bytes_written == extent.nbytes == 40
    assert bits(read(model)) == bits(pm.at(tree(), "layers.1.weight").zero())
    assert str(report) == (
        "path             spec           edit\nlayers.1.weight  bfloat16[5,4]  zero()\n\n1 of 7 leaves changes\n"
        f"patched {model}: 40 B written in place; to take it back: paramend undo {model}"
    )
    assert report.to_dict()["bytes_written"] == 40 and report.to_dict()["changed"][0]["path"] == "layers.1.weight"
    assert Path(report.record).stat().st_size == report.bytes_recorded
    taken = undo(model)
    assert model.read_bytes() == before and taken.left == 0 and taken.bytes_written == 40
    assert sorted(file.name for file in model.parent.iterdir()) == ["model.safetensors"]


def test_writes_touch_only_the_ranges_of_the_slice(model, monkeypatch):
    before, written = model.read_bytes(), []
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: written.append((at, len(data))) or pwrite(fd, data, at))
    report = patched(model, pm.sel("embed.weight")[2:4], "fill", value=0.5)
    assert sum(count for _, count in written) == report.bytes_written == 2 * 6 * 4
    assert min(at for at, _ in written) == before.index(tree()["embed.weight"][2:4].tobytes())
    assert len(written) == 1


def test_columns_of_a_wide_leaf_are_written_run_by_run(tmp_path):
    path = tmp_path / "m.safetensors"
    wide = np.arange(5 * 4000, dtype="float32").reshape(5, 4000)
    safetensors.numpy.save_file({"w": wide}, path)
    report = patched(path, pm.sel("w")[:, 7:9], "zero")
    assert report.bytes_written == 5 * 2 * 4  # rows are 16 kB apart
    assert bits(read(path)) == bits(pm.at({"w": wide}, "w")[:, 7:9].zero())
    undo(path)
    assert bits(read(path)) == bits({"w": wide})


def test_a_directory_of_shards(sharded):
    before = content(sharded)
    report = patched(sharded, "layers/**", "multiply", value=2)
    assert bits(read(sharded)) == bits(
        pm.at({k: v for k, v in tree().items() if k not in ("steps", "empty")}, "layers/**").multiply(2)
    )
    assert report.bytes_written == 2 * (40 + 8)
    (row,) = history(sharded)
    assert row.files == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert "multiply(2) at layers.0.weight, layers.0.bias, and 2 more" in str(row)
    assert undo(sharded).undone == row
    assert content(sharded) == before and not (sharded / ".undo").exists()
    with pytest.raises(CannotWrite, match="nothing to take back"):
        undo(sharded)


def test_the_index_file_stands_for_its_folder(sharded):
    before = content(sharded)
    patched(sharded / "model.safetensors.index.json", "embed/**", "zero")
    assert len(history(sharded)) == 1
    undo(sharded / "model.safetensors.index.json")
    assert content(sharded) == before


def test_a_file_of_torch_keeps_its_checksums(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "m.pt"
    state = {"fc.weight": torch.arange(12.0).reshape(3, 4), "fc.bias": torch.ones(3), "epoch": 3}
    torch.save(state, path)
    before = path.read_bytes()
    patched(path, pm.sel("fc.weight")[1], "multiply", value=2)
    import zipfile

    assert zipfile.ZipFile(path).testzip() is None
    after = torch.load(path)
    expected = state["fc.weight"].clone()
    expected[1] *= 2
    assert torch.equal(after["fc.weight"], expected) and torch.equal(after["fc.bias"], state["fc.bias"])
    undo(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("folder", [False, True], ids=["file", "shards"])
def test_views_of_one_storage_are_not_changed_with_each_other(tmp_path, folder):
    torch = pytest.importorskip("torch")
    path = make_torch_shards(tmp_path / "model") / "pytorch_model-00001-of-00002.bin" if folder else tmp_path / "m.pt"
    whole, matrix = torch.arange(10.0), torch.ones(2, 3)
    state = {"a": whole[:6], "b": whole[4:], "w": matrix, "row": matrix[0], "twin": matrix, "even": whole[6:]}
    torch.save(state, path)
    if folder:
        (path.parent / "pytorch_model-00002-of-00002.bin").unlink()
        index = dict.fromkeys(state, path.name)
        (path.parent / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    before, name = path.read_bytes(), path.parent if folder else path
    for selector, others in {"a": "b", "w": "row", "row": "w, twin", "{a,b}": "b", "even": "b"}.items():
        with pytest.raises(Unsupported, match=f"shares bytes of .* with {others}: a change in place") as caught:
            patched(name, selector, "zero")
        assert f"paramend zero {name} '" in caught.value.hint
        with pytest.raises(Unsupported, match="shares bytes"):
            pm.patch(name, lambda t, s=selector: pm.at(t, s).zero(), dry_run=True)
    assert path.read_bytes() == before
    pm.at(pm.open(name), "a").zero().save(tmp_path / "new")
    new = pm.load(tmp_path / "new")
    assert new["a"].tolist() == [0] * 6 and new["b"].tolist() == [4, 5, 6, 7, 8, 9]


def test_leaves_without_elements_need_no_record(model):
    before = model.read_bytes()
    assert patched(model, "empty", "fill", value=1).bytes_written == 0
    assert model.read_bytes() == before and not UndoStore(model).folder.exists()


def test_a_dry_run_writes_nothing(model):
    before = model.read_bytes()
    report = patch(model, lambda tree: pm.at(tree, "**/bias").zero(), dry_run=True)
    assert report.bytes_written == 16 and report.record is None and "dry run" in report.summary
    assert model.read_bytes() == before and [p.name for p in model.parent.iterdir()] == [model.name]


def test_progress_ends_at_the_total(model):
    heard = []
    patch(model, lambda tree: pm.at(tree, "layers/**").zero(), progress=heard.append)
    assert heard[-1].done == heard[-1].total == 2 * 96


def test_a_sparse_file(tmp_path):
    from paramend.leaves.specs import Spec
    from support.writing import write_header

    path = tmp_path / "m.safetensors"
    header = write_header({"a": Spec((1 << 20,), "float32"), "b": Spec((1 << 20,), "float32")})
    path.write_bytes(header.to_bytes())
    os.truncate(path, header.nbytes + header.data_nbytes)
    before = path.read_bytes()
    patch(path, lambda t: pm.at(t, "b")[:1000].fill(1))
    assert path.stat().st_blocks * 512 < 1 << 20
    assert read(path)["b"].sum() == 1000 and not read(path)["a"].any()
    undo(path)
    assert path.read_bytes() == before


# ---- the engines agree -------------------------------------------------------------------------------------


# Fans of more than two axes depend on the library that the names are those of: file and dict may differ there.
AGREEING = [
    (index, verb) for index in INDICES for verb in VERBS if verb[0] != "reinit" or len(region((5, 4), index).shape) < 3
]


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(("index", "verb"), AGREEING, ids=[f"{index!r}-{verb[0]}" for index, verb in AGREEING])
def test_patching_gives_what_memory_gives(model, monkeypatch, index, verb, small):
    if small:
        monkeypatch.setattr(computing, "CHUNK", 3)
    name, args = verb
    before, selector = model.read_bytes(), "layers.1.weight"
    chosen = pm.sel(selector) if index is None else pm.sel(selector)[index]
    try:
        expected = getattr(pm.at(tree(), chosen), name)(**args)
    except ParamendError as error:
        with pytest.raises(type(error)):
            patched(model, chosen, name, **args)
        assert model.read_bytes() == before and not UndoStore(model).folder.exists()
        return
    patched(model, chosen, name, **args)
    assert bits(read(model)) == bits(expected)
    if region((5, 4), index).size:
        undo(model)
    assert model.read_bytes() == before


@pytest.mark.parametrize("index", [None, slice(1, 4), (slice(None), [0, 2]), [4, 4]], ids=repr)
def test_set_in_pieces(model, monkeypatch, index):
    monkeypatch.setattr(computing, "CHUNK", 3)
    chosen = pm.sel("layers.1.weight") if index is None else pm.sel("layers.1.weight")[index]
    shape = region((5, 4), index).shape
    value = np.arange(np.prod(shape)).reshape(shape).astype(ml_dtypes.bfloat16)
    patched(model, chosen, "set", value=value.T.copy().T)
    assert bits(read(model)) == bits(pm.at(tree(), chosen).set(value))


@st.composite
def slices(draw, shape):
    parts = []
    for length in shape[: draw(st.integers(0, len(shape)))]:
        bound = st.none() | st.integers(-length, length)
        part = st.builds(slice, bound, bound, st.sampled_from([None, 1, 2, -1, -3])) | st.integers(-length, length - 1)
        part |= st.lists(st.integers(-length, length - 1), min_size=1, max_size=3)
        parts.append(draw(part))
    return tuple(parts)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_regions_are_what_numpy_takes(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    index = data.draw(slices(shape))
    whole = np.arange(np.prod(shape)).reshape(shape)
    try:
        expected = whole[index]
    except IndexError:
        with pytest.raises(OutOfRange):
            region(shape, index)
        return
    found = region(shape, index)
    assert found.shape == expected.shape
    elements: list[int] = []
    for at, starts, run in found.pieces(data.draw(st.integers(1, 9)), data.draw(st.integers(0, 3))):
        assert at == len(elements)
        elements += (starts[:, None] + np.arange(run)).reshape(-1).tolist()
    assert elements == expected.reshape(-1).tolist()


@st.composite
def edits(draw):
    """A function over checkpoints: up to four edits, some of slices, that fit the tree."""
    steps = []
    for _ in range(draw(st.integers(1, 4))):
        chosen = pm.sel(draw(st.sampled_from(["embed.weight", "layers/*/weight", "layers.1.weight", "**/weight"])))
        verb, args = draw(st.sampled_from([verb for verb in VERBS if verb[0] != "multiply"]))
        index = draw(slices((5, 4)) | st.none())
        with contextlib.suppress(OutOfRange):  # lists of two lengths do not go together
            region((5, 4), index)
            chosen = chosen if index is None else chosen[index]
        steps.append((chosen, verb, args))

    def edit(t):
        for chosen, verb, args in steps:
            t = getattr(pm.at(t, chosen), verb)(**args)
        return t

    return edit


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(edit=edits(), small=st.sampled_from([1, 7, 1 << 18]), many=st.booleans())
def test_patching_gives_what_rewriting_gives(tmp_path_factory, edit, small, many):
    folder = tmp_path_factory.mktemp("engines")
    path = folder / "model"
    if many:
        make_shards(path)
    else:
        safetensors.numpy.save_file(tree(), path)
    before = content(path)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(computing, "CHUNK", small)
        with open_checkpoint(path) as t:
            try:
                edit(t).save(folder / "out" / "" if many else folder / "out.safetensors")
            except SpecMismatch:  # reinit of a slice without two axes
                assume(False)
        changed = patch(path, edit).bytes_written
    expected = folder / "out" if many else folder / "out.safetensors"
    assert bits(read(path)) == bits(read(expected))
    if not many:
        assert path.read_bytes() == expected.read_bytes()
    if changed:
        undo(path)
    assert content(path) == before
    shutil.rmtree(folder)


# ---- what is refused ---------------------------------------------------------------------------------------


def test_what_changes_the_spec_is_refused_with_the_command_that_does_it(model):
    with pytest.raises(Unsupported, match=r"paramend cast .*model.safetensors 'layers.0.bias' float32 -o OUT"):
        patched(model, "layers.0.bias", "cast", dtype="float32")
    assert not UndoStore(model).folder.exists()


def test_what_changes_the_structure_is_refused(model):
    before = model.read_bytes()
    with pytest.raises(Unsupported, match=r"paramend delete .*model.safetensors 'layers.0.bias' -o OUT"):
        patch(model, lambda t: pm.at(t, "layers.0.bias").delete())
    with pytest.raises(Unsupported, match=r"paramend rename .* 'layers.0.bias' 'layers.0.b' -o OUT"):
        patch(model, lambda t: pm.at(t, "layers.0.bias").rename("layers.0.b"))
    assert model.read_bytes() == before and not UndoStore(model).folder.exists()


@pytest.mark.parametrize("edit", [lambda t: None, lambda t: 3, lambda t: pm.at(open_checkpoint(t.path), "**").zero()])
def test_an_edit_gives_the_checkpoint_back(model, edit):
    with pytest.raises(BadArgument, match="must return the edited checkpoint"):
        patch(model, edit)
    assert not UndoStore(model).folder.exists()


def test_several_edits_in_one_patch(model, tmp_path):
    before = model.read_bytes()

    def edit(t):
        t = pm.at(t, "layers/**").multiply(3)
        t = pm.at(t, "layers/*/weight")[1:3].zero()
        t = pm.at(t, "layers.0.weight")[2, 1].fill(5)
        return pm.at(t, "layers.1.weight").noise(0.1)

    dry = patch(model, edit, dry_run=True)
    assert model.read_bytes() == before and dry.bytes_written == 96
    report = patch(model, edit)
    assert report.bytes_written == 96 and len(history(model)) == 1
    after = model.read_bytes()
    undo(model)
    assert model.read_bytes() == before
    edit(open_checkpoint(model)).save(tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == after
    undone = patch(model, lambda t: t)
    assert undone.bytes_written == 0 and not UndoStore(model).folder.exists()


def test_a_cast_there_and_back(model, tmp_path):
    edit = lambda t: pm.at(pm.at(pm.at(t, "layers/**").cast("float64"), "**/weight").add(0.001), "layers/*/*").cast(
        "float16"
    )
    with pytest.raises(Unsupported):
        patch(model, edit)
    edit = lambda t: pm.at(pm.at(pm.at(t, "**/bias").cast("float64"), "**/bias").add(0.1), "**/bias").cast("float16")
    edit(open_checkpoint(model)).save(tmp_path / "out.safetensors")
    patch(model, edit)
    assert model.read_bytes() == (tmp_path / "out.safetensors").read_bytes()


def test_tied_leaves_of_torch_change_once(tmp_path):
    torch = pytest.importorskip("torch")
    weight = torch.ones(3, 2)
    torch.save({"embed": weight, "head": weight, "bias": torch.ones(2)}, tmp_path / "m.pt")
    patch(tmp_path / "m.pt", lambda t: pm.at(t, "**").multiply(2))
    after = torch.load(tmp_path / "m.pt")
    assert all((array == 2).all() for array in after.values())


def test_hard_links_and_symbolic_links_are_refused(model, tmp_path):
    before = model.read_bytes()
    link, twin = tmp_path / "link.safetensors", tmp_path / "twin.safetensors"
    link.symlink_to(model)
    with pytest.raises(CannotWrite, match=r"symbolic link.*\n\nhint: write a new file instead: -o OUT"):
        patched(link, "**/bias", "zero")
    patched(model, "**/bias", "zero")
    twin.hardlink_to(model)
    for action in (lambda: patched(model, "**/bias", "zero"), lambda: undo(model)):
        with pytest.raises(CannotWrite, match="2 names"):
            action()
    with pytest.raises(CannotWrite, match="2 names"):
        patch(model, lambda tree: pm.at(tree, "**/bias").zero(), dry_run=True)
    twin.unlink()
    undo(model)
    assert model.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link.safetensors", "model.safetensors"]


def test_a_linked_shard_is_refused(sharded, tmp_path):
    before, shard = content(sharded), sharded / "model-00002-of-00002.safetensors"
    shard.rename(tmp_path / "blob")
    shard.symlink_to(tmp_path / "blob")
    with pytest.raises(CannotWrite, match="symbolic link"):
        patched(sharded, "layers/**", "zero")
    assert content(sharded) == before and not (sharded / ".undo").exists()


def test_an_undo_that_fails_half_way_is_finished_by_the_next(model, monkeypatch):
    import errno

    before = model.read_bytes()
    patch(model, lambda t: pm.at(t, "**/weight").zero())
    real, count = os.pwrite, [0]

    def failing(*args):
        count[0] += 1
        if count[0] == 2:  # the first is the note that the undo begins
            raise OSError(errno.EIO, "Input/output error")
        return real(*args)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(CannotWrite, match="only in part"):
        undo(model)
    monkeypatch.undo()
    assert model.read_bytes() != before
    assert len(recover(model)) == 1 and model.read_bytes() == before


@pytest.mark.parametrize("where", ["mkdir", "write", "fsync", "pwrite", "rename"])
def test_errors_of_the_system_change_nothing(model, monkeypatch, where):
    import errno

    before, real, count = model.read_bytes(), getattr(os, where), [0]

    def failing(*args, **options):
        count[0] += 1
        if where == "mkdir" or count[0] == {"rename": 2, "fsync": 5}.get(where, 1):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **options)

    monkeypatch.setattr(os, where, failing)
    with pytest.raises(CannotWrite, match=r"the disk is full.*nothing was changed"):
        patched(model, "**/weight", "zero")
    monkeypatch.undo()
    assert model.read_bytes() == before
    assert history(model) == [] and not UndoStore(model).folder.exists()


def test_what_was_cut_short_is_looked_for_once(model, monkeypatch):
    patch(model, lambda t: pm.at(t, "**/bias").zero())
    looks = []
    for name in ("recover", "recover_held"):
        real = getattr(UndoStore, name)
        monkeypatch.setattr(UndoStore, name, lambda store, real=real: looks.append(store.base) or real(store))
    patch(model, lambda t: pm.at(t, "**/weight").zero())
    assert looks == [model]


def test_no_room_for_the_record(model, monkeypatch):
    real = os.statvfs

    def full(path):
        found = real(path)
        return os.statvfs_result([*found[:3], 0, 0, *found[5:]])

    monkeypatch.setattr(os, "statvfs", full)
    with pytest.raises(CannotWrite, match=r"the undo record needs .* and 0 B are free"):
        patched(model, "**/weight", "zero")
    assert not UndoStore(model).folder.exists()


def test_a_second_writer_is_told_and_readers_are_not_stopped(model):
    code = f"""
        import sys
        import paramend as pm
        def wait(event):
            if event.done == event.total // 2:
                print("half", flush=True); sys.stdin.readline()
        pm.patch({str(model)!r}, lambda tree: pm.at(tree, "**/weight").zero(), progress=wait)
    """
    other = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "half\n"
    try:
        for action in (lambda: patched(model, "**/bias", "zero"), lambda: undo(model), lambda: drop(model)):
            with pytest.raises(Busy, match="another program is writing to it"):
                action()
        assert recover(model) == [] and history(model) == []
        assert read(model).keys() == tree().keys()
    finally:
        other.stdin.write("\n")
        other.communicate(timeout=600)
    assert other.returncode == 0
    patched(model, "**/bias", "zero")
    assert len(history(model)) == 2


def test_a_shard_is_locked_while_its_folder_is_patched(sharded):
    shard = sharded / "model-00001-of-00002.safetensors"

    def meanwhile(event):
        for action in (lambda: patched(shard, "**/bias", "zero"), lambda: patched(sharded, "**/bias", "zero")):
            with pytest.raises(Busy):
                action()

    patch(sharded, lambda t: pm.at(t, "layers/**").zero(), progress=meanwhile)
    assert len(history(sharded)) == 1 and history(shard) == []
    with pytest.raises(CannotWrite, match=r"nothing to take back.*\n\nhint: paramend undo .*/model, which was patched"):
        undo(shard)


# ---- taking back -------------------------------------------------------------------------------------------


def test_patches_stack(model):
    states = [content(model)]
    for n in range(4):
        patched(model, "embed/**" if n % 2 else "**", "multiply", value=n) if n else patched(model, "**/bias", "zero")
        states.append(content(model))
    assert [row.number for row in history(model)] == [1, 2, 3, 4]
    for state in reversed(states[:-1]):
        undo(model)
        assert content(model) == state
    with pytest.raises(CannotWrite, match="nothing to take back"):
        undo(model)


def test_undo_refuses_what_was_changed_since(model):
    patched(model, "layers/**", "zero")
    after = model.read_bytes()
    at = after.index(bytes(40))
    changed = after[: at + 3] + b"x" + after[at + 4 :]
    model.write_bytes(changed)
    with pytest.raises(CannotWrite, match=r"layers\.[01]\.weight changed since patch 1; nothing was written"):
        undo(model)
    assert model.read_bytes() == changed
    undo(model, force=True)
    assert bits(read(model)) == bits(tree())


def test_undo_refuses_a_file_of_another_size(model):
    patched(model, "layers/**", "zero")
    safetensors.numpy.save_file({"w": np.ones(3)}, model)
    for force in (False, True):
        with pytest.raises(BadCheckpoint, match="another file"):
            undo(model, force=force)


def test_a_copy_with_its_records_can_be_taken_back(model, tmp_path):
    patched(model, "layers/**", "zero")
    away = tmp_path / "away"
    away.mkdir()
    shutil.copy(model, away)
    shutil.copytree(UndoStore(model).folder, away / UndoStore(model).folder.name)
    undo(away / model.name)
    assert bits(read(away / model.name)) == bits(tree())


def test_records_can_be_dropped(model):
    for _ in range(3):
        patched(model, "layers/**", "add", value=1)
    after = content(model)
    assert [row.number for row in drop(model, keep=1)] == [1, 2]
    assert drop(model, keep=5) == []
    assert len(history(model)) == 1 and content(model) == after
    assert len(drop(model)) == 1 and drop(model) == [] and not UndoStore(model).folder.exists()
    assert content(model) == after


def test_no_such_file(tmp_path):
    for action in (undo, history):
        with pytest.raises(CannotRead, match="there is no such file"):
            action(tmp_path / "nothing")
    assert recover(tmp_path / "nothing") == []


def test_ctrl_c_puts_the_old_bytes_back(model):
    before = model.read_bytes()

    def stop(event):
        if event.done > event.total * 0.7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        patch(model, lambda tree: pm.at(tree, "**").zero(), progress=stop)
    assert model.read_bytes() == before and not UndoStore(model).folder.exists()


def test_a_function_that_raises_changes_nothing(model):
    before, seen = model.read_bytes(), []

    def fn(x):
        if seen:
            raise ZeroDivisionError
        seen.append(x)
        return x + 1

    with pytest.raises(ZeroDivisionError):
        patched(model, "**/weight", "apply", fn=fn)
    assert model.read_bytes() == before and not UndoStore(model).folder.exists()
    with pytest.raises(SpecMismatch):
        patched(model, "**/weight", "apply", fn=lambda x: x[:1])
    assert model.read_bytes() == before


# ---- crashes -----------------------------------------------------------------------------------------------


HOW = [{}, {"torn": True}, *({"power": seed, "torn": bool(seed % 2)} for seed in range(6))]


def make_configured(folder):
    """Shards beside a configuration."""
    make_shards(folder)
    (folder / "config.json").write_text('{"n": 1}\n')
    return folder


def configured(path):
    """A patch of leaves and of the configuration, which has another length then."""
    pm.patch(path, lambda t: pm.config(pm.at(t, "layers/**").add(1)).set({"n": 2, "a new key": [1]}))


MANY = {"file": None, "shards and their configuration": make_configured, "torch shards": make_torch_shards}


@pytest.mark.parametrize("how", HOW, ids=repr)
@pytest.mark.parametrize("many", MANY.values(), ids=MANY)
def test_a_patch_cut_short_anywhere_leaves_old_or_new(tmp_path, many, how):
    def make(folder):
        if many:
            return many(folder / "model").name
        safetensors.numpy.save_file(tree(), folder / "model.safetensors")
        return "model.safetensors"

    def action(path):
        if many is make_configured:
            configured(path)
        else:
            patched(path, "layers/**", "add", value=1)

    make(tmp_path)
    name = "model" if many else "model.safetensors"
    old = content(tmp_path / name)
    action(tmp_path / name)
    new = content(tmp_path / name)

    def check(path, dead):
        rows = recover(path)
        found = content(path)
        assert found in (old, new)
        assert recover(path) == []
        assert len(history(path)) == (found == new)
        assert not dead or found == new or not (rows and history(path))
        assert dead or found == new
        if found == new:
            undo(path)
        assert content(path) == old
        action(path)  # and it can be done again
        assert content(path) == new

    steps = crash_everywhere(tmp_path, make, action, check, **how)
    assert steps > 20


@pytest.mark.parametrize("how", HOW, ids=repr)
def test_an_undo_cut_short_anywhere_leaves_old_or_new(tmp_path, how):
    def make(folder):
        path = make_configured(folder / "model")
        patched(path, "embed/**", "zero")
        configured(path)
        return path.name

    path = tmp_path / make(tmp_path)
    new = content(path)
    undo(path)
    middle = content(path)
    undo(path)
    old = content(path)

    def check(path, dead):
        # A copy of the folder is as good as the folder.
        recover(path)
        found = content(path)
        assert found in (new, middle) if dead else found == middle
        if found == new:
            undo(path)
        assert content(path) == middle
        undo(path)
        assert content(path) == old

    assert crash_everywhere(tmp_path, make, undo, check, **how) > 8


def test_a_recovery_cut_short_anywhere_is_done_by_the_next(tmp_path):
    def make(folder):
        path = make_shards(folder / "model")
        cut_short(path, lambda path: patched(path, "layers/**", "add", value=1))
        return path.name

    path = make_shards(tmp_path / "model")
    old = content(path)

    def action(path):
        undo(path, force=True)  # at another place: not believed unasked

    def check(path, dead):
        if not dead:
            assert content(path) == old
        with contextlib.suppress(CannotWrite):  # it had been done
            assert undo(path, force=True).interrupted and dead
        assert content(path) == old

    assert crash_everywhere(tmp_path, make, action, check) > 4


def cut_short(path, edit):
    """Patches until the program dies with some new bytes in place and others not."""
    before = content(path)
    for step in range(1, 100):
        with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Crash):
            Machine(monkeypatch, step, torn=True)
            edit(path)
        if content(path) != before:
            assert UndoStore(path).records(records.PENDING)
            return
        recover(path)


KILLER = """
    import os, random, signal, sys, time
    from pathlib import Path
    import paramend as pm
    from paramend.journal.records import PENDING
    from paramend.journal.store import UndoStore
    from paramend.checkpoints.patching import patch
    from paramend.journal.undo import history, recover, undo

    path, rounds, signum = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(0)
    edit = lambda t: pm.at(t, "**").add(1)
    old = path.read_bytes()
    began = time.monotonic(); patch(path, edit); took = time.monotonic() - began
    new = path.read_bytes()
    undo(path)
    assert path.read_bytes() == old
    seen = {"old": 0, "new": 0, "cut short": 0}
    for _ in range(rounds):
        child = os.fork()
        if not child:
            try:
                patch(path, edit)
            except KeyboardInterrupt:
                pass
            finally:
                os._exit(0)
        time.sleep(rng.random() * took * 1.3)
        os.kill(child, signum)
        os.waitpid(child, 0)
        pending = len(UndoStore(path).records(PENDING))
        if signum == signal.SIGINT:
            assert not pending, "Ctrl-C left a half"
        else:
            recover(path)
        found = path.read_bytes()
        assert found in (old, new), "a third state"
        seen["old" if found == old else "new"] += 1
        seen["cut short"] += pending
        assert len(history(path)) == (found == new)
        if found == new:
            undo(path)
            assert path.read_bytes() == old
        assert history(path) == []
    print(seen)
"""


@pytest.mark.far
@pytest.mark.parametrize(("signum", "rounds"), [(signal.SIGKILL, 30), (signal.SIGINT, 20)], ids=["kill -9", "ctrl-c"])
def test_stopped_at_random_moments(tmp_path, signum, rounds):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({f"w{n}": np.full((64, 1024), n, "float32") for n in range(12)}, path)
    command = [sys.executable, "-c", textwrap.dedent(KILLER), str(path), str(rounds), str(int(signum))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    print(done.stdout)


def test_a_pending_patch_of_another_file_is_not_rolled_back_blindly(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tree(), path)
    cut_short(path, lambda path: patched(path, "layers/**", "add", value=1))
    half = path.read_bytes()
    path.unlink()
    safetensors.numpy.save_file(tree(seed=1), path)
    other = path.read_bytes()
    for action in (recover, history, undo, lambda path: patched(path, "**/bias", "zero")):
        with pytest.raises(BadCheckpoint, match="not the one that was patched"):
            action(path)
    assert path.read_bytes() == other
    path.write_bytes(half)  # a copy of the half patched one
    assert undo(path, force=True).interrupted
    assert bits(read(path)) == bits(tree())


def test_the_original_that_came_back_needs_no_rolling_back(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tree(), path)
    cut_short(path, lambda path: patched(path, "layers/**", "add", value=1))
    path.unlink()
    safetensors.numpy.save_file(tree(), path)
    assert recover(path) == [] and not UndoStore(path).folder.exists()


def test_a_shard_opened_alone_takes_back_the_patch_of_its_folder(sharded):
    before = content(sharded)
    cut_short(sharded, lambda path: patched(path, "layers/**", "add", value=1))
    assert content(sharded) != before
    assert len(recover(sharded / "model-00002-of-00002.safetensors")) == 1
    assert content(sharded) == before


# ---- the command line --------------------------------------------------------------------------------------


def test_the_commands(model):
    before = model.read_bytes()
    for value in (1, 2):
        patched(model, "layers/**", "fill", value=value)
    runner = CliRunner()
    shown = runner.invoke(history_command, [str(model)])
    assert shown.exit_code == 0 and "fill(2) at layers.0.weight" in shown.stdout.replace(
        "layers.1.weight", "layers.0.weight"
    )
    rows = json.loads(runner.invoke(history_command, [str(model), "--json"]).stdout)
    assert [row["number"] for row in rows] == [1, 2] and rows[0]["changed"][0]["edit"] == "fill(1)"
    data = json.loads(runner.invoke(undo_command, [str(model), "--json"]).stdout)
    assert data["left"] == 1 and data["undone"] == rows[1]
    assert "took back the last patch" in runner.invoke(undo_command, [str(model)]).stderr
    assert model.read_bytes() == before
    assert runner.invoke(history_command, [str(model)]).stdout == "no patches: nothing to take back\n"
    patched(model, "layers/**", "zero")
    assert runner.invoke(undo_command, [str(model), "--keep", "1"]).exit_code == 2
    assert "forgot 1 undo record" in runner.invoke(undo_command, [str(model), "--drop"]).stderr
    assert not UndoStore(model).folder.exists()
