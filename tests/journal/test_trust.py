"""Whom undo records are believed: only a user's own are carried out unasked, and none writes elsewhere or elsewise."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from click.testing import CliRunner

import paramend as pm
from paramend.cli.main import cli
from paramend.disk.locks import locked
from paramend.errors import BadCheckpoint, Busy, CannotRead, CannotWrite, ParamendError
from paramend.journal import claims
from paramend.journal.records import DONE, PENDING
from paramend.journal.store import UndoStore
from paramend.journal.undo import drop, history, recover, undo

pytestmark = pytest.mark.filterwarnings("ignore")  # of orbax, about itself

KINDS = ["safetensors", "shards", "torch", "npz", "msgpack", "ocdbt", "zarr"]


def tree(seed=0):
    """Weights that depend on the seed, a bias and a norm that do not."""
    rng = np.random.default_rng(seed)
    weights = {f"w{n}": rng.normal(size=(16, 8)).astype("float32") for n in range(3)}
    return weights | {"bias": np.zeros(8, "float32"), "norm": np.ones(8, "float32")}


def write(path, kind, seed=0):
    """A checkpoint of a kind, written by the library that defines the format."""
    data = tree(seed)
    if kind == "safetensors":
        safetensors.numpy.save_file(data, path)
    elif kind == "shards":
        path.mkdir()
        names = sorted(data)
        table = {name: f"model-{n % 2}.safetensors" for n, name in enumerate(names)}
        for n in range(2):
            part = {name: data[name] for name in names[n::2]}
            safetensors.numpy.save_file(part, path / f"model-{n}.safetensors")
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    elif kind == "torch":
        torch.save({name: torch.from_numpy(array) for name, array in data.items()}, path)
    elif kind == "npz":
        np.savez(path, **data)
    elif kind == "msgpack":
        import flax.serialization

        path.write_bytes(flax.serialization.msgpack_serialize(data))
    else:
        import orbax.checkpoint as ocp

        ocp.PyTreeCheckpointer(use_ocdbt=kind == "ocdbt").save(path, data)
    return path


def named(folder, kind):
    suffix = {"safetensors": ".safetensors", "torch": ".pt", "npz": ".npz", "msgpack": ".msgpack"}.get(kind, "")
    return folder / f"model{suffix}"


def silence(t):
    return pm.at(t, "bias").fill(5)


def everything(folder):
    """Every name below a folder, with what is there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else "no file"
    return found


def only_record(path, state):
    (record,) = UndoStore.of(path).records(state)
    return record


def as_if_downloaded(tmp_path, kind):
    """A folder with a patched checkpoint whose record says that the patch was cut short, made at another place."""
    origin = tmp_path / "origin"
    origin.mkdir()
    path = write(named(origin, kind), kind)
    pm.patch(path, silence)
    record = only_record(path, DONE)
    record.rename(record.with_suffix(f".{PENDING}"))
    (record.parent / "000009.partial").write_bytes(b"half a record")
    (record.parent / "000009.new").mkdir()
    (record.parent / "000009.new" / "file").write_bytes(b"mine")
    (record.parent / "lock").unlink()
    shutil.copytree(origin, tmp_path / "downloads")
    shutil.rmtree(origin)
    return named(tmp_path / "downloads", kind)


