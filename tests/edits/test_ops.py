"""A row of the table of edits is all that an edit needs: everything else is made from it."""

import inspect
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import paramend as pm
from paramend.cli import main
from paramend.edits.ops import OPS, Edits
from paramend.errors import BadArgument, SpecMismatch, Unsupported

TOP = Path(__file__).parents[2]

ROW = '''
    @edit(
        "every element is multiplied and then shifted",
        run=lambda library, x, args, place: library.add(library.multiply(x, args["factor"]), args["shift"]),
        takes=(NUMBER.named("the factor", "2"), NUMBER),
        aliases=("linear",),
        also=("muladd",),
    )
    def affine(self, factor: float, shift: float) -> T:
        """The tree with the chosen leaves multiplied and shifted.

        >>> pm.at({"w": np.ones(2)}, "w").affine(2, 1)
        {'w': array([3., 3.])}
        """

    affine_ = in_place(affine)
'''


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package with one row more, and nothing else."""
    folder = tmp_path_factory.mktemp("with-a-row")
    shutil.copytree(TOP / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    table = folder / "src" / "paramend" / "edits" / "ops.py"
    table.write_text(table.read_text() + ROW)
    return folder


def runs(copy: Path, code: str, *more: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(copy / "src")}
    command = [sys.executable, "-c", textwrap.dedent(code), *more]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=copy)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_fresh_row_is_a_verb_and_a_twin(copy):
    runs(
        copy,
        """
        import doctest, inspect
        import numpy as np, paramend as pm
        from paramend.edits import ops

        tree = {"w": np.array([1.0, -2.0]), "b": np.zeros(1)}
        edited = pm.at(tree, "w").affine(2, shift=0.5)
        assert edited["w"].tolist() == [2.5, -3.5] and edited["b"] is tree["b"] and tree["w"].tolist() == [1, -2]
        assert pm.at(tree, "w")[-1:].affine(2, 0.5)["w"].tolist() == [1, -3.5]
        w = tree["w"]
        assert pm.at(tree, "w").affine_(2, 0.5) is None and tree["w"] is w and w.tolist() == [2.5, -3.5]

        Selection = pm.Selection
        assert str(inspect.signature(Selection.affine)) == "(self, factor: float, shift: float) -> ~T"
        assert list(inspect.signature(Selection.affine_).parameters) == ["self", "factor", "shift"]
        assert Selection.affine.__doc__.startswith("The tree with") and "`affine`" in Selection.affine_.__doc__
        found = doctest.DocTestFinder().find(Selection.affine, "affine", globs={"pm": pm, "np": np})
        assert sum(len(test.examples) for test in found) == 1
        assert not any(doctest.DocTestRunner().run(test).failed for test in found)
        for wrong, says in [(lambda: pm.at(tree, "w").affine(2), "missing 1 required positional argument: 'shift'"),
                            (lambda: pm.at(tree, "w").affine("x", 1), "affine takes a number, and factor is 'x'")]:
            try:
                wrong()
            except Exception as error:
                assert says in str(error), error
            else:
                raise AssertionError(says)
        """,
    )


def test_a_fresh_row_is_an_edit_of_files(copy):
    runs(
        copy,
        """
        import numpy as np, paramend as pm

        w = np.arange(6, dtype="float32").reshape(2, 3)
        pm.save({"w": w, "b": np.ones(2)}, "m.safetensors")
        edited = pm.at(pm.open("m.safetensors"), "w").affine(2, -1)
        assert "affine(2, -1)" in str(edited.plan)
        edited.save("out.safetensors", force=True)
        assert pm.load("out.safetensors")["w"].tobytes() == (w * 2 - 1).astype("float32").tobytes()
        pm.patch("m.safetensors", lambda t: pm.at(t, "w").affine(2, -1))
        assert pm.load("m.safetensors")["w"].tobytes() == (w * 2 - 1).astype("float32").tobytes()
        pm.undo("m.safetensors")
        assert pm.load("m.safetensors")["w"].tobytes() == w.tobytes()
        """,
    )


def test_a_fresh_row_is_a_step_with_a_schema(copy):
    runs(
        copy,
        """
        import jsonschema, numpy as np, paramend as pm

        tree = {"w": np.ones(2)}
        assert pm.Recipe([{"affine": {"at": "w", "factor": 2, "shift": -1}}]).apply(tree)["w"].tolist() == [1, 1]
        pm.Recipe([{"affine": {"at": "w", "index": 0, "factor": 2, "shift": 3}}]).apply_(tree)
        assert tree["w"].tolist() == [5, 1]
        schema = pm.Recipe.schema()
        step = schema["$defs"]["affine"]
        assert step["required"] == ["at", "factor", "shift"]
        assert step["description"] == "every element is multiplied and then shifted"
        assert step["properties"]["factor"]["description"] == "the factor"
        recipe = {"version": 1, "steps": [{"affine": step["examples"][0]}]}
        jsonschema.validate(recipe, schema)
        pm.Recipe(**recipe)
        for body, hint in [({"at": "w", "factor": 2}, 'affine: {at: "**/kernel", factor: 2, shift: 0.5}')]:
            try:
                pm.Recipe([{"affine": body}])
            except pm.errors.BadRecipe as error:
                assert [problem.hint for problem in error.problems] == [hint]
                assert error.problems[0].message == "affine needs shift"
            else:
                raise AssertionError(body)
        """.replace("import jsonschema", "import paramend.errors, jsonschema"),
    )


def test_a_fresh_row_is_a_command(copy):
    runs(
        copy,
        """
        import numpy as np, paramend as pm
        from click.testing import CliRunner
        from paramend.cli.main import cli

        def run(*args, code=0):
            done = CliRunner().invoke(cli, args, prog_name="paramend")
            assert done.exit_code == code, done.output
            return done.output

        assert "  affine, linear  Every element is multiplied and then shifted.\\n" in run("--help").replace(
            " " * 3, "  ").replace("linear   ", "linear  ")
        said = run("help", "affine")
        assert "PATH SELECTOR... FACTOR SHIFT" in said and "FACTOR: the factor." in said and "--in-place" in said
        assert "Did you mean 'affine'" in run("muladd", "m", code=2)
        pm.save({"w": np.ones(2, "float32"), "b": np.ones(1)}, "c.safetensors")
        dry = run("affine", "c.safetensors", "w", "-2", "-1", "--dry-run")
        assert "w     float32[2]  affine(-2, -1)" in dry and "1 of 2 leaves changes" in dry
        for name in ("affine", "linear"):
            run(name, "c.safetensors", "w", "-2", "1.5", "-o", "d.safetensors", "--force", "--record")
            assert pm.load("d.safetensors")["w"].tolist() == [-0.5, -0.5]
            assert pm.record("d.safetensors").recipe.endswith('affine: {at: "w", factor: -2, shift: 1.5}')
        run("affine", "c.safetensors", "w", "3", "-1", "--in-place")
        assert pm.load("c.safetensors")["w"].tolist() == [2, 2]
        """,
    )


def test_a_fresh_row_is_in_the_tables_of_the_docs(copy):
    code = """
        import importlib.util, sys

        spec = importlib.util.spec_from_file_location("tables", sys.argv[1])
        tables = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tables)
        says = "every element is multiplied and then shifted"
        assert f"| `affine(factor, shift)` | {says} | yes | yes |" in tables.ops_table()
        assert f"| `affine` | {says} | **at**, except, where, index, **factor**, **shift** |" in tables.steps_table()
        command = "`affine PATH SELECTOR... FACTOR SHIFT -o OUT`"
        assert f"| {command} | `linear` | `--in-place` | {says} |" in tables.commands_table()
    """
    runs(copy, code, str(TOP / "docs" / "making" / "doctables.py"))


def test_a_type_checker_sees_a_fresh_row(copy):
    (copy / "mypy.ini").write_text(
        "[mypy]\nstrict = True\nno_site_packages = True\nfollow_imports = skip\n"
        "[mypy-paramend.edits.*]\nfollow_imports = silent\n"
        "[mypy-paramend.edits.memory,paramend.edits.checks,paramend.edits.runs]\nfollow_imports = skip\n"
    )
    lines = [
        ('reveal_type(at(tree, "w").affine(2, shift=1))', 'note: Revealed type is "dict[str, int]"'),
        ('reveal_type(at(tree, "w").affine_)', 'note: Revealed type is "def (factor: float, shift: float)"'),
        ('at(tree, "w").affine(2)', 'error: Missing positional argument "shift" in call to "affine" of "Edits"'),
        ('at(tree, "w").affine_(2, shfit=1)', 'error: Unexpected keyword argument "shfit"'),
        ('at(tree, "w").afine(2, 1)', 'error: "Selection[dict[str, int]]" has no attribute "afine"'),
    ]
    code = "from paramend.edits.selection import at\n\ntree: dict[str, int] = {}\n"
    (copy / "probe.py").write_text(code + "\n".join(line for line, _ in lines))
    environment = {**os.environ, "MYPYPATH": str(copy / "src")}
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "probe.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=copy)
    for number, (_, says) in enumerate(lines, 4):
        assert re.search(rf"^probe.py:{number}: {re.escape(says)}", done.stdout, re.MULTILINE), done.stdout


# ---- the table ---------------------------------------------------------------------------------------------------


def test_the_command_line_reads_the_table_as_it_is():
    """It parses the file, so that `--help` need not import it."""
    read = [(row.name, row.says, row.aliases, row.also) for row in main.edits()]
    assert read == [
        (op.name, f"{op.says[0].upper()}{op.says[1:]}.", op.aliases, op.also) for op in OPS.values() if not op.code
    ]


def test_no_two_commands_have_one_name():
    names = [name for row in (*main.ROWS, *main.edits()) for name in (row.name, *row.aliases)]
    assert len(names) == len({*names})
    assert {"add", "reinit", "multiply", "scale", "clip"} <= {*names}


def test_help_opens_neither_numpy_nor_the_table():
    code = """
        import sys
        from paramend.cli.main import cli
        for args in (["--help"], ["nonsense"]):
            try:
                cli(args)
            except SystemExit:
                pass
        assert not {"numpy", "paramend.edits.ops"} & sys.modules.keys()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", OPS)
