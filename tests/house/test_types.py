"""What a type checker knows of the public face: no `Any` without a reason, and user code that is right or flagged."""

import ast
import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest

import paramend
import paramend as pm
from paramend.edits.ops import Edits
from paramend.reports.report import Report


def public_things() -> Iterator[tuple[str, Any]]:
    """Functions and classes that users meet, by their public names: reports and their rows too."""
    for name in pm.__all__:
        thing = getattr(pm, name)
        if inspect.ismodule(thing):
            for inner, value in vars(thing).items():
                if (
                    not inner.startswith("_")
                    and inspect.isroutine(value) | inspect.isclass(value)
                    and value.__module__.startswith(thing.__name__)
                ):
                    yield f"{name}.{inner}", value
        elif inspect.isfunction(thing) or inspect.isclass(thing):
            yield name, thing
    yield "Selection", Edits  # its verbs
    met = set()
    for info in pkgutil.walk_packages(paramend.__path__, "paramend."):
        if info.name.startswith(("paramend.cli", "paramend.demo", "paramend.lessons", "paramend.__main__")):
            continue
        for name, kind in inspect.getmembers(importlib.import_module(info.name), inspect.isclass):
            row = is_dataclass(kind) and name.endswith(("Row", "RecordedLeaf", "Plan"))
            if (row or issubclass(kind, Report)) and kind.__module__.startswith("paramend.") and kind not in met:
                met.add(kind)
                yield kind.__name__, kind


def annotations(thing: Any) -> Iterator[tuple[str, ast.expr]]:
    """Every annotation of a function, or of the fields and methods of a class, with its place."""
    tree = ast.parse(Path(inspect.getfile(thing)).read_text())
    nodes = [node for node in tree.body if getattr(node, "name", "") == thing.__qualname__]
    for node in nodes:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        for item in inside:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                yield item.target.id, item.annotation
            if not isinstance(item, ast.FunctionDef):
                continue
            if item.name.startswith("_") and (not item.name.endswith("__") or item.name in UNSEEN):
                continue
            method = f"{item.name}." if isinstance(node, ast.ClassDef) else ""
            given = [*item.args.posonlyargs, *item.args.args, *item.args.kwonlyargs, item.args.vararg, item.args.kwarg]
            for arg in given:
                if arg is not None and arg.annotation is not None:
                    yield f"{method}{arg.arg}", arg.annotation
            if item.returns is not None:
                yield f"{method}return", item.returns


UNSEEN = {"__reduce__", "__deepcopy__", "__getstate__"}  # what only pickle and copy call


def holds_any(annotation: ast.expr, module: Any) -> bool:
    """Whether `Any` stands in an annotation, by that name or behind one that says nothing more."""
    for node in ast.walk(annotation):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if holds_any(ast.parse(node.value, mode="eval").body, module):
                return True
        elif isinstance(node, ast.Name) and node.id not in ALIASES and getattr(module, node.id, None) is Any:
            return True
    return False


# Aliases of `Any` that say what is meant where no type exists.
ALIASES = {"AnyTree", "AnyArray"}


def places() -> list[str]:
    found = []
    for name, thing in public_things():
        module = sys.modules[thing.__module__]
        found += [f"{name}.{place}" for place, annotation in annotations(thing) if holds_any(annotation, module)]
    return sorted(set(found))


# Where `Any` stands in the public face, and why no type would be truer.
JSON = "data that JSON can hold: a union of all it may be would have to be taken apart at every step"
KEYS = "a mapping is invariant in its keys: `Mapping[SelectorLike, ...]` would refuse a plain dict of texts"
NNX = "`nnx.Optimizer` is generic in the model, which does not matter here"
ALLOWED = {
    r".*\.to_dict\.return": JSON,
    r"Recipe\.schema\.return": JSON,
    r"Anatomy\.(experts|(layers|mtp|parts)\.return)": "a row of the table, whose keys have types of their own",
    r"Config\.(__getitem__|get|set|edited)\..*": JSON,
    r"Checkpoint\.metadata\.return": "what the file says of itself, as its format has it",
    r"StatsReport\.totals\.return": "counts, and figures that may be None: read by name",
    r"graft_?\.(mismatch|place|resize)": KEYS,
    r"resize\.Resize\.options": "the keywords of the rule that made it, each of its own type",
    r"errors\.(Graft|Port)Refused\.__init__\.(report|ways)": "errors lie below reports and options, and name neither",
    r"graft_optimizer_\.(optimizer|old)": NNX,
    r"Layout\.(__init__\.rules|of\.data|to_data\.return)|port_?\.rules": "data, which is checked when it is read",
    r"nnx_filter\.model": "`nnx.State` is generic in keys and values, which do not matter here",
}


