"""Bodies: the layers, experts and sizes of a model, or of one part of it, by its configuration, names and shapes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from paramend.anatomy.entries import entries, entry_of
from paramend.anatomy.parts import parts_of
from paramend.anatomy.schedules import DENSE, SPARSE, schedules_of
from paramend.anatomy.sections import MTP, counted, kind_at, part_at, sections_of, side_of
from paramend.anatomy.sizes import Leaf, sizes_of
from paramend.leaves.paths import number_of

Pieces = tuple[str, ...]
# What a layer holds, and what that makes it, where no configuration tells.
_MIXERS = {
    "linear_attn": "linear_attention",
    "mamba": "linear_attention",
    "A_log": "linear_attention",
    **dict.fromkeys(("self_attn", "self_attention", "attention", "attn", "SelfAttention", "q_proj"), "attention"),
}
_PREDICTS = {"eh_proj", "enorm", "hnorm"}  # of a block that predicts further tokens
_LISTED = ("layer_types", "layers_block_type")  # lists that tell kinds as transformers calls them


class Run(Protocol):
    """Numbered entries under one parent, as `selectors.layers` finds them."""

    @property
    def parent(self) -> Pieces: ...
    @property
    def head(self) -> str: ...
    @property
    def numbers(self) -> tuple[int, ...]: ...
    @property
    def blocks(self) -> tuple[int, ...]: ...
    def place(self, path: Pieces) -> int | None: ...
    def piece(self, number: int) -> str: ...


@dataclass(frozen=True)
class Stack:
    """Layers, and the blocks after them that predict further tokens."""

    run: Run  # all of them
    blocks: tuple[int, ...]  # the numbers of the blocks
    inside: Mapping[int, list[Pieces]]  # number → the paths of its leaves, relative to it

    @property
    def layers(self) -> list[int]:
        return [number for number in self.run.numbers if number not in self.blocks]

    @property
    def where(self) -> Pieces:
        """Its path; with `*` for the numbers of siblings, such as `Dense_*`."""
        return (*self.run.parent, f"{self.run.head}*") if self.run.head else self.run.parent

    @property
    def size(self) -> int:
        return sum(map(len, self.inside.values()))


@dataclass(frozen=True)
class Body:
    """A model, or one part of it."""

    config: Mapping[str, Any]  # the configuration of the whole model; {} if there is none
    place: Pieces  # the section of the body in it
    leaves: Mapping[int, Leaf]  # number → leaf, those of the body alone
    stack: Stack | None  # its layers; None if they are not known

    @property
    def section(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = part_at(self.config, self.place)
        return found

    @property
    def side(self) -> str:
        """The side of a model with an encoder and a decoder that it is, or ""."""
        return "" if self.stack is None else side_of(self.stack.run.parent)

    @property
    def model_type(self) -> str:
        return kind_at(self.config, self.place)

    @cached_property
    def sizes(self) -> dict[str, int]:
        return sizes_of(self.section, self.leaves.values(), self.side)

    @property
    def inside(self) -> list[list[Pieces]]:
        """The paths of the leaves of each layer, relative to it."""
        return [] if self.stack is None else [self.stack.inside[number] for number in self.stack.layers]

    @cached_property
    def kinds(self) -> list[str] | None:
        """The kind of each layer; None if nothing tells it."""
        mixers = [
            dict.fromkeys(kind for name, kind in _MIXERS.items() if any(name in path for path in paths))
            for paths in self.inside
        ]
        sparse = [SPARSE if any("experts" in path for path in paths) else DENSE for paths in self.inside]
        named = ["+".join(kinds) for kinds in mixers]
        columns = (*_told(self), *(column for column in (named, sparse) if len({*column}) > 1), named)
        return next((column for column in columns if column and all(column)), None)

    def kind_of(self, number: int) -> str:
        """The kind of the layer that a leaf is in; "layer" if it is not told, "" outside of layers."""
        layers = [] if self.stack is None else self.stack.layers
        layer = self.stack and self.stack.run.place(self.leaves[number].path)
        if layer not in layers:
            return ""
        return self.kinds[layers.index(layer)] if self.kinds else "layer"

    @cached_property
    def blocks(self) -> list[Pieces]:
        """The paths of the blocks that predict further tokens: numbered after the layers, or under a name of theirs."""
        if self.stack is not None and self.stack.blocks:
            run = self.stack.run
            return [(*run.parent, run.piece(number)) for number in self.stack.blocks]
        own = [(leaf.path, at) for leaf in self.leaves.values() for at, piece in enumerate(leaf.path) if piece in MTP]
        after = [path[: i + n + 1] for path, i in own for n in (1, 2) if number_of((*path, "", "")[i + n]) is not None]
        numbered = sorted(dict.fromkeys(after), key=lambda path: int(path[-1]))
        return numbered or sorted({path[: at + 1] for path, at in own})


def _told(body: Body) -> Iterator[list[str]]:
    """What the configuration says of each layer, list by list, then by schedules."""
    n = len(body.inside)
    lists = [pair for pair in entries(body.section, n, len(body.blocks)) if pair[1] in ("list", "cycle")] if n else []
    for path, how in sorted(lists, key=lambda pair: pair[0][-1] not in _LISTED):
        values = [entry_of(part_at(body.section, path), how, layer) for layer in range(n)]
        if all(isinstance(value, str) for value in values):
            yield values
    for schedule in schedules_of(body.section, body.model_type, body.side):
        kinds = schedule.kinds(body.section, n)
        if kinds and all(isinstance(kind, str) for kind in kinds):
            yield kinds


_TEXTS = ("text", "language", "llm")  # parts whose layers are those of the model


def bodies_of(
    config: Mapping[str, Any], leaves: Mapping[int, Leaf], runs: Iterable[Run]
) -> tuple[Body, dict[str, Body]]:
    """The body whose layers are those of the model, and the parts by name, if it has several; `runs` are the outermost
    numbered entries."""
    stacks = [_stack(run, config, leaves) for run in runs if not {*MTP} & {*run.parent}]
    inside = {n for n, leaf in leaves.items() if any(each.run.place(leaf.path) in each.blocks for each in stacks)}
    blocks = inside | {n for n, leaf in leaves.items() if {*MTP} & {*leaf.path}}
    parts: dict[str, Body] = {}
    for part in parts_of(config, {n: leaf.path for n, leaf in leaves.items() if n not in blocks}):
        name = part.name.removesuffix("_config")
        own = part.leaves | part.head | (blocks if name in _TEXTS else set())
        stack = next((stack for stack in stacks if stack.run.parent == part.layers and not stack.run.head), None)
        parts[name] = Body(config, (part.name,), {n: leaf for n, leaf in leaves.items() if n in own}, stack)
    sides = {side: [stack for stack in stacks if side in stack.run.parent] for side in ("encoder", "decoder")}
    if not parts and all(sides.values()) and config.get("is_encoder_decoder", True):
        for side, other in (("encoder", "decoder"), ("decoder", "encoder")):
            mine = {n: leaf for n, leaf in leaves.items() if other not in leaf.path}
            place = (side,) if isinstance(config.get(side), Mapping) else ()
            parts[side] = Body(config, place, mine, max(sides[side], key=lambda stack: stack.size))
    main = next((parts[name] for name in (*_TEXTS, "decoder") if name in parts), None)
    return main or _rest(config, leaves, stacks, parts), parts


def _rest(
    config: Mapping[str, Any], leaves: Mapping[int, Leaf], stacks: Sequence[Stack], parts: Mapping[str, Body]
) -> Body:
    """What is in none of the parts as a body; the last part if its layers are not known."""
    taken = {number for body in parts.values() for number in body.leaves}
    rest = {n: leaf for n, leaf in leaves.items() if n not in taken}
    free = [stack for stack in stacks if all(body.stack is not stack for body in parts.values())]
    free.sort(key=lambda stack: -stack.size)
    text = next(((key,) for key in map("{}_config".format, _TEXTS) if isinstance(config.get(key), Mapping)), ())
    counting = [(place, stack) for stack in free if (place := _counting(config, stack, text)) is not None]
    if counting:
        place, stack = min(counting, key=lambda pair: pair[0] not in ((), text))
        return Body(config, place, rest, stack)
    if parts:
        return [*parts.values()][-1]
    most = free[0] if free and 2 * free[0].size > len(leaves) else None
    return Body(config, text, rest, most)


def _counting(config: Mapping[str, Any], stack: Stack, text: Pieces) -> Pieces | None:
    """The section that counts some layers, or lists their kinds."""
    n = len(stack.layers)
    found = sections_of(config, n, stack.run.parent)
    if found:
        return found[-1]
    listed = (part_at(config, text).get(key) for key in _LISTED)
    return text if any(isinstance(kinds, list) and len(kinds) == n for kinds in listed) else None


def _stack(run: Run, config: Mapping[str, Any], leaves: Mapping[int, Leaf]) -> Stack:
    inside: dict[int, list[Pieces]] = {number: [] for number in (*run.numbers, *run.blocks)}
    for leaf in leaves.values():
        number = run.place(leaf.path)
        if number in inside:
            inside[number].append(leaf.path[len(run.parent) + 1 :])
    last = max(inside) + 1
    said = next((range(layers, last) for layers, blocks in counted(config) if layers + blocks == last), ())
    blocks = [n for n in inside if n in run.blocks or n in said or any(_PREDICTS & {*path} for path in inside[n])]
    return Stack(run, tuple(blocks), inside)
