"""Leaves put into a folder of shards in its own place: in a further file, which undo takes away again."""

import contextlib
import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import paramend as pm
from paramend.cli.main import cli
from paramend.errors import BadArgument, CannotWrite, ParamendError, Unsupported
from paramend.journal.records import PENDING
from paramend.journal.store import UndoStore
from support.crashing import crash_everywhere

INDEX = "model.safetensors.index.json"
FIRST, SECOND, THIRD = (f"model-{n:05}-of-{max(n, 2):05}.safetensors" for n in (1, 2, 3))
HEAD = {"mtp.w": np.arange(6, dtype="f2").reshape(2, 3), "mtp.b": np.arange(3, dtype="i1"), "other": np.ones(1, "f4")}
LEAVES = {"layers.0.w": np.ones((2, 3), "f4"), "layers.1.w": np.zeros((2, 3), "f4")}


def make(folder, kind="shards"):
    """A model in two shards with an index, or in one file."""
    folder.mkdir()
    if kind == "single":
        save_file(LEAVES, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        table = dict(zip(LEAVES, (FIRST, SECOND), strict=True))
        for name, file in table.items():
            save_file({name: LEAVES[name]}, folder / file, metadata={"format": "pt"})
        # Not as Hugging Face formats it, so that only the old bytes are the old bytes.
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 48, "by": "x"}, "weight_map": table}))
    (folder / "config.json").write_text('{"hidden_size": 3}')
    return folder


@pytest.fixture(params=["shards", "single"])
def model(request, tmp_path):
    return make(tmp_path / "model", request.param)


@pytest.fixture
def donor(tmp_path):
    save_file(HEAD, tmp_path / "head.safetensors", metadata={"format": "pt"})
    return tmp_path / "head.safetensors"


def inserting(donor, selector="mtp.**", **rules):
    return lambda target: pm.insert(target, pm.open(donor), selector, rename=rules or None)[0]


def content(folder):
    """All bytes and permissions but those of undo records."""
    files = (file for file in folder.iterdir() if file.is_file())
    return {file.name: (file.read_bytes(), oct(file.stat().st_mode)) for file in files}


def by_index(folder):
    """What a reader finds that goes by the index alone."""
    index = json.loads((folder / INDEX).read_text())
    found = {name: load_file(folder / file)[name] for name, file in index["weight_map"].items()}
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in found.values())
    return found


def test_what_comes_is_in_a_further_file_and_undo_takes_it_away(model, donor):
    before, inodes = content(model), {file.stat().st_ino for file in model.glob("*.safetensors")}
    report = pm.patch(model, inserting(donor, **{"mtp.**": "model.mtp.**"}))
    found = by_index(model)
    right = LEAVES | {"model.mtp.w": HEAD["mtp.w"], "model.mtp.b": HEAD["mtp.b"]}
    assert {name: (a.dtype, a.tobytes()) for name, a in found.items()} == {
        name: (a.dtype, a.tobytes()) for name, a in right.items()
    }
    # transformers looks for a single file before it looks for the index.
    assert not (model / "model.safetensors").exists()
    kept = {file for file in model.glob("*.safetensors") if file.stat().st_ino in inodes}
    assert len(kept) == len(inodes)
    (come,) = set(model.glob("*.safetensors")) - kept
    assert come.name == (THIRD if SECOND in before else SECOND)
    assert (model / "config.json").read_bytes() == before["config.json"][0]
    (row,) = pm.history(model)
    assert row.edit == f"inserted from {donor} at model.mtp.w, model.mtp.b"
    assert report.bytes_written == sum((model / name).stat().st_size for name in row.files)
    undone = pm.undo(model)
    assert (undone.left, content(model)) == (0, before)
    assert [file.name for file in model.iterdir() if file.name.startswith(".")] == []


