"""Changes of structure: leaves deleted from a tree, leaves moved to other paths.

The containers are opened as drafts, entries are removed and added, and the drafts are closed again. A container in
which nothing changed stays the same object; the given tree is never written to. What is already at a new path is a
`RenameClash`, and so is a hole in a list; containers with fixed entries are `Unsupported`.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from paramend.errors import BadArgument, RenameClash, Unsupported
from paramend.leaves.leaves import Group, Index, keys_of
from paramend.leaves.nested import unexhausted
from paramend.leaves.paths import Label, Names, Part, labels, number_of
from paramend.reports import wording
from paramend.selectors.renames import Rename, keys, rename
from paramend.selectors.selector import Both, Selector, Text, Union, Where
from paramend.trees.kind import ELIDED, Kind
from paramend.trees.lookup import find_kind
from paramend.trees.tree import Tree


@unexhausted("the tree")
def relocate(tree: Tree, moved: Mapping[int, Sequence[tuple[str, int | None]]], gone: Collection[int]) -> Any:
    """A tree without leaves that are gone, or dicts and lists that became empty, and with others under new paths, from
    `moves`. All move at once, so paths may be swapped. If leaves are gone, list positions close up."""
    draft = take_apart(tree)
    values = {number: draft.take(number) for number in moved}
    for number in gone:
        draft.take(number)
    for number, path in moved.items():
        draft.put(number, path, values[number])
    draft.check("delete what is there first, or rename to other paths")
    for number in (*moved, *gone):
        draft.prune(number)
    return draft.root.close(close_up=bool(gone))


def regroup(tree: Tree, groups: Sequence[Group], *, close_up: bool = True) -> Any:
    """A tree in which groups of leaves are replaced by others, each in a box like that of the first of its group."""
    draft = take_apart(tree)
    held = {number: draft.take(number) for number in dict.fromkeys(n for group in groups for n in group.numbers)}
    for group in groups:
        values, box = [tree.values[number] for number in group.numbers], held[group.numbers[0]]
        kind = find_kind(box)
        box = group.boxed(box) if group.boxed is not None and kind is not None else box
        for path, value in zip(group.paths, group.make(values), strict=True):
            made = value if kind is None else kind.close(box, [value])
            draft.put(group.numbers[0], path, made, position=group.position)
    draft.check("into=, paths that are free")
    for number in held:
        draft.prune(number)
    return draft.root.close(close_up=close_up)


def boxes(tree: Tree, numbers: Iterable[int]) -> dict[int, Any]:
    """What leaves stand in, such as a Variable of NNX, the leaves themselves where it is nothing; none of a module."""
    try:
        places = take_apart(tree).places
    except Unsupported:
        return {}
    return {n: places[n].chain[-1].entries[places[n].keys[-1]] for n in numbers if places[n].sealed is None}


def enter(tree: Tree, leaves: Sequence[tuple[Sequence[str], Any]]) -> Any:
    """A tree with more leaves, each under keys; containers that are missing are dicts."""
    draft = take_apart(tree)
    for path, value in leaves:
        draft.put(None, [(key, None) for key in path], value)
    draft.check("rename=, paths that are free")
    return draft.root.close(close_up=False)


def moves(
    index: Index, selector: Selector, chosen: Collection[int], to: str
) -> dict[int, list[tuple[str, int | None]]]:
    """The new paths of the chosen leaves that the selector's text names, by number, in the form of `renames.keys`."""
    found: dict[int, list[tuple[str, int | None]]] = {}
    for rule in _rules(selector, to):
        for number, path in rule.over(index).items():
            if number in chosen and number not in found:
                found[number] = keys(path)
    return found


def _rules(selector: Selector, to: str) -> list[Rename]:
    """One rename for each text in a selector; for `&` and `.where`, that of their left side."""
    match selector:
        case Text():
            return [rename(selector.text, to)]
        case Union():
            return [rule for part in selector.parts for rule in _rules(part, to)]
        case Where():
            return _rules(selector.part, to)
        case Both():
            return _rules(selector.left, to)
    raise BadArgument(f"rename needs a selector of text, and this is {selector!r}", hint='pm.at(tree, "h_<n>/**")')


