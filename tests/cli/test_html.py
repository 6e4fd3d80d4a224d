"""`--html`: a page of what every command does that changes something, and true lines about it."""

import json
import pickle
import re

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner

import paramend as pm
from paramend.cli.main import cli


def run(*args):
    return CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="paramend")


@pytest.fixture
def model(tmp_path):
    tree = {f"layers.{i}.{name}": np.ones((2, 2), "float32") for i in range(3) for name in "wb"}
    safetensors.numpy.save_file(tree, tmp_path / "m.safetensors")
    (tmp_path / "fix.yaml").write_text("version: 1\nsteps:\n  - zero: '**/w'\n")
    return tmp_path / "m.safetensors"


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())[1])


COMMANDS = {
    "zero": ["zero", "M", "**/w"],
    "cast": ["cast", "M", "**/w", "float16"],
    "delete": ["delete", "M", "**/w"],
    "rename": ["rename", "M", "layers.<n>.w", "h.<n>.w"],
    "apply": ["apply", "FIX", "M"],
    "convert": ["convert", "M", "OUT"],
    "graft": ["graft", "M", "--into", "M"],
    "port": ["port", "M", "--like", "M"],
    "stack": ["stack", "M", "layers[*]"],
    "deepen": ["deepen", "M", "--drop", "0"],
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("dry", [False, True])
def test_every_command_that_writes_has_a_page(model, tmp_path, name, dry):
    out, page = tmp_path / "out.safetensors", tmp_path / "page.html"
    given = {"M": model, "FIX": tmp_path / "fix.yaml", "OUT": out}
    args = [given.get(arg, arg) for arg in COMMANDS[name]]
    done = run(*args, *([] if name == "convert" else ["-o", out]), "--html", page, *["--dry-run"] * dry)
    assert done.exit_code == 0, done.output
    *lines, last = done.stderr.splitlines()
    assert last == f"wrote {page}" and page.read_text().startswith("<!doctype html>")
    assert lines == ["dry run: no checkpoint was written"] if dry else lines[0].startswith(f"wrote {out}: ")
    assert out.exists() is not dry
    assert len(data_of(page)["paths"]) >= 2


def test_the_page_of_an_edit_says_what_becomes_of_each_leaf(model, tmp_path):
    page = tmp_path / "page.html"
    args = ["cast", model, "**/w", "float16", "--except", "layers[0].*"]
    assert run(*args, "--dry-run", "--html", page).exit_code == 0
    data = data_of(page)
    found = dict(zip(data["paths"], (data["groups"][number] for number in data["group"]), strict=True))
    assert {path for path, group in found.items() if group == "changed"} == {"layers.1.w", "layers.2.w"}
    columns = {column["name"]: dict(zip(data["paths"], column["values"], strict=True)) for column in data["columns"]}
    assert columns["spec"]["layers.1.w"] == "float16[2,2]" and columns["before"]["layers.1.w"] == "float32[2,2]"
    assert columns["edit"]["layers.1.w"] == "cast('float16')" and columns["edit"]["layers.0.w"] == ""
    assert run("delete", model, "layers[0].*", "--dry-run", "--html", page).exit_code == 0
    data = data_of(page)
    groups = [data["groups"][number] for number in data["group"]]
    assert sorted(groups) == ["deleted"] * 2 + ["kept"] * 4


def test_a_patch_has_a_page(model, tmp_path):
    page = tmp_path / "page.html"
    done = run("zero", model, "**/w", "--in-place", "--dry-run", "--html", page)
    assert done.stderr.splitlines()[0].startswith(f"dry run: {model} was not changed; ")
    assert done.stderr.splitlines()[1] == f"wrote {page}"
    done = run("zero", model, "**/w", "--in-place", "--html", page)
    assert done.exit_code == 0 and "48 B written in place" in page.read_text()


def test_reports_of_save_patch_and_plan_have_pages_and_are_pickled(model, tmp_path):
    edited = pm.at(pm.open(model), "**/w").apply(lambda x: x + 1)
    assert edited.plan.to_html().startswith("<!doctype html>")
    reports = [edited.save(tmp_path / "out.safetensors"), pm.patch(model, lambda t: pm.at(t, "**/w").zero())]
    reports += [pm.save({"w": np.ones(2)}, tmp_path / "new.safetensors")]
    for report in reports:
        again = pickle.loads(pickle.dumps(report))
        assert again.to_html() == report.to_html(tmp_path / "page.html") == (tmp_path / "page.html").read_text()
        assert len(repr(report)) < 300


def test_a_page_that_cannot_be_written_is_refused_before_anything_is(model, tmp_path):
    (tmp_path / "taken").write_text("no page")
    before = model.read_bytes()
    for page, message in (("taken", "is not an HTML page"), ("nowhere/page.html", "there is no folder")):
        for args in (
            ["zero", model, "**", "-o", tmp_path / "out"],
            ["zero", model, "**", "--in-place"],
            ["diff", model, model],
            ["graft", model, "--into", model, "-o", tmp_path / "out"],
            ["convert", model, tmp_path / "out.npz"],
        ):
            done = run(*args, "--html", tmp_path / page)
            assert (done.exit_code, done.stdout) == (2, "") and message in done.stderr
    assert model.read_bytes() == before and not list(tmp_path.glob("out*"))


def test_what_was_written_is_said_even_if_its_page_fails(model, tmp_path, monkeypatch):
    done = run("zero", model, "**/w", "-o", tmp_path / "x.html", "--html", tmp_path / "x.html")
    assert done.exit_code == 2 and "names of their own" in done.stderr and not (tmp_path / "x.html").exists()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("paramend.pages.paged.write_file", fail)
    out, page = tmp_path / "out.safetensors", tmp_path / "page.html"
    done = run("zero", model, "**/w", "-o", out, "--html", page)
    assert done.exit_code == 2 and out.exists() and not page.exists()
    first, second = done.stderr.splitlines()
    assert first.startswith(f"wrote {out}: ") and second.startswith(f"error[cannot-write]: {page}: the disk is full")


def test_diff_says_that_its_page_was_written(model, tmp_path):
    done = run("diff", model, model, "--html", tmp_path / "page.html")
    assert (done.exit_code, done.stderr) == (0, f"wrote {tmp_path / 'page.html'}\n")