READS = {
    "open": lambda path: pm.open(path).close(),
    "load": pm.load,
    "diff": lambda path: pm.diff(path, {"w": np.ones(2)}),
    "history": history,
    "recover": recover,
    "dry run": lambda path: pm.patch(path, silence, dry_run=True),
}
COMMANDS = ["show {}", "history {}", "diff {0} {0}"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pending_record_that_came_with_the_files_is_named_and_nothing_is_touched(tmp_path, kind):
    path = as_if_downloaded(tmp_path, kind)
    record = only_record(path, PENDING)
    before = everything(tmp_path)
    for name, read in READS.items():
        with pytest.raises(BadCheckpoint, match=r"000001\.pending.*\n\nhint: paramend undo .* --drop") as error:
            read(path)
        assert str(record) in str(error.value), name
        assert everything(tmp_path) == before, name
    for command in COMMANDS:
        done = CliRunner().invoke(cli, command.format(path).split())
        assert done.exit_code == 2 and "000001.pending" in done.output
        assert everything(tmp_path) == before, command


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_on_is_explicit(tmp_path, kind):
    path = as_if_downloaded(tmp_path, kind)
    with pytest.raises(BadCheckpoint, match="not known as a patch that you made here"):
        pm.patch(path, silence)
    done = CliRunner().invoke(cli, ["undo", str(path)])
    assert done.exit_code == 0, done.output
    assert pm.load(path)["bias"].tolist() == [0] * 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_that_came_with_the_files_can_be_forgotten(tmp_path, kind):
    path = as_if_downloaded(tmp_path, kind)
    assert len(drop(path)) == 1
    assert pm.load(path)["bias"].tolist() == [5] * 8


# ---- records that lead elsewhere --------------------------------------------------------------------------------


def framed(kind, payload):
    data = struct.pack("<4sQ", kind, len(payload)) + payload
    return data + hashlib.sha256(data).digest()


def planted(store, names, sizes, state, *, whole):
    """A sound record that puts eight bytes of an attacker into files, or exchanges these whole."""
    store.mkdir(exist_ok=True)
    head = {"time": 0, "edits": ["zero()"], "rows": [["a", 0]], "files": names} | ({"whole": True} if whole else {})
    files = [{"size": size, "witness": ""} for size in sizes]
    spans = [(-1 if whole else 0, n, 0, 8) for n in range(len(names))]
    table = struct.pack("<Q", len(spans)) + b"".join(struct.pack("<4q", *span) for span in spans)
    length = len(table) + 8 * len(names)
    frame = struct.pack("<4sQ", b"SPAN", length)
    old = b"attacker" * len(names)
    digest = hashlib.sha256(frame + table + old)
    body = framed(b"HEAD", json.dumps(head).encode()) + framed(b"FILE", json.dumps(files).encode())
    body += frame + table + old + digest.digest()
    body += framed(b"DONE", bytes(32 * (len(names) if whole else 2)))
    (store / f"000001.{state}").write_bytes(b"PMUNDO1\n" + body)


@pytest.fixture(params=["shards", "ocdbt", "zarr"])
def shared(request, tmp_path):
    """(a checkpoint in a shared folder, the home of the one who opens it)."""
    home = tmp_path / "home"
    home.mkdir()
    (home / ".bashrc").write_text("export EDITOR=vi\n" * 4)
    path = write(tmp_path / "shared", request.param)
    (path / "l").symlink_to(home)
    (path / "last").symlink_to(home / ".bashrc")
    (path / "last.safetensors").symlink_to(home / ".bashrc")
    (path / "d").mkdir(exist_ok=True)
    (path / "d" / "1").symlink_to(home / ".bashrc")
    (path / "notes.txt").write_text("the user's own\n")
    return path, home


NAMES = [
    "l/.bashrc",
    "last",
    "last.safetensors",
    "d/1",
    "../home/.bashrc",
    "l/../../home/.bashrc",
    "notes.txt",
    ".undo/x",
]


@pytest.mark.parametrize("state", [PENDING, DONE])
@pytest.mark.parametrize("whole", [False, True], ids=["ranges", "whole"])
@pytest.mark.parametrize("name", [*NAMES, "absolute"])
def test_a_planted_record_writes_nowhere(shared, state, whole, name):
    path, home = shared
    name = str(home / ".bashrc") if name == "absolute" else name
    target = path / name
    planted(UndoStore(path).folder, [name], [target.stat().st_size if target.exists() else 8], state, whole=whole)
    before = everything(path.parent)
    with contextlib.suppress(ParamendError):
        pm.open(path).close()
    assert everything(path.parent) == before
    for force in (False, True):
        with pytest.raises((BadCheckpoint, CannotWrite)):
            undo(path, force=force)
        now = everything(path.parent)
        now.pop("shared/.undo/lock", None)
        assert now == before
    assert (home / ".bashrc").read_text() == "export EDITOR=vi\n" * 4


def test_a_planted_record_of_a_file_writes_into_no_other(tmp_path):
    path = write(tmp_path / "model.safetensors", "safetensors")
    (tmp_path / "other.safetensors").write_bytes(path.read_bytes())
    planted(UndoStore(path).folder, ["other.safetensors"], [path.stat().st_size], PENDING, whole=False)
    before = everything(tmp_path)
    for force in (False, True):
        with pytest.raises(BadCheckpoint, match=r"no patch of model\.safetensors writes there"):
            undo(path, force=force)
    assert {k: v for k, v in everything(tmp_path).items() if k in before} == before


def test_undo_writes_through_no_second_name(tmp_path):
    path = write(tmp_path / "model.safetensors", "safetensors")
    pm.patch(path, silence)
    os.link(path, tmp_path / "backup")
    before = path.read_bytes()
    for force in (False, True):
        with pytest.raises(CannotWrite, match=r"2 names \(hard links\)"):
            undo(path, force=force)
    record = only_record(path, DONE)
    record.rename(record.with_suffix(f".{PENDING}"))
    with pytest.raises(CannotWrite, match=r"2 names \(hard links\)"):
        undo(path)
    assert path.read_bytes() == before


def test_a_store_that_is_a_link_is_left_alone(tmp_path):
    """Neither are records believed there, nor is anything swept or made."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "000001.partial").write_text("mine")
    (victim / "000002.new").mkdir()
    path = write(tmp_path / "model.safetensors", "safetensors")
    planted(victim, [path.name], [path.stat().st_size], PENDING, whole=False)
    UndoStore(path).folder.symlink_to(victim)
    before = everything(tmp_path)
    pm.open(path).close()
    assert history(path) == []
    assert everything(tmp_path) == before


def test_names_of_stores_lead_nowhere(tmp_path):
    """`....undo` in a folder would be the records of "..", and `.x.undo` of a folder x those inside of it."""
    folder = write(tmp_path / "outer", "shards")
    planted(tmp_path / ".undo", ["x"], [8], PENDING, whole=False)
    (folder / "....undo").mkdir()
    (folder / "...undo").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    planted(elsewhere / ".undo", ["x"], [8], PENDING, whole=False)
    (folder / "x").symlink_to(elsewhere)
    (folder / ".x.undo").mkdir()
    before = everything(tmp_path)
    pm.open(folder).close()
    assert everything(tmp_path) == before


# ---- one's own ------------------------------------------------------------------------------------------------

DIES = """
    import os, sys
    import paramend as pm
    from paramend.journal import writer

    real = writer.Writer.become

    def become(self, state):
        if state == "done":
            os._exit(9)
        real(self, state)

    writer.Writer.become = become
    pm.patch(sys.argv[1], lambda t: pm.at(t, "bias").fill(5))
"""


def killed(path):
    """A checkpoint whose patch was killed when its bytes were in place and the record was not done."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(DIES), str(path)], check=False)
    assert done.returncode == 9
    return only_record(path, PENDING)


def weights(path):
    return {
        str(file.relative_to(path.parent)): file.read_bytes()
        for file in sorted(path.parent.rglob("*"))
        if file.is_file() and ".undo" not in str(file.relative_to(path.parent))
    }


@pytest.mark.parametrize("kind", KINDS)
def test_ones_own_patch_is_taken_back_unasked(tmp_path, kind):
    path = write(named(tmp_path, kind), kind)
    before = weights(path)
    killed(path)
    assert weights(path) != before
    pm.open(path).close()
    assert weights(path) == before
    assert claims.read(UndoStore.of(path).folder) is None and not UndoStore.of(path).folder.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["old bytes", "head", "a note is added"])
