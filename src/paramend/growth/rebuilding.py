"""Rebuilding: a tree in memory whose numbered layers are rearranged by an order."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from paramend._optional import imported
from paramend.errors import BadArgument, Unsupported
from paramend.growth.configured import copied
from paramend.growth.depth import Order
from paramend.growth.numbered import Layers, renumbered, shared
from paramend.leaves.leaves import keys_of
from paramend.leaves.paths import labels, text_of
from paramend.reports import wording
from paramend.selectors.layers import Pieces
from paramend.trees.kind import ELIDED, Kind
from paramend.trees.lookup import find_kind, is_torch_module
from paramend.trees.tree import Tree

# Attributes in which modules keep their own number; attention uses it to index its cache.
_NUMBERED = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")


class _Entry(NamedTuple):
    """An entry of a container: its key, its child, its new number, and the new layer that it is in, if any."""

    key: Any
    child: Any
    number: int = 0
    target: int | None = None


class Rebuilder:
    """Rebuilds one tree. The first copy of each layer that is not an identity is the layer itself; the others are
    copies that share with it only what layers share with the rest of the model.
    """

    def __init__(self, tree: Tree, runs: Sequence[Layers], order: Order) -> None:
        self.tree, self.runs, self.order = tree, runs, order
        self.numbers = {id(value): number for number, value in enumerate(tree.values)}
        self.boxes = {id(box): number for number, box in tree.boxes.items()}
        self.shared = shared(tree, runs)
        self.made: dict[tuple[int | None, Any], Any] = {}

    def rebuilt(self, node: Any, path: Pieces = ()) -> Any:
        """A new tree; subtrees that contain no layers are the same objects."""
        kind = find_kind(node)
        if kind is None or not any(run.parent[: len(path)] == path for run in self.runs):
            return node
        if kind.replace is not None:
            twin = kind.replace(node, {})
            inside = [replace(s, parent=s.parent[len(path) :]) for s in self.runs if s.parent[: len(path)] == path]
            Rebuilder(Tree(twin), inside, self.order).rebuild_(twin)
            return twin
        keys, children, _ = kind.open(node)
        named = list(keys or range(len(children)))
        if ELIDED in named:
            return kind.close(node, [self.rebuilt(child, path) for child in children])
        pairs = list(zip(named, children, strict=True))
        entries = [_Entry(key, self.rebuilt(each, (*path, *map(text_of, labels(key))))) for key, each in pairs]
        if not any(self._place(path, key) for key in named):
            return kind.close(node, [entry.child for entry in entries])
        order = list(node) if isinstance(node, Mapping) and len(node) == len(named) else named
        by_key = {entry.key: entry for entry in entries}
        return self._rekeyed(node, kind, path, [by_key[key] for key in order], positional=not keys)

    def _rekeyed(self, node: Any, kind: Kind, path: Pieces, entries: list[_Entry], *, positional: bool) -> Any:
        if kind.rekey is None:
            why = f"{'/'.join(path) or 'the tree'} is {wording.described(node)}, whose entries are fixed"
            raise Unsupported(why, hint="put the layers in a list, a tuple or a dict")
        new: list[tuple[Any, Any]] = []
        done: set[int] = set()
        for entry in entries:
            place = self._place(path, entry.key)
            if place is None:
                new.append((entry.key, entry.child))
            elif id(place[0]) not in done:
                done.add(id(place[0]))
                moved, again = self._moved(path, place[0], entries), self.order.new
                new += [(e.key, self._copied(e.child, e.target) if e.target in again else e.child) for e in moved]
        listed = positional or (isinstance(node, list | tuple) and not hasattr(node, "_fields"))
        if listed and [key for key, _ in new] != list(range(len(new))):
            why = f"{'/'.join(path)} is a list, and the entries between its layers would leave gaps in it"
            raise BadArgument(why, hint="select whole blocks with `layers`, or convert the list to a dict")
        if len(dict(new)) != len(new):
            raise BadArgument(f"two entries of {'/'.join(path)} would have the same name", hint="rename one first")
        return kind.rekey(node, dict(new))

    def _moved(self, path: Pieces, run: Layers, entries: list[_Entry]) -> list[_Entry]:
        moved: list[_Entry] = []
        for entry in entries:
            place = self._place(path, entry.key)
            if place is not None and place[0] is run:
                _, piece, number = place
                for new, target in run.moved(number, self.order):
                    text = renumbered(labels(entry.key), piece, run.piece(new))
                    moved.append(_Entry(new if type(entry.key) is int else keys_of(text)[0], entry.child, new, target))
        return sorted(moved, key=lambda entry: entry.number)

    def _place(self, path: Pieces, key: Any) -> tuple[Layers, int, int] | None:
        """The layers that an entry is numbered among, which piece of its key is the number, and the number."""
        texts = tuple(map(text_of, labels(key)))
        for run in self.runs:
            depth = len(run.parent) - len(path)
            whole = (*path, *texts)
            if 0 <= depth < len(texts) and whole[: len(run.parent)] == run.parent:
                number = run.number(texts[depth])
                if number is not None:
                    return run, depth, number
        return None

    def _copied(self, node: Any, target: int | None) -> Any:
        kind = find_kind(node)
        box = self.boxes.get(id(node))
        number = self.numbers.get(id(node)) if box is None else box
        if number is not None and (kind is None or box is not None):
            first = self.tree.ties.get(number, number)
            if first in self.shared:
                return node
            if (target, first) not in self.made:
                self.made[target, first] = self._fresh(node, kind)
            return self.made[target, first]
        if kind is None:
            return self._fresh(node, None)
        if kind.replace is not None:
            return copy.deepcopy(node) if is_torch_module(node) else _twin(node, kind)
        return kind.close(node, [self._copied(child, target) for child in kind.open(node)[1]])

    def _fresh(self, node: Any, kind: Kind | None) -> Any:
        if kind is not None:  # a box
            return kind.close(node, [self._fresh(child, None) for child in kind.open(node)[1]])
        return copied(node)

    def check(self) -> None:
        """Refuse a module whose layers cannot be rearranged, before anything changes."""
        for run in self.runs:
            _items(run, _descend(self.tree.root, run.parent))

    def rebuild_(self, module: Any) -> None:
        for run in self.runs:
            self._rearrange_(module, run, _descend(module, run.parent))

    def _rearrange_(self, root: Any, run: Layers, holder: Any) -> None:
        items, put = _items(run, holder)
        torch = is_torch_module(root)
        numbered: list[tuple[int, Any]] = []
        kept: list[tuple[Any, Any]] = []
        for key, child in items:
            number = run.number(str(key))
            if number is None:
                kept.append((key, child))
                continue
            for new, target in run.moved(number, self.order):
                again = target is not None and target in self.order.new
                made = (_copied_torch if torch else _copied_nnx)(root, child) if again else child
                numbered.append((new, (made, target)))
        numbered.sort(key=lambda pair: pair[0])
        if [new for new, _ in numbered] != list(range(len(numbered))) and run.step != 1:
            why = f"the entries between the layers of {'.'.join(run.parent)} would leave gaps"
            raise BadArgument(why, hint="select whole blocks with `layers`")
        put([*kept, *((run.piece(new), layer) for new, (layer, _) in numbered)])
        for _, (layer, target) in numbered:
            if torch and target is not None and layer is not None:
                _renumber_(layer, self.order.sources[target], target)


def _twin(module: Any, kind: Kind) -> Any:
    """A copy of an NNX module, arrays included."""
    tree = Tree(module)
    owners = {id(tree.boxes.get(number, value)): copied(value) for number, value in enumerate(tree.values)}
    assert kind.replace is not None
    return kind.replace(module, owners)


def _copied_torch(root: Any, child: Any) -> Any:
    """A deep copy of a layer. What it shares with the rest of the model, such as the configuration, stays shared."""
    inside = {id(module) for module in child.modules()}
    memo: dict[int, Any] = {}
    outside: set[int] = set()
    for _, module in root.named_modules(memo={child}):  # not through the layer
        outside.add(id(module))
        outside |= {id(t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None}
        outside |= {id(value) for name, value in vars(module).items() if not name.startswith("_")}
    for module in child.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *module._modules.values()):
            if value is not None and id(value) in outside:
                memo[id(value)] = value
        for name, value in vars(module).items():
            if not name.startswith("_") and id(value) in outside and id(value) not in inside:
                memo[id(value)] = value
    return copy.deepcopy(child, memo)


def _copied_nnx(root: Any, child: Any) -> Any:
    """A copy of a layer of an NNX module. What it shares with the rest of the model stays shared."""
    kind = find_kind(child)
    if kind is None or kind.replace is None:
        return copy.deepcopy(child)
    twin = _twin(child, kind)
    _share(child, twin, {id(node) for node in _objects(root, id(child))}, set())
    return twin


def _share(old: Any, new: Any, shared: set[int], met: set[int]) -> None:
    """Make a copy of a module share what the module shares."""
    if id(old) in met:
        return
    met.add(id(old))
    for name, value in vars(old).items():
        kind = find_kind(value)
        if kind is None or name.startswith("_pytree__"):
            continue
        if id(value) in shared:
            vars(new)[name] = value
        elif kind.replace is not None:
            _share(value, vars(new)[name], shared, met)


def _objects(node: Any, without: int, met: set[int] | None = None) -> list[Any]:
    """The modules and Variables that can be reached from a node without passing through a given one."""
    met = set() if met is None else met
    kind = find_kind(node)
    if kind is None or id(node) == without or id(node) in met:
        return []
    met.add(id(node))
    found = [node] if kind.replace is not None or kind.assign is not None else []
    for child in kind.open(node)[1]:
        found += _objects(child, without, met)
    return found


def _descend(node: Any, pieces: Pieces) -> Any:
    for piece in pieces:
        kind = find_kind(node)
        assert kind is not None
        by_text = {str(key): child for key, child in kind.entries(node)}
        if piece not in by_text:
            raise Unsupported(f"{piece} of {type(node).__name__} is not a container", hint='layers="model.layers[*]"')
        node = by_text[piece]
    return node


def _items(run: Layers, holder: Any) -> tuple[list[tuple[Any, Any]], Callable[[list[tuple[Any, Any]]], None]]:
    """The entries of a container of layers, and a function that replaces them in place."""
    if is_torch_module(holder):
        import torch

        if isinstance(holder, torch.nn.ModuleList | torch.nn.Sequential | torch.nn.ModuleDict):
            return list(holder._modules.items()), partial(_put, holder._modules)
    elif isinstance(holder, list) or _is_nnx_list(holder):
        return list(enumerate(holder)), partial(_fill, holder)
    raise Unsupported(
        f"the layers of {'.'.join(run.parent) or 'the module'} are attributes of {wording.described(holder)}, "
        "which calls them by name and would not call new ones",
        hint="put the layers in a torch.nn.ModuleList, a torch.nn.Sequential or an nnx.List",
    )


def _is_nnx_list(holder: Any) -> bool:
    if not imported("flax"):
        return False
    from flax import nnx

    return isinstance(holder, nnx.List)


def _put(modules: Any, items: list[tuple[Any, Any]]) -> None:
    modules.clear()
    modules.update(items)


def _fill(holder: Any, items: list[tuple[Any, Any]]) -> None:
    layers = [layer for _, layer in items]
    while len(holder):
        holder.pop()
    holder.extend(layers)


def _renumber_(layer: Any, source: int, target: int) -> None:
    """Set the number that modules of a layer keep, where it is the old one."""
    for module in layer.modules():
        for name in _NUMBERED:
            if type(vars(module).get(name)) is int and vars(module)[name] == source:
                setattr(module, name, target)
