"""The tree of an Orbax checkpoint: the table in `_METADATA`, one row for each leaf, with its keys and its kind."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from paramend.formats.jsontext import bad
from paramend.formats.limits import MAX_PIECES, shown
from paramend.formats.orbax.store import read_json
from paramend.leaves.leaves import Index
from paramend.leaves.outlines import BOXED, Place
from paramend.leaves.outlines import shown as shown_keys

Keys = tuple[str | int, ...]

TREE, STRINGS = "_METADATA", "_strings.json"
# A folder of tables of what arrays are besides numbers; for keys, under this name, the implementation.
ARRAYS, KEY = "array_metadatas", "random_key_impl"

_EMPTY: dict[str, Callable[[], Any]] = {"None": lambda: None, "Dict": dict, "List": list, "Tuple": tuple}


class OrbaxWalk:
    """The leaves that a table of metadata lists."""

    def __init__(self, folder: Path, table: Mapping[str, Any]) -> None:
        self.file = str(folder / TREE)
        self.index = Index("/")
        # Keys → the place of a leaf, or an entry that is not an array. The key "value" of a box is left out.
        self.entries: list[tuple[Keys, Any]] = []
        # By number, the implementation of a typed PRNG key whose numbers a leaf is.
        self.implementations: dict[int, str] = {}
        self.names: list[str] = []  # by number, the name of a leaf in the store
        # By number, Orbax's name for the kind of a leaf: "jax.Array", "np.ndarray", "scalar" ...
        self.kinds: list[str] = []
        self.others: dict[str, Any] = {}  # path → an entry that is not an array
        rows = table.get("tree_metadata")
        if type(rows) is not dict:
            raise bad(self.file, "tree_metadata", "an object is expected")
        texts = read_json(folder / STRINGS) if (folder / STRINGS).is_file() else {}
        found: list[tuple[str, Keys, str, Any]] = []
        for title, row in rows.items():
            keys, kind = self._row(title, row)
            value: Any = _LEAF
            if kind == "string" and type(texts.get(".".join(map(str, keys)))) is str:
                value = texts[".".join(map(str, keys))]
            elif kind in _EMPTY or row["value_metadata"].get("skip_deserialize"):
                value = _EMPTY.get(kind, dict)()
            found.append((title, keys, kind, value))
        boxed = _boxes(found, rows)
        implementations = _implementations(folder)
        tree: dict[str | int, Any] = {}
        for title, keys, kind, value in found:
            if value is not _LEAF:
                self.entries.append((keys, value))
                self.others[shown_keys(keys)] = value
                continue
            own, name, number = keys[:-1] if keys in boxed else keys, ".".join(map(str, keys)), len(self.names)
            self._leaf(tree, own, title, number)
            box = "NNX Variable" if keys in boxed else ""
            place = Place(number, number, box, implementations.get(name, ""), scalar=kind == "scalar")
            self.implementations |= {number: place.key} if place.key else {}
            self.entries.append((own, place))
            self.names.append(name)
            self.kinds.append(kind)
        self._enter(tree, self.index.names)
        self.custom = table.get("custom_metadata")  # the user's metadata, or None
        if self.custom is not None:
            self.others["custom_metadata"] = self.custom

    def _row(self, title: str, row: Any) -> tuple[Keys, str]:
        place = f"tree_metadata, {shown(title)}"
        keys, value = (row.get("key_metadata"), row.get("value_metadata")) if type(row) is dict else (None, None)
        if type(keys) is not list or type(value) is not dict or type(value.get("value_type")) is not str:
            raise bad(self.file, place, "key_metadata and value_metadata with a value_type are expected")
        found: list[str | int] = []
        for key in keys:
            text, kind = (key.get("key"), key.get("key_type")) if type(key) is dict else (None, None)
            if type(text) is not str or kind not in (1, 2):
                reason = "a key of type 1 (of a list) or 2 (of a dict) is expected"
                raise bad(self.file, f"{place}, key_metadata", reason)
            if kind == 1 and not (text.isdigit() and text.isascii() and len(text) < 19):
                raise bad(self.file, f"{place}, key_metadata", f"{shown(text)} is not a position in a list")
            found.append(int(text) if kind == 1 else text)
        if sum(key.count(".") + key.count("/") + 1 if type(key) is str else 1 for key in found) > MAX_PIECES:
            raise bad(self.file, place, f"the name has more than {MAX_PIECES} pieces")
        return tuple(found), value["value_type"]

    def _leaf(self, tree: dict[str | int, Any], keys: Keys, title: str, number: int) -> None:
        *outer, last = keys or ("",)  # a tree that is a single array
        for key in outer:
            tree = tree.setdefault(key, {})
            if type(tree) is not dict:
                break
        if type(tree) is not dict or last in tree:
            raise bad(self.file, f"tree_metadata, {shown(title)}", "another leaf has its path, or part of it")
        tree[last] = number
        self.index.numbers.append(number)

    def _enter(self, tree: Mapping[str | int, Any], names: dict[Any, Any]) -> None:
        for key, child in tree.items():
            if type(child) is dict:
                inner: dict[Any, Any] = {}
                self._enter(child, inner)
                self.index.add(names, key, inner)
            else:
                self.index.add(names, key, child)


_LEAF = object()


def _boxes(found: list[tuple[str, Keys, str, Any]], rows: Mapping[str, Any]) -> set[Keys]:
    """The leaves that are the content of boxes: all leaves but counters are the only entry, "value", of a dict. Orbax
    writes the Variables of an `nnx.state` so; the names of the module end at the Variable."""
    inside = Counter(keys[:at] for _, keys, _, _ in found for at in {len(keys) - 1} if keys)
    leaves = {title: keys for title, keys, kind, value in found if value is _LEAF}
    boxes = {keys for keys in leaves.values() if len(keys) > 1 and keys[-1] == BOXED and inside[keys[:-1]] == 1}
    others = {title for title, keys in leaves.items() if keys not in boxes}
    others = {title for title in others if rows[title]["value_metadata"].get("write_shape") != []}
    return set() if any(kind != "scalar" for title, _, kind, _ in found if title in others) else boxes


def _implementations(folder: Path) -> dict[str, str]:
    """The implementation of each typed PRNG key, by the name of its numbers in the store."""
    found: dict[str, str] = {}
    for path in sorted((folder / ARRAYS).glob("process_*")):
        rows = read_json(path).get("array_metadatas")
        for row in rows if type(rows) is list else ():
            said = row.get("array_metadata") if type(row) is dict else None
            name, more = (said.get("param_name"), said.get("ext_metadata")) if type(said) is dict else (None, None)
            if type(name) is str and type(more) is dict and type(more.get(KEY)) is str:
                found[name] = more[KEY]
    return found


def table_row(keys: Keys, kind: str, shape: tuple[int, ...] | None) -> tuple[str, dict[str, Any]]:
    """The title and row of a leaf, as Orbax writes them; without a shape, those of an entry that is not an array."""
    value: dict[str, Any] = {"value_type": kind, "skip_deserialize": shape is None and kind != "string"}
    if shape is not None and kind != "scalar":
        value["write_shape"] = list(shape)
    listed = [{"key": str(key), "key_type": 1 if type(key) is int else 2} for key in keys]
    return str(tuple(map(str, keys))), {"key_metadata": listed, "value_metadata": value}