def test_a_record_that_was_altered_is_not_believed(tmp_path, kind, where):
    path = write(named(tmp_path, kind), kind)
    record = killed(path)
    data = record.read_bytes()
    length = int.from_bytes(data[12:20], "little")
    if where == "head":  # as sound as the one before
        payload = data[20 : 20 + length].replace(b"fill(5)", b"fill(6)")
        assert payload != data[20 : 20 + length]
        data = data[:8] + framed(b"HEAD", payload) + data[20 + length + 32 :]
    elif where == "old bytes":
        at = data.index(b"SPAN")
        stop = at + 12 + int.from_bytes(data[at + 4 : at + 12], "little")
        payload = data[at + 12 : stop - 1] + bytes([data[stop - 1] ^ 1])
        data = data[:at] + framed(b"SPAN", payload) + data[stop + 32 :]
    else:
        files = json.loads(data[20 : 20 + length])["files"]
        note = [{"size": 1, "witness": "x"} for _ in files]
        data += framed(b"FILE", json.dumps(note).encode())
    record.write_bytes(data)
    before = weights(path)
    if where == "a note is added":  # it does not count, and the rest is as it was
        assert len(recover(path)) == 1
        return
    for read in (READS["open"], READS["load"], history):
        with pytest.raises(BadCheckpoint, match="not known as a patch that you made here"):
            read(path)
    assert weights(path) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_cannot_be_used_at_another_place_or_again(tmp_path, kind):
    (tmp_path / "one").mkdir()
    path = write(named(tmp_path / "one", kind), kind)
    record = killed(path)
    kept = record.read_bytes()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    copy = named(tmp_path / "two", kind)
    before = weights(copy)
    with pytest.raises(BadCheckpoint, match="not known"):
        pm.open(copy)
    assert weights(copy) == before
    pm.open(path).close()
    pm.patch(path, silence)
    before = weights(path)
    only_record(path, DONE).unlink()
    record.write_bytes(kept)  # what was its own a moment ago
    with pytest.raises(BadCheckpoint, match="not known"):
        pm.open(path)
    assert weights(path) == before


