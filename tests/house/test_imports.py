"""What `import paramend` loads, and what its root shows."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import paramend as pm

HEAVY = {
    "jax",
    "flax",
    "optax",
    "orbax",
    "torch",
    "ray",
    "equinox",
    "sklearn",
    "safetensors",
    "rich",
    "click",
    "jinja2",
    "matplotlib",
    "transformers",
}
REFERENCE = Path(__file__).parents[2] / "docs" / "reference.md"


def loaded(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after running the code."""
    show = f"{code}\nimport sys; print(' '.join({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_paramend_imports_no_framework():
    assert not loaded("import paramend") & HEAVY


def test_the_test_above_can_fail():
    assert loaded("import click, paramend") & HEAVY == {"click"}


def test_looking_at_a_checkpoint_opens_no_engine(tmp_path):
    """Start-up is most of the time that a look takes."""
    pm.save({"a": np.ones(2)}, tmp_path / "m.safetensors")
    code = f"""
import sys
from paramend.cli.main import cli
try:
    cli(["show", {str(tmp_path / "m.safetensors")!r}], prog_name="paramend")
except SystemExit:
    pass
print(" ".join(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    got = set(done.stdout.splitlines()[-1].split())
    assert "paramend.checkpoints.checkpoint" in got
    unneeded = {"editing", "memory", "trees.registry", "rewriting", "layouts", "undoing", "journal", "patching"}
    assert not got & ({f"paramend.{name}" for name in unneeded} | {"rich", "hashlib", "numpy.random"})


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_editing_with_one_framework_imports_no_other(framework):
    make = {"jax": "import jax.numpy as np", "torch": "import torch as np"}[framework]
    got = loaded(f"{make}\nimport paramend as pm\npm.at({{'a': np.ones(2)}}, 'a').zero()")
    assert framework in got
    assert not got & {"jax", "flax", "torch"} - {framework}


def test_editing_plain_numpy_imports_no_framework():
    got = loaded("import numpy as np, paramend as pm\nassert pm.at({'a': np.ones(2)}, 'a').zero()['a'].sum() == 0")
    assert not got & HEAVY


def test_every_public_name_has_a_docstring_with_an_example_and_stands_in_the_reference():
    text = REFERENCE.read_text()
    for name in pm.__all__:
        value = getattr(pm, name)
        if name == "__version__":
            continue
        assert value.__doc__, name
        assert f"pm.{name}" in text, f"{name} is missing in {REFERENCE.name}"
        if callable(value) and not isinstance(value, type):
            assert ">>>" in value.__doc__, f"{name} has no example"


def test_the_public_names_are_sorted_and_there():
    assert pm.__all__ == sorted(pm.__all__)
    assert all(hasattr(pm, name) for name in pm.__all__)


def test_what_tools_read_is_what_the_interpreter_finds():
    tree = ast.parse(Path(pm.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    said = {
        alias.asname: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    later = {name: (module, name) for name, module in pm._LATER.items()}
    modules = {name: tuple(module.rsplit(".", 1)) for name, module in pm._MODULES.items()}
    assert said == later | modules
    assert {node.target.id for node in block.body if isinstance(node, ast.AnnAssign)} == {"__version__"}
    assert set(pm.__all__) == {*said, "__version__"}


def test_modules_of_the_root_are_attributes_before_anything_loads_them():
    code = "import paramend as pm\nprint(pm.errors.NoMatch.code, pm.testing.assert_identical.__name__, *dir(pm))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[:2] == ["no-match", "assert_identical"]
    assert done.stdout.split()[2:] == pm.__all__
    assert not loaded("import paramend") & {"numpy"}


def test_a_name_that_is_not_there_is_an_error():
    assert not hasattr(pm, "opne")
