"""New checkpoints beside their sources on file systems that share blocks: what they cost, and that all else is as ever.

`Kernel` answers as such a file system does. The tests marked `mounts` count blocks on real ones.
"""

import errno
import json
import os
import subprocess
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch

import paramend as pm
from paramend.disk.copying import BLOCK
from paramend.errors import CannotWrite
from support.sharing import Kernel, own_nbytes

ROWS = 64  # layers of 64 x 512 x 4 bytes are 32 blocks
LAYERS = 6


def tree(layers=LAYERS, dtype="float32"):
    rng = np.random.default_rng(0)
    made = {"embed.weight": (600, 512)}
    for n in range(layers):
        made |= {f"layers.{n}.up.weight": (ROWS, 512), f"layers.{n}.norm.weight": (2 * BLOCK // 4,)}
    return {name: rng.random(shape, "float32").astype(dtype) for name, shape in made.items()}


def make(folder):
    """A model as the library of the format writes it, and a smaller one."""
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tree(), folder / "model.safetensors", metadata={"format": "pt"})
    safetensors.numpy.save_file({"extra.weight": np.ones((ROWS, 512), "float32")}, folder / "extra.safetensors")
    np.savez(folder / "model.npz", **tree())
    torch.save({name: torch.from_numpy(leaf) for name, leaf in tree().items()}, folder / "model.pt")
    (folder / "shards").mkdir()
    names = list(tree())
    weight_map = {}
    for n in range(2):
        part = {name: tree()[name] for name in names[n * 7 : n * 7 + 7]}
        safetensors.numpy.save_file(part, folder / "shards" / f"model-{n}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{n}.safetensors")
    (folder / "shards/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "shards/tokenizer.json").write_text(json.dumps(list(range(20_000))))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make(tmp_path_factory.mktemp("sharing") / "models")


def zeroed(name):
    return lambda ckpt: pm.at(ckpt, name).zero()


def inserted(ckpt):
    return pm.insert(ckpt, pm.open(ckpt.path.with_name("extra.safetensors")), "**")[0]


def deepened(ckpt):
    return pm.deepen(ckpt, layers="layers[*]", order=[0, 1, 1, 2, 2, 3, 4, 5])[0]


UP = ROWS * 512 * 4
# What is opened, the edit, how it is saved, and the bytes that it costs: those of the leaves that are new. Every cut
# between what stays and what is new costs up to a block at each side.
EDITS = {
    "zero": ("model.safetensors", zeroed("layers.2.up.weight"), {}, UP, 2),
    "zero, a hole": ("model.safetensors", zeroed("embed.weight"), {}, 600 * 512 * 4, 1),
    "zero, a record": ("model.safetensors", zeroed("layers.2.up.weight"), {"record": True}, UP, 2),
    "scale of a slice": ("model.safetensors", lambda c: pm.at(c, "layers.2.up.weight")[3].multiply(2), {}, UP, 2),
    "rename of all": ("model.safetensors", lambda c: pm.at(c, "layers.<n>.**").rename("model.h.<n>.**"), {}, 0, 1),
    "names of half the length": ("model.safetensors", lambda c: pm.at(c, "layers.<n>.**").rename("h.<n>.**"), {}, 0, 1),
    "delete": ("model.safetensors", lambda c: pm.at(c, "layers.2.norm.weight").delete(), {}, 0, 2),
    "cast": ("model.safetensors", lambda c: pm.at(c, "layers.2.up.weight").cast("float16"), {}, UP // 2, 2),
    "insert": ("model.safetensors", inserted, {}, UP, 2),
    "deepen": ("model.safetensors", deepened, {}, 0, 3),
    "stay": ("model.safetensors", lambda c: c, {}, 0, 1),
    "zero in an npz": ("model.npz", zeroed("layers.2.up.weight"), {}, UP, 2),
    "zero in a torch file": ("model.pt", zeroed("layers.2.up.weight"), {}, UP, 2),
    "zero in shards": ("shards", zeroed("layers.2.up.weight"), {}, UP, 4),
    "rename in shards": ("shards", lambda c: pm.at(c, "layers.<n>.**").rename("model.h.<n>.**"), {}, 0, 3),
    "other shards": ("model.safetensors", zeroed("layers.2.up.weight"), {"max_shard_size": "400kB"}, UP, 8),
}


def expected(ckpt):
    return {name: (leaf.dtype.name, leaf.shape, leaf.tobytes()) for name, leaf in ckpt.items()}


def content(path):
    """Every leaf, as the library of the format reads it."""
    if path.is_dir():
        found = {}
        for file in path.glob("*.safetensors"):
            found |= safetensors.numpy.load_file(file)
    elif path.suffix == ".pt":
        found = {name: leaf.numpy() for name, leaf in torch.load(path, weights_only=True).items()}
    else:
        found = dict(np.load(path) if path.suffix == ".npz" else safetensors.numpy.load_file(path))
    return {name: (leaf.dtype.name, leaf.shape, leaf.tobytes()) for name, leaf in found.items()}


def files_of(path):
    return [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]


def data_of(path):
    """The bytes of a file, or of all files of a directory."""
    return [file.read_bytes() for file in sorted(files_of(Path(path)))]


def out_of(folder, name):
    return folder / ("out" if "." not in name else f"out{Path(name).suffix}")


def saved(folder, case, out):
    """(report, output, what it should hold)"""
    name, edit, options, *_ = EDITS[case]
    with pm.open(folder / name) as ckpt:
        edited = edit(ckpt)
        where = f"{out.with_suffix('')}/" if "max_shard_size" in options else out
        return edited.save(where, **options), expected(edited)


@pytest.mark.parametrize("case", EDITS)
def test_an_edit_costs_its_own_bytes(models, tmp_path, monkeypatch, case):
    kernel = Kernel(monkeypatch)
    out = out_of(tmp_path, EDITS[case][0])
    report, right = saved(models, case, out)
    out = Path(report.path)
    assert content(out) == right
    size = sum(file.stat().st_size for file in files_of(out))
    own, blocks = EDITS[case][3:]
    assert report.bytes_shared == sum(count for _, count, _ in kernel.shared)
    head = sum(file.stat().st_size for file in files_of(out) if file.suffix == ".json")
    assert size - report.bytes_shared <= own + (2 * blocks + 1) * BLOCK + head
    assert report.to_dict()["bytes_shared"] == report.bytes_shared and " copied (" in report.summary


@pytest.mark.parametrize("case", ["zero", "rename of all", "insert", "deepen", "other shards", "rename in shards"])
def test_the_bytes_are_those_of_any_other_file_system(models, tmp_path, monkeypatch, case):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with monkeypatch.context() as refused:
        Kernel(refused, refuses=errno.EOPNOTSUPP)
        report, _ = saved(models, case, out_of(tmp_path / "one", EDITS[case][0]))
        assert report.bytes_shared == 0 and "shared" not in report.summary
    with monkeypatch.context() as granted:
        Kernel(granted)
        again, _ = saved(models, case, out_of(tmp_path / "two", EDITS[case][0]))
    assert data_of(report.path) == data_of(again.path)


# ---- the header ----------------------------------------------------------------------------------------------------


def data_start(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_data_begins_at_the_same_place_of_a_block(models, tmp_path):
    with pm.open(models / "model.safetensors") as ckpt:
        pm.at(ckpt, "layers.<n>.**").rename("a.much.longer.name.for.layers.<n>.**").save(tmp_path / "a.safetensors")
        pm.at(ckpt, "**").add(1).save(tmp_path / "b.safetensors", record=True)
    before, after = data_start(models / "model.safetensors"), data_start(tmp_path / "a.safetensors")
    assert before != after and before % BLOCK == after % BLOCK
    raw = (tmp_path / "a.safetensors").read_bytes()[8:after]
    assert raw.rstrip(b" ").endswith(b"}") and json.loads(raw)["__metadata__"] == {"format": "pt"}
    with safetensors.safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    # Nothing of the other stays, so its header has no more than the padding that aligns it to 8 bytes.
    raw = (tmp_path / "b.safetensors").read_bytes()[8 : data_start(tmp_path / "b.safetensors")]
    assert len(raw) - len(raw.rstrip(b" ")) < 8


def test_a_second_edit_takes_no_more_padding(models, tmp_path):
    """The spaces of the first header are not kept beside those of the second."""
    source = models / "model.safetensors"
    for turn in range(4):
        with pm.open(source) as ckpt:
            out = tmp_path / f"{turn}.safetensors"
            pm.at(ckpt, f"layers.{turn}.norm.weight").fill(turn).save(out, record=True)
        assert data_start(out) % BLOCK == data_start(source) % BLOCK
        source = out
    raw = source.read_bytes()[8 : data_start(source)]
    assert len(raw) - len(raw.rstrip(b" ")) < BLOCK
    assert [each.leaves[0].path for each in pm.record(source).earlier] == [f"layers.{n}.norm.weight" for n in range(3)]
    pm.verify_record(source)


def test_small_files_are_not_padded(tmp_path):
    safetensors.numpy.save_file(
        {"w": np.ones(3000, "float32"), "b": np.ones(3, "float32")}, tmp_path / "in.safetensors"
    )
    with pm.open(tmp_path / "in.safetensors") as ckpt:
        pm.at(ckpt, "b").rename("bias").save(tmp_path / "out.safetensors")
    safetensors.numpy.save_file({"w": np.ones(3000, "float32"), "bias": np.ones(3, "float32")}, tmp_path / "right")
    assert data_start(tmp_path / "out.safetensors") == data_start(tmp_path / "right")


def test_where_what_stays_disagrees_most_of_it_is_shared(tmp_path, monkeypatch):
    kernel = Kernel(monkeypatch)
    leaves = {"a": np.ones(BLOCK * 8, "uint8"), "b": np.ones(16, "uint8"), "c": np.ones(BLOCK * 20, "uint8")}
    safetensors.numpy.save_file(leaves, tmp_path / "in.safetensors")
    with pm.open(tmp_path / "in.safetensors") as ckpt:
        report = pm.at(ckpt, "b").delete().save(tmp_path / "out.safetensors")
    assert [19 * BLOCK] == [report.bytes_shared] == [count for _, count, _ in kernel.shared]
    moved = data_start(tmp_path / "out.safetensors") - data_start(tmp_path / "in.safetensors")
    assert moved % BLOCK == 16


def test_data_begins_aligned_even_if_it_did_not_before(tmp_path, monkeypatch):
    kernel = Kernel(monkeypatch)
    raw = json.dumps({"w": {"dtype": "F32", "shape": [16 * BLOCK], "data_offsets": [0, 64 * BLOCK]}}).encode()
    raw += b" " * (-len(raw) % 8 + 3)
    (tmp_path / "in.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + os.urandom(64 * BLOCK))
    with pm.open(tmp_path / "in.safetensors") as ckpt:
        pm.at(ckpt, "w").rename("v").save(tmp_path / "out.safetensors")
        assert data_start(tmp_path / "out.safetensors") % 8 == 0 and not kernel.asked
        ckpt.save(tmp_path / "same.safetensors")  # as it is: shared, header and all
    assert (tmp_path / "same.safetensors").read_bytes() == (tmp_path / "in.safetensors").read_bytes()
    assert sum(count for _, count, _ in kernel.shared) == 64 * BLOCK


# ---- free space ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refuses", [0, errno.EOPNOTSUPP])
def test_what_is_shared_needs_no_room(models, tmp_path, monkeypatch, refuses):
    Kernel(monkeypatch, refuses=refuses)
    free = (UP + 8 * BLOCK) // BLOCK
    disk = namedtuple("Disk", "f_blocks f_bavail f_frsize")
    monkeypatch.setattr(os, "statvfs", lambda path: disk(1 << 30, free, BLOCK))
    if refuses:
        with pytest.raises(CannotWrite, match=r"needs 2\.1 MB, and 163.8 kB are free"):
            saved(models, "zero", tmp_path / "out.safetensors")
    else:
        saved(models, "zero", tmp_path / "out.safetensors")
        monkeypatch.setattr(os, "statvfs", lambda path: disk(1 << 30, free // 2, BLOCK))
        with pytest.raises(CannotWrite, match=r"needs 1\d\d.\d kB, and 81.9 kB are free"):
            saved(models, "zero", tmp_path / "two.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ([] if refuses else ["out.safetensors"])


# ---- real file systems ---------------------------------------------------------------------------------------------


def shell(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert not done.returncode, f"{' '.join(map(str, command))}\n{done.stderr}"


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def mounted(request, tmp_path_factory):
    """A folder on a file system in a file."""
    folder = tmp_path_factory.mktemp(request.param)
    image, top = folder / "image", folder / "top"
    top.mkdir()
    with image.open("wb") as file:
        file.truncate(400 << 20)
    shell(f"mkfs.{request.param}", "-q", *(["-m", "reflink=1"] if request.param == "xfs" else []), image)
    shell("mount", "-o", "loop", image, top)
    try:
        yield make(top / "models")
    finally:
        shell("umount", top)


@pytest.mark.mounts
@pytest.mark.parametrize("case", EDITS)
def test_blocks_on_disk(mounted, models, tmp_path, case):
    folder = mounted.with_name(case)
    folder.mkdir()
    os.sync()
    before = os.statvfs(mounted)
    report, right = saved(mounted, case, out_of(folder, EDITS[case][0]))
    out = Path(report.path)
    os.sync()
    after = os.statvfs(mounted)
    assert content(out) == right
    own, blocks = EDITS[case][3:]
    kept = sum(file.stat().st_size for file in files_of(out) if file.suffix == ".json")
    new = own + (2 * blocks + 1) * BLOCK + kept
    size = sum(file.stat().st_size for file in files_of(out))
    assert size - report.bytes_shared <= new
    # What the file system counts: blocks of the output that are not shared, and blocks that are no longer free.
    assert sum(own_nbytes(file) for file in files_of(out)) <= new + len(files_of(out)) * BLOCK
    assert (before.f_bfree - after.f_bfree) * after.f_frsize <= new + (1 << 18)
    elsewhere, _ = saved(models, case, out_of(tmp_path, EDITS[case][0]))
    if EDITS[case][2] != {"record": True}:  # which tells the time
        assert data_of(out) == data_of(elsewhere.path)