def test_a_done_record_that_is_renamed_undoes_nothing(tmp_path):
    path = write(tmp_path / "model.safetensors", "safetensors")
    pm.patch(path, silence)
    record = only_record(path, DONE)
    record.rename(record.with_suffix(f".{PENDING}"))
    with pytest.raises(BadCheckpoint, match="not known"):
        pm.open(path)
    assert safetensors.numpy.load_file(path)["bias"].tolist() == [5] * 8


@pytest.mark.parametrize("state", ["missing", "a file", "read-only"])
def test_without_a_state_directory_patches_work_and_are_taken_back_when_asked(tmp_path, monkeypatch, state):
    home = tmp_path / "home"
    if state == "a file":
        home.write_text("")
    elif state == "read-only":
        home.mkdir(mode=0o500)
        if os.geteuid() == 0:
            home.rmdir()
            home.symlink_to("/proc/self")
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state") if state != "missing" else "/dev/null/none")
    folder = tmp_path / "x"
    folder.mkdir()
    path = write(folder / "model.safetensors", "safetensors")
    before = path.read_bytes()
    pm.patch(path, silence)
    assert undo(path).left == 0 and path.read_bytes() == before
    killed(path)
    with pytest.raises(BadCheckpoint, match="not known"):
        pm.open(path)
    assert undo(path).interrupted and path.read_bytes() == before


def test_nobody_else_vouches(tmp_path):
    """A note that others can write says nothing."""
    store = tmp_path / ".undo"
    store.mkdir()
    claims.seal(store, "1 2 3")
    (note,) = [path for path in claims._note(store).parent.iterdir() if path == claims._note(store)]
    assert note.stat().st_mode & 0o777 == 0o600
    note.chmod(0o622)
    assert claims.read(store) is None
    note.chmod(0o600)
    assert claims.read(store) == "1 2 3"
    claims.end(store)


# ---- two models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_undo_does_not_mix_two_models(tmp_path, kind):
    """The second has the first one's size, and its bytes where these were patched."""
    path = write(named(tmp_path, kind), kind)
    pm.patch(path, silence)
    store = UndoStore.of(path).folder
    kept = tmp_path / "kept"
    shutil.move(store, kept)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    write(path, kind, seed=1)
    pm.patch(path, silence)
    shutil.rmtree(store)
    shutil.move(kept, store)
    before = weights(path)
    with pytest.raises(CannotWrite, match=r"nothing was written\n\nhint: .*--force"):
        undo(path)
    assert weights(path) == before and len(history(path)) == 1
    undo(path, force=True)
    if kind != "ocdbt":  # whose manifest is exchanged, and leads to nodes that only the first model had
        assert pm.load(path)["bias"].tolist() == [0] * 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_pending_patch_is_not_taken_back_in_another_model(tmp_path, kind):
    path = write(named(tmp_path, kind), kind)
    killed(path)
    said = claims.read(UndoStore.of(path).folder)
    store, kept = UndoStore.of(path).folder, tmp_path / "kept"
    shutil.move(store, kept)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    write(path, kind, seed=1)
    pm.patch(path, silence)
    shutil.rmtree(store)
    shutil.move(kept, store)
    claims.seal(store, said)
    before = weights(path)
    with pytest.raises(BadCheckpoint, match="is not the one that was patched"):
        pm.open(path)
    assert weights(path) == before
    claims.end(store)


@pytest.mark.parametrize("kind", KINDS)
def test_a_true_copy_can_be_taken_back_and_so_can_one_whose_files_are_numbered_anew(tmp_path, kind):
    path = write(named(tmp_path, kind), kind)
    before = weights(path)
    pm.patch(path, silence)
    aside = tmp_path / "aside"
    shutil.move(path, aside)
    shutil.copytree(aside, path) if aside.is_dir() else shutil.copy(aside, path)
    shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
    undo(path)
    assert weights(path) == before
    killed(path)
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if ".undo" not in file.parts]:
        if file.is_file():  # as after a restart of an overlay file system
            shutil.copy(file, tmp_path / "file")
            (tmp_path / "file").rename(file)
    pm.open(path).close()
    assert weights(path) == before


