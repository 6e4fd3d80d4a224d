"""Every python block of the documents and every notebook runs, page by page; every link leads somewhere; and the site
has every page.

What docs/cli.md shows, tests/cli/test_cli.py runs.
"""

import json
import re
from pathlib import Path

import notebooks
import pytest

from support.sessions import run_session

TOP = Path(__file__).parents[2]
DOCS = TOP / "docs"
PAGES = [TOP / "README.md", *sorted(DOCS.rglob("*.md"))]
NOTEBOOKS = sorted(DOCS.rglob("*.ipynb"))
LINKING = [*PAGES, TOP / "CONTRIBUTING.md", TOP / "CHANGELOG.md", TOP / "bench" / "README.md"]
FENCE = re.compile(r"^( *)(`{3,})(\w+)[^\n]*\n(.*?)^\1\2$", re.MULTILINE | re.DOTALL)
# Those that train and compile.
LONG = {"README.md", "ablation.md", "freezing.md", "grafting.md", "growth.md", "lessons.md", "porting.md", "stacks.md"}


SESSIONS = {"readers", "uses", "tutorials"}  # folders whose pages show sessions of a shell
# Those that need more than the other tests; see `tests/conftest.py`.
ON_DEMAND = {"remote.md": "far"}  # obstore, and a server of objects


def called(page):
    return str(page.relative_to(DOCS if page.is_relative_to(DOCS) else TOP))


def page_of(page):
    name = called(page)
    marks = [pytest.mark.slow] if name in LONG or "/" in name else []
    marks += [getattr(pytest.mark, ON_DEMAND[name])] if name in ON_DEMAND else []
    return pytest.param(page, id=name, marks=marks)


@pytest.mark.numeric
@pytest.mark.parametrize("page", list(map(page_of, PAGES)))
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for indent, _, language, block in FENCE.findall(page.read_text()):
        if language == "python":
            exec(compile(re.sub(rf"(?m)^{indent}", "", block), page.name, "exec"), names)
        elif language == "console" and page.parent.name in SESSIONS:
            run_session(block, tmp_path)


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=called)
def test_a_notebook_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [kind for kind, *_ in notebooks.run(notebook)].count("code") > 3


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=called)
def test_a_notebook_holds_no_outputs(notebook):
    for cell in json.loads(notebook.read_text())["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


def test_the_site_has_every_page():
    named = set(re.findall(r": ([\w/.-]+\.md)$", (TOP / "mkdocs.yml").read_text(), re.MULTILINE))
    there = {str(page.relative_to(DOCS).with_suffix(".md")) for page in [*PAGES[1:], *NOTEBOOKS]}
    assert not there - named, f"`nav` of mkdocs.yml lacks {sorted(there - named)}"
    made = {name for name in named - there if name.startswith("reference/")}
    assert named - there == made, "`nav` of mkdocs.yml has pages that are not there"


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text()))


def test_every_page_is_reachable_from_the_readme():
    seen, ahead = set(), [TOP / "README.md"]
    while ahead:
        page = ahead.pop()
        seen.add(page)
        targets = {(page.parent / link.partition("#")[0]).resolve() for link in links(page) if "://" not in link}
        ahead += [target for target in targets - seen if target in PAGES]
        seen |= targets
    assert not set(PAGES + NOTEBOOKS) - seen, "no link leads there"


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    text = FENCE.sub("", page.read_text())
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(TOP)))
def test_every_link_leads_somewhere(page):
    for link in links(page):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links {link}"
