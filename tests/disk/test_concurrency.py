"""Several programs at one checkpoint: one writer at a time, readers see the old state or the new one."""

import contextlib
import fcntl
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import paramend as pm
from paramend.checkpoints.patching import patch
from paramend.disk import publishing
from paramend.disk.locks import hold
from paramend.disk.permissions import NEW_FILE, NEW_FOLDER
from paramend.disk.publishing import published
from paramend.errors import BadCheckpoint, Busy, CannotWrite


def write(path, value=0.0, size=200_000, leaves=3):
    safetensors.numpy.save_file({f"w{i}": np.full(size, value, "float32") for i in range(leaves)}, path)
    return path


def values(path):
    return {float(x) for array in safetensors.numpy.load_file(path).values() for x in np.unique(array)}


def together(code, *arguments):
    """Runs programs at the same time, one for each tuple of arguments, and gives what each printed."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    programs = [
        subprocess.Popen([*command, *map(str, each)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for each in arguments
    ]
    ends = [program.communicate(timeout=600) for program in programs]
    for program, (_, said) in zip(programs, ends, strict=True):
        assert not program.returncode, said
    return [out.split() for out, _ in ends]


PATCHER = """
    import sys, time
    import paramend as pm
    done = 0
    while done < int(sys.argv[2]):
        try:
            pm.patch(sys.argv[1], lambda t: pm.at(t, "**").add(1))
            done += 1
        except pm.errors.Busy as error:
            assert "another program" in str(error) and "try again" in error.hint, error
            time.sleep(0.002)
"""


def test_patches_of_several_programs_take_turns(tmp_path):
    path = write(tmp_path / "x.safetensors")
    together(PATCHER, *[(path, 6)] * 3)
    assert values(path) == {18.0}
    assert len(pm.history(path)) == 18
    for _ in range(18):
        pm.undo(path)
    assert values(path) == {0.0}


REWRITER = """
    import sys
    import numpy as np, safetensors.numpy
    import paramend as pm
    for turn in range(int(sys.argv[3])):
        try:
            pm.at(pm.open(sys.argv[1]), "w0").add(0).save(sys.argv[2], force=True)
        except (pm.errors.BadCheckpoint, pm.errors.Busy) as error:
            print("refused")
            assert "nothing was written" in str(error), error
        else:
            found = {float(x) for a in safetensors.numpy.load_file(sys.argv[2]).values() for x in np.unique(a)}
            assert len(found) == 1, found
            print("written")
"""


def test_a_rewrite_never_copies_half_a_patch(tmp_path):
    path = write(tmp_path / "x.safetensors")
    patcher, rewriter = (textwrap.dedent(code).strip() for code in (PATCHER, REWRITER))
    both = f"import sys\nwhich = sys.argv.pop(1)\nexec({patcher!r} if which == 'patch' else {rewriter!r})"
    _, said = together(both, ("patch", path, 25), ("rewrite", path, tmp_path / "out.safetensors", 40))
    assert len(said) == 40
    assert values(path) == {25.0}


def test_a_rewrite_is_refused_while_a_patch_is_being_made(tmp_path):
    path = write(tmp_path / "x.safetensors")
    said = []

    def heard(event):
        if event.at:  # bytes of the file itself
            with contextlib.ExitStack() as stack:
                error = stack.enter_context(pytest.raises(Busy, match="a patch of it is being made at this moment"))
                checkpoint = stack.enter_context(pm.open(path))
                pm.at(checkpoint, "w0").zero().save(tmp_path / "out.safetensors")
            said.append(error.value)

    patch(path, lambda t: pm.at(t, "**").add(1), progress=heard)
    assert said and "000001.pending" in str(said[0]) and "nothing was written" in str(said[0])
    assert said[0].hint == "try again when it is done"
    assert not (tmp_path / "out.safetensors").exists()


def test_a_patch_during_a_rewrite_stops_the_rewrite(tmp_path):
    path = write(tmp_path / "x.safetensors")
    checkpoint = pm.at(pm.open(path), "w2").add(1)
    patched = []

    def heard(event):
        if not patched:
            patched.append(patch(path, lambda t: pm.at(t, "w1").fill(7)))

    with pytest.raises(BadCheckpoint, match="another program changed it since it was opened; nothing was written"):
        checkpoint.save(tmp_path / "out.safetensors", progress=heard)
    assert patched and sorted(path.name for path in tmp_path.iterdir()) == [".x.safetensors.undo", "x.safetensors"]


def test_a_second_writer_of_an_output_is_told(tmp_path):
    path, out = write(tmp_path / "x.safetensors"), tmp_path / "out.safetensors"
    write(out, 5.0)
    checkpoint = pm.at(pm.open(path), "w2").add(1)
    said, seen = [], []

    def heard(event):
        seen.append(values(out))  # a reader finds the old file
        with pytest.raises(Busy, match=r"another program is writing it at this moment .*\.paramend-.*\.tmp") as error:
            checkpoint.save(out, force=True)
        said.append(error.value)

    checkpoint.save(out, force=True, progress=heard)
    assert said and said[0].code == "busy" and said[0].hint == "try again when it is done, or write to another name"
    assert all(found == {5.0} for found in seen)
    assert values(out) == {0.0, 1.0}


SAVER = """
    import sys
    import paramend as pm
    for turn in range(int(sys.argv[4])):
        try:
            pm.at(pm.open(sys.argv[1]), "**").fill(float(sys.argv[3])).save(sys.argv[2], force=True)
        except pm.errors.Busy:
            print("busy")
        else:
            print("written")