def test_a_row_has_a_verb_with_an_example_and_a_twin_where_specs_stay(name):
    verb = getattr(pm.Selection, name)
    assert ">>>" in verb.__doc__
    assert list(inspect.signature(verb).parameters)[1:] == list(OPS[name].parameters)
    twin = getattr(pm.Selection, f"{name}_", None)
    assert (twin is not None) == OPS[name].keeps_spec
    if twin is not None:
        assert inspect.signature(twin).parameters == inspect.signature(verb).parameters
        assert (twin.__name__, inspect.signature(twin).return_annotation) == (f"{name}_", None)


def test_the_table_refuses_a_row_that_contradicts_itself():
    from paramend.edits.arguments import NUMBER
    from paramend.edits.ops import edit, in_place

    with pytest.raises(TypeError, match="takes="):
        edit("nothing", run=lambda *_: None, takes=(NUMBER,))(lambda self, a, b: None)
    with pytest.raises(TypeError, match="cannot be done in place"):
        in_place(Edits.cast)
    assert "<lambda>" not in OPS


# ---- verbs that draw, in place -----------------------------------------------------------------------------------


def trees():
    values = np.linspace(-1, 1, 2000, dtype=np.float32).reshape(40, 50)
    return {
        "numpy": {"w": values.copy(), "b": np.zeros(3, np.float32)},
        "torch": {"w": torch.tensor(values), "b": torch.zeros(3)},
    }


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_noise_in_place(library):
    tree, before = trees()[library], trees()[library]
    leaf = tree["w"]
    assert pm.at(tree, "w").noise_(0.25, seed=3) is None
    assert tree["w"] is leaf
    added = np.asarray(leaf) - np.asarray(before["w"])
    assert abs(added.std() - 0.25) < 0.02 and abs(added.mean()) < 0.02
    np.testing.assert_array_equal(leaf, pm.at(before, "w").noise(0.25, seed=3)["w"])
    assert not np.asarray(tree["b"]).any()
    pm.at(tree, "w").noise_(std=0.25, seed=4)
    assert not (np.asarray(leaf) - np.asarray(before["w"]) - added == added).all()


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_reinit_in_place(library):
    tree, before = trees()[library], trees()[library]
    leaf = tree["w"]
    assert pm.at(tree, "w").reinit_("he_uniform", seed=3) is None
    assert tree["w"] is leaf
    limit = (6 / {"numpy": 40, "torch": 50}[library]) ** 0.5  # kernels are (in, out) in JAX, (out, in) in torch
    values = np.asarray(leaf)
    assert abs(values).max() <= limit and abs(values.std() - limit / 3**0.5) < 0.01
    np.testing.assert_array_equal(leaf, pm.at(before, "w").reinit("he_uniform", seed=3)["w"])
    assert not np.asarray(tree["b"]).any()


