"""Imports fall from wing to wing, those that are opened late included, and no files import each other in a circle."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import paramend

# The wings, from the ground to the roof: a wing imports only from lines above its own.
FLOORS = [
    {"errors"},
    {"reports", "_optional"},
    {"leaves", "disk"},
    {"formats", "arrays", "pages"},
    {"journal", "trees", "resize", "anatomy"},
    {"selectors"},
    {"edits"},
    {"piecewise", "freezing", "mapping"},
    {"rewriting"},
    {"checkpoints"},
    {"grafting", "growth", "stacking", "evidence", "quantizing", "tokens"},
    {"merging", "deltas"},
    {"recipes"},
    {"testing", "lessons", "demo", "ablation", "porting"},
    {"cli"},
]
AT_THE_ROOT = {"__init__.py", "__main__.py", "_optional.py", "errors.py", "py.typed", "testing.py"}
PUBLIC_MODULES = {"errors", "resize", "testing"}  # `pm.depth` and `pm.init` are files of a wing
ROOT = Path(__file__).parents[2] / "src" / "paramend"
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): file
    for file in ROOT.rglob("*.py")
    if file.name not in ("__init__.py", "__main__.py")
}
FLOOR = {wing: number for number, wings in enumerate(FLOORS) for wing in wings}


def imports(source: str | ast.Module) -> set[str]:
    """The modules that a file imports, at its top or late, by statement or by name in a string."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source) if isinstance(source, str) else source):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            files = {name for name in names if name.removeprefix("paramend.") in FILES}
            found |= files or {str(node.module)}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            found |= {str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)}
    return {name.removeprefix("paramend.") for name in found if name.partition(".")[0] == "paramend"}


def upward(name: str, source: str) -> list[str]:
    """The imports of a file that do not fall."""
    wing = name.partition(".")[0]
    return [
        target
        for target in sorted(imports(source))
        if target == "paramend"
        or ((other := target.partition(".")[0]) != wing and FLOOR.get(other, len(FLOORS)) >= FLOOR[wing])
    ]


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_fall(name):
    assert not upward(name, FILES[name].read_text())


@pytest.mark.parametrize(
    "source",
    [
        "import paramend",
        "from paramend.edits.selection import at",
        "def f():\n    from paramend.cli.main import main",
        "import importlib\n\ndef f():\n    importlib.import_module('paramend.checkpoints.patching')",
    ],
)
def test_an_upward_import_is_seen(source):
    assert upward("leaves.paths", source)
    assert not upward("leaves.paths", "from paramend.errors import NoMatch\nfrom paramend.leaves import specs")


def test_no_files_import_each_other_in_a_circle():
    def arrows(name: str) -> set[str]:
        tree = ast.parse(FILES[name].read_text())
        for node in ast.walk(tree):  # what only a type checker reads makes no circle
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = [ast.Pass()]
        return imports(tree) & set(FILES)

    try:
        TopologicalSorter({name: arrows(name) for name in FILES}).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_own_modules_are_opened_late_by_a_statement():
    """`importlib.import_module("paramend....")` hides an arrow from type checkers and editors."""
    for name, file in FILES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
                assert not any(isinstance(arg, ast.Constant) for arg in node.args), f"{name}: a constant name"


def test_only_wings_lie_at_the_root():
    found = {path.name for path in ROOT.iterdir() if path.name != "__pycache__"}
    assert found == AT_THE_ROOT | {path.name for path in ROOT.iterdir() if path.is_dir()} - {"__pycache__"}
    assert set(FLOOR) == {name.partition(".")[0] for name in FILES}


def test_the_table_of_wings_says_the_same():
    """That of CONTRIBUTING: of files at the root it has `errors.py` alone."""
    page = (ROOT.parents[1] / "CONTRIBUTING.md").read_text()
    told = {
        int(floor): set(re.findall(r"`(\w+)/`", wings))
        for floor, wings in re.findall(r"^\| (\d+) \| (.*?) \|", page, re.M)
    }
    assert told == {n: wings - {"_optional", "testing"} for n, wings in enumerate(FLOORS) if n}


def test_every_wing_has_a_door():
    """The docstring of a package says in a sentence what is in it."""
    for package in (file for file in ROOT.rglob("__init__.py") if file.parent != ROOT):
        assert ast.get_docstring(ast.parse(package.read_text())), f"{package.parent.name} has no sentence at its door"


def test_no_child_of_the_package_bears_the_name_of_a_public_function():
    """`import paramend.undo.x` would put the module `undo` where `pm.undo` is. The name of one wing is freed."""
    children = {path.stem for path in ROOT.iterdir()}
    assert children & set(paramend.__all__) == PUBLIC_MODULES | {"anatomy"}


def test_the_wing_of_anatomy_leaves_its_name_to_the_function():
    code = "import paramend as pm; from paramend.anatomy import sizes; print(pm.anatomy.__name__, sizes)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("anatomy <module 'paramend.anatomy.sizes'")
