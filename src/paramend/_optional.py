"""Optional dependencies, imported by name; the error for a missing one says how to install it."""

import importlib
import sys
from types import ModuleType

from paramend.errors import MissingExtra


def need(module: str, *, extra: str, to: str) -> ModuleType:
    """The module, imported.

    Raises:
        MissingExtra: it cannot be imported; the hint is the command that installs it.

    >>> need("math", extra="none", to="count").sqrt(4)
    2.0
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtra(
            f"{package} is needed to {to}, and it cannot be imported: {error}",
            hint=f"pip install 'paramend[{extra}]'",
        ) from error


def imported(module: str) -> bool:
    """Whether this framework has been imported: only then can its objects exist."""
    return sys.modules.get(module) is not None
