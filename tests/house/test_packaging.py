"""What the package says of itself: versions that agree, no upper bound on Python, no extra that opens nothing."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import paramend as pm
from paramend.lessons.lesson import ROWS

TOP = Path(__file__).parents[2]
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
FOR_USERS = set(EXTRAS) - {"test", "far", "docs", "all"}  # those of the project itself


def test_a_later_python_may_install_it():
    assert re.fullmatch(r">=3\.\d+", PROJECT["requires-python"])


def test_the_oldest_python_is_the_first_classifier():
    versions = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert versions[0] == PROJECT["requires-python"].removeprefix(">=")
    assert versions == sorted(versions, key=lambda version: int(version.partition(".")[2]))


def test_all_versions_are_one():
    citation = yaml.safe_load((TOP / "CITATION.cff").read_text())
    assert PROJECT["version"] == citation["version"] == pm.__version__
    assert f"## {PROJECT['version']}" in (TOP / "CHANGELOG.md").read_text()
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]


@pytest.mark.parametrize("extra", sorted(FOR_USERS))
def test_every_extra_opens_something(extra):
    """A message of the package, or a lesson, says to install it."""
    text = "\n".join(path.read_text() for path in (TOP / "src").rglob("*.py"))
    named = set(re.findall(r'extra="(\w+)"', text)) | {row.extra for row in ROWS}
    assert extra in named, f"nothing in the package needs the extra {extra}"


def test_all_holds_every_extra_for_users_but_the_demo():
    (every,) = EXTRAS["all"]
    assert set(re.search(r"\[(.*)\]", every)[1].split(",")) == FOR_USERS - {"demo"}


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_no_requirement_has_an_upper_bound(extra):
    assert not [line for line in EXTRAS[extra] if re.search(r"<|==|~=", line)]


def test_what_is_typed_says_so():
    assert (Path(pm.__file__).parent / "py.typed").is_file()


def test_the_command_is_installed():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="paramend")
    assert callable(entry.load())
