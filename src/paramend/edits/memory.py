"""The memory engine: edits of a tree in memory, carried out immediately."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from paramend.arrays.initializers import NOWHERE, Site
from paramend.arrays.registry import backend
from paramend.edits.call import Call
from paramend.edits.quantized import check_calls, check_renamed, check_whole
from paramend.errors import NoMatch, SpecMismatch, Unsupported
from paramend.leaves.leaves import Editable
from paramend.trees.tree import Tree

_LEAVE_OUT = 'leave it out of the selection: pm.sel(...).where(dtype="float")'


class Memory(Tree, Editable):
    """A tree in memory that carries out edits. Each returns a new tree; other leaves are the same objects."""

    def fetch(self, number: int, index: Any = None) -> Any:
        """A leaf, as the object itself, or a slice of it."""
        leaf = self.read(number)
        return leaf if index is None else backend(leaf).get(leaf, index)

    def edited(self, calls: Mapping[int, Call]) -> Any:
        """The tree with calls of edits on some leaves. All are checked before the first runs."""
        self._check(calls)
        return self.with_leaves(dict(self.computed(calls)))

    def edited_(self, calls: Mapping[int, Call]) -> None:
        """Carry out calls in place. An error leaves everything unchanged."""
        self.check_(calls)
        new = self.computed(calls)
        if any(call.op.name == "apply" for call in calls.values()):  # the user's function may raise halfway
            new = iter(list(new))
        for number, value in new:
            self.assign(number, value)

    def check_(self, calls: Mapping[int, Call]) -> None:
        """Raise if calls cannot be carried out in place."""
        for number, call in calls.items():
            self.in_place(number)
            if not call.args.get("keep_spec", True):
                raise Unsupported(f"{call}: in place a leaf must keep its spec", hint="leave out keep_spec")
        self._check(calls)

    def deleted(self, numbers: Iterable[int]) -> Any:
        """The tree without some leaves, under all their paths."""
        from paramend.edits import structure  # rarely needed, and imports take time

        gone = {twin for number in numbers for twin in self.twins(number)}
        check_whole(self, gone)
        return structure.delete(self, gone)

    def moved(self, selector: Any, numbers: Iterable[int], to: str) -> Any:
        """The tree with the leaves that a selector found under new paths."""
        from paramend.edits import structure  # as above

        check_renamed(self, lambda: structure.moves(self.index, selector, set(numbers), to))
        return structure.move(self, selector, tuple(numbers), to)

    def labelled(self, labels: Mapping[int, Any], rest: Any) -> Any:
        """The same containers with labels, and with `rest` at other leaves and at values that are not arrays."""
        return self.mapped([labels.get(number, rest) for number in range(len(self.values))])

    def computed(self, calls: Mapping[int, Call]) -> Iterator[tuple[int, Any]]:
        """The new values of leaves, one at a time."""
        for number, call in calls.items():
            yield number, call.run(self.values[number], self._place(number) if call.op.placed else NOWHERE)

    def _check(self, calls: Mapping[int, Call]) -> None:
        check_calls(self, calls)
        for number, call in calls.items():
            leaf = self.values[number]
            library = backend(leaf)
            why = library.refusal(leaf) if call.op.arithmetic else ""
            if why:
                raise Unsupported(f"{self.index.path(number)} cannot take {call}: {why}", hint=_LEAVE_OUT)
            if call.op.checks or call.index is not None:
                explain(self, number, call.spec, library.spec(leaf))

    def _place(self, number: int) -> Site:
        """The place of a leaf; of several paths the first counts, whichever was selected."""
        return Site(self.index.pieces(self.ties.get(number, number)), out_first=self.index.separator == ".")


def editable(tree: Any, *, raw: bool = False) -> Editable:
    """A checkpoint, which carries out edits itself, as it is; anything else as a tree in memory.

    Args:
        tree: the checkpoint or the tree.
        raw: whether leaves are taken as they are stored; a checkpoint that was opened so stays so.
    """
    leaves = tree if isinstance(tree, Editable) else Memory(tree)
    return leaves.as_stored() if raw else leaves


def explain(leaves: Any, number: int, check: Callable[..., Any], *args: Any) -> None:
    """Run a check, and add the path of the leaf to its error."""
    try:
        check(*args)
    except (SpecMismatch, NoMatch) as error:
        error.args = (f"{leaves.index.path(number)}: {error}",)
        raise
