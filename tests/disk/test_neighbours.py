"""Files that share a folder: a patch of one is no matter of the others; what is replaced leaves nothing behind."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import safetensors.numpy

import paramend as pm
from paramend.disk import publishing
from paramend.errors import Busy, CannotWrite
from paramend.journal.records import DONE, PENDING
from paramend.journal.store import UndoStore
from paramend.journal.undo import history

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
    pm.patch(sys.argv[1], lambda t: pm.at(t, sys.argv[2]).fill(5))
"""


def killed(path, selector="**"):
    """A patch that is killed when its bytes are in place and its record is not done."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(DIES), str(path), selector], check=False)
    assert done.returncode == 9 and UndoStore.of(path).records(PENDING)


def tree(value=1.0):
    return {"a": np.full(4000, value, "float32"), "b": np.full(10, value, "float32")}


def file(folder, name, value=1.0):
    safetensors.numpy.save_file(tree(value), folder / name)
    return folder / name


def shards(folder, value=1.0):
    pm.save(tree(value), f"{folder}/", max_shard_size=16_000)
    return folder


# ---- patches beside --------------------------------------------------------------------------------------------------


def test_a_half_patch_of_a_neighbour_stops_nothing(tmp_path):
    one, two = file(tmp_path, "one.safetensors"), file(tmp_path, "two.safetensors")
    killed(two)
    half = two.read_bytes()
    pm.at(pm.open(one), "a").fill(2).save(tmp_path / "out.safetensors")
    pm.patch(one, lambda t: pm.at(t, "a").fill(3))
    pm.undo(one)
    assert two.read_bytes() == half and UndoStore(two).records(PENDING)  # nor is it any matter of theirs
    assert pm.load(two)["a"][0] == 1


@pytest.mark.parametrize("inside", [False, True], ids=["files", "shards"])
def test_patches_of_neighbours_while_a_file_is_saved(tmp_path, inside):
    if inside:
        folder = shards(tmp_path / "x")
        one, two = (folder / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
        patched, selector = folder, next(iter(pm.load(two)))
    else:
        one, two = file(tmp_path, "one.safetensors"), file(tmp_path, "two.safetensors")
        patched, selector = two, "b"
    done = []

    def heard(event):
        if not done:
            done.append(pm.patch(patched, lambda t: pm.at(t, selector).add(1)))

    with pm.open(one) as checkpoint:
        pm.at(checkpoint, "**").add(0).save(tmp_path / "out.safetensors", progress=heard)
    assert done and (tmp_path / "out.safetensors").read_bytes() == one.read_bytes()


def test_a_save_while_a_neighbour_is_being_patched(tmp_path):
    one, two = file(tmp_path, "one.safetensors"), file(tmp_path, "two.safetensors")
    done = []

    def heard(event):
        if event.at and not done:
            assert UndoStore(two).records(PENDING)
            done.append(pm.open(one).save(tmp_path / "out.safetensors"))

    pm.patch(two, lambda t: pm.at(t, "**").add(1), progress=heard)
    assert done and (tmp_path / "out.safetensors").read_bytes() == one.read_bytes()


@pytest.mark.parametrize("link", [False, True])
def test_what_is_read_still_counts(tmp_path, link):
    """A patch of the file itself, of the folder that it is a part of, or of the file that a link leads to."""
    folder = shards(tmp_path / "x")
    one = folder / "model-00001-of-00002.safetensors"
    name = next(iter(pm.load(one)))
    if link:
        one, link = tmp_path / "link.safetensors", one
        one.symlink_to(link)
    for patched in (folder, link or one):
        with pm.open(one) as checkpoint:
            heard = []

            def patch(event, patched=patched, heard=heard):
                if not heard:
                    heard.append(pm.patch(patched, lambda t: pm.at(t, name).add(1)))

            with pytest.raises((Busy, pm.errors.BadCheckpoint), match="nothing was written"):
                pm.at(checkpoint, "**").add(0).save(tmp_path / "out.safetensors", progress=patch)
        pm.undo(patched)


def test_a_half_patch_of_other_shards_of_a_folder(tmp_path, monkeypatch):
    """One that may not be taken back unasked stops those who open what it is about."""
    folder = shards(tmp_path / "x")
    one, two = (folder / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    killed(folder, next(iter(pm.load(two))))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another's"))
    pm.open(one).close()
    pm.open(one).save(tmp_path / "out.safetensors")
    pm.patch(one, lambda t: pm.at(t, "**").fill(3))
    pm.undo(one)
    for path in (two, folder):
        with pytest.raises(pm.errors.BadCheckpoint, match="not known as a patch that you made here"):
            pm.open(path)
    pm.save({"new": np.ones(3)}, folder / "other.safetensors")


# ---- over what was half patched --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "shards", pytest.param("orbax", marks=pytest.mark.slow)])
@pytest.mark.parametrize("own", [True, False])
def test_a_save_over_what_was_half_patched(tmp_path, monkeypatch, kind, own):
    path = (
        file(tmp_path, "x.safetensors")
        if kind == "file"
        else shards(tmp_path / "x")
        if kind == "shards"
        else tmp_path / "x.orbax"
    )
    if kind == "orbax":
        pm.save(tree(), path)
    killed(path)
    if not own:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another's"))
    pm.save(tree(2.0), f"{path}/" if kind == "shards" else path, force=True)
    for _ in range(2):
        assert pm.load(path)["a"][0] == 2 and history(path) == []
    pm.patch(path, lambda t: pm.at(t, "a").fill(3))
    assert pm.load(path)["a"][0] == 3


def test_a_save_over_one_shard_of_a_model_that_was_half_patched(tmp_path, monkeypatch):
    """The other shards are put back first; where that may not be done unasked, nothing is written."""
    folder = shards(tmp_path / "x")
    one, two = (folder / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    name = next(iter(pm.load(one)))
    killed(folder)
    with monkeypatch.context() as patched:
        patched.setenv("XDG_STATE_HOME", str(tmp_path / "another's"))
        before = one.read_bytes()
        with pytest.raises(pm.errors.BadCheckpoint, match="not known as a patch that you made here"):
            pm.save({name: np.full_like(tree()[name], 2)}, one, force=True)
        assert one.read_bytes() == before
    pm.save({name: np.full_like(tree()[name], 2)}, one, force=True)
    found = pm.load(folder)
    assert found[name][0] == 2 and found["b" if name == "a" else "a"][0] == 1
    assert two.exists() and history(folder) == []


# ---- second names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", [True, False])
def test_a_new_file_has_one_name_at_every_moment(tmp_path, monkeypatch, exchange):
    """A name that a killed program left beside it, where the system cannot rename without replacing, goes."""
    source, out = file(tmp_path, "x.safetensors"), tmp_path / "out.safetensors"
    names, real = [], publishing._rename_at_once

    def renamed(old, new, flags):
        done = exchange and real(old, new, flags)
        names.append(out.exists() and out.stat().st_nlink)
        return done

    monkeypatch.setattr(publishing, "_rename_at_once", renamed)
    with monkeypatch.context() as patched:
        if not exchange:  # killed at once
            patched.setattr(publishing, "_clear", lambda path: None)
        pm.open(source).save(out)
    assert names == [1 if exchange else False] and out.stat().st_nlink == 2 - exchange
    pm.patch(out, lambda t: pm.at(t, "a").fill(3))
    assert out.stat().st_nlink == 1 and pm.load(out)["a"][0] == 3
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["out.safetensors", "x.safetensors"]


def test_a_second_name_that_somebody_gave_stays(tmp_path):
    path = file(tmp_path, "x.safetensors")
    other = publishing.spare(tmp_path / "y.safetensors")
    other.hardlink_to(path)
    with pytest.raises(CannotWrite, match="2 names"):
        pm.patch(path, lambda t: pm.at(t, "a").fill(3))
    assert other.exists() and pm.load(path)["a"][0] == 1


def test_an_output_that_comes_meanwhile_stays(tmp_path, monkeypatch):
    source, out = file(tmp_path, "x.safetensors"), tmp_path / "out.safetensors"
    for at_once in (publishing._rename_at_once, lambda *args: False):
        monkeypatch.setattr(publishing, "_rename_at_once", at_once)
        with pytest.raises(CannotWrite, match="already exists"):
            pm.open(source).save(out, progress=lambda event: out.write_text("precious"))
        assert out.read_text() == "precious"
        out.unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_records_of_others_in_a_shared_folder(tmp_path):
    """What cannot be read of a neighbour's records is no matter of those who save from another file."""
    one, two = file(tmp_path, "one.safetensors"), file(tmp_path, "two.safetensors")
    pm.patch(two, lambda t: pm.at(t, "a").fill(3))
    (UndoStore(two).folder / f"000002.{PENDING}").write_bytes(b"damaged")
    pm.open(one).save(tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == one.read_bytes() and UndoStore(two).records(DONE)
