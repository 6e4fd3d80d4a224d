"""Bodies: the layers, experts and sizes of a model, or of one part of it, by its configuration, names and shapes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Protocol

from paramend.anatomy.axes import TRANSPOSED, Axis, axes_of, is_stacked, proposed
from paramend.anatomy.entries import entries, entry_of
from paramend.anatomy.parts import parts_of
from paramend.anatomy.schedules import DENSE, SPARSE, schedules_of
from paramend.anatomy.sections import counted, part_at, sections_of
from paramend.anatomy.sizes import Place, sizes_of
from paramend.leaves.paths import number_of

Pieces = tuple[str, ...]
# What a layer holds, and what that makes it, where no configuration tells.
_MIXERS = {
    "linear_attn": "linear_attention",
    "mamba": "mamba",
    "A_log": "mamba",
    **dict.fromkeys(("self_attn", "attention", "attn", "SelfAttention", "q_proj"), "attention"),
}
_ROUTERS = ("gate", "router")
_PREDICTS = {"eh_proj", "enorm", "hnorm"}  # of a block that predicts further tokens
MTP = ("mtp", "mtp_layers", "mtp_block")  # above such blocks
_SHARED = ("shared_expert", "shared_experts", "shared_mlp")


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
class Leaf:
    """The path of a leaf, piece by piece, and its shape."""

    path: Pieces
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of its scalars."""
        return prod(self.shape)