def test_any_stands_in_the_public_face_only_where_there_is_a_reason():
    found = places()
    wild = [place for place in found if not any(re.fullmatch(pattern, place) for pattern in ALLOWED)]
    assert not wild, "these have a type, or need a reason in ALLOWED"
    idle = [pattern for pattern in ALLOWED if not any(re.fullmatch(pattern, place) for place in found)]
    assert not idle, "no `Any` stands there any more"


def test_an_any_is_seen(tmp_path, monkeypatch):
    """Also in a string, in an alias, in a method and in a field."""
    file = tmp_path / "faceless.py"
    file.write_text(
        "from typing import Any\nfrom paramend.leaves.specs import AnyTree\nHidden = Any\n"
        "def f(a: 'list[Any]', b: Hidden, c: AnyTree, *d: int) -> 'Any': ...\n"
        "class C:\n    e: Any\n    def g(self, *h: Any) -> int: ...\n    def _i(self, j: Any): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("faceless")
    seen = [place for thing in (module.f, module.C) for place, note in annotations(thing) if holds_any(note, module)]
    assert seen == ["a", "b", "return", "e", "g.h"]


def test_aliases_of_any_say_so():
    """`AnyTree` and `AnyArray` are explained where they stand, and there are no others."""
    text = (Path(paramend.__file__).parent / "leaves" / "specs.py").read_text()
    assert set(re.findall(r"^(\w+): TypeAlias = Any$", text, re.MULTILINE)) == ALIASES
    assert "no type names them all" in text


# ---- what type checkers say of user code ---------------------------------------------------------------------------

TYPED = Path(__file__).parent / "typed"
ROOT = Path(__file__).parents[2]


def flagged_by_mypy() -> dict[str, set[int]]:
    """The lines that mypy flags, by page. It reads no frameworks, whose types take it minutes."""
    pages = [str(TYPED / "right.py"), str(TYPED / "wrong.py")]
    call = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "--no-pretty", *pages]
    done = subprocess.run(
        call, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"MYPYPATH": str(ROOT / "src")}
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = {"right": set(), "wrong": set()}
    for page, line in re.findall(r"(right|wrong)\.py:(\d+): error", done.stdout):
        found[page].add(int(line))
    assert "Found" in done.stdout and "in 1 file" in done.stdout, done.stdout  # wrong.py alone
    return found


def flagged_by_pyright() -> dict[str, set[int]]:
    call = [sys.executable, "-m", "basedpyright", "--outputjson", "-p", str(TYPED), "--pythonpath", sys.executable]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == 2
    found = {"right": set(), "wrong": set()}
    for each in report["generalDiagnostics"]:
        found[Path(each["file"]).stem].add(each["range"]["start"]["line"] + 1)
    return found


CHECKERS = {"mypy": flagged_by_mypy, "pyright": flagged_by_pyright}


@pytest.mark.parametrize("checker", CHECKERS)
def test_user_code_that_is_right_passes_and_what_is_wrong_is_flagged(checker):
    flagged = CHECKERS[checker]()
    assert not flagged["right"]
    lines = enumerate((TYPED / "wrong.py").read_text().splitlines(), 1)
    mark = r"# wrong: " if checker == "mypy" else r"# wrong(: |, say the types of the framework: )"
    wanted = {number: line.strip() for number, line in lines if re.search(mark, line)}
    assert len(wanted) >= 40
    assert flagged["wrong"] == set(wanted), [wanted[line] for line in set(wanted) - flagged["wrong"]]


def test_user_code_names_all_that_is_public():
    """A public function that is on no page may lose its types unseen."""
    assert set(pm.__all__) <= set(re.findall(r"\bpm\.(\w+)", (TYPED / "right.py").read_text()))
