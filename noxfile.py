"""Paramend on other Pythons, with the oldest and the newest releases of what it uses, and without each extra.

    pip install nox        # and uv, for oldest_frameworks
    nox --list
    nox -s plain frameworks-3.13 oldest                            # environments are in .nox: delete them afterwards
    nox -s "without(extra='orbax')" -- tests/house/test_extras.py  # arguments of pytest, in place of the files chosen

A test runs where all is installed that its text names. What is installed is read from pyproject.toml.
"""

import re
from pathlib import Path

import nox

TOML = nox.project.load_toml("pyproject.toml")
EXTRAS = TOML["project"]["optional-dependencies"]
PYTHONS = nox.project.python_versions(TOML)
FOR_USERS = re.findall(r"\w+", EXTRAS["all"][0].partition("[")[2])
TOOLS = {"pytest", "hypothesis", "jsonschema", "safetensors"}
ABOVE_JAX = {"equinox", "haiku", "cloudpickle"}
MODULES = {"orbax-checkpoint": "orbax", "dm-haiku": "haiku", "scikit-learn": "sklearn"}  # others: the package's name

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "venv"  # pip: uv would bring torch with gigabytes of CUDA
nox.options.download_python = "never"
nox.options.sessions = ["plain", "oldest"]


def lines(extra):
    """The requirements of an extra by module, with those of the extras that it names."""
    found = {}
    for line in EXTRAS[extra]:
        name = re.match(r"[\w-]+", line)[0]
        if name == "paramend":
            for other in re.findall(r"\w+", line.partition("[")[2]):
                found |= lines(other)
        else:
            found[MODULES.get(name, name)] = line
    return found


LINES = lines("far") | lines("docs")


def files(has, of=()):
    """The files of tests whose text names only modules that are there; `of` these, at least one."""
    heavy = set(LINES) - TOOLS - set(has)
    for path in sorted(Path("tests").rglob("test_*.py")):
        # What these read or run names frameworks, not they.
        if path.name in ("test_docs.py", "test_costs.py", "test_types.py") or path.parent.name == "demo":
            continue
        text = path.read_text()
        for helper in re.findall(r"from support\.(\w+)", text):
            text += Path(f"tests/support/{helper}.py").read_text()
        words = set(re.findall(r"\w+", text))
        if not words & heavy and (not of or words & set(of)):
            yield str(path)
    yield "tests/house/test_extras.py"  # hides what it names


def install(session, extras, *options, more=()):
    session.install(
        *options, f".[{','.join(extras)}]" if extras else ".", *(LINES[module] for module in sorted(TOOLS | set(more)))
    )


def run_tests(session, paths, *options):
    base = ["-q", "-p", "no:cacheprovider", f"--basetemp={session.virtualenv.location}/pytest"]
    session.run("python", "-m", "pytest", *base, *options, *(session.posargs or paths), env={"PYTHONPATH": None})


def of_jax(session, *options):
    extras = ["orbax", "plot", "gguf", "deltas"]
    install(session, extras, *options, more=ABOVE_JAX)
    has = {module for extra in extras for module in lines(extra)} | ABOVE_JAX
    return files(has, of=has)


@nox.session(python=PYTHONS)
def plain(session):
    """With numpy and what Paramend itself needs, newest."""
    install(session, [])
    run_tests(session, files(()))


@nox.session(python=PYTHONS)
def frameworks(session):
    """With JAX and all that has wheels for this Python, newest: no torch."""
    run_tests(session, of_jax(session), "-m", "not slow")


@nox.session(python=PYTHONS[0])
def oldest(session):
    """With numpy and what Paramend itself needs, each in the first release that pyproject.toml names."""
    install(session, [], *(line.replace(">=", "==") for line in TOML["project"]["dependencies"]))
    run_tests(session, files(()), "-m", "not slow")


@nox.session(python=PYTHONS[0], venv_backend="uv")
def oldest_frameworks(session):
    """With JAX and all beside it in the first releases that pyproject.toml names, as far as the others allow it."""
    paths = of_jax(session, "--resolution=lowest-direct")
    # Old packages warn of what newer ones dropped; the package gguf has learned these types later.
    late = ["-W", "default::DeprecationWarning", "-k", "not mxfp4 and not nvfp4"]
    run_tests(session, paths, *late, "-m", "not slow")


@nox.session(python=PYTHONS[0])
@nox.parametrize("extra", FOR_USERS)
def without(session, extra):
    """With every other extra: what needs this one says so, and the rest works."""
    gone = {module: line for module, line in lines(extra).items() if line in EXTRAS[extra]}  # not those it builds on
    others = [other for other in FOR_USERS if not set(gone) <= set(lines(other))]
    install(session, others, "-q", "-c", "constraints.txt")
    session.run("pip", "uninstall", "-qy", *(re.match(r"[\w-]+", line)[0] for line in gone.values()))  # others bring it
    run_tests(session, files({module for other in others for module in lines(other)} - set(gone)), "-m", "not slow")
