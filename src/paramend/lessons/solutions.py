"""Solutions: the function `solve` of a Python file."""

import inspect
import itertools
import linecache
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from paramend.errors import BadArgument
from paramend.lessons.observation import place_in
from paramend.reports.wording import closest, described

_count = itertools.count()


def load(path: str | Path, parameters: Sequence[str]) -> Callable[..., Any]:
    """The function `solve` of a Python file, which is run as a module, without code under `if __name__ == "__main__"`.
    `BadArgument` names the file, and if known the line, if it fails or has no `solve` that takes `parameters`."""
    path = Path(path)
    module = _run(path, _source(path))
    call = f"solve({', '.join(parameters)})"
    solve = vars(module).get("solve")
    if solve is None:
        functions = {name: value for name, value in vars(module).items() if inspect.isfunction(value)}
        near = closest("solve", functions, limit=1)
        there = f"; {near[0]} is on line {functions[near[0]].__code__.co_firstlineno}" if near else ""
        raise BadArgument(f"{path.name} has no function `solve`{there}", hint=f"write  def {call}: ...")
    if not callable(solve):
        raise BadArgument(f"{path.name}: `solve` is {described(solve)}, not a function", hint=f"write  def {call}: ...")
    try:
        signature = inspect.signature(solve)
    except (TypeError, ValueError):  # a callable without a signature is tried as it is
        return solve  # type: ignore[no-any-return]
    try:
        signature.bind(*parameters)
    except TypeError as error:
        line = getattr(getattr(inspect.unwrap(solve), "__code__", None), "co_firstlineno", None)
        where = f"{path.name}, line {line}" if line else path.name
        raise BadArgument(
            f"{where}: solve{signature} cannot be called as {call}: {error}", hint=f"write  def {call}: ..."
        ) from None
    return solve  # type: ignore[no-any-return]


def _source(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise BadArgument(
            f"cannot read {path}: {reason}", hint="give the path of the file that holds `solve`"
        ) from error


def _run(path: Path, source: bytes) -> ModuleType:
    file = str(path.resolve())
    try:
        code = compile(source, file, "exec", dont_inherit=True)
    except SyntaxError as error:
        at = f"{path.name}, line {error.lineno}" if error.lineno else path.name
        line = f"\n\n    {error.text.strip()}" if error.text else ""
        raise BadArgument(f"{at}: {type(error).__name__}: {error.msg}{line}") from error
    except ValueError as error:  # null bytes
        raise BadArgument(f"{path.name} is not Python source: {error}") from error
    linecache.checkcache(file)
    # Dataclasses, and so Flax modules, look up their module by name; a unique name separates gradings.
    module = ModuleType(f"_paramend_solution_{next(_count)}")
    module.__file__ = file
    sys.modules[module.__name__] = module
    try:
        exec(code, vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        where = place_in(error, file) or path.name
        raise BadArgument(f"{where}: {type(error).__name__} while the file was run: {error}") from error
    return module
