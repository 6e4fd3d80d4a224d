"""The outline of a plan's result: its leaves at their new keys, and what else the source holds where it was."""

from collections.abc import Iterable, Sequence
from typing import Any

from paramend.edits.plan import Plan, Row
from paramend.errors import RenameClash
from paramend.formats.gathered import Gathered
from paramend.formats.registry import Format, format_of
from paramend.formats.source import Source
from paramend.leaves.leaves import keys_of
from paramend.leaves.outlines import ATOMS, CONTAINERS, Keys, Outline, Place, once, outline_of, shown, texts
from paramend.leaves.paths import number_of

_Pair = tuple[list[Any], Any]


def base_of(made: Plan) -> Any:
    """The checkpoint that the result is modelled on."""
    return made.leaves.base if isinstance(made.leaves, Gathered) else made.leaves


def arranged(made: Plan, rows: Sequence[Row]) -> Outline:
    """The outline of a plan's result; the number of a place is the position of a row.

    A leaf that is not moved keeps its true keys. In a path that is new, a number is a position where the source has a
    list, and where a leaf of a list is moved to a new place. A list that would have holes becomes a dict. `RenameClash`
    if a leaf would take the place of an entry that is not an array.
    """
    old = outline_of(base_of(made))
    places, gathered = old.places, isinstance(made.leaves, Gathered)
    known = {texts(keys): number for number, (keys, _) in places.items()}
    numbered = {keys[:at] for keys, _ in old.entries for at, key in enumerate(keys) if type(key) is int}
    boxed = next((place.boxed for _, place in places.values() if place.boxed), "")
    found: dict[int, list[_Pair]] = {}  # a leaf of the source → the rows that take its place
    late: list[_Pair] = []
    for at, row in enumerate(rows):
        wanted = keys_of(row.labels)
        wanted = () if wanted == ("",) else wanted  # a single array
        stays = known.get(wanted) if gathered or row.was else row.source
        of = stays if gathered else row.source
        like = places[of][1] if of is not None else Place(-1, boxed=boxed)
        if stays is not None:
            keys = list(places[stays][0])
        else:
            listed = of is not None and row.was != "" and any(type(key) is int for key in places[of][0])
            keys = _typed(wanted, numbered, always=listed)
        key = like.key if row.spec.dtype == "uint32" else ""
        pair = (keys, like._replace(number=at, like=-1 if of is None else of, key=key))
        (late if of is None else found.setdefault(of, [])).append(pair)
    pairs: list[_Pair] = []
    for above, value in old.entries:
        pairs += found.get(value.number, []) if type(value) is Place else [(list(above), value)]
    pairs = _apart([*pairs, *late])
    _settle(pairs, old)
    for keys, _ in pairs:  # no file can hold keys that are objects
        keys[:] = [key if type(key) in ATOMS or type(key) is tuple else str(key) for key in keys]
    return Outline([(tuple(keys), value) for keys, value in pairs], _containers(pairs, old), old.format)


def _typed(wanted: Sequence[str], numbered: set[Keys], *, always: bool) -> list[Any]:
    """The keys that texts mean: whole numbers among whole numbers."""
    keys: list[Any] = []
    for text in wanted:
        number = number_of(text) if always or tuple(keys) in numbered else None
        keys.append(text if number is None or str(number) != text else number)
    return keys


def _apart(pairs: list[_Pair]) -> list[_Pair]:
    """Without empty entries where leaves were moved to, or below them."""
    leaves = {texts(keys) for keys, value in pairs if type(value) is Place}
    above = {keys[:at] for keys in leaves for at in range(len(keys))}
    kept: list[_Pair] = []
    for keys, value in pairs:
        own = texts(keys)
        blocked = own in leaves or own in above or any(own[:at] in leaves for at in range(len(own)))
        if type(value) is Place or not blocked:
            kept.append((keys, value))
        elif value is not None and not (type(value) in CONTAINERS and not value):
            raise RenameClash(
                f"a leaf would take the place of {shown(tuple(keys))}, which is {value!r:.60}",
                hint="rename to another path",
            )
    return kept


def _settle(pairs: list[_Pair], old: Outline) -> None:
    """Make text of positions in lists that lack some of their positions."""
    lists = {texts(keys) for keys, node in old.containers.items() if isinstance(node, list | tuple)}
    there = {texts(keys[:at]) for keys, _ in old.entries for at in range(len(keys) + 1)}
    inside: dict[tuple[str, ...], set[Any]] = {}
    for keys, _ in pairs:
        for at, key in enumerate(keys):
            inside.setdefault(texts(keys[:at]), set()).add(key)
    broken = {
        above
        for above, inner in inside.items()
        if (above in lists or above not in there) and inner != set(range(len(inner)))
    }
    for keys, _ in pairs:
        for at in range(len(keys)):
            if texts(keys[:at]) in broken:
                keys[at] = str(keys[at])


def _containers(pairs: list[_Pair], old: Outline) -> dict[Keys, Any]:
    """The containers that are not dicts, by their new keys."""
    likes = {texts(keys): node for keys, node in old.containers.items()}
    there = {texts(keys[:at]) for keys, _ in old.entries for at in range(len(keys) + 1)}
    inside: dict[Keys, set[Any]] = {}
    for keys, _ in pairs:
        for at, key in enumerate(keys):
            inside.setdefault(tuple(keys[:at]), set()).add(key)
    found: dict[Keys, Any] = {}
    for above, inner in inside.items():
        whole = inner == set(range(len(inner)))
        like = likes.get(texts(above), None if texts(above) in there else [])
        if like is not None and (whole or not isinstance(like, list | tuple)):
            found[above] = like
    return found


def lost(source: Source, form: Format) -> tuple[str, ...]:
    """What a new file in a format has no place for, each with the reason.

    Of a named tuple without fields, such as an empty optimizer state, there is only one: it is not lost.
    """
    writer = form.writer()
    holds = once(writer.holds)
    own = format_of(source)
    said = [
        f"{shown(keys, source.index.separator)} ({what(value, flat=writer.flat)})"
        for keys, value in outline_of(source).others
        if not holds(value) and not (isinstance(value, tuple) and not value and hasattr(value, "_fields"))
    ]
    if own is not form:
        said += [f"{name} (not a tensor)" for name in _beside(source)]
    return tuple(said)


def _beside(source: Any) -> Iterable[str]:
    names = {"npz": source.metadata, "orbax": ["custom_metadata"], "safetensors": source.metadata}
    there = names.get(source.format, ())
    return [n for n in there if n in source.metadata and n != "format" and not n.startswith("paramend.")]


def what(value: Any, *, flat: bool) -> str:
    """What an entry is, for a message."""
    kind = type(value)
    if kind.__module__ == "paramend.formats.torch.pickles":  # a name, or an object that is carried unread
        return str(value.text)
    if flat:
        return "not a tensor"
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}"
