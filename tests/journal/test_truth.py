"""What an error says of the files is so, whichever call of the system fails and whatever other programs do."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import paramend as pm
from paramend.disk import publishing
from paramend.errors import Busy, CannotWrite, ParamendError
from paramend.journal.records import DONE, PENDING, Record
from paramend.journal.store import UndoStore
from paramend.journal.undo import drop, history, recover, undo

CALLS = (
    "open",
    "write",
    "pwrite",
    "fsync",
    "rename",
    "replace",
    "unlink",
    "mkdir",
    "rmdir",
    "ftruncate",
    "link",
    "close",
)


def tree(seed=0, leaves=4):
    rng = np.random.default_rng(seed)
    return {f"w{n}": rng.normal(size=40).astype("float32") for n in range(leaves)} | {"bias": np.zeros(8, "float32")}


def make(folder, kind, leaves=4):
    """A model of a kind in a folder; its path."""
    if kind == "file":
        safetensors.numpy.save_file(tree(leaves=leaves), folder / "model.safetensors")
        return folder / "model.safetensors"
    if kind == "torch":
        import torch

        torch.save({name: torch.from_numpy(value) for name, value in tree(leaves=leaves).items()}, folder / "model.pt")
        return folder / "model.pt"
    if kind == "shards":
        pm.save(tree(leaves=leaves), f"{folder}/model/", max_shard_size=300)
        return folder / "model"
    import orbax.checkpoint as ocp

    ocp.PyTreeCheckpointer(use_ocdbt=kind == "ocdbt").save(folder / "model.orbax", tree(leaves=leaves))
    return folder / "model.orbax"


KINDS = ["file", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("torch", "shards", "ocdbt", "zarr"))]


def patched(path):
    pm.patch(path, lambda t: pm.at(t, "**").fill(5))


def weights(path):
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {
        str(file.relative_to(path.parent)): file.read_bytes()
        for file in files
        if ".undo" not in str(file.relative_to(path.parent))
    }


class Fails:
    """From a chosen call on, one call of the system fails, or all of them."""

    def __init__(self, monkeypatch, at, *, lasts=False, only=None):
        self.count, self.at, self.lasts, self.failed = 0, at, lasts, ""
        for name in only or CALLS:
            monkeypatch.setattr(os, name, self.wrapped(name, getattr(os, name)))

    def wrapped(self, name, real):
        def run(*args, **options):
            reads = name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if reads or "/patches/" in str(args[0]):  # the note of this user: without it, a patch goes on
                return real(*args, **options)
            self.count += 1
            if self.count == self.at or (self.lasts and self.count > self.at > 0):
                self.failed = name
                if name == "close":
                    real(*args)
                raise OSError(errno.EIO, "Input/output error")
            return real(*args, **options)

        return run


def everywhere(tmp_path, kind, begin, job, *, lasts):
    """(path, state before, state when all goes well, error) for each call of the system that fails within a job."""
    (tmp_path / "template").mkdir()
    name = make(tmp_path / "template", kind, leaves=2).name
    right = None
    for at in range(500):  # 0: nothing fails
        folder = tmp_path / f"run{at}"
        shutil.copytree(tmp_path / "template", folder)
        path, error = folder / name, None
        begin(path)
        before = weights(path)
        with pytest.MonkeyPatch.context() as patched:
            fails = Fails(patched, at, lasts=lasts)
            try:
                job(path)
            except ParamendError as caught:
                error = caught
        if right is None:
            right = weights(path)
        elif not fails.failed:
            assert at > 10
            return
        yield path, before, right, error
        shutil.rmtree(folder)
    raise AssertionError("it never ended")


@pytest.mark.parametrize("lasts", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_that_fails_says_what_it_left(tmp_path, kind, lasts):
    for path, before, _, error in everywhere(tmp_path, kind, lambda path: None, patched, lasts=lasts):
        if error is None:
            assert all((leaf == 5).all() for leaf in pm.load(path).values()) and len(history(path)) == 1
        elif str(error).partition("\n")[0].endswith("nothing was changed"):
            assert weights(path) == before
            assert history(path) == [] and weights(path) == before
        else:
            assert "put back only in part" in str(error) or "the old bytes are back in place, but" in str(error)
            assert ("are back" in str(error)) == (weights(path) == before) or "only in part" in str(error)
            recover(path)
            if "--force" in error.hint:
                undo(path, force=True)
            assert weights(path) == before and history(path) == []


@pytest.mark.parametrize("lasts", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_undo_that_fails_says_what_it_left(tmp_path, kind, lasts):
    for path, before, right, error in everywhere(tmp_path, kind, patched, undo, lasts=lasts):
        said = "" if error is None else str(error).partition("\n")[0]
        if error is None:
            assert weights(path) == right and history(path) == []
        elif said.endswith("nothing was changed"):
            assert weights(path) == before
            assert len(history(path)) == 1 and weights(path) == before  # nor does an open change anything
        else:
            assert "only in part" in said or "old bytes are back in place, but" in said or "undo has begun" in said, (
                said
            )
            assert "are back" not in said or weights(path) == right
            recover(path)
            assert weights(path) == right and history(path) == []


def half(path):
    """A checkpoint whose undo has begun, and was cut short at once."""
    patched(path)
    (found,) = UndoStore.of(path).records(DONE)
    with Record(found) as record:
        record.become_pending()


@pytest.mark.parametrize("lasts", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_recovery_that_fails_says_what_it_left(tmp_path, kind, lasts):
    for path, before, right, error in everywhere(tmp_path, kind, half, lambda path: pm.open(path).close(), lasts=lasts):
        said = "" if error is None else str(error).partition("\n")[0]
        now = weights(path)
        if error is None:
            assert now == right
        elif said.endswith("nothing was changed"):
            assert now == before
        else:
            assert "only in part" in said or ("old bytes are back in place, but" in said and now == right)
        recover(path)
        assert weights(path) == right and history(path) == []


# ---- other programs meanwhile ------------------------------------------------------------------------------------


def at_first_byte(path, act):
    """A listener that acts once, when the first bytes of the checkpoint itself have been written."""
    before, done = weights(path), []

    def heard(event):
        if not done and weights(path) != before:
            done.append(act())

    return heard


@pytest.mark.parametrize("kind", ["file", "torch", "shards"])
def test_the_records_are_removed_in_the_midst_of_a_patch(tmp_path, kind):
    path = make(tmp_path, kind)
    before = weights(path)
    heard = at_first_byte(path, lambda: shutil.rmtree(UndoStore.of(path).folder))
    with pytest.raises(CannotWrite, match=r"No such file or directory.*nothing was changed"):
        pm.patch(path, lambda t: pm.at(t, "**").fill(5), progress=heard)
    assert weights(path) == before and history(path) == []


def test_the_records_are_removed_and_an_edit_raises(tmp_path):
    path = make(tmp_path, "file")
    before = weights(path)

    def gone():
        shutil.rmtree(UndoStore.of(path).folder)
        raise ValueError("of the listener")

    with pytest.raises(ValueError, match="of the listener"):
        pm.patch(path, lambda t: pm.at(t, "**").fill(5), progress=at_first_byte(path, gone))
    assert weights(path) == before


@pytest.mark.parametrize("how", ["replaced", "renamed", "removed"])
def test_a_file_that_loses_its_name_in_the_midst_of_a_patch(tmp_path, how):
    """What was opened gets its old bytes back; what has the name now is another program's, and is left alone."""
    path = make(tmp_path, "file")
    before = path.read_bytes()
    kept = tmp_path / "kept"
    os.link(path, tmp_path / "other")
    (tmp_path / "other").unlink()
    safetensors.numpy.save_file(tree(1), tmp_path / "new")
    new = (tmp_path / "new").read_bytes()

    def act():
        if how == "removed":
            kept.hardlink_to(path)
            path.unlink()
        else:
            path.rename(kept)
        if how == "replaced":
            (tmp_path / "new").rename(path)

    with pytest.raises(
        Busy, match="replaced, renamed or removed it meanwhile; the patch was taken back in the file that"
    ):
        pm.patch(path, lambda t: pm.at(t, "**").fill(5), progress=at_first_byte(path, act))
    assert kept.read_bytes() == before
    assert not path.exists() if how != "replaced" else path.read_bytes() == new
    assert not UndoStore(path).records(PENDING, DONE)


