"""`at`: the edit verbs for any tree, like `x.at[i]` in jax.numpy."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar, cast

from paramend._optional import imported
from paramend.edits.arguments import Args, shown
from paramend.edits.call import Call, Op, explained, sliced_shape
from paramend.edits.memory import editable
from paramend.edits.ops import Edits
from paramend.edits.weights import Weights, chosen, weighed
from paramend.errors import BadArgument, NoMatch, Unsupported, WrongCount, printable
from paramend.leaves.leaves import Editable
from paramend.leaves.rules import Codec
from paramend.leaves.specs import AnyArray, AnyTree, Slice
from paramend.reports import wording
from paramend.reports.report import Line, fold
from paramend.reports.tables import as_html
from paramend.selectors.selector import SelectorLike, sel, slice_of
from paramend.selectors.slices import read_slice, write_index
from paramend.trees.lookup import is_torch_module

T = TypeVar("T")


class Selection(Edits[T]):
    """Selected leaves of a tree, and the verbs that change them. Made by `pm.at`.

    Each verb returns a new tree with the same containers; other leaves are the same objects. The verbs whose names end
    in `_` change torch modules and tensors, NNX modules and numpy arrays in place and return None.
    """

    def __init__(
        self,
        tree: T,
        selector: SelectorLike,
        count: int | None = None,
        *,
        raw: bool = False,
        codec: Codec | None = None,
    ) -> None:
        self._selector, self._index = slice_of(selector)
        self._tree = weighed(editable(tree, raw=raw), rule=codec)
        if codec is not None and not isinstance(self._tree, Weights):
            raise NoMatch(
                f"{codec.name}: no leaves called {' and '.join(codec.leaves)} stand beside each other",
                hint="leave out codec=",
            )
        self._stays_raw = isinstance(tree, Editable) and tree.raw
        self._numbers = chosen(self._selector, self._tree)
        if count is not None and len(self._numbers) != count:
            raise WrongCount(
                f"{self._selector!r} matches {wording.plural(len(self._numbers), 'leaf', 'leaves')}, not {count}: "
                f"{wording.listing(self.paths)}",
                found=len(self._numbers),
                wanted=count,
                hint=f"count={len(self._numbers)}",
            )

    @property
    def paths(self) -> list[str]:
        """The paths of the selected leaves, in the order of the tree; each is a selector for its leaf.

        >>> at({"a": {"kernel": np.ones(2), "bias": np.ones(2)}}, "**").paths
        ['a/kernel', 'a/bias']
        """
        return [self._tree.index.path(number) for number in self._numbers]

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[tuple[str, AnyArray]]:
        return iter(list(self.get().items()))

    def __repr__(self) -> str:
        index = "" if self._index is None else f"[{write_index(self._index)}]"
        count = wording.plural(len(self), "leaf", "leaves")
        return f"<pm.at(..., {self._selector!r}){index}: {count}: {printable(wording.listing(self.paths))}>"

    def _repr_html_(self) -> str:
        index = self._tree.index
        named = [(index.path(number), self._tree.spec(number)) for number in self._numbers]
        lines = fold([Line((path,), (str(spec),), spec.nbytes) for path, spec in named])
        rows = [(*line.paths, *line.cells, wording.size(line.size)) for line in lines]
        return as_html(repr(self).partition(":")[0][1:], [("path", "spec", "size"), *rows])

    def __getitem__(self, index: Slice) -> "Selection[T]":
        """The same slice of each selected leaf, such as one layer of a scanned stack.

        >>> at({"wo": np.ones((3, 2))}, "wo")[-1].zero()["wo"]
        array([[1., 1.],
               [1., 1.],
               [0., 0.]])
        """
        if self._index is not None:
            raise BadArgument(
                f"the leaves are sliced already, [{write_index(self._index)}]", hint="[i, j] slices two axes at once"
            )
        index = read_slice(index)
        new: Selection[T] = object.__new__(type(self))
        new._selector, new._tree, new._numbers, new._index = self._selector, self._tree, self._numbers, index
        new._stays_raw = self._stays_raw
        for number in self._numbers:
            explained(self._tree.index.path(number), sliced_shape, self._tree.spec(number).shape, index)
        return new

    def get(self) -> dict[str, AnyArray]:
        """The selected leaves, or slices of them, by path.

        For a tree in memory they are its own leaves; for a checkpoint, copies that later patches do not change.

        >>> at({"a": np.zeros(2), "b": np.ones(2)}, "b").get()
        {'b': array([1., 1.])}
        """
        found = {
            path: self._tree.fetch(number, self._index) for path, number in zip(self.paths, self._numbers, strict=True)
        }
        if len(found) != len(self._numbers):
            raise Unsupported(
                f"two leaves have one path: {wording.listing(sorted(set(self.paths)))}", hint="rename one of the keys"
            )
        return found

    def one(self) -> AnyArray:
        """The only selected leaf, or its slice: the leaf itself, or for a checkpoint a copy.

        Raises:
            WrongCount: several leaves are selected.

        >>> at({"a": np.zeros(2), "b": np.ones(2)}, "b").one()
        array([1., 1.])
        """
        if len(self) != 1:
            raise WrongCount(
                f"{self._selector!r} matches {len(self)} leaves, and one() takes one: {wording.listing(self.paths)}",
                found=len(self),
                wanted=1,
                hint=f'pm.at(tree, "{self.paths[0]}").one()',
            )
        return self._tree.fetch(self._numbers[0], self._index)

    def mask(self) -> AnyTree:
        """A tree of bools with the same containers, true at the selected leaves: for optax.masked, eqx.partition ...

        For a torch module or a checkpoint, a dict from paths to bools. For an NNX module a State; NNX Variables are
        left out, so that a mask fits what `nnx.Optimizer` gives to optax.

        >>> at({"a": {"kernel": np.ones(2), "bias": np.ones(2)}}, "**/bias").mask()
        {'a': {'kernel': False, 'bias': True}}
        """
        self._whole("a mask")
        chosen = {twin: True for number in self._numbers for twin in self._tree.twins(number)}
        return self._tree.labelled(chosen, rest=False)

    def delete(self) -> T:
        """The tree without the selected leaves, or dicts and lists that became empty; list positions close up.

        Raises:
            Unsupported: a container whose entries are fixed (a dataclass, a module) holds a selected leaf.

        >>> at({"a": {"w": np.ones(1)}, "b": np.ones(1)}, "a/**").delete()
        {'b': array([1.])}
        """
        self._whole("delete")
        return self._made(self._tree.deleted(self._numbers))

    def rename(self, to: str) -> T:
        """The tree with the selected leaves under other paths; the wildcards in `to` take what those of the selector
        matched.

        Args:
            to: the new path: `*`, `**`, `{a,b}` are filled in order, `<n>` by name, also as `<n+1>` or `<2*n>`.

        Raises:
            RenameClash: two leaves would have one path.

        >>> at({"h_0": {"w": 1 * np.ones(1)}, "h_1": {"w": 2 * np.ones(1)}}, "h_<n>/**").rename("layers_<n+1>/**")
        {'layers_1': {'w': array([1.])}, 'layers_2': {'w': array([2.])}}
        """
        self._whole("rename")
        if not isinstance(cast(object, to), str):
            given = shown(to)
            raise BadArgument(f"rename takes the text of a path, and this is {given}", hint='.rename("layers/<n>/**")')
        return self._made(self._tree.moved(self._selector, self._numbers, to))

    def _made(self, made: Any) -> T:
        """What a verb made; a checkpoint takes its leaves as the given one did."""
        return made.as_stored(self._stays_raw) if isinstance(made, Editable) else made  # type: ignore[return-value]

    def _whole(self, what: str) -> None:
        if self._index is not None:
            raise BadArgument(f"{what} takes whole leaves, not slices [{write_index(self._index)}]")

    def _calls(self, op: Op, args: Args) -> dict[int, Call]:
        if op.name == "set" and isinstance(args["value"], Mapping):
            values = _by_path(args["value"], self.paths)
            calls = [Call(op, {**args, "value": value}, self._index) for value in values]
            return dict(zip(self._numbers, calls, strict=True))
        return dict.fromkeys(self._numbers, Call(op, args, self._index))

    def _edit(self, op: Op, args: Args) -> T:
        return self._made(self._tree.edited(self._calls(op, args)))

    def _edit_(self, op: Op, args: Args) -> None:
        calls = self._calls(op, args)
        if self._tree.patched_by:
            selector = repr(getattr(self._selector, "text", self._selector))
            plain = {name: args[name] for name in op.parameters if name in args}
            typed = _typed({name: value for name, value in plain.items() if (name, value) != ("requantize", "amax")})
            index = "" if self._index is None else f"[{write_index(self._index)}]"
            raise Unsupported(
                f"{op.name}_ cannot edit an opened checkpoint in place",
                hint=self._tree.patched_by.format(f"pm.at(tree, {selector}){index}.{op.name}({typed})"),
            )
        self._tree.edited_(calls)


def _typed(args: Mapping[str, Any]) -> str:
    """Arguments of a verb as they are written; arrays and functions by their names.

    >>> _typed({"std": 0.1, "seed": 0}), _typed({"value": np.ones(2)})
    ('0.1, seed=0', 'value')
    """
    plain = (bool, int, float, complex, str, type(None))
    texts = {name: repr(value) if isinstance(value, plain) else name for name, value in args.items()}
    return ", ".join(f"{name}={text}" if at else text for at, (name, text) in enumerate(texts.items()))


def _by_path(values: Mapping[str, Any], paths: Sequence[str]) -> list[Any]:
    extra = [path for path in values if path not in set(paths)]
    missing = [path for path in paths if path not in values]
    if extra or missing:
        raise WrongCount(
            "set was given arrays by path"
            + (f"; not selected: {wording.listing(extra)}" if extra else "")
            + (f"; no array for: {wording.listing(missing)}" if missing else ""),
            found=len(values),
            wanted=len(paths),
        )
    return [values[path] for path in paths]


def at(
    tree: T, selector: SelectorLike, *, count: int | None = None, raw: bool = False, codec: Codec | None = None
) -> Selection[T]:
    """The selected leaves of a tree, ready to be read or edited.

    Args:
        tree: any tree of arrays: nested dicts and lists, Flax params, NNX and Equinox modules, optax states, torch
            modules and state dicts.
        selector: text such as `"**/Dense_[-1]/kernel"`, or anything that `pm.sel` takes.
        count: the number of leaves that must match.
        raw: whether leaves are taken as they are stored. Without it, verbs that would take the codes and scales of a
            quantised weight for values are refused.
        codec: a `pm.Codec`, by which leaves that stand beside each other are one weight.

    Raises:
        NoMatch: nothing matches; the message names the nearest paths.
        WrongCount: more or fewer than `count` match.

    >>> params = {"params": {"Dense_0": {"kernel": np.ones((2, 2)), "bias": np.ones(2)}}}
    >>> at(params, "**/kernel").zero()["params"]["Dense_0"]["kernel"]
    array([[0., 0.],
           [0., 0.]])
    """
    return Selection(tree, selector, count, raw=raw, codec=codec)


def labels(tree: AnyTree, groups: Mapping[str, SelectorLike]) -> AnyTree:
    """A tree of strings with the same containers, for optax.partition: the first group that matches each leaf.

    NNX Variables are left out, and of an NNX module it is a State, so it fits what `nnx.Optimizer` gives to optax. The
    labels of a module that can be called are a function of the parameters too, since optax would call the module.

    Args:
        tree: any tree.
        groups: label → selector. Each selector must match something, even if earlier ones take all of it.

    Raises:
        NoMatch: a selector matches nothing, or a leaf is in no group.

    >>> labels({"a": np.ones(1), "b": np.ones(1)}, {"frozen": "a", "train": "**"})
    {'a': 'frozen', 'b': 'train'}
    """
    leaves = weighed(editable(tree))
    if not isinstance(groups, Mapping) or not all(isinstance(label, str) for label in groups):
        raise BadArgument(
            f"labels takes a dict from labels to selectors, and this is {shown(groups)}",
            hint='pm.labels(tree, {"frozen": "**/Dense_0/**", "train": "**"})',
        )
    found: dict[int, str] = {}
    for label, selector in groups.items():
        for number in chosen(selector, leaves):
            for twin in leaves.twins(number):
                found.setdefault(twin, label)
    left = [leaves.index.path(number) for number in leaves.index.numbers if number not in found]
    if left:
        raise NoMatch(
            f"{wording.plural(len(left), 'leaf is', 'leaves are')} in no group: {wording.listing(left)}",
            hint='{..., "rest": "**"} as the last group takes the rest',
            near=left[:3],
        )
    # Leaves that are not arrays (functions of Equinox modules) need some label, or the structures would differ.
    made = leaves.labelled(found, rest=list(groups)[-1])
    return Labels(made) if callable(tree) and not is_torch_module(tree) else made


def param_count(tree: AnyTree, selector: SelectorLike = "**") -> int:
    """The number of scalars in the selected leaves; a leaf with several paths counts once.

    >>> param_count({"kernel": np.ones((3, 4)), "bias": np.ones(4)}), param_count({"w": np.ones(2)}, "w")
    (16, 2)
    """
    leaves = weighed(editable(tree))
    whole, index = slice_of(sel(selector))
    if not leaves.index.numbers and selector == "**":
        return 0
    specs = [leaves.spec(number) for number in chosen(whole, leaves)]
    if index is None:
        return sum(spec.size for spec in specs)
    return sum(type(spec)(sliced_shape(spec.shape, index), spec.dtype).size for spec in specs)


class Labels:
    """The tree of labels of a module that can be called, as a function that returns it. optax calls labels that can be
    called, and a tree of the module's own class would run the model. Else it is like the tree: it has its attributes,
    its entries and its leaves, and `jax.tree.map` makes a tree of it."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        if imported("jax"):
            _register()

    def __call__(self, params: Any) -> Any:
        """The labels of these parameters, which may be a part of the module: the State of its `nnx.Param`."""
        return _part(self.tree, params)

    def __getattr__(self, name: str) -> Any:
        if name == "tree" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tree, name)

    def __getitem__(self, key: Any) -> Any:
        return self.tree[key]

    def __eq__(self, other: object) -> bool:
        return bool(self.tree == (other.tree if isinstance(other, Labels) else other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self.tree)


def _part(labels: Any, params: Any, kind: Any = None) -> Any:
    if isinstance(labels, Mapping) and isinstance(params, Mapping):  # within a State these are plain dicts
        kind = kind or type(params)
        return kind({key: _part(labels[key], params[key], dict) for key in params})
    return labels


@cache
def _register() -> None:
    import jax  # a pytree of JAX, once the user has imported it

    jax.tree_util.register_pytree_node(Labels, lambda node: ((node.tree,), None), lambda _, trees: trees[0])
