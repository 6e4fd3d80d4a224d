"""What is written is never more open than what it is made from or replaces; a rewrite stays as open as its source."""

import contextlib
import os
import shutil
import stat

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner

import paramend as pm
from paramend.cli.main import cli
from paramend.disk.permissions import NEW_FILE, access_of, create_file, reach, settle
from paramend.errors import CannotWrite
from paramend.journal.store import UndoStore
from paramend.rewriting.provenance import FILE

ROOT = os.geteuid() == 0


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def tree():
    return {"a": np.ones(40, "float32"), "b": np.zeros(6, "float32")}


@contextlib.contextmanager
def umask(value):
    old = os.umask(value)
    try:
        yield
    finally:
        os.umask(old)


@pytest.fixture(autouse=True)
def usual():
    with umask(0o022):
        yield


FORMS = ["safetensors", "npz", "msgpack", "pt"]


def write(path):
    """A checkpoint of the format of a name, by the library that defines it where it is at hand."""
    if path.suffix == ".pt":
        import torch

        torch.save({name: torch.from_numpy(value) for name, value in tree().items()}, path)
    elif path.suffix == ".npz":
        np.savez(path, **tree())
    elif path.suffix == ".safetensors":
        safetensors.numpy.save_file(tree(), path)
    else:
        pm.save(tree(), path)
    path.chmod(0o644)
    return path


def edit(checkpoint):
    return pm.at(checkpoint, "a").add(1)


# ---- trees ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "right"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
@pytest.mark.parametrize("out", ["x.safetensors", "x.pt", "x.npz", "x.msgpack", "x/"])
def test_a_tree_gets_what_the_umask_leaves_whatever_the_folder(tmp_path, monkeypatch, out, mask, right):
    home = tmp_path / "home"
    home.mkdir(0o700)
    monkeypatch.chdir(home)
    with umask(mask):
        pm.save(tree(), out)
    file = home / "x" / "model.safetensors" if out == "x/" else home / out
    assert mode(file) == right
    assert mode(file.parent) == (0o777 & ~mask if out == "x/" else 0o700)