"""


@pytest.mark.parametrize("folder", [False, True])
def test_programs_that_write_one_output(tmp_path, folder):
    path = write(tmp_path / "x.safetensors")
    out = tmp_path / ("out" if folder else "out.safetensors")
    target = f"{out}/" if folder else out
    said = together(SAVER, *((path, target, value, 12) for value in (1.0, 2.0, 3.0)))
    assert "written" in {word for each in said for word in each}
    assert len(values(out / "model.safetensors" if folder else out)) == 1
    pm.at(pm.open(path), "**").fill(4.0).save(target, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([out.name, "x.safetensors"])


@pytest.mark.parametrize("folder", [True, False], ids=["folder", "file"])
@pytest.mark.parametrize("moment", ["open", "flock", "locked"])
def test_a_temporary_that_is_swept_away_before_it_is_locked_is_made_anew(tmp_path, monkeypatch, folder, moment):
    """Between the making of a temporary and its lock another writer takes it for what a killed one left behind."""
    out, turns, held = tmp_path / "out", [], []

    def whole(text):
        with published(out, force=True, access=NEW_FOLDER if folder else NEW_FILE, folder=folder) as temporary:
            (temporary / "x" if folder else temporary).write_text(text)

    def another():
        """The other writer, from its sweep to its end, or only to the moment in which it has the lock."""
        if turns or not (found := list(tmp_path.glob(".paramend-*.tmp"))):
            return
        turns.append(found)
        if moment == "locked":
            held.append(os.open(found[0], os.O_RDONLY))
            assert hold(held[0])
        else:
            whole("other")
            assert not found[0].exists()

    def before(call):
        def wrapped(*args, **kwargs):
            another()
            return call(*args, **kwargs)

        return wrapped

    if moment == "open":
        monkeypatch.setattr(os, "open", before(os.open))
    else:
        monkeypatch.setattr(fcntl, "flock", before(fcntl.flock))
    whole("mine")
    monkeypatch.undo()
    assert len(turns) == (0 if (folder, moment) == (False, "open") else 1)  # a file is made and opened at once
    assert (out / "x" if folder else out).read_text() == "mine"
    for descriptor in held:
        os.close(descriptor)
    whole("last")  # sweeps what the other writer, had it been killed, would have left
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_old_state_that_a_living_writer_put_aside_stays_its_own(tmp_path, monkeypatch):
    """Where names cannot be exchanged, nothing has the name for a moment. What a killed writer left then is mended."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "x").write_text("old")
    monkeypatch.setattr(publishing, "_rename_at_once", lambda *args: False)
    rename, told = Path.rename, []

    def renamed(path, target):
        if Path(target) == out and not told:
            assert not out.exists()
            with pytest.raises(Busy) as error, published(out, force=True, access=NEW_FOLDER, folder=True):
                pass
            told.append(error.value)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed)
    with published(out, force=True, access=NEW_FOLDER, folder=True) as temporary:
        (temporary / "x").write_text("new")
    assert told and (out / "x").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- hub cache -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path):
    """A model as huggingface_hub keeps it: a snapshot of symbolic links to blobs, which other revisions share."""
    home = tmp_path / "hub" / "models--me--model"
    blobs, snapshot = home / "blobs", home / "snapshots" / "0123abcd"
    for made in (blobs, snapshot, home / "refs"):
        made.mkdir(parents=True)
    (home / "refs" / "main").write_text("0123abcd")
    write(blobs / "aaaa", 1.0)
    (blobs / "bbbb").write_text("{}")
    for name, blob in (("model.safetensors", "aaaa"), ("config.json", "bbbb")):
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    return snapshot


def test_a_snapshot_opens_and_is_saved_as_files(hub, tmp_path):
    pm.at(pm.open(hub), "w0").zero().save(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert values(tmp_path / "out" / "model.safetensors") == {0.0, 1.0}
    assert values(hub / "model.safetensors") == {1.0}


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_a_snapshot_is_not_patched(hub, tmp_path, name):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CannotWrite, match="symbolic link, as in a hub cache") as error:
        pm.patch(hub / name, lambda t: pm.at(t, "w0").zero())
    assert error.value.hint == "write a new file instead: -o OUT"
    assert values(hub / "model.safetensors") == {1.0} and sorted(tmp_path.rglob("*")) == before
