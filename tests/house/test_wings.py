"""Imports fall: a file imports only from lower floors, by absolute name, and never the package root."""

import ast
from pathlib import Path

import pytest

FLOORS = [
    # words
    {"errors", "reports.wording", "reports.tables", "reports.progress", "trees.kind", "resize.arithmetic"},
    {"disk.io", "leaves.paths", "leaves.specs", "_optional", "reports.report"},
    # the language of selectors, the verbs over arrays, the kinds of containers
    {"selectors.grammar", "arrays.*", "arrays.initializers", "trees.*"},
    {"selectors.matching", "resize.fits", "edits.arguments"},
    {"selectors.patterns", "resize.rules"},
    {"leaves.leaves", "arrays.registry", "selectors.misses"},
    {
        "trees.lookup",
        "formats.source",
        "selectors.nesting",
        "formats.files",
        "formats.jsontext",
        "formats.torch.pickles",
        "formats.writer",
        "pages.page",
    },
    {"pages.drawing"},
    {"formats.torch.recordings", "formats.zips.headers"},
    {"formats.orbax.store"},
    {"formats.orbax.tree"},
    {"trees.walks", "formats.index", "formats.zips.archive", "formats.torch.rebuilds"},
    {"formats.torch.writer", "formats.msgpack_writer", "formats.orbax.writer"},
    {
        "selectors.selector",
        "edits.ops",
        "selectors.renames",
        "formats.*",
        "formats.torch.source",
        "formats.orbax.source",
        "grafting.conversions",
        "resize.detection",
        "trees.tree",
    },
    {
        "freezing.filters",
        "edits.structure",
        "edits.memory",
        "edits.plan",
        "formats.shards",
        "grafting.report",
        "grafting.alignment",
        "grafting.mismatches",
        "grafting.options",
    },
    {"grafting.links"},
    # surgeries in memory
    {"freezing.masks", "freezing.report", "freezing.schedules", "freezing.slices"},
    {"freezing.places"},
    {"freezing.phases", "freezing.shares"},
    {
        "edits.selection",
        "freezing.*",
        "grafting.states.carry_torch",
        "grafting.states.carry_optax",
        "ablation.influence",
        "growth.zeroing",
        "stacking.plan",
        "grafting.plan",
    },
    {"freezing.freeze", "grafting.engine", "grafting.states.moments"},
    {"grafting.states.graft_optax", "grafting.states.graft_torch"},
    {"growth.depth", "growth.families"},
    {"growth.numbered", "growth.configs", "growth.report", "growth.identities"},
    {"ablation.stages", "ablation.report", "ablation.methods"},
    {"ablation.ablate"},
    {"growth.rebuilding", "growth.planning", "growth.scanned"},
    {"growth.deepening", "growth.liveness", "growth.writers"},
    {"growth.init"},
    # surgeries on disk
    {
        "disk.copying",
        "disk.publishing",
        "piecewise.regions",
        "disk.locks",
        "formats.gathered",
        "formats.registry",
        "rewriting.files",
    },
    {"journal.claims"},
    {"piecewise.steps", "journal.records", "rewriting.torch"},
    {"piecewise.rows"},
    {"rewriting.layouts", "piecewise.windows", "journal.exchange"},
    {"piecewise.changes", "journal.undo"},
    {"piecewise.chunks", "rewriting.provenance"},
    {"rewriting.note"},
    {"rewriting.rewrite"},
    {"checkpoints.checkpoint"},
    {"checkpoints.assemble"},
    {"grafting.checkpoints", "growth.checkpoints", "stacking.checkpoints"},
    {"grafting.graft", "stacking.stack"},
    {"checkpoints.patching", "recipes.text", "recipes.verbs", "recipes.donors"},
    {"recipes.steps", "recipes.schema"},
    {"recipes.run"},
    {"recipes.recipe"},
    # evidence
    {"evidence.widening", "evidence.work", "evidence.streams", "evidence.pairing", "evidence.differences"},
    {"evidence.distances", "evidence.measures", "evidence.reading", "evidence.spectra", "evidence.statistics"},
    {"evidence.comparisons"},
    {"evidence.*"},
    {"evidence.diff", "evidence.stats"},
    {"testing"},
    # the doors
    {"lessons.observation", "demo.digits", "demo.network", "demo.folder", "demo.evidence", "demo.twin"},
    {"lessons.lesson", "lessons.solutions", "demo.training"},
    {"lessons.witness", "demo.patient"},
    {"lessons.*", "demo.step"},
    {"lessons.catalogue", "demo.steps"},
    {"lessons.grading", "demo.tour"},
    {"cli._ui"},
    {"cli.writing"},
    {"cli.*"},
    {"cli.main"},
]
ROOT = Path(__file__).parents[2] / "src" / "paramend"
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): file
    for file in ROOT.rglob("*.py")
    if file.name not in ("__init__.py", "__main__.py")
}


def floor(name: str) -> int:
    for wanted in (name, name.rpartition(".")[0] + ".*"):
        for number, files in enumerate(FLOORS):
            if wanted in files:
                return number
    return pytest.fail(f"{name} has no floor: add it to FLOORS in {Path(__file__).name}")


def imports(source: str):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            files = [name for name in names if name.removeprefix("paramend.") in FILES]
            yield from files or [node.module]


def upward(name: str, source: str) -> list[str]:
    """The imports of a file that do not fall."""
    wrong = []
    for target in imports(source):
        inside = target.removeprefix("paramend.") if target.startswith("paramend.") else ""  # `io` is Python's own
        if target == "paramend" or (inside in FILES and floor(inside) >= floor(name)):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_fall(name):
    assert not upward(name, FILES[name].read_text())


@pytest.mark.parametrize(
    "source",
    [
        "import paramend",
        "from paramend.edits.selection import at",
        "def f():\n    from paramend.cli.main import main",
    ],
)
def test_an_upward_import_is_seen(source):
    assert upward("leaves.paths", source)


def test_every_floor_names_a_file():
    known = set(FILES) | {name.rpartition(".")[0] + ".*" for name in FILES}
    assert set().union(*FLOORS) <= known