@pytest.mark.slow
@pytest.mark.parametrize(("mask", "right"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_tree_as_orbax(tmp_path, mask, right):
    with umask(mask):
        pm.save(tree(), tmp_path / "x.orbax")
    assert {mode(path) for path in (tmp_path / "x.orbax").rglob("*") if path.is_file()} == {right}
    assert mode(tmp_path / "x.orbax") == 0o777 & ~mask


# ---- rewrites ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [0o600, 0o640, 0o644, 0o664, 0o660, 0o444, 0o400])
@pytest.mark.parametrize("suffix", FORMS)
def test_a_rewrite_is_as_open_as_its_source(tmp_path, suffix, given):
    source = write(tmp_path / f"x.{suffix}")
    source.chmod(given)
    edit(pm.open(source)).save(tmp_path / f"y.{suffix}")
    pm.open(source).save(tmp_path / "z.safetensors", record=True)
    assert mode(tmp_path / f"y.{suffix}") == mode(tmp_path / "z.safetensors") == given


def test_a_mode_with_which_a_program_would_run_as_its_owner_is_not_taken_over(tmp_path):
    source = write(tmp_path / "x.safetensors")
    source.chmod(0o6755)
    edit(pm.open(source)).save(tmp_path / "y.safetensors")
    assert mode(tmp_path / "y.safetensors") == 0o755


def folder(path, modes, *, own=0o755):
    """A model in shards, with files that are as open as is said."""
    pm.save(tree(), f"{path}/", max_shard_size=170)
    (path / "config.json").write_text("{}")
    (path / "more").mkdir()
    (path / "more" / "notes.txt").write_text("hello")
    for name, given in modes.items():
        (path / name).chmod(given)
    path.chmod(own)
    return path


def test_a_folder_keeps_what_each_of_its_files_and_folders_has(tmp_path):
    names = {"model-00001-of-00002.safetensors": 0o600, "config.json": 0o640, "more/notes.txt": 0o600, "more": 0o700}
    source = folder(tmp_path / "x", names, own=0o750)
    edit(pm.open(source)).save(tmp_path / "y")
    for name in (*names, ".", "model-00002-of-00002.safetensors"):
        assert mode(tmp_path / "y" / name) == mode(source / name), name
    assert mode(tmp_path / "y" / "model.safetensors.index.json") & 0o077 == 0  # it tells of all shards


def test_a_private_folder_stays_private_in_every_form(tmp_path):
    source = folder(tmp_path / "x", {}, own=0o700)
    edit(pm.open(source)).save(tmp_path / "y")
    assert mode(tmp_path / "y") == 0o700 and mode(tmp_path / "y" / "config.json") == 0o644
    pm.open(source).save(f"{tmp_path}/z/", max_shard_size="1MB", record=True)
    assert mode(tmp_path / "z") == 0o700
    pm.open(source).save(tmp_path / "one.safetensors")  # out of the folder that kept it private
    pm.open(source).save(tmp_path / "one.pt", record=True)
    assert {mode(tmp_path / name) for name in ("one.safetensors", "one.pt", "one.pt.record.json")} == {0o600}


def test_new_shards_are_as_private_as_the_most_private_of_the_old(tmp_path):
    source = folder(tmp_path / "x", {"model-00001-of-00002.safetensors": 0o640})
    pm.open(source).save(f"{tmp_path}/y/", max_shard_size="1MB", record=True)
    assert mode(tmp_path / "y" / "model.safetensors") == mode(tmp_path / "y" / FILE) == 0o640
    assert mode(tmp_path / "y" / "config.json") == 0o644


def test_a_private_file_in_a_new_folder(tmp_path):
    source = write(tmp_path / "x.safetensors")
    for given, right in ((0o600, 0o700), (0o640, 0o750), (0o644, 0o755)):
        source.chmod(given)
        pm.open(source).save(f"{tmp_path}/out/", max_shard_size=170, force=True)
        assert mode(tmp_path / "out") == right
        assert {mode(path) for path in (tmp_path / "out").iterdir()} == {given}
        shutil.rmtree(tmp_path / "out")


def test_leaves_of_a_private_donor(tmp_path):
    source, donor = write(tmp_path / "x.safetensors"), write(tmp_path / "donor.safetensors")
    donor.chmod(0o600)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\nsteps:\n  - set: {at: a, from: donor.safetensors, leaf: a}\n")
    for name, made in {
        "set": pm.Recipe.load(recipe).apply(pm.open(source)),
        "added": edit(pm.Recipe.load(recipe).apply(pm.open(source))),
        "grafted": pm.graft(pm.open(source), pm.open(donor))[0],
    }.items():
        made.save(tmp_path / f"{name}.safetensors")
        assert mode(tmp_path / f"{name}.safetensors") == 0o600, name


@pytest.mark.parametrize("out", [*(f"out.{suffix}" for suffix in FORMS), "out/"])
def test_what_is_replaced_stays_as_private_as_it_was(tmp_path, out):
    source = write(tmp_path / "x.safetensors")
    file = tmp_path / "out" / "model.safetensors" if out == "out/" else tmp_path / out
    for save in (edit(pm.open(source)).save, lambda path, **options: pm.save(tree(), path, **options)):
        for given in (0o600, 0o640):
            save(f"{tmp_path}/{out}", force=True)
            file.chmod(given)
            file.parent.chmod(0o750 if out == "out/" else 0o755)
            save(f"{tmp_path}/{out}", force=True)
            assert mode(file) == given
            assert mode(file.parent) == (0o750 if out == "out/" else 0o755)
        shutil.rmtree(file.parent) if out == "out/" else file.unlink()


def test_weights_under_other_names_are_as_private_as_those_they_replace(tmp_path):
    source = write(tmp_path / "x.safetensors")
    pm.open(source).save(f"{tmp_path}/out/")
    (tmp_path / "out" / "model.safetensors").chmod(0o600)
    pm.open(source).save(f"{tmp_path}/out/", max_shard_size=170, force=True)
    assert {mode(path) for path in (tmp_path / "out").iterdir()} == {0o600}


def test_links_are_as_open_as_what_they_link_to_or_copies(tmp_path):
    source = folder(tmp_path / "x", {})
    edit(pm.open(source)).save(tmp_path / "y", link=True)
    other = tmp_path / "y" / "model-00002-of-00002.safetensors"
    assert other.samefile(source / other.name) and mode(source / other.name) == 0o644
    other.unlink()
    other.write_bytes(b"")
    other.chmod(0o600)
    report = edit(pm.open(source)).save(tmp_path / "y", link=True, force=True)
    assert not other.samefile(source / other.name) and report.bytes_linked == 0
    assert mode(other) == 0o600 and mode(source / other.name) == 0o644


def test_nothing_is_more_open_while_it_is_written(tmp_path):
    source = folder(tmp_path / "x", {"model-00001-of-00002.safetensors": 0o600}, own=0o700)
    single = write(tmp_path / "x.safetensors")
    single.chmod(0o600)
    seen = []

    def heard(event):
        for temporary in tmp_path.glob(".paramend-*"):
            seen.append(temporary)
            assert mode(temporary) & 0o077 == 0

    edit(pm.open(source)).save(tmp_path / "y", progress=heard)
    edit(pm.open(single)).save(tmp_path / "y.safetensors", progress=heard)
    assert len({path.is_dir() for path in seen} | set(seen)) > 2


# ---- in place -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [0o600, 0o640, 0o644])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_records_are_as_private_as_the_file(tmp_path, suffix, given):
    path = write(tmp_path / f"x.{suffix}")
    path.chmod(given)
    seen = []

    def heard(event):
        seen.extend(mode(each) for each in UndoStore(path).folder.iterdir())

    pm.patch(path, edit, progress=heard)
    store = UndoStore(path).folder
    assert {0o600: 0o700, 0o640: 0o750, 0o644: 0o755}[given] == mode(store)
    assert seen and all(found & ~given == 0 for found in (*seen, *(mode(each) for each in store.iterdir())))
    assert mode(path) == given
    pm.undo(path)
    assert mode(path) == given


def test_a_record_of_several_files_is_as_private_as_the_most_private(tmp_path):
    source = folder(tmp_path / "x", {"model-00001-of-00002.safetensors": 0o600}, own=0o750)
    pm.patch(source, lambda t: pm.at(t, "**").add(1))
    assert mode(source / ".undo") == 0o750
    assert {mode(each) & 0o177 for each in (source / ".undo").iterdir() if each.suffix == ".done"} == {0}


@pytest.mark.slow
@pytest.mark.parametrize("database", [True, False])
def test_orbax_stays_private(tmp_path, database):
    import orbax.checkpoint as ocp

    path = tmp_path / "x"
    ocp.PyTreeCheckpointer(use_ocdbt=database).save(path, tree())
    for each in (path, *path.rglob("*")):
        each.chmod(0o700 if each.is_dir() else 0o600)
    seen = []

    def look(folder):
        """What others may do with files, as far as the folders let them in."""
        for each in folder.iterdir():
            if each.is_dir():
                seen.append(mode(each))
                if mode(each) & 0o011:
                    look(each)
            else:
                seen.append(mode(each))

    pm.patch(path, edit, progress=lambda event: look(path))
    look(path)
    edit(pm.open(path)).save(tmp_path / "copy.orbax")
    pm.at(pm.open(path), "a").cast("float64").save(tmp_path / "fresh.orbax")
    pm.open(path).save(tmp_path / "x.safetensors")
    pm.undo(path)
    for made in (path, tmp_path / "copy.orbax", tmp_path / "fresh.orbax", tmp_path / "x.safetensors"):
        seen += [mode(each) for each in (made, *made.rglob("*"))]
    assert not [found for found in seen if found & 0o077]
    for each in (path, *path.rglob("*")):  # the folder alone keeps others out
        each.chmod(0o700 if each == path else 0o755 if each.is_dir() else 0o644)
    pm.open(path).save(tmp_path / "y.safetensors")
    edit(pm.open(path)).save(tmp_path / "other.orbax")
    assert mode(tmp_path / "y.safetensors") == 0o600 and mode(tmp_path / "other.orbax") == 0o700


def test_a_folder_in_one_that_hands_on_its_group_hands_it_on_too(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o2775)
    source = folder(tmp_path / "x", {})
    edit(pm.open(source)).save(tmp_path / "shared" / "y")
    pm.save(tree(), f"{tmp_path}/shared/z/")
    assert mode(tmp_path / "shared" / "y") == mode(tmp_path / "shared" / "z") == 0o2755


@pytest.mark.slow
def test_an_orbax_checkpoint_that_is_replaced_stays_private(tmp_path):
    for out in ("x.orbax", "x.orbax/"):
        pm.save(tree(), tmp_path / "x.orbax", force=True)
        for file in (file for file in (tmp_path / "x.orbax").rglob("*") if file.is_file()):
            file.chmod(0o600)
        pm.save(tree(), f"{tmp_path}/{out}", force=True)
        assert {mode(file) for file in (tmp_path / "x.orbax").rglob("*") if file.is_file()} == {0o600}


# ---- groups and owners ----------------------------------------------------------------------------------------------


def test_a_group_that_cannot_be_kept_gets_no_more_than_everybody(tmp_path, monkeypatch):
    files = [tmp_path / name for name in "xy"]
    for file in files:
        file.touch()
        file.chmod(0o664)

    def refused(*args, **options):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "chown", refused)
    one = os.stat_result([*files[0].stat()[:5], files[0].stat().st_gid + 1, *files[0].stat()[6:]])
    for read in ([one], [one, files[1].stat()]):
        made = tmp_path / "made"
        os.close(create_file(made, access_of(read)))
        settle(made, access_of(read))
        assert mode(made) == 0o644
        made.unlink()


@pytest.mark.skipif(not ROOT, reason="only root gives files to others")
def test_group_and_owner_where_the_system_allows(tmp_path):
    source, out = write(tmp_path / "x.safetensors"), tmp_path / "y.safetensors"
    source.chmod(0o640)
    os.chown(source, 12345, 23456)
    edit(pm.open(source)).save(out)
    assert (mode(out), out.stat().st_uid, out.stat().st_gid) == (0o640, 0, 23456)  # a new file is its writer's
    os.chown(out, 12345, 34567)
    edit(pm.open(source)).save(out, force=True)
    assert (mode(out), out.stat().st_uid, out.stat().st_gid) == (0o600, 12345, 34567)  # of two groups, neither
    pm.patch(source, edit)
    store = UndoStore(source).folder
    assert (mode(store), store.stat().st_uid, store.stat().st_gid) == (0o750, 12345, 23456)
    pm.undo(source)
    assert (mode(source), source.stat().st_uid) == (0o640, 12345)


def test_what_a_folder_leaves_to_its_files():
    found = [reach(os.stat_result([given, *[0] * 9])) for given in (0o755, 0o700, 0o750, 0o711, 0o744)]
    assert found == [0o777, 0o700, 0o770, 0o777, 0o700]
    assert NEW_FILE.here(os.stat_result([0o100600, *[0] * 9])).mode == 0o600


# ---- pages ----------------------------------------------------------------------------------------------------------


def test_a_page_is_as_private_as_what_it_tells_of(tmp_path):
    a, b, page = write(tmp_path / "a.safetensors"), write(tmp_path / "b.npz"), tmp_path / "page.html"
    pm.diff(a, b).to_html(page)
    assert mode(page) == 0o644
    page.unlink()
    b.chmod(0o640)
    pm.diff(a, b).to_html(page)
    assert mode(page) == 0o640
    page.chmod(0o600)
    pm.stats(tree()).to_html(page)  # which tells of no file
    assert mode(page) == 0o600
    page.unlink()
    pm.stats(tree()).to_html(page)
    assert mode(page) == 0o644
    pm.stats(folder(tmp_path / "x", {}, own=0o700)).to_html(tmp_path / "other.html")
    assert mode(tmp_path / "other.html") == 0o600


@pytest.mark.parametrize(
    "arguments",
    [
        ["diff", "a.safetensors", "b.npz"],
        ["graft", "b.npz", "--into", "a.safetensors", "--dry-run"],
        ["graft", "b.npz", "--into", "a.safetensors", "-o", "out.safetensors"],
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[-1]}",
)
def test_a_page_of_the_command_line_too(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.safetensors")
    write(tmp_path / "b.npz").chmod(0o600)
    CliRunner().invoke(cli, [*arguments, "--html", "page.html"])
    assert mode(tmp_path / "page.html") == 0o600


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    pm.stats(tree()).to_html(page)
    before = page.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(CannotWrite, match="the disk is full; nothing was written"):
        pm.stats({"c": np.ones(3)}).to_html(page)
    assert page.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_page_that_cannot_be_written_is_known_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.safetensors")
    write(tmp_path / "b.npz")
    command = ["graft", "b.npz", "--into", "a.safetensors", "-o", "out.safetensors", "--html", "no/page.html"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 2 and "no/page.html: there is no folder no" in done.output
    assert not (tmp_path / "out.safetensors").exists()
