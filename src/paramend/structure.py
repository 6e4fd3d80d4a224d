"""Changes of structure: leaves deleted from a tree, leaves moved to other paths."""

from collections.abc import Sequence
from typing import Any

from paramend import _text
from paramend.containers import ELIDED
from paramend.errors import BadArgument, RenameClash, Unsupported
from paramend.paths import Label, Part, labels, text_of, write_path
from paramend.patterns import Pattern, Quoted
from paramend.renames import Rename, joined, rename
from paramend.selectors import Selector, Text, Union
from paramend.trees.registry import Tree, find_kind


class _Draft:
    """A container taken apart: its children by key, so that entries can go and come."""

    def __init__(self, node: Any) -> None:
        kind = find_kind(node)
        assert kind is not None
        self.node, self.kind = node, kind
        keys, children, _ = kind.open(node)
        self.positions = not keys and bool(children)
        keys = keys or tuple(range(len(children)))
        self.children: dict[Any, Any] = dict(zip(keys, children, strict=True))
        self.changed = False


def _open(node: Any, counter: list[int], drafts: list[tuple[_Draft, Any] | None]) -> Any:
    """A tree as nested drafts; the place of each leaf is noted, in the order of leaf numbers."""
    kind = find_kind(node)
    if kind is None:
        return node
    draft = _Draft(node)
    if kind.replace is not None:
        raise Unsupported(
            f"the parts of a {type(node).__name__} are fixed by its class: nothing can be deleted or renamed in it",
            hint="edit its state: pm.at(module.state_dict(), ...) in torch, pm.at(nnx.state(module), ...) in NNX",
        )
    for key, child in draft.children.items():
        if find_kind(child) is None:
            drafts.append((draft, key))
        else:
            draft.children[key] = _open(child, counter, drafts)
    return draft


def _close(draft: Any, path: tuple[str, ...] = ()) -> Any:
    if not isinstance(draft, _Draft):
        return draft
    children = {key: _close(child, (*path, str(key))) for key, child in draft.children.items()}
    if not draft.changed:
        return draft.kind.close(draft.node, list(children.values()))
    if draft.kind.rekey is None:
        raise Unsupported(
            f"{'/'.join(path) or 'the tree'} is a {type(draft.node).__name__}, whose entries are fixed",
            hint="only dicts and lists lose or gain entries",
        )
    if draft.positions:
        children = {i: children[key] for i, key in enumerate(sorted(children))}
    return draft.kind.rekey(draft.node, children)


def _prune(draft: _Draft, key: Any, parents: dict[int, tuple[_Draft, Any]]) -> None:
    """Removes an entry, and the containers that it leaves empty."""
    while True:
        while draft.kind.open(draft.node)[0] == (ELIDED,):  # a box goes with its content
            draft, key = parents[id(draft)]
        del draft.children[key]
        draft.changed = True
        if draft.children or id(draft) not in parents:
            return
        draft, key = parents[id(draft)]


def _take_apart(tree: Tree) -> tuple[Any, list[Any], dict[int, tuple[_Draft, Any]]]:
    places: list[Any] = []
    root = _open(tree.root, [0], places)
    if not isinstance(root, _Draft):
        raise Unsupported("a single array has no entries to delete or rename")
    parents: dict[int, tuple[_Draft, Any]] = {}

    def note(draft: _Draft) -> None:
        for key, child in draft.children.items():
            if isinstance(child, _Draft):
                parents[id(child)] = (draft, key)
                note(child)

    note(root)
    return root, places, parents


def delete(tree: Tree, numbers: set[int]) -> Any:
    """A tree without these leaves."""
    root, places, parents = _take_apart(tree)
    for number in numbers:
        _prune(*places[number], parents)
    return _close(root)


