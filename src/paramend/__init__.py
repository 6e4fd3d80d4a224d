"""Surgery for model parameters: pick leaves by path, change exactly those, know that nothing else moved."""

from importlib.metadata import version

from paramend.editing import Selection as Selection
from paramend.editing import at as at
from paramend.editing import labels as labels
from paramend.editing import param_count as param_count
from paramend.selectors import Selector as Selector
from paramend.selectors import sel as sel
from paramend.specs import Spec as Spec

__version__ = version("paramend")
