"""Whether a file is still the one that was opened: what is put in its place is noticed, what leaves it alone is not."""

import os
import shutil
import time

import numpy as np
import pytest
import safetensors.numpy

import paramend as pm
from paramend.checkpoints import whole
from paramend.disk.identity import changed, check_still, unchanged
from paramend.errors import BadCheckpoint


def write(path, value=0.0, leaves=3):
    safetensors.numpy.save_file({f"w{i}": np.full(200_000, value, "float32") for i in range(leaves)}, path)
    return path


def overwritten(path, value):
    """Writes other values into the very same file, and puts its time of modification back."""
    then, data = path.stat(), bytearray(path.read_bytes())
    data[-2_400_000:] = np.full(600_000, value, "float32").tobytes()
    while path.stat().st_ctime_ns == then.st_ctime_ns:  # the clock of the file system may be coarse
        time.sleep(0.002)
        with path.open("r+b") as file:
            file.write(data)
        os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))
    now = path.stat()
    assert (now.st_ino, now.st_size, now.st_mtime_ns) == (then.st_ino, then.st_size, then.st_mtime_ns)


def other_of_the_same_size(path):
    data = path.read_bytes()
    path.rename(path.with_name("aside"))
    path.write_bytes(data)


def a_byte_more(path):
    then = path.stat()
    with path.open("ab") as file:
        file.write(b"x")
    os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))


@pytest.mark.parametrize(
    "does",
    [
        lambda path: overwritten(path, 1.0),
        other_of_the_same_size,
        a_byte_more,
        lambda path: os.utime(path, (1, 1)),
        lambda path: path.unlink(),
    ],
    ids=["overwritten, time put back", "another file", "longer, time put back", "touched", "removed"],
)
def test_another_file_is_noticed(tmp_path, does):
    path = write(tmp_path / "x.safetensors")
    then = path.stat()
    does(path)
    assert not path.exists() or not unchanged(then, path.stat())
    with pytest.raises(BadCheckpoint) as error:
        check_still({path: then})
    assert str(error.value) == str(changed(path))


@pytest.mark.parametrize(
    "does",
    [
        lambda path: None,
        lambda path: path.read_bytes(),
        lambda path: path.chmod(0o600),
        lambda path: path.with_name("second").hardlink_to(path),
        lambda path: (path.with_name("second").hardlink_to(path), path.chmod(0o400)),
    ],
    ids=["nothing", "read", "permissions", "a second name", "both"],
)
def test_what_leaves_the_bytes_alone_is_no_change(tmp_path, does):
    path = write(tmp_path / "x.safetensors")
    path.chmod(0o644)
    then = path.stat()
    time.sleep(0.02)
    does(path)
    check_still({path: then})


def test_names_of_a_file_with_several_come_and_go(tmp_path):
    path = write(tmp_path / "x.safetensors")
    (tmp_path / "second").hardlink_to(path)
    then = path.stat()
    time.sleep(0.02)
    (tmp_path / "third").hardlink_to(path)
    (tmp_path / "third").unlink()
    check_still({path: then})
    (tmp_path / "second").unlink()
    check_still({path: then})


# ---- each that asks ------------------------------------------------------------------------------------------------


def test_a_source_overwritten_in_mid_save_is_not_copied_half_and_half(tmp_path):
    path, done = write(tmp_path / "x.safetensors"), []

    def heard(event):
        if not done:
            done.append(overwritten(path, 7.0))

    with pm.open(path) as checkpoint, pytest.raises(BadCheckpoint, match="another program changed it"):
        pm.at(checkpoint, "w1").fill(2).save(tmp_path / "out.safetensors", progress=heard)
    assert done and sorted(entry.name for entry in tmp_path.iterdir()) == ["x.safetensors"]


