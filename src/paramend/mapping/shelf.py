"""The layouts that ship with Paramend, each a file in `shipped/`."""

from pathlib import Path

from paramend.errors import NoMatch
from paramend.mapping.layout import Layout
from paramend.reports import wording

_SHELF = Path(__file__).parent / "shipped"


def layouts() -> list[str]:
    """The names of the layouts that ship, sorted; `pm.layout(name)` opens one.

    >>> "mixtral_4_to_5" in pm.layouts()
    True
    """
    return sorted(path.stem for path in _SHELF.glob("*.yaml"))


def layout(name: str) -> Layout:
    """A layout that ships.

    Raises:
        LookupError: there is none of that name; the message names near ones.

    >>> pm.layout("mixtral_4_to_5")
    <layout mixtral_4_to_5: 3 rules>
    """
    if name not in layouts():
        near = wording.closest(name, layouts()) or [known for known in layouts() if name in known]
        hint = wording.listing(near) if near else "pm.layouts() lists those that ship; pm.Layout.load(path) reads yours"
        raise NoMatch(f"there is no layout {name!r}", hint=hint)
    return Layout.load(_SHELF / f"{name}.yaml")