@dataclass(frozen=True)
class Body:
    """A model, or one part of it.

    Attributes:
        config: the configuration of the whole model; {} if there is none.
        place: the section of the body in it.
        leaves: number → leaf, those of the body alone.
        run: its layers and the blocks after them; None if they are not known.
        layers: the numbers of its layers.
        side: "encoder" or "decoder", for one side of a model.
    """

    config: Mapping[str, Any]
    place: Place
    leaves: Mapping[int, Leaf]
    run: Run | None
    layers: tuple[int, ...] = ()
    side: str = ""

    @property
    def section(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = part_at(self.config, self.place)
        return found

    @property
    def model_type(self) -> str:
        return str(self.section.get("model_type") or self.config.get("model_type") or "")

    @cached_property
    def said(self) -> Mapping[str, tuple[int, list[Place]]]:
        """Size → what the configuration says, and the keys that do."""
        return sizes_of(self.config, self.place, self.side)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Size → its value, by the configuration; what it does not say, by shapes. Absent if not known."""
        found = {name: value for name, (value, _) in self.said.items()}
        return _measured(found, self)

    def axes(self, number: int) -> tuple[Axis, ...]:
        """What each axis of a leaf counts, by its number; see `axes.axes_of`."""
        leaf, sizes = self.leaves[number], dict(self.sizes)
        if "kv_lora_rank" in self.section:  # queries, keys and values have head sizes of their own
            sizes.pop("head_dim", None)
        return axes_of(leaf.path, leaf.shape, sizes, transposed=self.model_type in TRANSPOSED)

    @cached_property
    def inside(self) -> dict[int, list[Pieces]]:
        """Layer → the paths of its leaves, relative to it."""
        found: dict[int, list[Pieces]] = {number: [] for number in self.layers}
        for leaf in self.leaves.values():
            number = None if self.run is None else self.run.place(leaf.path)
            if self.run is not None and number in found:
                found[number].append(leaf.path[len(self.run.parent) + 1 :])
        return found

    @cached_property
    def kinds(self) -> list[str] | None:
        """The kind of each layer; None if nothing tells it."""
        columns = list(_told(self))
        sparse = [SPARSE if any("experts" in path for path in paths) else DENSE for paths in self.inside.values()]
        columns += [sparse] if len({*sparse}) > 1 else []
        if not columns and self.inside:
            columns = [
                [
                    "+".join(
                        dict.fromkeys(kind for name, kind in _MIXERS.items() if any(name in path for path in paths))
                    )
                    for paths in self.inside.values()
                ]
            ]
        kinds: list[str] = []
        for column in columns:
            if not kinds:
                kinds = column
            elif len({*zip(kinds, column, strict=True)}) > len({*kinds}):  # it tells more
                kinds = [f"{one}, {more}" for one, more in zip(kinds, column, strict=True)]
        return kinds if all(kinds) and kinds else None

    def kind_of(self, number: int) -> str:
        """The kind of the layer that a leaf is in; "layer" if it is not told, "" outside of layers."""
        layer = None if self.run is None else self.run.place(self.leaves[number].path)
        if layer not in self.layers:
            return ""
        return self.kinds[self.layers.index(layer)] if self.kinds else "layer"

    @cached_property
    def blocks(self) -> list[Pieces]:
        """The paths of the blocks that predict further tokens: numbered after the layers, or under a name of theirs."""
        if self.run is not None and (rest := {*self.run.numbers, *self.run.blocks} - {*self.layers}):
            return [(*self.run.parent, self.run.piece(number)) for number in sorted(rest)]
        own = [(leaf.path, at) for leaf in self.leaves.values() for at, piece in enumerate(leaf.path) if piece in MTP]
        after = {
            path[: at + n + 1]: int(path[at + n])
            for path, at in own
            for n in (1, 2)
            if number_of((*path, "", "")[at + n]) is not None
        }
        return sorted(after, key=after.__getitem__) or sorted({path[: at + 1] for path, at in own})

    @cached_property
    def experts(self) -> dict[str, Any] | None:
        """How many experts there are, how they are stored, and where; None if there are none."""
        held = [path for paths in self.inside.values() for path in paths if "experts" in path]
        if not held or self.run is None:
            return None
        depth = held[0].index("experts") + 1
        separate = number_of(held[0][depth]) is not None
        count = self.sizes.get("experts") if self.said.get("experts") else None
        if count is None and separate:
            count = 1 + max(int(path[depth]) for path in held)
        all_paths = [path for paths in self.inside.values() for path in paths]
        return {
            "count": count or self.sizes.get("experts"),
            "top_k": self.sizes.get("top_k"),
            "storage": "separate" if separate else "stacked",
            "router": self._first(all_paths, _ROUTERS, without="experts"),
            "shared": self._first(all_paths, _SHARED),
            "where": self._anywhere(held[0][:depth]),
        }

    def _anywhere(self, inner: Pieces) -> Pieces:
        assert self.run is not None
        return (*self.run.parent, f"{self.run.head}*", *inner)

    def _first(self, paths: Iterable[Pieces], names: Sequence[str], without: str = "") -> Pieces | None:
        """The path, in any layer, of the first module with one of these names."""
        for path in paths:
            at = next(
                (depth for depth, piece in enumerate(path[:-1]) if piece in names and without not in path[:depth]), None
            )
            if at is not None:
                return self._anywhere(path[: at + 1])
        return None


# ---- kinds -------------------------------------------------------------------------------------------------------


def _told(body: Body) -> Iterator[list[str]]:
    """What the configuration says of each layer, list by list, then by schedules."""
    n = len(body.layers)
    lists = [path for path, how in entries(body.section, n, len(body.blocks)) if how == "list"] if n else []
    for path in sorted(lists, key=lambda path: path[-1] != "layer_types"):
        values = [entry_of(part_at(body.section, path), "list", layer) for layer in range(n)]
        if all(isinstance(value, str) for value in values):
            yield values
    for schedule in schedules_of(body.section, body.model_type, body.side):
        kinds = schedule.kinds(body.section, n)
        if kinds and all(isinstance(kind, str) for kind in kinds):
            yield kinds


# ---- sizes by shapes ---------------------------------------------------------------------------------------------


def _measured(said: Mapping[str, int], body: Body) -> dict[str, int]:
    """Sizes, those that the configuration does not say by the shapes of leaves; heads are those of the shapes."""
    found = dict(said)
    for leaf in body.leaves.values():
        if proposed(leaf.path) == (("vocabulary",), ("hidden",)) and len(leaf.shape) == 2:
            found.setdefault("vocabulary", leaf.shape[0])
            found.setdefault("hidden", leaf.shape[1])
    lengths: dict[Axis, list[int]] = {}
    for leaf in body.leaves.values():
        for axis, length in _beside_hidden(leaf, found.get("hidden", 0)):
            lengths.setdefault(axis, []).append(length)
    for name in ("mlp", "expert_mlp", "shared_mlp"):
        for axis in ((name,), (name, name)):
            if axis in lengths:
                found.setdefault(name, lengths[axis][0] // len(axis))
    return _with_heads(found, lengths, body)


def _beside_hidden(leaf: Leaf, hidden: int) -> Iterator[tuple[Axis, int]]:
    """What the axis beside the residual width may count, and its length; queries may be gated, and tell nothing."""
    shape = leaf.shape[1:] if is_stacked(leaf.path, leaf.shape) else leaf.shape
    out, into = proposed(leaf.path)
    if len(shape) == 2 and hidden in shape and ("hidden",) in (out, into) and out != ("heads",):
        yield (into if out == ("hidden",) else out), (shape[0] if shape[1] == hidden else shape[1])
    elif out in (("heads",), ("kv_heads",)) and len(shape) == 1 and leaf.path[-1] != "bias":
        yield ("head_dim",), shape[0]  # a norm of heads


def _with_heads(sizes: dict[str, int], lengths: Mapping[Axis, list[int]], body: Body) -> dict[str, int]:
    """Sizes with those of heads as the shapes have them; without any for a model whose layers do not attend."""
    heads, dim, kv = (sizes.pop(name, 0) for name in ("heads", "head_dim", "kv_heads"))
    inner, keys, fused = (
        lengths.get(axis, []) for axis in (("heads",), ("kv_heads",), ("heads", "kv_heads", "kv_heads"))
    )
    latent = [body.section.get(key) or 0 for key in ("qk_nope_head_dim", "qk_rope_head_dim")]
    if all(latent):  # keys have another size than values
        dim, kv = sum(latent), kv or heads
    elif inner or keys or fused:
        dim = dim or lengths.get(("head_dim",), [0])[0]
        heads = heads or (inner[0] // dim if dim and inner else 0)
        if heads and inner and heads * dim not in inner:
            dim = inner[0] // heads
        if dim and keys:
            kv = keys[0] // dim
        elif dim and heads and fused:
            kv = (fused[0] // dim - heads) // 2
    elif body.inside:
        return sizes
    return sizes | {name: size for name, size in (("heads", heads), ("head_dim", dim), ("kv_heads", kv)) if size}


# ---- which bodies there are --------------------------------------------------------------------------------------


def bodies_of(
    config: Mapping[str, Any], leaves: Mapping[int, Leaf], runs: Sequence[Run]
) -> tuple[Body, dict[str, Body]]:
    """The body whose layers are those of the model, and all by name if there are several; it is one of them then.

    Args:
        config: the configuration; {} if there is none.
        leaves: number → leaf.
        runs: the outermost numbered entries, from `selectors.layers`.
    """
    first = _first_numbers(config, leaves, runs)
    layers = {n: leaf.path for n, leaf in leaves.items() if not _is_block(leaf.path, runs, first)}
    parts: dict[str, Body] = {}
    for part in parts_of(config, layers) if config else ():
        mine = {n: leaf for n, leaf in leaves.items() if n in part.leaves | part.head or n not in layers}
        run = next((run for run in runs if run.parent == part.layers and not run.head), None)
        parts[part.name.removesuffix("_config")] = _body(config, (part.name,), mine, run, first)
    sides = {side: [run for run in runs if side in run.parent] for side in ("encoder", "decoder")}
    if not parts and all(sides.values()) and config.get("is_encoder_decoder", True):
        for side, found in sides.items():
            other = "encoder" if side == "decoder" else "decoder"
            mine = {n: leaf for n, leaf in leaves.items() if other not in leaf.path}
            parts[side] = _body(config, (), mine, _largest(mine, found), first, side)
    if parts:
        main = next((name for name in ("text", "decoder") if name in parts), [*parts][-1])
        return parts[main], parts
    run, place = _only(config, leaves, runs, first)
    return _body(config, place, leaves, run, first), {}


def _body(
    config: Mapping[str, Any],
    place: Place,
    leaves: Mapping[int, Leaf],
    run: Run | None,
    first: Mapping[Pieces, int],
    side: str = "",
) -> Body:
    numbers = () if run is None else tuple(n for n in run.numbers if n < first.get((*run.parent, run.head), n + 1))
    return Body(config, place, leaves, run, numbers, side)


def _largest(leaves: Mapping[int, Leaf], runs: Sequence[Run]) -> Run:
    return max(runs, key=lambda run: sum(run.place(leaf.path) is not None for leaf in leaves.values()))


def _only(
    config: Mapping[str, Any], leaves: Mapping[int, Leaf], runs: Sequence[Run], first: Mapping[Pieces, int]
) -> tuple[Run | None, Place]:
    """The layers of a model of one body, and the section that counts them, or lists them."""
    held = {id(run): sum(run.place(leaf.path) is not None for leaf in leaves.values()) for run in runs}
    runs = sorted(
        (run for run in runs if not any(piece in MTP for piece in run.parent)), key=lambda run: -held[id(run)]
    )
    inner = next(
        (key for key in ("text_config", "llm_config", "language_config") if isinstance(config.get(key), Mapping)), ""
    )
    place = (inner,) if inner else ()
    for run in runs:
        n = len([number for number in run.numbers if number < first.get((*run.parent, run.head), number + 1)])
        counting = sections_of(config, n, run.parent)
        if counting:
            return run, counting[-1]
        if any(how == "list" and path[-1].startswith("layer") for path, how in entries(part_at(config, place), n)):
            return run, place
    return (runs[0] if runs and 2 * held[id(runs[0])] > len(leaves) else None), place


def _first_numbers(config: Mapping[str, Any], leaves: Mapping[int, Leaf], runs: Sequence[Run]) -> dict[Pieces, int]:
    """Path of layers, with what stands before their number → the number of the first block after the last layer."""
    found: dict[Pieces, int] = {}
    for run in runs:
        own = {run.place(leaf.path) for leaf in leaves.values() if _PREDICTS & set(leaf.path)}
        own |= {
            n
            for layers, blocks in counted(config)
            if run.numbers[-1] + 1 == layers + blocks
            for n in range(layers, layers + blocks)
        }
        ours = sorted(number for number in own if number in run.numbers)
        if ours and ours == list(run.numbers[-len(ours) :]) and len(ours) < len(run.numbers):
            found[*run.parent, run.head] = ours[0]
    return found


def _is_block(path: Pieces, runs: Sequence[Run], first: Mapping[Pieces, int]) -> bool:
    """Whether a leaf is in a block that predicts further tokens."""
    numbers = ((run.place(path), first.get((*run.parent, run.head)), run.blocks) for run in runs)
    return any(n is not None and ((at is not None and n >= at) or n in blocks) for n, at, blocks in numbers)