@pytest.mark.parametrize("kind", KINDS)
def test_patches_still_stack(tmp_path, kind):
    path = write(named(tmp_path, kind), kind)
    states = [weights(path)]
    for selector in ("bias", "w1", "**"):
        pm.patch(path, lambda t, selector=selector: pm.at(t, selector).add(1))
        states.append(weights(path))
    for state in reversed(states[:-1]):
        undo(path)
        assert weights(path) == state


def test_the_witness_of_a_large_file_sees_a_layer_that_differs(tmp_path):
    layers = {f"w{n:02}": np.zeros(1 << 18, "float32") for n in range(24)}
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(layers | {"bias": np.zeros(8, "float32")}, path)
    pm.patch(path, silence)
    patched = safetensors.numpy.load_file(path)
    for n in (1, 7, 13, 22):  # all layers are frozen but one
        safetensors.numpy.save_file(patched | {f"w{n:02}": np.ones(1 << 18, "float32")}, path)
        with pytest.raises(CannotWrite, match=r"is not the file of patch 1"):
            undo(path)
    safetensors.numpy.save_file(patched, path)
    assert undo(path).left == 0


# ---- what takes a name anew -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "torch", "npz", "msgpack", "shards", "ocdbt", "zarr"])
@pytest.mark.parametrize("writer", ["save", "Checkpoint.save", "the command line"])
def test_what_replaces_a_checkpoint_retires_its_records(tmp_path, kind, writer):
    path = write(named(tmp_path, kind), kind)
    pm.patch(path, silence)
    (tmp_path / "other").mkdir()
    other = write(named(tmp_path / "other", kind), kind, seed=1)
    if writer == "save" and kind in ("safetensors", "npz", "msgpack"):
        pm.save(tree(1) | {"bias": np.full(8, 5, "float32")}, path, force=True)
    elif writer == "the command line":
        done = CliRunner().invoke(cli, ["fill", str(other), "bias", "5", "-o", str(path), "--force"])
        assert done.exit_code == 0, done.output
    else:
        pm.at(pm.open(other), "bias").fill(5).save(path, force=True)
    assert history(path) == [] and not UndoStore.of(path).folder.exists()
    with pytest.raises(CannotWrite, match="nothing to take back"):
        undo(path)
    assert pm.load(path)["bias"].tolist() == [5] * 8


def test_a_new_file_in_the_place_of_one_that_was_removed_has_no_past(tmp_path):
    path = write(tmp_path / "model.safetensors", "safetensors")
    pm.patch(path, silence)
    path.unlink()
    pm.save(tree(1), path)
    assert history(path) == []


def test_a_shard_that_is_replaced_retires_the_records_of_its_folder_that_are_about_it(tmp_path):
    path = write(tmp_path / "model", "shards")
    shard = path / "model-1.safetensors"
    names = set(safetensors.numpy.load_file(shard))
    inside, outside = ("norm", "bias") if "norm" in names else ("bias", "norm")
    for name in (inside, outside):
        pm.patch(path, lambda t, name=name: pm.at(t, name).fill(3))
    old = safetensors.numpy.load_file(shard)
    pm.save(dict(old), shard, force=True)
    assert [row.edit for row in history(path)] == [f"fill(3) at {outside}"]
    assert undo(path).left == 0


def test_a_save_over_a_file_that_is_being_patched_is_refused(tmp_path):
    path = write(tmp_path / "model.safetensors", "safetensors")
    pm.patch(path, silence)
    before = path.read_bytes()
    with locked(UndoStore(path).lock, name=path), pytest.raises(Busy, match="another program is writing"):
        pm.save(tree(1), path, force=True)
    assert path.read_bytes() == before and len(history(path)) == 1


def test_a_save_that_fails_keeps_the_records(tmp_path, monkeypatch):
    path = write(tmp_path / "model.safetensors", "safetensors")
    pm.patch(path, silence)

    def failing(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", failing)
        with pytest.raises(CannotWrite, match="disk is full"):
            pm.save(tree(1), path, force=True)
    assert len(history(path)) == 1 and undo(path).left == 0


@pytest.mark.parametrize("call", [pm.history, pm.undo, lambda path: pm.patch(path, lambda tree: tree)])
@pytest.mark.parametrize("name", ["m.safetensors", "m", "m.safetensors.index.json"])
def test_a_folder_that_one_may_not_enter(tmp_path, monkeypatch, call, name):
    def closed(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", closed)
    with pytest.raises(CannotRead, match="Permission denied"):
        call(tmp_path / name)