def move(tree: Tree, selector: Selector, numbers: Sequence[int], to: str) -> Any:
    """A tree with these leaves under new paths. All move at once, so that paths may be swapped.

    Raises:
        RenameClash: two leaves would have one path.
    """
    rules = _rules(selector, to)
    index = tree.index
    flat = any(isinstance(label, Part) for path in index.paths.values() for label in path) and all(
        len(joined(path, "")) == 1 for path in index.paths.values()
    )
    chosen = [twin for number in numbers for twin in tree.twins(number) if any(r.of(index.paths[twin]) for r in rules)]
    keys: dict[int, tuple[str, ...]] = {}
    for number in chosen:
        new = next(path for rule in rules if (path := rule.of(index.paths[number])) is not None)
        keys[number] = _keys(new, index.separator, flat=flat)
    after = {number: keys.get(number) or joined(path, "") for number, path in index.paths.items()}
    _check_clashes(tree, after)
    root, places, parents = _take_apart(tree)
    values = {number: _lift(*places[number], parents) for number in chosen}
    for number in chosen:
        _prune(*places[number], parents)
    for number in chosen:
        _insert(root, keys[number], values[number], write_path(index.paths[number], index.separator))
    return _close(root)


def _rules(selector: Selector, to: str) -> list[Rename]:
    parts = selector.parts if isinstance(selector, Union) else (selector,)
    texts = [part.text for part in parts if isinstance(part, Text)]
    if len(texts) != len(parts):
        raise BadArgument(f"rename needs a selector in text, and this is {selector!r}", hint='pm.at(tree, "h_<n>/**")')
    return [rename(text, to) for text in texts]


def _keys(path: Sequence[Label | Pattern], separator: str, *, flat: bool) -> tuple[str, ...]:
    """The keys of a new path: one for each new piece, or a single one in a flat state dict."""
    flattened: list[Label] = []
    for label in path:
        if isinstance(label, Pattern):
            segment = label.segments[0]
            assert isinstance(segment, Quoted)
            flattened += labels(segment.text)
        elif not isinstance(label, Part) and flattened and flat:
            flattened.append(Part(label, separator, False))
        else:
            flattened.append(label)
    if flat:
        flattened = [flattened[0], *(p if isinstance(p, Part) and p.before else Part(text_of(p), separator, False) for p in flattened[1:])]
    return joined(flattened, separator)


def _check_clashes(tree: Tree, after: dict[int, tuple[str, ...]]) -> None:
    taken: dict[tuple[str, ...], int] = {}
    clashes = []
    for number, keys in after.items():
        if keys in taken:
            clashes.append(f"{tree.index.path(taken[keys])} and {tree.index.path(number)} to {'/'.join(keys)}")
        taken[keys] = number
    if clashes:
        raise RenameClash(
            f"{_text.plural(len(clashes), 'path')} would hold two leaves: {_text.listing(clashes, 4)}",
            hint="delete one of the two first, or rename to other paths",
        )
    for keys in after.values():
        for size in range(1, len(keys)):
            if keys[:size] in taken:
                raise RenameClash(f"{'/'.join(keys[:size])} would be a leaf and hold {'/'.join(keys)}")


def _lift(draft: _Draft, key: Any, parents: dict[int, tuple[_Draft, Any]]) -> Any:
    """A leaf with its box, so that a boxed parameter stays boxed."""
    value = draft.children[key]
    while draft.kind.open(draft.node)[0] and ELIDED in draft.kind.open(draft.node)[0]:
        value = draft.node
        draft, key = parents[id(draft)]
    return value


def _insert(root: _Draft, keys: tuple[str, ...], value: Any, old: str) -> None:
    draft = root
    for i, key in enumerate(keys[:-1]):
        found = _own_key(draft, key)
        child = draft.children.get(found)
        if child is None:
            child = _Draft(_blank(draft.node))
            draft.children[found] = child
            draft.changed = True
        if not isinstance(child, _Draft):
            raise RenameClash(f"{old} cannot go to {'/'.join(keys)}: {'/'.join(keys[: i + 1])} is a leaf")
        draft = child
    draft.children[_own_key(draft, keys[-1])] = value
    draft.changed = True


def _own_key(draft: _Draft, text: str) -> Any:
    """The key as this container has it: a position in a list, an int among int keys."""
    if isinstance(draft.node, list | tuple) or any(isinstance(key, int) for key in draft.children):
        return int(text) if text.isdigit() else text
    return text


def _blank(node: Any) -> Any:
    """An empty container for a new level: a dict, or a plain dict where the parent is a list."""
    return {}
