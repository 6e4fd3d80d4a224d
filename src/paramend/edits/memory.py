"""The memory engine: edits of a tree in memory, carried out immediately."""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from paramend.arrays.initializers import NOWHERE, Site
from paramend.arrays.lowrank import LowRank
from paramend.arrays.origins import made
from paramend.arrays.registry import backend, backend_of
from paramend.edits import structure
from paramend.edits.call import Call, explained
from paramend.edits.damage import Damage, of_call, said
from paramend.edits.quantized import check_calls, check_renamed, check_whole
from paramend.errors import BadArgument, Unsupported, ValuesLost
from paramend.leaves.leaves import Editable, Group, keys_of
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Held
from paramend.leaves.overlaps import overlapping
from paramend.reports import wording
from paramend.selectors.slices import write_index
from paramend.trees.tree import Tree

# From `computed` through an edit and its verb to the line that calls the verb.
_CALLER = 5
_LEAVE_OUT = 'leave it out of the selection: pm.sel(...).where(dtype="float")'


class Memory(Tree, Editable):
    """A tree in memory that carries out edits. Each returns a new tree; other leaves are the same objects."""

    def fetch(self, number: int, index: Any = None) -> Any:
        leaf = self.read(number)
        return leaf if index is None else backend(leaf).get(leaf, index)

    def edited(self, calls: Mapping[int, Call]) -> Any:
        """The tree with calls of edits on some leaves. All are checked before the first runs."""
        self._check(calls)
        return self.with_leaves(dict(self.computed(calls)))

    def edited_(self, calls: Mapping[int, Call]) -> None:
        """Carry out calls in place. An error leaves everything unchanged."""
        calls = self.check_(calls)
        new = self.computed(calls)
        # The user's function may raise halfway, and an operand may be a leaf that changes.
        if any(call.op.name == "apply" or call.coding for call in calls.values()) or self._reads_itself(calls):
            new = iter(list(new))
        for number, value in new:
            self.assign(number, value)
            del value  # the next one takes its memory

    def check_(self, calls: Mapping[int, Call]) -> dict[int, Call]:
        """The calls that are to be carried out in place, one for each array; raises if they cannot be."""
        for number, call in calls.items():
            try:
                self.in_place(number)
            except Unsupported as error:
                path = self.index.path(number).replace('"', '\\"')
                index = "" if call.index is None else f"[{write_index(call.index)}]"
                hint = f'the verb without the underscore returns a new tree: tree = pm.at(tree, "{path}"){index}.{call}'
                raise Unsupported(error.args[0].partition("\n\nhint: ")[0], hint=hint) from None
            if not call.args.get("keep_spec", True):
                raise Unsupported(f"{call}: in place a leaf must keep its spec", hint="leave out keep_spec")
        self._check(calls)
        one = self.apart(calls)
        for number, first in one.items():
            if calls[number] is not calls[first]:
                paths = self.index.path(first), self.index.path(number)
                raise Unsupported(
                    f"{' and '.join(paths)} are one array, which cannot take two values",
                    hint="the verb without the underscore returns a new tree: params = pm.at(params, ...).set(values)",
                )
        return {number: call for number, call in calls.items() if number not in one}

    def _reads_itself(self, calls: Mapping[int, Call]) -> bool:
        """Whether an operand shares memory with one of several leaves that change."""
        if len(calls) < 2:
            return False
        given = [value for call in calls.values() for value in call.args.values()]
        given += [factor for value in given if isinstance(value, LowRank) for factor in value]
        operands = {id(value): value for value in given}
        arrays = [value for value in operands.values() if backend_of(type(value)) is not None]
        written = [self.values[number] for number in calls] if arrays else []
        memories = {at: backend(each).memory(each) for at, each in enumerate((*arrays, *written))}
        found = overlapping({at: memory for at, memory in memories.items() if memory is not None})
        return any(min(pair) < len(arrays) <= max(pair) for pair in found)

    def deleted(self, numbers: Iterable[int]) -> Any:
        gone = {twin for number in numbers for twin in self.twins(number)}
        check_whole(self, gone)
        return structure.relocate(self, {}, gone)

    def moved(self, selector: Any, numbers: Iterable[int], to: str) -> Any:
        chosen = tuple(numbers)
        check_renamed(self, lambda: structure.moves(self.index, selector, set(chosen), to))
        twins = {twin for number in chosen for twin in self.twins(number)}
        return self.relocated(structure.moves(self.index, selector, twins, to))

    def relocated(self, moves: Mapping[int, Sequence[tuple[str, int | None]]]) -> Any:
        return structure.relocate(self, moves, ())

    def expression(self, number: int) -> Origin:
        return made(self.values[number])

    def computing(self, origin: Origin, call: Call, *, path: str, pieces: tuple[str, ...]) -> Origin:
        place = Site(pieces, out_first=self.index.separator == ".") if call.op.placed else NOWHERE
        return Held(np.asarray(call.run(origin.read(), place)))

    def is_blank(self, number: int) -> bool:
        library = backend_of(type(self.values[number]))
        return library is None or library.abstract(self.values[number]) or library.traced(self.values[number])

    def as_given(self, values: Any, number: int) -> Any:
        return backend(self.values[number]).beside(values, self.values[number])

    def regrouped(self, groups: Sequence[Group], *, close_up: bool = True) -> Any:
        if all(map(self._stays, groups)):
            made = {each.numbers[0]: each.make([self.read(each.numbers[0])])[0] for each in groups}
            specs = {number: backend(leaf).spec(leaf) for number, leaf in made.items()}
            if all(new.shape == (old := self.spec(n)).shape and new.kind == old.kind for n, new in specs.items()):
                return self.with_leaves(made)  # as modules allow it, too
        check_whole(self, {number for group in groups for number in group.numbers}, "be made part of other leaves")
        return structure.regroup(self, groups, close_up=close_up)

    def _stays(self, group: Group) -> bool:
        """Whether one leaf is replaced by one of the same path."""
        here = keys_of(self.index.paths[group.numbers[0]])
        paths = [tuple(key for key, _ in path) for path in group.paths]
        return len(group.numbers) == 1 and group.boxed is None and paths == [here]

    def labelled(self, labels: Mapping[int, Any], rest: Any) -> Any:
        return self.mapped([labels.get(number, rest) for number in range(len(self.values))])

    def computed(self, calls: Mapping[int, Call]) -> Iterator[tuple[int, Any]]:
        """The new values of leaves, one at a time; at the end, a warning if some values overflowed."""
        found: list[tuple[str, Damage]] = []
        for number, call in calls.items():
            yield number, self._value(number, call, found)
        if any(damage.overflowed for _, damage in found):
            call = next(iter(calls.values()))
            here = any(backend(self.values[number]).spread(self.values[number]) for number in calls)
            says = f"{call}: {said(found)}{', of those in this process' if here else ''}"
            warnings.warn(says, ValuesLost, stacklevel=_CALLER)

    def _value(self, number: int, call: Call, found: list[tuple[str, Damage]]) -> Any:
        """The new value of a leaf; what it could not hold is added to what was found."""
        before, place = self.values[number], self._place(number) if call.op.placed else NOWHERE
        if call.op.losses is None:
            return call.run(before, place)
        with np.errstate(over="ignore", invalid="ignore"):  # counted here
            after = call.run(before, place)
        found.append((self.index.path(number), Damage(*of_call(call, before, after))))
        return after

    def _check(self, calls: Mapping[int, Call]) -> None:
        check_calls(self, calls)
        for number, call in calls.items():
            leaf = self.values[number]
            library = backend(leaf)
            why = library.refusal(leaf) if call.op.arithmetic else ""
            if why:
                raise Unsupported(f"{self.index.path(number)} cannot take {call}: {why}", hint=_LEAVE_OUT)
            if call.op.checks or call.index is not None:
                explained(self.index.path(number), call.spec, library.spec(leaf))

    def _place(self, number: int) -> Site:
        """The place of a leaf; of several paths the first counts, whichever was selected."""
        return Site(self.index.pieces(self.ties.get(number, number)), out_first=self.index.separator == ".")


def editable(tree: Any, *, raw: bool = False) -> Editable:
    """A checkpoint, which carries out edits itself, as it is; anything else as a tree in memory. A checkpoint that was
    opened `raw` stays so."""
    leaves = tree if isinstance(tree, Editable) else Memory(tree)
    if not isinstance(tree, Editable) and not leaves.index.numbers:
        from paramend.edits.subjects import check_subject  # needed only for errors

        check_subject(tree)
    return leaves.as_stored() if raw else leaves


def valued(tree: Any) -> Editable:
    """Leaves that are computed with: `Unsupported` if some have no values, `BadArgument` for a path."""
    if isinstance(tree, str | os.PathLike):
        raise BadArgument(
            f"{str(tree)!r} is a path, and a tree or a checkpoint is needed", hint=f"pm.open({str(tree)!r})"
        )
    leaves = editable(tree)
    blank = [leaves.index.path(number) for number in leaves.index.numbers if leaves.is_blank(number)]
    if blank:
        raise Unsupported(
            f"{wording.listing(blank, 4)}: there are no values, or jax.jit traces them",
            hint="call it with arrays, outside of jax.jit",
        )
    return leaves