def test_a_new_folder_holds_the_same_files(model, donor, tmp_path):
    with pm.open(model) as target:
        inserting(donor)(target).save(tmp_path / "out", link=True)
    out = content(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")  # files with two names are not patched
    pm.patch(model, inserting(donor))
    assert {name: data for name, (data, _) in content(model).items()} == {name: data for name, (data, _) in out.items()}


def test_patches_before_and_after_are_taken_back_in_turn(model, donor):
    states, edits = (
        [content(model)],
        [
            lambda t: pm.at(t, "layers.0.w").fill(3),
            inserting(donor, "mtp.w"),
            lambda t: pm.at(t, "mtp.w").zero(),
            inserting(donor, "mtp.b"),
            lambda t: pm.at(t, "layers[*].w").fill(4),
        ],
    )
    for edit in edits:
        pm.patch(model, edit)
        states.append(content(model))
    assert by_index(model)["mtp.w"].any() == (states[3] == states[2])
    for then in reversed(states[:-1]):
        pm.undo(model)
        assert content(model) == then
    assert pm.history(model) == []


def test_edits_on_the_way(tmp_path, donor):
    model = make(tmp_path / "model")
    before = content(model)

    def edit(target):
        made = inserting(donor, "mtp.w")(pm.at(target, "layers.1.w").fill(2))
        return pm.at(made, "mtp.w").multiply(2)

    pm.patch(model, edit)
    found = by_index(model)
    assert found["layers.1.w"].tolist() == np.full((2, 3), 2).tolist()
    assert (found["mtp.w"] == 2 * HEAD["mtp.w"]).all()
    assert content(model)[FIRST] == before[FIRST]
    pm.undo(model)
    assert content(model) == before


def configuring(donor):
    return lambda target: pm.config(inserting(donor)(target)).set({"mtp": 1, "hidden_size": 12})


def test_leaves_come_together_with_what_the_configuration_says_of_them(model, donor):
    before = content(model)
    dry = pm.patch(model, configuring(donor), dry_run=True)
    assert content(model) == before
    assert "2 of 4 leaves are inserted, 2 keys of config.json change" in str(dry)
    report = pm.patch(model, configuring(donor))
    assert report.bytes_written == dry.bytes_written
    assert (model / "config.json").read_text() == '{"hidden_size": 12, "mtp": 1}'
    assert set(by_index(model)) == {*LEAVES, "mtp.w", "mtp.b"}
    (row,) = pm.history(model)
    assert {"config.json", INDEX} < set(row.files) and "hidden_size: 3 -> 12" in row.edit
    after = content(model)
    pm.patch(model, lambda target: pm.config(pm.at(target, "layers.1.w").fill(7)).delete("mtp"))
    assert (model / "config.json").read_text() == '{"hidden_size": 12}'
    for then in (after, before):
        pm.undo(model)
        assert content(model) == then


def test_leaves_of_every_kind(tmp_path):
    odd = {
        "half": np.arange(5).astype(ml_dtypes.bfloat16),
        "fp8": np.arange(4).astype(ml_dtypes.float8_e4m3fn),
        "scalar": np.array(7, "i8"),
        "empty": np.zeros((0, 3), "f4"),
        "a/b.c": np.ones(2, "u1"),
    }
    pm.save(odd, tmp_path / "odd.safetensors")
    model = make(tmp_path / "model")
    pm.patch(model, inserting(tmp_path / "odd.safetensors", "**"))
    index = json.loads((model / INDEX).read_text())
    assert index["metadata"] == {"total_size": 48 + 10 + 4 + 8 + 2, "by": "x"}
    (home,) = {index["weight_map"][name] for name in odd}
    with pm.open(model / home) as new:
        assert {path: leaf.tobytes() for path, leaf in new.items()} == {k: a.tobytes() for k, a in odd.items()}
    pm.patch(model, lambda t: pm.insert(t, {"x": {"y": torch.ones(2)}}, "**")[0])
    with pm.open(model) as made:
        assert made["x.y"].tolist() == [1, 1]


def test_layers_at_the_end_and_what_counts_them(model):
    """Whatever only adds leaves can be done in place; the configuration is a file like the others."""
    (model / "config.json").write_text('{"num_hidden_layers": 2}')
    before = content(model)
    pm.patch(model, lambda t: pm.deepen(t, layers="layers[*]", order=[0, 1, 1])[0])
    assert by_index(model)["layers.2.w"].tobytes() == LEAVES["layers.1.w"].tobytes()
    assert json.loads((model / "config.json").read_text()) == {"num_hidden_layers": 3}
    with pytest.raises(Unsupported, match="others keep their name"):
        pm.patch(model, lambda t: pm.deepen(t, layers="layers[*]", order=[0, 0, 1, 2])[0])
    pm.undo(model)
    assert content(model) == before


def test_names_that_are_taken_stay(tmp_path, donor):
    model = make(tmp_path / "model")
    (model / THIRD).write_bytes(b"not in the index")
    pm.patch(model, inserting(donor))
    assert (model / THIRD).read_bytes() == b"not in the index"
    assert by_index(model).keys() == {*LEAVES, "mtp.w", "mtp.b"}
    shards = set(json.loads((model / INDEX).read_text())["weight_map"].values())
    assert shards == {FIRST, SECOND, "model-00004-of-00004.safetensors"}


def test_a_variant_keeps_its_word(tmp_path, donor):
    model = make(tmp_path / "model", "single")
    (model / "model.safetensors").rename(model / "model.fp16.safetensors")
    pm.patch(model, inserting(donor))
    names = {file.name for file in model.glob("model*")}
    shards = {f"model.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert names == {"model.safetensors.index.fp16.json", *shards}
    pm.undo(model)
    assert {file.name for file in model.glob("model*")} == {"model.fp16.safetensors"}


# ---- what is refused -----------------------------------------------------------------------------------------------


def alone(folder):
    return make(folder, "single") / "model.safetensors"


def zipped(folder):
    folder.mkdir()
    np.savez(folder / "x.npz", **LEAVES)
    return folder / "x.npz"


def pickled(folder):
    folder.mkdir()
    torch.save({name: torch.from_numpy(leaf) for name, leaf in LEAVES.items()}, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def adapter(folder):
    path = alone(folder)
    path.rename(folder / "adapter_model.safetensors")  # peft looks for no index
    return folder


REFUSED = {
    "safetensors": alone,
    "npz": zipped,
    "torch": pickled,
    "a folder of torch": lambda folder: pickled(folder).parent,
    "an adapter": adapter,
}


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("kind", REFUSED)
def test_where_no_reader_would_find_a_further_file(tmp_path, donor, kind, dry_run):
    path = REFUSED[kind](tmp_path / "model")
    before = content(tmp_path / "model")
    with pytest.raises(
        Unsupported, match=r"a file of their own, which readers find only.*\n\nhint: write a new file instead: -o OUT"
    ):
        pm.patch(path, inserting(donor), dry_run=dry_run)
    assert content(tmp_path / "model") == before and len(before) == len(list((tmp_path / "model").iterdir()))


def test_only_leaves_that_come(model, donor):
    before = content(model)
    for edit in (lambda t: pm.at(t, "layers.0.w").delete(), lambda t: pm.at(t, "layers.0.w").rename("w")):
        with pytest.raises(Unsupported, match="and others keep their name"):
            pm.patch(model, lambda t, edit=edit: inserting(donor)(edit(t)))
    with pytest.raises(ValueError, match="would stand"):
        pm.patch(model, lambda t: pm.insert(t, {"layers": {"0": {"w": np.ones(1)}}}, "**")[0])
    with pytest.raises(BadArgument), pm.open(donor) as other:
        pm.patch(model, lambda t: pm.insert(other, t, "**")[0])
    assert content(model) == before and not (model / ".undo").exists()


def test_an_edit_of_a_file_that_gets_another_name(tmp_path, donor):
    model = make(tmp_path / "model", "single")
    with pytest.raises(Unsupported, match=r"both change.*\n\nhint: two patches"):
        pm.patch(model, lambda t: inserting(donor)(pm.at(t, "**").zero()))


@pytest.mark.parametrize("dry_run", [True, False])
def test_links(model, donor, tmp_path, dry_run):
    shown = tmp_path / "shown"
    shown.symlink_to(model)
    touched = INDEX if (model / INDEX).exists() else "model.safetensors"
    before = content(model)

    def refused(path, match):
        with pytest.raises(CannotWrite, match=match):
            pm.patch(path, inserting(donor), dry_run=dry_run)
        assert content(model) == before and not (model / ".undo").exists()

    refused(shown, "symbolic link")
    (tmp_path / "twin").hardlink_to(model / touched)
    refused(model, "2 names")
    (model / touched).unlink()
    (model / touched).symlink_to(tmp_path / "twin")
    refused(model, "symbolic link")


def test_shards_that_other_names_share_are_not_touched(tmp_path, donor):
    model = make(tmp_path / "model")
    (tmp_path / "twin").hardlink_to(model / FIRST)
    pm.patch(model, inserting(donor))
    assert (model / FIRST).samefile(tmp_path / "twin") and by_index(model).keys() == {*LEAVES, "mtp.w", "mtp.b"}
    pm.undo(model)


def test_no_room(model, donor, monkeypatch):
    before, real = content(model), os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result([*real(path)[:3], 0, 0, *real(path)[5:]]))
    with pytest.raises(CannotWrite, match=r"the insertion needs .*, and 0 B are free"):
        pm.patch(model, inserting(donor))
    assert content(model) == before and not (model / ".undo").exists()


def test_a_private_donor_stays_private(model, donor):
    donor.chmod(0o600)
    names = {file.name for file in model.iterdir()}
    pm.patch(model, inserting(donor))
    new = {file.name: file.stat().st_mode & 0o777 for file in model.glob("*.safetensors") if file.name not in names}
    new.pop(FIRST, None)
    assert list(new.values()) == [0o600]


def test_what_changed_since_is_not_taken_away(model, donor):
    pm.patch(model, inserting(donor))
    (new,) = (name for name in pm.history(model)[0].files if name.endswith(".safetensors"))
    data = bytearray((model / new).read_bytes())
    data[-1] ^= 1
    (model / new).write_bytes(data)
    now = content(model)
    with pytest.raises(CannotWrite, match=f"{new} changed since patch 1; nothing was written"):
        pm.undo(model)
    assert content(model) == now
    pm.undo(model, force=True)
    assert not (model / new).exists() and pm.load(model, nested=False).keys() == LEAVES.keys()


def test_a_file_that_took_the_old_name_is_left_alone(tmp_path, donor):
    model = make(tmp_path / "model", "single")
    pm.patch(model, inserting(donor))
    (model / "model.safetensors").write_bytes(b"downloaded again")
    now = content(model)
    with pytest.raises(CannotWrite, match=r"model\.safetensors changed since patch 1; nothing was written"):
        pm.undo(model)
    assert content(model) == now


def test_a_file_that_moved_and_changed(tmp_path, donor):
    model = make(tmp_path / "model", "single")
    pm.patch(model, inserting(donor))
    pm.patch(model / FIRST, lambda t: pm.at(t, "layers.0.w").zero())
    with pytest.raises(CannotWrite, match="what the patch left alone changed since"):
        pm.undo(model)
    pm.undo(model / FIRST)
    pm.undo(model)
    assert content(model) == content(make(tmp_path / "again", "single"))


@pytest.mark.parametrize("change", [{"files": ["tokenizer.model"]}, {"moved": [["a.txt", "model.safetensors"]]}])
def test_a_record_that_names_other_files_is_refused(tmp_path, donor, change):
    model = make(tmp_path / "model", "single")
    pm.patch(model, inserting(donor))
    (record,) = (model / ".undo").glob("*.done")
    edited(record, change)
    now = content(model)
    with pytest.raises(ParamendError, match="no patch of model writes there"):
        pm.undo(model, force=True)
    assert content(model) == now


def edited(record, change):
    """Another head in a record, with its checksum."""
    import hashlib

    data = record.read_bytes()
    size = int.from_bytes(data[12:20], "little")
    head = json.dumps(json.loads(data[20 : 20 + size]) | change).encode()
    frame = b"HEAD" + len(head).to_bytes(8, "little") + head
    record.write_bytes(data[:8] + frame + hashlib.sha256(frame).digest() + data[20 + size + 32 :])


# ---- links ---------------------------------------------------------------------------------------------------------


def names_of(file):
    return file.stat().st_nlink


def test_linked_are_the_files_that_stay(model, donor, tmp_path):
    out = tmp_path / "out"
    with pm.open(model) as target:
        report = inserting(donor)(target).save(out, link=True)
    linked = {file.name for file in out.iterdir() if names_of(file) == 2}
    assert linked == ({FIRST, SECOND} if (model / INDEX).exists() else {FIRST})
    assert report.bytes_linked == sum((out / name).stat().st_size for name in linked)
    assert by_index(out).keys() == {*LEAVES, "mtp.w", "mtp.b"}


def test_a_file_that_comes_whole_is_linked_too(tmp_path, donor):
    model = make(tmp_path / "model")
    rules = {"whole": ("**", {}), "renamed": ("**", {"other": "more"}), "part": ("mtp.**", {})}
    for name, (selector, rename) in rules.items():
        with pm.open(model) as target:
            inserting(donor, selector, **rename)(target).save(tmp_path / name, link=True)
        files = sorted((tmp_path / name).glob("*.safetensors"))
        assert [names_of(file) for file in files] == [2, 2, 2 if name == "whole" else 1]
        shutil.rmtree(tmp_path / name)
    with pm.open(model) as target:
        inserting(donor, "**")(pm.at(target, "layers.1.w").fill(9)).save(tmp_path / "edited", link=True)
    assert [names_of(file) for file in sorted((tmp_path / "edited").glob("*.safetensors"))] == [2, 1, 2]
    found = by_index(tmp_path / "edited")
    assert found["layers.1.w"].tolist() == np.full((2, 3), 9).tolist() and found.keys() == {*LEAVES, *HEAD}


def test_a_whole_file_without_what_transformers_asks_for_is_written_anew(tmp_path):
    save_file(HEAD, tmp_path / "plain.safetensors")
    model = make(tmp_path / "model")
    with pm.open(model) as target:
        inserting(tmp_path / "plain.safetensors", "**")(target).save(tmp_path / "out", link=True)
    assert names_of(tmp_path / "plain.safetensors") == 1
    with pm.open(tmp_path / "out" / THIRD) as new:
        assert new.metadata["format"] == "pt"


def test_in_place_nothing_is_linked(tmp_path, donor):
    model = make(tmp_path / "model")
    pm.patch(model, inserting(donor, "**"))
    assert (model / THIRD).read_bytes() == donor.read_bytes() and names_of(donor) == 1


# ---- the command ---------------------------------------------------------------------------------------------------


def run(*words):
    return CliRunner().invoke(cli, list(map(str, words)))


def test_the_command(model, donor, tmp_path):
    before = content(model)
    words = ["insert", model, donor, "mtp.**", "--rename", "mtp.**=model.mtp.**", "--in-place"]
    dry = run(*words, "--dry-run")
    assert dry.exit_code == 0 and content(model) == before, dry.output
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert dry.stdout == done.stdout and "model.mtp.w  float16[2,3]  inserted from" in done.stdout
    assert "2 of 4 leaves are inserted" in done.stdout
    assert f"to take it back: paramend undo {model}" in done.stderr
    assert "inserted from" in run("history", model).stdout
    again = run(*words)
    assert again.exit_code == 2 and "would stand" in again.output
    assert run("undo", model).exit_code == 0 and content(model) == before
    for more in (["-o", tmp_path / "out"], ["--link"], ["--max-shard-size", "5GB"], ["--record"]):
        refused = run(*words, *more)
        assert refused.exit_code == 2 and "--in-place changes" in refused.output
    assert "-o OUT or --in-place is needed" in run("insert", model, donor, "mtp.**").output
    assert run("insert", model, donor, "mtp.**", "-o", tmp_path / "out", "--link").exit_code == 0
    assert names_of(tmp_path / "out" / FIRST) == 2


# ---- kills ---------------------------------------------------------------------------------------------------------

HOW = [{}, *({"power": seed, "torn": bool(seed % 2)} for seed in range(3))]


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW, ids=repr)
@pytest.mark.parametrize("kind", ["shards", "single"])
def test_cut_short_anywhere_leaves_old_or_new(tmp_path, donor, kind, how):
    model = make(tmp_path / "model", kind)
    old = content(model)
    pm.patch(model, configuring(donor))
    new = content(model)

    def check(path, dead):
        with pm.open(path) as found:
            assert len(found) == (len(LEAVES) if content(path) == old else len(LEAVES) + 2)
        assert content(path) in (old, new)
        assert dead or content(path) == new
        assert len(pm.history(path)) == (content(path) == new)
        if content(path) == new:
            pm.undo(path)
        assert content(path) == old
        pm.patch(path, configuring(donor))
        assert content(path) == new

    steps = crash_everywhere(
        tmp_path,
        lambda folder: make(folder / "model", kind).name,
        lambda p: pm.patch(p, configuring(donor)),
        check,
        **how,
    )
    assert steps > 20


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW, ids=repr)
@pytest.mark.parametrize("kind", ["shards", "single"])
def test_an_undo_cut_short_anywhere_leaves_new_or_old(tmp_path, donor, kind, how):
    def begin(folder):
        path = make(folder / "model", kind)
        pm.patch(path, configuring(donor))
        return path.name

    model = tmp_path / begin(tmp_path)
    new = content(model)
    pm.undo(model)
    old = content(model)

    def check(path, dead):
        pm.open(path).close()
        assert content(path) in (new, old) if dead else content(path) == old
        with contextlib.suppress(CannotWrite):  # there is nothing to take back
            pm.undo(path)
        assert content(path) == old

    assert crash_everywhere(tmp_path, begin, pm.undo, check, **how) > 8


def test_between_the_files_readers_find_the_old_state(model, donor, monkeypatch):
    """At each rename a reader that goes by names finds all old leaves, and none that lacks its file."""
    seen, real = [], os.rename

    def looking(*args, **options):
        real(*args, **options)
        found = model / "model.safetensors"
        if found.exists():
            assert load_file(found).keys() == LEAVES.keys()
        else:
            seen.append(len(by_index(model)))

    monkeypatch.setattr(os, "rename", looking)
    pm.patch(model, configuring(donor))
    assert seen[-1] == 4
    pm.undo(model)
    monkeypatch.undo()
    assert UndoStore(model).records(PENDING) == []
