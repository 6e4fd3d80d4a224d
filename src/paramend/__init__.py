"""Surgery for model parameters: pick leaves by path, change exactly those, know that nothing else moved."""

from typing import Any

from paramend.editing import Selection as Selection
from paramend.editing import at as at
from paramend.editing import labels as labels
from paramend.editing import param_count as param_count
from paramend.freezing.registry import freeze as freeze
from paramend.freezing.registry import freeze_ as freeze_
from paramend.freezing.registry import unfreeze_ as unfreeze_
from paramend.grafting import graft as graft
from paramend.grafting import graft_ as graft_
from paramend.modules import init_zero_ as init_zero_
from paramend.selectors import Selector as Selector
from paramend.selectors import sel as sel
from paramend.specs import Spec as Spec

__all__ = [
    "Selection",
    "Selector",
    "Spec",
    "__version__",
    "at",
    "freeze",
    "freeze_",
    "graft",
    "graft_",
    "init_zero_",
    "labels",
    "param_count",
    "sel",
    "unfreeze_",
]


def __getattr__(name: str) -> Any:
    """The version, read only when asked for: the standard library's reader takes half as long to import as numpy."""
    if name == "__version__":
        from importlib.metadata import version

        return version("paramend")
    raise AttributeError(f"module 'paramend' has no attribute {name!r}")