class _Container:
    """An opened container: its entries by key, which can be removed and added."""

    def __init__(self, node: Any, kind: Kind | None, path: tuple[str, ...], *, empty: bool = False) -> None:
        assert kind is not None
        self.node, self.kind, self.path = node, kind, path
        names, children, _ = kind.open(node)
        self.positional = not names and isinstance(node, list | tuple)
        names = names or tuple(range(len(children)))
        self.by_text = {keys_of(labels(name))[0]: name for name in names}
        self.flat = bool(names) and all(type(name) is tuple for name in names)  # a flattened dict
        self.numbered = self.positional or (bool(names) and all(type(name) is int for name in names))
        self.before: dict[Any, Any] = {} if empty else dict(zip(names, children, strict=True))
        self.entries: dict[Any, Any] = dict(self.before)
        # The place of each key; a new one takes that of the first leaf moved to it, or the end. Frameworks open some
        # mappings in sorted order; the user sees the order of iteration.
        listed = list(node) if isinstance(node, Mapping) and len(node) == len(names) else names
        self.rank: dict[Any, float] = {} if empty else {name: place for place, name in enumerate(listed)}

    @property
    def fixed(self) -> bool:
        return self.kind.rekey is None

    def key(self, text: str) -> Any:
        """The key that a text means here: in a list a position, among ints an int, else the text."""
        if text in self.by_text:
            return self.by_text[text]
        if self.flat:
            return tuple(text.split("/"))
        number = number_of(text)
        return number if self.numbered and number is not None else text

    def close(self, *, close_up: bool) -> Any:
        """The container with its entries. List positions close up if `close_up`; else they must have no holes."""
        entries = {
            key: child.close(close_up=close_up) if isinstance(child, _Container) else child
            for key, child in self.entries.items()
        }
        if entries.keys() == self.before.keys():
            if all(child is self.before[key] for key, child in entries.items()):
                return self.node
            return self.kind.close(self.node, [entries[key] for key in self.before])
        name = "/".join(self.path) or "the tree"
        if self.kind.rekey is None:
            raise Unsupported(
                f"{name} is a {type(self.node).__name__}, whose entries are fixed",
                hint="only dicts and lists can lose or gain entries",
            )
        order = sorted(entries, key=None if self.positional else lambda key: self.rank.get(key, math.inf))
        if self.positional and not close_up and order != list(range(len(order))):
            hole = next(i for i in range(len(order) + 1) if i not in entries)
            raise RenameClash(
                f"{name} is a list: it would have entries {wording.listing(list(map(str, order)))} and no entry {hole}",
                hint="rename the other entries too, or convert the list to a dict first",
            )
        if self.positional:
            return self.kind.rekey(self.node, {i: entries[key] for i, key in enumerate(order)})
        return self.kind.rekey(self.node, {key: entries[key] for key in order})


def _vacated(child: Any) -> bool:
    """Whether everything that a container held was taken out of it."""
    return isinstance(child, _Container) and bool(child.before) and all(map(_vacated, child.entries.values()))


def _is_stale(child: Any, following: str, *, is_list: bool) -> bool:
    """Whether a container gives way to one of another kind: a list for positions, or a dict where a list was."""
    return _vacated(child) and (is_list or (child.positional and number_of(following) is None))


class _Place(NamedTuple):
    """The place of a leaf: the containers from the root to its own, the key in each, and what seals it in, or None."""

    chain: tuple[_Container, ...]
    keys: tuple[Any, ...]
    sealed: Any