def test_noise_and_reinit_of_a_module_keep_its_parameters():
    module = torch.nn.Linear(300, 200)
    weight, before = module.weight, module.weight.detach().clone()
    pm.at(module, "weight").noise_(0.5, seed=1)
    assert module.weight is weight and abs(float((weight - before).detach().std()) - 0.5) < 0.01
    pm.at(module, "weight").reinit_("kaiming_normal", seed=1)
    assert module.weight is weight and weight.requires_grad
    assert abs(float(weight.detach().std()) - (2 / 300) ** 0.5) < 0.002


# ---- messages ----------------------------------------------------------------------------------------------------

WRONG = {
    "text for fill": (lambda s: s.fill("abc"), SpecMismatch, "fill takes a number, and value is 'abc', of type str"),
    "text of numpy": (lambda s: s.fill(np.str_("abc")), SpecMismatch, "fill takes a number, and value is "),
    "nothing for fill": (lambda s: s.fill(None), SpecMismatch, "fill takes a number, and value is None"),
    "list for fill": (
        lambda s: s.fill([1, 2]),
        SpecMismatch,
        "fill takes a scalar, and value is an array of shape (2,)",
    ),
    "array for fill": (lambda s: s.fill(np.ones((1, 2))), SpecMismatch, "is an array of shape (1, 2)"),
    "text for multiply": (
        lambda s: s.multiply("2"),
        SpecMismatch,
        "the operand is a number or an array, and this is '2'",
    ),
    "text for add": (
        lambda s: s.add({"a": 1}),
        SpecMismatch,
        "the operand is a number or an array, and this is {'a': 1}",
    ),
    "text for set": (
        lambda s: s.set("new.npy"),
        SpecMismatch,
        "set takes an array, and this is 'new.npy', of type str",
    ),
    "text for noise": (lambda s: s.noise("small"), SpecMismatch, "noise takes a number, and std is 'small'"),
    "text for a seed": (lambda s: s.noise(1.0, seed="one"), BadArgument, "seed='one' is not a seed"),
    "fraction for a seed": (lambda s: s.reinit("lecun_normal", seed=0.5), BadArgument, "seed=0.5 is not a seed"),
    "text for clip": (lambda s: s.clip(0, "1"), SpecMismatch, "clip takes a number, and hi is '1'"),
    "another spec in place": (lambda s: s.apply_(lambda x: x[:1], keep_spec=False), Unsupported, "spec"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_an_edit_says_of_a_wrong_argument(case):
    edit, error, message = WRONG[case]
    tree = {"w": np.ones((4, 2))}
    with pytest.raises(error, match=re.escape(message)):
        edit(pm.at(tree, "w"))
    assert tree["w"].tolist() == np.ones((4, 2)).tolist()
