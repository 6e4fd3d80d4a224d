"""What a stopped command says: what became of its output, and nothing that is not so."""

import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import safetensors.numpy

import paramend as pm
from paramend.cli.fates import Dropped, Filled, Outputs, Patched, Undone
from paramend.journal.records import PENDING
from paramend.journal.store import UndoStore

PATCH = "paramend.checkpoints.patching"
REWRITE = "paramend.rewriting.rewrite"


@pytest.fixture
def model(tmp_path):
    safetensors.numpy.save_file({"w": np.ones(4, "float32"), "b": np.ones(2, "float32")}, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def stopped(folder, module, name, args, *, before=False, often=False, number=signal.SIGINT):
    """What a command says that gets a signal after (or before) it calls a function, at the first call or at each."""
    code = f"""
    import importlib, os
    from paramend.cli import main

    module = importlib.import_module({module!r})
    owner, _, name = {name!r}.rpartition(".")
    owner = getattr(module, owner) if owner else module
    call = getattr(owner, name)

    def signalled(*args, **given):
        if not {often}:
            setattr(owner, name, call)
        if {before}:
            os.kill(os.getpid(), {int(number)})
        result = call(*args, **given)
        if not {before}:
            os.kill(os.getpid(), {int(number)})
        return result

    setattr(owner, name, signalled)
    main.main()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 128 + number, done.stderr
    return done.stderr.removesuffix("\n").rpartition(f"stopped by {number.name}: ")[2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_output_that_was_not_written(model, tmp_path, number):
    args = ["zero", model.name, "w", "-o", "out.safetensors", "--html", "page.html"]
    said = stopped(tmp_path, REWRITE, "_Run.make", args, number=number)
    assert said == "nothing was written"
    assert [path.name for path in tmp_path.iterdir()] == [model.name]
    (tmp_path / "out.safetensors").write_bytes(b"old")
    said = stopped(tmp_path, REWRITE, "_Run.make", [*args, "--force"], number=number)
    assert said == "nothing was written; out.safetensors is as it was"
    assert (tmp_path / "out.safetensors").read_bytes() == b"old"


def test_an_output_that_was_written(model, tmp_path):
    said = stopped(tmp_path, REWRITE, "Note._publish", ["zero", model.name, "w", "-o", "out.safetensors"])
    assert said == "out.safetensors had been written in full"
    assert pm.load(tmp_path / "out.safetensors")["w"].tolist() == [0] * 4
    args = ["zero", model.name, "w", "-o", "new.safetensors", "--html", "page.html"]
    said = stopped(tmp_path, REWRITE, "Note._publish", args)
    assert said == "1 of 2 outputs had been written: new.safetensors; not page.html"
    assert (tmp_path / "new.safetensors").exists() and not (tmp_path / "page.html").exists()


def test_a_patch_that_was_stopped(model, tmp_path):
    before = model.read_bytes()
    args = ["zero", model.name, "w", "--in-place"]
    assert stopped(tmp_path, PATCH, "change_all", args) == f"nothing was changed: {model.name} has its old bytes"
    assert model.read_bytes() == before
    said = stopped(tmp_path, PATCH, "_Patch.carry_out", args)
    assert said == f"{model.name} had been changed in full; to take it back: paramend undo {model.name}"
    assert pm.load(model)["w"].tolist() == [0] * 4
    pm.undo(model)
    assert model.read_bytes() == before


def test_an_undo_that_was_stopped(model, tmp_path):
    before = model.read_bytes()
    pm.patch(model, lambda t: pm.at(t, "w").zero())
    after = model.read_bytes()
    args = ["undo", model.name]
    said = stopped(tmp_path, "paramend.journal.rollback", "Rollback.undo", args, before=True)
    assert said == f"nothing was changed: no patch of {model.name} was taken back"
    assert model.read_bytes() == after
    # A second signal, amid the way back, leaves a half.
    said = stopped(tmp_path, "paramend.journal.rollback", "scatter", args, often=True)
    assert said.startswith(f"{model.name} has its old bytes only in part; all are in .{model.name}.undo/000001.pending")
    pm.open(model).close()
    assert model.read_bytes() == before
    pm.patch(model, lambda t: pm.at(t, "w").zero())
    said = stopped(tmp_path, "paramend.journal.rollback", "scatter", args)
    assert said == f"the last patch of {model.name} had been taken back in full"
    assert model.read_bytes() == before


def test_what_is_half_done_is_said_to_be(model):
    patched, undone = Patched(model), Undone(model)
    pm.patch(model, lambda t: pm.at(t, "w").zero())
    store = UndoStore.of(model)
    dropped = Dropped(model)
    record = store.records("done")[0]
    record.rename(record.with_suffix(f".{PENDING}"))
    assert "has been changed in part" in patched() and f"{record.stem}.{PENDING}" in patched()
    assert "has its old bytes only in part" in undone()
    assert dropped() == f"0 of 1 undo record of {model} had been deleted"
    record.with_suffix(f".{PENDING}").unlink()
    assert dropped() == f"1 of 1 undo record of {model} had been deleted"


def test_folders_and_pages(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "page.html").write_text("<!doctype html>old")
    outputs, filled = Outputs([tmp_path / "out", tmp_path / "page.html"]), Filled(tmp_path)
    assert outputs() == f"nothing was written; {tmp_path}/out, {tmp_path}/page.html are as they were"
    assert filled() == "nothing was written"
    (tmp_path / "out").rename(tmp_path / "old")
    (tmp_path / "out").mkdir()
    (tmp_path / "page.html").write_text("<!doctype html>newer")
    assert outputs() == f"{tmp_path}/out, {tmp_path}/page.html had been written in full"
    assert filled() == f"3 files had been written to {tmp_path}: old, out, page.html"


def test_a_page_alone(model, tmp_path):
    args = ["zero", model.name, "w", "--dry-run", "--html", "page.html"]
    assert stopped(tmp_path, "paramend.edits.plan", "Plan.page", args) == "nothing was written"
    assert stopped(tmp_path, "paramend.pages.paged", "Paged.to_html", args) == "page.html had been written in full"
    args = ["diff", model.name, model.name, "--html", "diff.html"]
    assert stopped(tmp_path, "paramend.pages.paged", "Paged.to_html", args) == "diff.html had been written in full"


def test_a_command_that_only_reads(model, tmp_path):
    said = stopped(tmp_path, "paramend.cli.look", "open_checkpoint", ["show", model.name])
    assert said == "nothing was written"
