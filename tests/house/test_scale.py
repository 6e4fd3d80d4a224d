"""The page of costs on several machines is what the saved constants and plans give, and the schedule is arithmetic."""

import importlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import paramend as pm
from paramend.rewriting.layouts import lay_out

TOP = Path(__file__).parents[2]


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.syspath_prepend(TOP / "bench")
    return importlib.import_module("scale")


def test_the_page_is_what_was_measured(scale):
    text = scale.table(json.loads((TOP / "bench" / "scale.json").read_text()))
    page = (TOP / "docs" / "scale.md").read_text()
    assert f"<!-- scale -->\n{text}\n<!-- /scale -->" in page, "python bench/scale.py table --write"


CONSTANTS = {"start": 1.0, "rates": {"copy": {"cpu": 1e-9}, "cast": {"cpu": 1e-8}}}


@pytest.mark.parametrize(
    ("jobs", "machines", "seconds"),
    [
        ([[4, 1000, 0, 0, 0]], 1, 2 + 1 + 2 * 1),  # two workers, two jobs each of a second
        ([[3, 1000, 0, 0, 0]], 1, 2 + 1 + 2 * 1),
        ([[4, 1000, 0, 0, 0]], 2, 2 + 1 + 1),
        ([[1, 0, 100, 0, 0], [3, 1000, 0, 0, 0]], 1, 2 + 1 + 2),
        ([[1, 0, 100, 5000, 0]], 1, 2 + 1 + 10),  # half of a link of 1 GB/s
        ([], 64, 2 + 1),
    ],
)
def test_a_free_worker_takes_the_next_job(scale, jobs, machines, seconds):
    edit = {"jobs": jobs, "plan": {"cpu": 2.0}}
    found = scale.seconds_of(edit, "cast", CONSTANTS, machines=machines, cores=2, link=1e9)
    assert found == pytest.approx(seconds)


def test_jobs_hold_all_bytes_of_the_files(scale, tmp_path, monkeypatch):
    monkeypatch.setattr("paramend.rewriting.jobs._COMPUTED", 1_000_000)
    tree = {f"layers.{n}.w": np.ones((100, 5000), "float32") for n in range(4)}  # 2 MB each
    pm.save(tree, tmp_path / "m.safetensors")
    with pm.open(tmp_path / "m.safetensors") as model:
        for edited, read in (
            (pm.at(model, "layers[1:3].w").multiply(2.0), 8_000_000),
            (pm.at(model, "layers[1:3].w").fill(2.0), 4_000_000),
            (pm.at(model, "layers[0].w").cast("float16"), 8_000_000),
        ):
            files = lay_out(edited.plan, str(tmp_path / "out.safetensors")).files
            jobs = list(scale.jobs_of(edited.plan, files))
            total = sum(jobs, Counter())
            assert total["written"] == files[0].nbytes
            assert read <= total["read"] <= read + 1000  # the header
            assert all(job["computed"] <= 2_000_000 for job in jobs)
        plan = pm.at(model, "layers[1].w").zero().plan
        files = lay_out(plan, str(tmp_path / "out.safetensors")).files
        total = sum(scale.jobs_of(plan, files), Counter())
        assert total["read"] == total["written"] == files[0].nbytes - 2_000_000  # a hole
