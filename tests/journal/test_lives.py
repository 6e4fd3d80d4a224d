"""Lives of checkpoints, in any order of patches, undos, kills, copies and moves; and what long ones have found."""

import contextlib
import shutil

import numpy as np
import pytest

import paramend as pm
from paramend.journal.undo import recover
from support.crashing import Crash, Machine
from support.kinds import CONFIG, KINDS
from support.stateful import Inserted, bits, live, names_in, records_of, visible


@pytest.mark.parametrize("kind", ["file", "shards", "npz"])
def test_lives(kind):
    live(kind, 200, each=20)


def more(path):
    return pm.patch(path, Inserted("more", np.arange(5, dtype="float32")))


def dies(action, stop, path):
    """Whether a program was killed at a call of the system."""
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.suppress(Crash):
        Machine(monkeypatch, stop)
        action(path)
        return False
    return True


@pytest.mark.parametrize("kind", ["single", "shards"])
def test_what_a_killed_insertion_had_made_is_no_part_of_the_next_patch(tmp_path, kind):
    template = KINDS[kind].make(tmp_path)
    leaves, config = KINDS[kind].read(template)
    right = {**leaves, "embed.weight": leaves["embed.weight"] * np.float32(-2)}
    for stop in range(1, 100, 3):
        path = tmp_path / f"{stop}" / "model"
        shutil.copytree(template, path)
        if not dies(more, stop, path):
            break
        if not recover(path) and len(pm.history(path)) == 1:  # it was complete
            continue
        pm.patch(path, lambda t: pm.at(t, "embed.weight").multiply(-2))
        found, same = KINDS[kind].read(path)  # and that no other file is there
        assert bits(found) == bits(right) and same == config
        more(path)
        assert KINDS[kind].read(path)[0].keys() == {*leaves, "more"}
    assert stop > 20


def test_the_next_patch_itself_finds_what_a_killed_insertion_had_made(tmp_path):
    """Nobody opens the checkpoint in between."""
    for stop in (6, 9, 12, 31):
        path = KINDS["single"].make(tmp_path)
        leaves, _ = KINDS["single"].read(path)
        assert dies(more, stop, path)
        pm.patch(path, lambda t: pm.at(t, "step").add(1))
        found, _ = KINDS["single"].read(path)
        assert bits(found) == bits({**leaves, "step": leaves["step"] + 1})
        shutil.rmtree(path)


@pytest.mark.parametrize("kind", ["single", "shards"])
def test_a_model_whose_configuration_alone_was_patched_is_saved(tmp_path, kind):
    path = KINDS[kind].make(tmp_path)
    leaves, _ = KINDS[kind].read(path)
    pm.patch(path, lambda t: pm.config(t).set({"n": 2}))
    for out, edit in (("copy", lambda t: t), ("edited", lambda t: pm.at(t, "step").zero())):
        with pm.open(path) as model:
            edit(model).save(tmp_path / out)
        found, config = KINDS[kind].read(tmp_path / out)
        assert config == {**CONFIG, "n": 2}
        assert bits(found) == bits(leaves if out == "copy" else {**leaves, "step": np.zeros((), "int64")})
    assert len(pm.history(path)) == 1


@pytest.mark.parametrize("kind", ["file", "npz"])
def test_a_file_that_is_renamed_with_its_records_can_be_taken_back(tmp_path, kind):
    path = KINDS[kind].make(tmp_path)
    before = path.read_bytes()
    pm.patch(path, lambda t: pm.at(t, "step").add(1))
    pm.patch(path, lambda t: pm.at(t, "embed.weight").zero())
    new = path.rename(path.with_name(f"another{path.suffix}"))
    records_of(path).rename(records_of(new))
    assert [pm.undo(new).left for _ in range(2)] == [1, 0]
    assert new.read_bytes() == before and names_in(tmp_path) == {new.name}


def test_records_that_are_copied_beside_another_file_are_not_for_it(tmp_path):
    path = KINDS["file"].make(tmp_path)
    other = shutil.copy(path, tmp_path / "other.safetensors")
    pm.patch(path, lambda t: pm.at(t, "step").add(1))
    shutil.copytree(records_of(path), records_of(tmp_path / "other.safetensors"))
    with pytest.raises(pm.errors.BadCheckpoint, match=r"no patch of other\.safetensors writes there"):
        pm.undo(other)


@pytest.mark.parametrize("kind", ["file", "shards"])
def test_nothing_stays_of_a_patch_that_was_killed_when_it_began_or_when_it_was_taken_back(tmp_path, kind):
    template = KINDS[kind].make(tmp_path)
    before = visible(template)

    def patch(path):
        pm.patch(path, lambda t: pm.at(t, "embed.weight").zero())

    for stop in range(1, 60, 2):
        folder = tmp_path / f"{stop}"
        (shutil.copytree if template.is_dir() else copied)(template, folder / template.name)
        path = folder / template.name
        dead = dies(patch, stop, path)
        dies(recover, stop % 7 + 1, path)
        pm.open(path).close()
        if visible(path) == before:
            assert names_in(folder) == {path.name} and not records_of(path).exists()
        if not dead:
            break
    assert stop > 15


def copied(file, new):
    new.parent.mkdir()
    shutil.copy(file, new)