@pytest.mark.parametrize(
    "kind", ["a compressed file", "a donor", "a sidecar", pytest.param("orbax", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("edited", [False, True])
def test_any_file_that_is_read_is_looked_at_again(tmp_path, kind, edited):
    """Also one whose leaves are not bytes in it, one of which a leaf is taken, one beside the weights."""
    tree, victim = {f"w{n}": np.full(200_000, float(n), "float32") for n in range(3)}, tmp_path / "x.npz"
    if kind == "a compressed file":
        np.savez_compressed(victim, **tree)
        made = pm.open(victim)
    elif kind == "orbax":
        import orbax.checkpoint as ocp

        ocp.PyTreeCheckpointer(use_ocdbt=False).save(tmp_path / "x", tree)
        victim, made = tmp_path / "x" / "w2" / "0", pm.open(tmp_path / "x")
    elif kind == "a donor":
        np.savez_compressed(victim, **tree)
        made, _ = pm.graft(pm.open(write(tmp_path / "x.safetensors")), pm.open(victim))
    else:
        (tmp_path / "x").mkdir()
        write(tmp_path / "x" / "model.safetensors")
        victim, made = tmp_path / "x" / "vocabulary.txt", pm.open(tmp_path / "x")
        victim.write_bytes(bytes(3_000_000))
    then, data, done = victim.stat(), bytearray(victim.read_bytes()), []

    def heard(event):
        if event.done == event.total and not done:  # its bytes have been read, or most of them
            done.append(1)
            while victim.stat().st_ctime_ns == then.st_ctime_ns:
                time.sleep(0.002)
                with victim.open("r+b") as file:
                    file.write(data)
                os.utime(victim, ns=(then.st_atime_ns, then.st_mtime_ns))

    out = f"{tmp_path}/out/" if kind == "a sidecar" else tmp_path / "out.safetensors"
    with pytest.raises(BadCheckpoint, match="another program changed it"):
        (pm.at(made, "w1").add(2) if edited else made).save(out, progress=heard)
    assert done and not (tmp_path / "out").exists() and not (tmp_path / "out.safetensors").exists()


def test_a_source_overwritten_before_it_is_saved_or_patched(tmp_path):
    path = write(tmp_path / "x.safetensors")
    with pm.open(path) as checkpoint:
        overwritten(path, 7.0)
        with pytest.raises(BadCheckpoint, match="another program changed it"):
            pm.at(checkpoint, "w1").fill(2).save(tmp_path / "out.safetensors")

    def edit(checkpoint):
        overwritten(path, 8.0)
        return pm.at(checkpoint, "w1").fill(2)

    with pytest.raises(BadCheckpoint, match="another program changed it since it was opened; nothing was written"):
        pm.patch(path, edit)
    assert set(np.unique(safetensors.numpy.load_file(path)["w1"])) == {8.0} and pm.history(path) == []


def test_a_checkpoint_overwritten_while_it_is_compared(tmp_path):
    path, other = write(tmp_path / "x.safetensors"), write(tmp_path / "y.safetensors", 1.0)
    with pm.open(path) as one, pm.open(other) as two:
        overwritten(path, 7.0)
        with pytest.raises(BadCheckpoint, match="another program changed it"):
            pm.diff(one, two)


def test_files_are_linked_again_and_again_from_one_opened_checkpoint(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for shard in ("a", "b"):
        safetensors.numpy.save_file({shard: np.ones(1000, "float32")}, source / f"{shard}.safetensors")
    with pm.open(source) as checkpoint:
        edited = pm.at(checkpoint, "a").fill(2)
        for turn in range(3):
            report = edited.save(tmp_path / "out", link=True, force=turn > 0)
            assert report.bytes_linked
        (source / "b.safetensors").chmod(0o600)
        assert edited.save(tmp_path / "other", link=True).bytes_linked
    shutil.rmtree(tmp_path / "out")
    with pm.open(source) as checkpoint:  # and from one that has several names when it is opened
        for turn in range(3):
            assert pm.at(checkpoint, "a").fill(2).save(tmp_path / "out", link=True, force=turn > 0).bytes_linked


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_a_file_that_is_written_into_or_replaced_while_it_is_loaded(tmp_path, monkeypatch, suffix):
    path, tree = tmp_path / f"x.{suffix}", {f"w{n}": np.full(200_000, 1.0, "float32") for n in range(3)}
    (safetensors.numpy.save_file(tree, path) if suffix == "safetensors" else np.savez(path, **tree))
    real, turns = whole.copied, []
    for name in ("kept", "aside"):
        shutil.copyfile(path, tmp_path / name)

    def act(source, number):
        turns.append(number)
        if len(turns) == 2:
            does()
        return real(source, number)

    monkeypatch.setattr(whole, "copied", act)
    does = lambda: overwritten(path, 7.0)
    with pytest.raises(BadCheckpoint, match="another program changed it"):
        pm.load(path)
    turns.clear()
    (tmp_path / "kept").rename(path)
    does = lambda: (tmp_path / "aside").rename(path)  # as a trainer does that saves its next step
    assert pm.load(path).keys() == tree.keys()
