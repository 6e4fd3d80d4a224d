"""Rules by which a leaf takes another shape: `pm.resize`, for `pm.graft(..., resize={selector: rule})`.

>>> import paramend as pm
>>> pm.resize.positions(prefix=1)
pm.resize.positions(prefix=1)
"""

from paramend.resize.rules import Resize, channels, patches, positions, vocabulary

__all__ = ["Resize", "channels", "patches", "positions", "vocabulary"]
