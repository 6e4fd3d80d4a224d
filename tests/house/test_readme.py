"""The README: its two commands are the ones that `.ci/run` and the constraints file know; its costs
are measured ones."""

import importlib
import re
from pathlib import Path

TOP = Path(__file__).parents[2]


def commands() -> list[str]:
    return re.findall(r"^```sh\n(.*?)\n```$", (TOP / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_readme_has_two_commands_and_ci_runs_the_second():
    demo, test = commands()
    assert demo.endswith("paramend demo")
    assert test in (TOP / ".ci" / "run").read_text().splitlines()


def test_both_commands_use_the_constraints():
    assert all("-c constraints.txt" in command for command in commands())
    assert "torch==2.13.0" in (TOP / "constraints.txt").read_text().splitlines()


def test_it_can_be_read_in_one_go():
    assert len((TOP / "README.md").read_text().splitlines()) <= 150


def test_its_costs_are_cells_of_the_tables_of_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(TOP / "bench")
    costs = importlib.import_module("run").costs((TOP / "bench" / "README.md").read_text())
    assert f"<!-- costs -->\n{costs}\n<!-- /costs -->" in (TOP / "README.md").read_text(), "bench/run.py --write"


def test_its_picture_is_small():
    (picture,) = re.findall(r"!\[.*?\]\((.*?)\)", (TOP / "README.md").read_text())
    assert (TOP / picture).stat().st_size < 150_000
