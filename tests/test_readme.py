"""The README's two commands are the ones that `.ci/run` and the constraints file know."""

import re
from pathlib import Path

TOP = Path(__file__).parents[1]


def commands() -> list[str]:
    return re.findall(r"^```sh\n(.*?)\n```$", (TOP / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_readme_has_two_commands_and_ci_runs_the_second():
    demo, test = commands()
    assert demo.endswith("paramend demo")
    assert test in (TOP / ".ci" / "run").read_text().splitlines()


def test_both_commands_use_the_constraints():
    assert all("-c constraints.txt" in command for command in commands())
    assert "torch==2.13.0" in (TOP / "constraints.txt").read_text().splitlines()