def test_an_error_after_another_file_took_the_name(tmp_path):
    """Old bytes never go into a file that was not patched."""
    path = make(tmp_path, "file")
    before = path.read_bytes()
    safetensors.numpy.save_file(tree(1), tmp_path / "new")
    new = (tmp_path / "new").read_bytes()

    def act():
        path.rename(tmp_path / "kept")
        (tmp_path / "new").rename(path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pm.patch(path, lambda t: pm.at(t, "**").fill(5), progress=at_first_byte(path, act))
    assert path.read_bytes() == new and (tmp_path / "kept").read_bytes() == before


def test_a_file_that_is_replaced_in_the_midst_of_an_undo(tmp_path):
    path = make(tmp_path, "file")
    before = path.read_bytes()
    patched(path)
    safetensors.numpy.save_file(tree(1), tmp_path / "new")
    new = (tmp_path / "new").read_bytes()

    def act():
        path.rename(tmp_path / "kept")
        (tmp_path / "new").rename(path)

    with pytest.raises(
        Busy, match="the old bytes were put back into the file that was there, and what has the name now"
    ):
        undo(path, progress=at_first_byte(path, act))
    assert path.read_bytes() == new and (tmp_path / "kept").read_bytes() == before


@pytest.mark.parametrize("kind", ["file", "shards", pytest.param("ocdbt", marks=pytest.mark.slow)])
def test_a_listener_that_raises_in_an_undo(tmp_path, kind):
    """As after Ctrl-C, the undo is done."""
    path = make(tmp_path, kind)
    before = weights(path)
    patched(path)

    def heard(event):
        raise ValueError("of the listener")

    with pytest.raises(ValueError, match="of the listener"):
        undo(path, progress=heard)
    assert weights(path) == before and history(path) == []


@pytest.mark.slow
def test_a_file_of_orbax_that_another_program_replaces_in_the_midst_of_an_exchange(tmp_path, monkeypatch):
    path = make(tmp_path, "zarr")
    before, sync = weights(path), []
    real = os.rename

    def renamed(old, new, **options):
        if str(new).startswith(str(path)) and ".undo" not in str(new) and not sync:
            sync.append(Path(new))
            others = sorted(file for file in path.rglob("*") if file.name == "0" and ".undo" not in file.parts)
            others.remove(Path(new))
            others[-1].unlink()
            others[-1].write_bytes(b"another")
            sync.append(others[-1])
        return real(old, new, **options)

    monkeypatch.setattr(os, "rename", renamed)
    with pytest.raises(ParamendError, match="another program"):
        patched(path)
    monkeypatch.undo()
    after = weights(path)
    assert {name for name in before if after[name] != before[name]} == {str(sync[1].relative_to(tmp_path))}


# ---- records that are dropped ------------------------------------------------------------------------------------


def test_a_drop_that_fails_says_how_many_are_left(tmp_path, monkeypatch):
    path = make(tmp_path, "file")
    for value in range(3):
        pm.patch(path, lambda t, value=value: pm.at(t, "bias").fill(value))
    real = Path.unlink

    def unlink(file, **options):
        if file.name == f"000002.{DONE}":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        real(file, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(
        CannotWrite, match=r"forgot 1 undo record, and 2 are left: .*not permitted; the checkpoint itself"
    ):
        drop(path)
    assert len(history(path)) == 2


# ---- outputs ------------------------------------------------------------------------------------------------------


OUTPUTS = ["out.pt", *(pytest.param(out, marks=pytest.mark.slow) for out in ("out.safetensors", "out/"))]


def seen(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("lasts", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize(
    "out", ["out.pt", *(pytest.param(out, marks=pytest.mark.slow) for out in ("out.safetensors", "out/"))]
)
@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
def test_a_save_that_fails_says_what_it_left(tmp_path, out, there, lasts):
    """With a record: in the header, in the directory, or in a file of its own beside one that has a record already."""
    source = make(tmp_path, "torch" if out == "out.pt" else "file")
    folder = tmp_path / "folder"
    for at in range(300):
        folder.mkdir()
        if there:
            pm.at(pm.open(source), "bias").fill(1).save(f"{folder}/{out}", record=True)
        before, error = seen(folder), None
        with pytest.MonkeyPatch.context() as patched_:
            fails = Fails(patched_, at, lasts=lasts)
            try:
                pm.at(pm.open(source), "bias").fill(5).save(f"{folder}/{out}", record=True, force=there)
            except ParamendError as caught:
                error = caught
        if at and not fails.failed:
            assert at > 5
            return
        said = "" if error is None else str(error).partition("\n")[0]
        if "its record is now" in said:
            _, aside, place = error.hint.split()
            shutil.move(aside, place)
        if said.endswith("nothing was written") or "the file is as it was" in said:
            after = seen(folder)
            assert {name: after[name] for name in before} == before
            assert lasts or after == before or "the file is as it was" in said
        else:
            assert not error or "was written, but" in said
            assert set(pm.load(folder / out)["bias"].tolist()) == {5}
            lost = "record was not" in said
            found = None if lost and out == "out.pt" else pm.record(folder / out)
            assert lost or (found is not None and found.leaves[0].edit == "fill(5)")
            if found is not None and not lost:
                pm.verify_record(folder / out)
        shutil.rmtree(folder)
    raise AssertionError("it never ended")


def test_a_folder_that_can_be_put_aside_but_not_replaced_is_named(tmp_path, monkeypatch):
    source = make(tmp_path, "file")
    pm.open(source).save(f"{tmp_path}/out/")
    monkeypatch.setattr(publishing, "_rename_at_once", lambda *args: False)
    real = os.rename

    def renamed(old, new, **options):
        if Path(new).name == "out":
            raise OSError(errno.EIO, "Input/output error")
        real(old, new, **options)

    monkeypatch.setattr(os, "rename", renamed)
    with pytest.raises(CannotWrite, match=r"what was there is now .*\.old\n\nhint: mv .*\.old .*out") as error:
        pm.at(pm.open(source), "bias").fill(5).save(f"{tmp_path}/out/", force=True)
    monkeypatch.undo()
    _, aside, out = error.value.hint.split()
    assert set(pm.load(aside)["bias"].tolist()) == {0} and not Path(out).exists()


def test_a_file_that_was_published_and_a_folder_that_cannot_be_synced(tmp_path, monkeypatch):
    source, out = make(tmp_path, "file"), tmp_path / "out.safetensors"

    def failing(folder):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(publishing, "sync_folder", failing)
    with pytest.raises(
        CannotWrite, match=r"was written, but it is not certain to outlast a power failure: Input/output"
    ):
        pm.open(source).save(out)
    assert out.read_bytes() == source.read_bytes() or set(pm.load(out)) == set(pm.load(source))
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name, out.name]
