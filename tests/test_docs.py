"""Every fenced python block of the documents runs, page by page, and every console block of `paramend` too."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from paramend.cli.main import cli

TOP = Path(__file__).parents[1]
PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for language, block in FENCE.findall(page.read_text()):
        if language == "python":
            exec(compile(block, f"{page.name}", "exec"), names)
        elif language == "console":
            run_console(block)


def run_console(block: str) -> None:
    """Runs the lines `$ paramend ...`; `# exit 1` at the end of a line is the exit status that it must have."""
    for line in block.splitlines():
        if line.startswith("$ paramend "):
            command, _, status = line.removeprefix("$ paramend ").partition("# exit ")
            result = CliRunner().invoke(cli, shlex.split(command))
            assert result.exit_code == int(status or 0), f"{line}\n{result.output}"


def test_every_page_is_reachable_from_the_readme():
    readme = (TOP / "README.md").read_text()
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in readme, f"README.md does not link docs/{page.name}"
