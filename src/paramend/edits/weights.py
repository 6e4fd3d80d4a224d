"""A tree or a checkpoint as the weights of its model: each quantised one is a leaf, under its own name."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, cast

import numpy as np

from paramend.anatomy.quantization import stated
from paramend.arrays.initializers import NOWHERE, Site
from paramend.arrays.registry import backend
from paramend.edits import coding, moves, structure
from paramend.edits.call import Call, Coding, explained
from paramend.edits.memory import Memory, editable
from paramend.edits.ops import OPS
from paramend.edits.own import Own
from paramend.edits.quantized import check_values, refusal
from paramend.errors import NoMatch, RenameClash, SpecMismatch, Unsupported
from paramend.leaves.groups import Group, alone, by_rule, groups_of, may_hold_groups
from paramend.leaves.leaves import Editable, Group as Regroup, Index, keys_of
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Held
from paramend.leaves.paths import write_path
from paramend.leaves.rules import Codec
from paramend.leaves.specs import Spec, dtype_name, numpy_dtype
from paramend.leaves.weights import Weight, labels_of, weight_of
from paramend.selectors.renames import Keys, Rename, keys
from paramend.selectors.selector import SelectorLike, resolve, resolve_paths

# Projections of one layer that engines join into one matrix, which then has one scale of scales.
_FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"w1", "w3"})


class Weights(Editable):
    """Leaves in which each quantised weight is one, with its own path and spec; numbers are those of the payloads.
    Values are decoded as they are read, and edits are made in what is stored. `RenameClash` if another leaf has the
    name of a weight."""

    def __init__(
        self, stored: Editable, groups: Iterable[Group], *, inputs: bool = False, rule: Codec | None = None
    ) -> None:
        self.stored = stored
        self.rule = rule
        self.groups = {cast(int, group.payload): group for group in groups}
        self._weights: dict[int, Weight | Own] = {}
        paths = dict(stored.index.paths)
        for payload, group in self.groups.items():
            paths[payload] = labels_of(stored, group)
            for number, companion in group.companions.items():
                if not (inputs and companion.role == "input"):
                    paths.pop(number, None)
        self._index = Index(stored.index.separator)
        for number, path in paths.items():
            names: Any = self._index.names
            for label in path[:-1]:
                names = names.setdefault(label, {}) if isinstance(names, dict) else names
            if not isinstance(names, dict) or names.setdefault(path[-1], number) != number:
                taken = write_path(path, self._index.separator)
                raise RenameClash(f"{taken} is there, and is no part of that weight", hint="raw=True")
            self._index.numbers.append(number)
        for where, layers in stored.index.layers.items():
            self._index.mark(where, layers)

    @property
    def index(self) -> Index:
        return self._index

    @property
    def path(self) -> Any:
        """The path of a checkpoint, "" of a tree."""
        return getattr(self.stored, "path", "")

    @property
    def ties(self) -> Mapping[int, int]:
        found = self.stored.ties
        return {number: one for number, one in found.items() if number in self._index.paths} if found else found

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """What a configuration says of the weights that are quantised."""
        return getattr(self.stored, "quantization", None)

    @property
    def patched_by(self) -> str:
        return self.stored.patched_by

    def as_stored(self, raw: bool = True) -> Any:
        return self.stored.as_stored(raw)

    def weight(self, payload: int) -> Weight | Own:
        """A quantised weight; `SpecMismatch` if its leaves and the configuration disagree."""
        group = self.groups[payload]
        if payload not in self._weights and group.scheme.rule is not None:
            self._weights[payload] = Own(self._index.path(payload), group, group.scheme.rule, self.stored)
        if payload not in self._weights:
            says = partial(stated, self.quantization)
            self._weights[payload] = weight_of(self.stored, group, self.stored.expression, says)
        return self._weights[payload]

    def spec(self, number: int) -> Spec:
        return self.weight(number).spec if number in self.groups else self.stored.spec(number)

    def nbytes(self, number: int) -> int:
        """The bytes of all leaves that a weight is stored in."""
        return sum(map(self.stored.nbytes, self.members(number)))

    def refusal(self, number: int) -> str:
        return next((why for each in self.members(number) if (why := self.stored.refusal(each))), "")

    def members(self, number: int) -> tuple[int, ...]:
        """The numbers of all leaves that a weight is stored in."""
        return self.groups[number].numbers if number in self.groups else (number,)

    def is_blank(self, number: int) -> bool:
        return self.stored.is_blank(number)

    def computing(self, origin: Any, call: Call, *, path: str, pieces: tuple[str, ...]) -> Any:
        return self.stored.computing(origin, call, path=path, pieces=pieces)

    def relocated(self, moves: Mapping[int, Keys]) -> Any:
        return self.stored.relocated(moves)

    def expression(self, number: int) -> Origin:
        return self.weight(number).origin() if number in self.groups else self.stored.expression(number)

    def read(self, number: int) -> Any:
        if number not in self.groups:
            return self.stored.read(number)
        weight = self.weight(number)
        return weight.read() if isinstance(weight, Own) else self.stored.as_given(weight.origin().read(), number)

    def fetch(self, number: int, index: Any = None) -> Any:
        if number not in self.groups:
            return self.stored.fetch(number, index)
        leaf = self.read(number)
        return leaf if index is None else backend(leaf).get(leaf, index)

    def home(self, number: int) -> Any:
        """What holds the values of a leaf: these, if they are decoded or in memory."""
        given = getattr(self.stored, "home", None)
        return self if number in self.groups else self.stored if given is None else given(number)

    def extent(self, number: int) -> None:
        """None: values are decoded."""

    def read_range(self, number: int, start: int, stop: int) -> Any:
        """A range of the elements of a weight."""
        return self.weight(number).origin().read_range(start, stop)

    def twins(self, number: int) -> Sequence[int]:
        return [twin for twin in self.stored.twins(number) if twin in self._index.paths]

    def children(self, node: Any) -> Any:
        return self.stored.children(node)

    def absence(self, text: str) -> tuple[str, str] | None:
        """Why a selector finds nothing."""
        found = getattr(self.stored, "absence", None)
        return None if found is None else cast("tuple[str, str] | None", found(text))

    # ---- edits -------------------------------------------------------------------------------------------------------

    def edited(self, calls: Mapping[int, Call]) -> Any:
        cast_: dict[int, Call] = {}
        moved: dict[int, Call] = {}
        there: dict[int, Call] = {}
        for number, call in calls.items():
            if number not in self.groups:
                there[number] = call
            elif call.op.name == "cast":
                explained(self._index.path(number), call.spec, self.spec(number))
                cast_[number] = call
            elif call.op.moves is not None and call.index is None:
                moved |= self._moved(number, call)
            else:
                there |= self._coded(number, call, calls)
        made = self.stored.edited(there | moved) if there or moved or not cast_ else self.stored
        if not cast_:
            return made
        from paramend.edits.decoding import floated  # most edits keep what they find

        weights = weighed(made if isinstance(made, Editable) else editable(made), rule=self.rule)
        assert isinstance(weights, Weights)
        chosen = {number: weights.weight(number) for number in cast_}
        kept = [group for number, group in weights.groups.items() if number not in cast_]
        dtypes = {number: dtype_name(each.args["dtype"]) for number, each in cast_.items()}
        return floated(weights.stored, chosen, kept, dtypes)[0]

    def edited_(self, calls: Mapping[int, Call]) -> None:
        self.stored.edited_(self._all(calls))

    def check_(self, calls: Mapping[int, Call]) -> Mapping[int, Call]:
        """The calls, if they can be carried out in place."""
        cast(Memory, self.stored).check_(self._all(calls))
        return calls

    def _all(self, calls: Mapping[int, Call]) -> dict[int, Call]:
        """The calls on stored leaves that edits are which keep the spec."""
        there: dict[int, Call] = {}
        for number, call in calls.items():
            there |= self._coded(number, call, calls) if number in self.groups else {number: call}
        return there

    def _coded(self, number: int, call: Call, calls: Mapping[int, Call]) -> dict[int, Call]:
        """The calls on stored leaves that an edit of a weight is."""
        weight, group = self.weight(number), self.groups[number]
        why = self.refusal(number)
        if why:
            check_values(self.stored, [number], f"cannot take {call}, since {why}")
        if isinstance(weight, Own):
            pieces = self._index.pieces(self.ties.get(number, number))
            place = Site(pieces, out_first=self._index.separator == ".") if call.op.placed else NOWHERE
            return weight.coded(call, place, OPS["set"])
        compute = partial(self.stored.computing, path=weight.path, pieces=self._index.pieces(number))
        found = coding.coded(weight, call, compute, OPS, shares=self._shares(number, call, calls))
        roles = {group.role(each): each for each in group.numbers}
        there = {roles[role]: each for role, each in found.items()}
        self._check_alone(number, there, call, calls)
        return there

    @cached_property
    def _owners(self) -> Mapping[int, Sequence[int]]:
        """Number of a stored leaf → the payloads of the weights that it is a part of, under any of its paths."""
        found: dict[int, list[int]] = {}
        for payload in self.groups:
            for one in self._units(payload):
                found.setdefault(one, []).append(payload)
        return found

    def _units(self, payload: int) -> tuple[int, ...]:
        return tuple(self.stored.ties.get(each, each) for each in self.groups[payload].numbers)

    def _check_alone(self, number: int, there: Iterable[int], call: Call, calls: Mapping[int, Call]) -> None:
        """Raise if what an edit changes is a part of a weight, too, that is another one and does not change with it."""
        for each in there if self.stored.ties else ():
            for other in self._owners[self.stored.ties.get(each, each)]:
                together = call.op.name == "multiply" and calls.get(other) is call
                if self._units(other) != self._units(number) and not together:
                    path, leaf = self._index.path(number), self.stored.index.path(each)
                    said = f"{path} cannot take {call}: {leaf} is a part of {self._index.path(other)}, too"
                    way = "tree, report = pm.dequantize(tree, selector) makes floats of both first"
                    raise refusal(self.stored, [self.groups[number]], said, [way])

    def _shares(self, number: int, call: Call, calls: Mapping[int, Call]) -> bool:
        """Whether a weight has a scale of scales in common with others that do not take the same factor."""
        weight, path = self.weight(number), self._index.pieces(number)
        fused = next((set_ for set_ in _FUSED if len(path) > 1 and path[-2] in set_), None)
        if isinstance(weight, Own) or "global" not in weight.codec.fields or fused is None:
            return False
        mine = weight.parts["global"].read().tobytes()
        for other in self.groups:
            there = self._index.pieces(other)
            alike = there[:-2] == path[:-2] and there[-2:-1] != path[-2:-1] and there[-2] in fused
            top = self.weight(other).parts.get("global") if alike and calls.get(other) is not call else None
            if top is not None and top.read().tobytes() == mine:
                return True
        return False

    def _moved(self, number: int, call: Call) -> dict[int, Call]:
        """The calls on stored leaves that move whole blocks of a weight."""
        weight, group = self.weight(number), self.groups[number]
        after = explained(weight.path, call.spec, weight.spec)
        if call.op.name in ("take", "permute") and isinstance(weight, Weight):
            find = moves.places if call.op.name == "take" else moves.permutation
            found = coding.taken(weight, *find(weight.spec, call.args))
            if found is not None:
                said = Coding(weight.path, weight.spec, after, weight.scheme, (call,), ("codes and scales alike",))
                roles = {group.role(each): each for each in group.numbers}
                made = {
                    roles[role]: Call(OPS["take"], {"indices": at, "axis": along}, coding=said)
                    for role, (at, along) in found.items()
                }
                if "shape" in roles:
                    leaf = self.stored.spec(roles["shape"])
                    values = np.array(after.shape, numpy_dtype(leaf.dtype)).reshape(leaf.shape)
                    made[roles["shape"]] = Call(OPS["set"], {"value": Held(values)}, coding=said)
                return made
        raise refusal(
            self.stored,
            [group],
            f"{weight.path} cannot take {call}: codes in {weight.scheme} move in whole blocks, along an axis "
            "that they are stored by",
            hints=["tree, report = pm.dequantize(tree, selector) makes floats of it first"],
        )

    def deleted(self, numbers: Iterable[int]) -> Any:
        return self.stored.deleted([each for number in numbers for each in self.members(number)])

    def moved(self, selector: Any, numbers: Iterable[int], to: str) -> Any:
        chosen = {twin for number in numbers for twin in self.twins(number)}
        try:
            resolve(selector, self)
        except NoMatch:
            group = next(self.groups[number] for number in chosen if number in self.groups)
            name = write_path(labels_of(self.stored, group), self.index.separator)
            said = f"{selector!r} names a part of a quantised weight ({group.scheme.name}), which is renamed as one"
            raise refusal(self.stored, [group], said, hints=[f'pm.at(tree, "{name}").rename(...)']) from None
        there: dict[int, Keys] = {}
        for number, path in structure.moves(self._index, selector, chosen, to).items():
            there |= self.carried(number, path)
        return self.stored.relocated(there)

    def carried(self, number: int, path: Keys) -> dict[int, Keys]:
        """The paths of the leaves of a weight that gets another one, in the form of `structure.moves`."""
        if number not in self.groups:
            return {number: path}
        group, paths = self.groups[number], self.stored.index.paths
        (*above, (last, depth)) = path
        old, new = self._index.pieces(number)[-1], last.rpartition(".")[2].rpartition("/")[2]
        prefix = last[: len(last) - len(new)]
        length = len(paths[number]) - 1
        found: dict[int, Keys] = {}
        mine = keys_of(paths[number])
        for each in group.numbers:
            theirs = keys_of(paths[each])
            shared = next((at for at, (one, two) in enumerate(zip(mine, theirs, strict=False)) if one != two), 0)
            if 0 < shared < len(mine) - 1:  # boxes of one leaf, such as kernel/value and scale/value
                inside = [(key, at) for at, key in enumerate(theirs)][shared:]
                found[each] = [*path[: len(path) - len(mine) + shared], *inside]
                continue
            name, *below = keys_of(paths[each][length:])
            own = name if new == old else name.replace(old, new, 1)
            needed = each == group.payload or not group.companions[each].optional
            if new != old and (old not in name and needed):
                raise refusal(
                    self.stored,
                    [group],
                    f"{self._index.path(number)} cannot be called {new}: leaves in {group.scheme.name} have names of "
                    "their own",
                    hints=[f'a path that ends in "{old}"'],
                )
            inner = [(piece, None) for piece in below]
            found[each] = [*above, (prefix + own, depth), *inner]
        return found

    def regrouped(self, groups: Sequence[Regroup], *, close_up: bool = True) -> Any:
        return self.stored.regrouped(groups, close_up=close_up)

    def labelled(self, labels: Mapping[int, Any], rest: Any) -> Any:
        inside = {each: labels[number] for number in labels for each in self.members(number)}
        return self.stored.labelled(inside, rest)


def weighed(leaves: Editable, *, inputs: bool = False, rule: Codec | None = None) -> Editable:
    """The leaves with each quantised weight as one, unless they are taken as they are stored. Weights that cannot be
    decoded stay several leaves: those in schemes without a codec, those of which a part is elsewhere, those without
    values. A rule of the user's goes before what is known, and also takes leaves as they are stored. With `inputs`
    scales of the inputs of a weight, which its values do not depend on, are leaves of their own."""
    if isinstance(leaves, Weights) or (leaves.raw and rule is None):
        return leaves
    known: dict[Any, Editable | None] = leaves.__dict__.setdefault("_weighed", {})
    if (inputs, rule) not in known:
        own = by_rule(leaves, rule) if rule else []
        if not leaves.raw:
            own += [alone(number, each) for number, each in getattr(leaves, "codecs", {}).items()]
        taken = {number for group in own for number in group.numbers}
        found = [group for group in _stored(leaves, inputs) if taken.isdisjoint(group.numbers)] + own
        known[inputs, rule] = Weights(leaves.twin(), found, inputs=inputs, rule=rule) if found else None
    return known[inputs, rule] or leaves


def _stored(leaves: Editable, inputs: bool) -> list[Group]:
    """The groups of known schemes that can be decoded; of a tree that is looked at, those that are sound."""
    if leaves.raw or not may_hold_groups(leaves):
        return []
    found = [group for group in groups_of(leaves) if _is_readable(leaves, group)]
    # What is looked at, and not edited, is shown as it is stored where leaves contradict each other.
    return [group for group in found if _is_sound(leaves, group)] if inputs else found


def _is_sound(leaves: Editable, group: Group) -> bool:
    try:
        weight_of(leaves, group, leaves.expression, partial(stated, getattr(leaves, "quantization", None)))
    except (SpecMismatch, Unsupported):
        return False
    return True


def _is_readable(leaves: Editable, group: Group) -> bool:
    """Whether a weight can be decoded: it is whole, its scheme is known, and its leaves have values."""
    if group.scheme.codec is None or group.payload is None or group.missing:
        return False
    return not any(map(leaves.is_blank, group.numbers))


def is_coded(leaves: Editable, number: int) -> bool:
    """Whether a leaf is a quantised weight, whose values are put and read exactly in float32."""
    return isinstance(leaves, Weights) and number in leaves.groups


def exact(leaves: Editable, number: int) -> Origin:
    """Where the values of a leaf are, those of a quantised weight in float32."""
    if isinstance(leaves, Weights) and number in leaves.groups:
        return leaves.weight(number).origin("float32")
    found: Origin = leaves.expression(number)
    return found


def chosen(selector: SelectorLike, leaves: Editable) -> list[int]:
    """The leaves that a selector means, which may name what a quantised weight is stored in; `NoMatch` for none."""
    try:
        return list(resolve(selector, leaves))
    except NoMatch:
        groups = leaves.groups if isinstance(leaves, Weights) else {}
        owner = {number: payload for payload, group in groups.items() for number in group.numbers}
        try:
            numbers = list(resolve(selector, cast(Weights, leaves).stored)) if owner else []
        except NoMatch:
            numbers = []
        if owner.keys().isdisjoint(numbers):
            raise
        return leaves.index.ordered({owner.get(number, number) for number in numbers})


def members(selector: SelectorLike, leaves: Editable) -> Sequence[int]:
    """The stored leaves that a selector means, one for each path: all of a quantised weight; `NoMatch` for none."""
    seen = weighed(leaves)
    try:
        numbers = resolve_paths(selector, seen)
    except NoMatch:
        return resolve_paths(selector, leaves)
    if not isinstance(seen, Weights):
        return numbers
    return leaves.index.ordered({each for number in numbers for each in seen.members(number)})


def carried(leaves: Editable, rule: Rename) -> dict[int, Keys]:
    """The new paths of stored leaves by a rule for those that are seen, in the form of `structure.moves`."""
    seen = weighed(leaves)
    found: dict[int, Keys] = {number: keys(path) for number, path in rule.over(leaves.index).items()}
    if isinstance(seen, Weights):
        for number, path in rule.over(seen.index).items():
            found |= seen.carried(number, keys(path))
    return found