class Draft:
    """An opened tree, closed again by `root.close`: the places of its leaves, and a sentence on each that is taken."""

    def __init__(self, tree: Tree, kind: Kind) -> None:
        self.index = tree.index
        self.root = _Container(tree.root, kind, ())
        self.clashes: list[str] = []
        self.places: dict[int, _Place] = {}
        self._open(self.root, (), (), tree.index.names)

    def _open(self, container: _Container, above: tuple[_Container, ...], path: tuple[Any, ...], names: Names) -> None:
        chain = (*above, container)
        met: set[Label] = set()
        for key, child in container.before.items():
            here = (*path, key)
            entry = _entry(names, key, met)
            kind = find_kind(child)
            if kind is None or ELIDED in kind.open(child)[0]:
                # A box moves with its content. A box of several leaves cannot be split.
                sealed = child if type(entry) is dict else None
                self.places |= dict.fromkeys(_numbers(entry), _Place(chain, here, sealed))
            elif kind.replace is not None:
                self.places |= dict.fromkeys(_numbers(entry), _Place(chain, here, child))
            else:
                container.entries[key] = inner = _Container(child, kind, tuple(map(str, here)))
                self._open(inner, chain, here, entry or {})

    def take(self, number: int) -> Any:
        """Take a leaf out of its container, with its box if it has one."""
        chain, path, sealed = self.places[number]
        if sealed is not None:
            raise Unsupported(
                f"{self.index.path(number)} is a part of a {type(sealed).__name__}, and the parts of a "
                f"{type(sealed).__name__} are fixed by its class",
                hint="edit its state: pm.at(module.state_dict(), ...) in torch, pm.at(nnx.state(module), ...) in NNX",
            )
        return chain[-1].entries.pop(path[-1])

    def put(
        self, number: int | None, path: Sequence[tuple[str, int | None]], value: Any, *, position: int | None = None
    ) -> None:
        """Put a leaf under new keys, each with the depth in the old path of the template of its container, or None. A
        leaf without a number comes from elsewhere, and has no templates. For the key at `position` a list is made if
        there is no container yet."""
        old = _Place((), (), None) if number is None else self.places[number]
        container = self.root
        for depth, (text, _) in enumerate(path):
            key = container.key(text)
            if container.positional and type(key) is not int:
                moves = "/".join(key for key, _ in path) if number is None else self.index.path(number)
                self.clashes.append(f"{moves} ({'/'.join(container.path)} is a list and has no {text!r})")
                return
            if container in old.chain and key not in container.rank:
                container.rank[key] = container.rank.get(old.keys[old.chain.index(container)], math.inf)
            if depth == len(path) - 1:
                break
            inner = container.entries.get(key)
            following, like = path[depth + 1]
            if key not in container.entries or _is_stale(inner, following, is_list=depth + 1 == position):
                template = old.chain[like] if like is not None else None
                here = (*container.path, text)
                inner = _list_in(self.root, here) if depth + 1 == position else _like(template, following, here)
                container.entries[key] = inner
            if not isinstance(inner, _Container):
                self._clash(number, path, f"{'/'.join((*container.path, text))} is a leaf")
                return
            container = inner
        if key in container.entries and not _vacated(container.entries[key]):
            self._clash(number, path, "which is taken")
        else:
            container.entries[key] = value

    def _clash(self, number: int | None, path: Sequence[tuple[str, Any]], why: str) -> None:
        to = "/".join(text for text, _ in path)
        moves = f"{self.index.path(number)} would go to {to} ({why})" if number is not None else ""
        self.clashes.append(moves or f"{to} (which is taken)")

    def check(self, hint: str) -> None:
        """Raise if the new places of leaves are taken."""
        if self.clashes:
            raise RenameClash(
                f"{wording.plural(len(self.clashes), 'leaf', 'leaves')} would collide with others: "
                f"{wording.listing(self.clashes, 4)}",
                hint=hint,
            )

    def prune(self, number: int) -> None:
        """Remove the containers that became empty when a leaf was taken."""
        chain, path, _ = self.places[number]
        for depth in range(len(chain) - 1, 0, -1):
            container, parent = chain[depth], chain[depth - 1]
            if container.entries or parent.fixed or parent.entries.get(path[depth - 1]) is not container:
                return
            del parent.entries[path[depth - 1]]


def take_apart(tree: Tree) -> Draft:
    """The draft of a tree; `Unsupported` if its class fixes its entries."""
    kind = find_kind(tree.root)
    if kind is None:
        raise Unsupported("a single array has no entries to delete or rename")
    if kind.replace is not None or ELIDED in kind.open(tree.root)[0]:
        name = type(tree.root).__name__
        raise Unsupported(
            f"the parts of a {name} are fixed by its class: they cannot be deleted or renamed",
            hint="edit its state: pm.at(module.state_dict(), ...) in torch, pm.at(nnx.state(module), ...) in NNX",
        )
    return Draft(tree, kind)


def _entry(names: Names, key: Any, met: set[Label]) -> Any:
    """The entry of an index for a key: a leaf number, names, or None; `met` are the labels of the keys before."""
    *first, last = labels(key)
    for label in first:
        names = names.get(label, {})
    while last in met:
        last = last._replace(serial=last.serial + 1) if isinstance(last, Part) else Part(last, "", True, 1)
    if last in names and not first:
        met.add(last)
    return names.get(last)


def _numbers(entry: Any) -> Iterator[int]:
    if type(entry) is int:
        yield entry
    for child in entry.values() if type(entry) is dict else ():
        yield from _numbers(child)


def _list_in(root: _Container, path: tuple[str, ...]) -> _Container:
    """An empty list; in an NNX State, which holds no lists, a dict with int keys."""
    in_state = type(root.node).__name__ == "State"
    node: Any = {} if in_state else []
    made = _Container(node, find_kind(node), path)
    made.numbered = made.numbered or in_state
    return made


def _like(template: _Container | None, first: str, path: tuple[str, ...]) -> _Container:
    """An empty container of the same kind as another, if that kind can hold a key of this text; else a dict."""
    if template is None or template.fixed or (template.positional and number_of(first) is None):
        return _Container({}, find_kind({}), path)
    return _Container(template.node, template.kind, path, empty=True)
