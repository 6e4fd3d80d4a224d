"""Every fenced python block of the documents runs, page by page, and every link leads somewhere.

What docs/cli.md shows, tests/cli/test_cli.py runs.
"""

import re
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]
LINKING = [*PAGES, TOP / "CONTRIBUTING.md", TOP / "CHANGELOG.md", TOP / "bench" / "README.md"]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Those that train and compile.
LONG = {"README.md", "ablation.md", "freezing.md", "grafting.md", "growth.md", "lessons.md", "porting.md", "stacks.md"}


# Those that need more than the other tests; see `tests/conftest.py`.
ON_DEMAND = {"remote.md": "far"}  # obstore, and a server of objects


def page_of(page):
    marks = [pytest.mark.slow] if page.name in LONG else []
    marks += [getattr(pytest.mark, ON_DEMAND[page.name])] if page.name in ON_DEMAND else []
    return pytest.param(page, id=page.name, marks=marks)


@pytest.mark.numeric
@pytest.mark.parametrize("page", list(map(page_of, PAGES)))
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for language, block in FENCE.findall(page.read_text()):
        if language == "python":
            exec(compile(block, page.name, "exec"), names)


def test_every_page_is_reachable_from_the_readme():
    readme = (TOP / "README.md").read_text()
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in readme, f"README.md does not link docs/{page.name}"


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    text = FENCE.sub("", page.read_text())
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(TOP)))
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links {link}"
