"""`Destinations`: which leaves of a base the modules of an adapter mean, whatever either is called by its library."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from paramend.anatomy.beside import EMBEDDINGS as _ROWS, HEADS, WITH_HEAD, absent_head
from paramend.anatomy.families import CONV1D, EXPERTS, INPUTS_FIRST, INTERLEAVED, UNSAID
from paramend.anatomy.ties import said
from paramend.checkpoints.anatomy import configuration
from paramend.leaves.leaves import Editable
from paramend.leaves.paths import number_of
from paramend.leaves.specs import Spec
from paramend.merging.adapters import Pieces

# How the weight of a module is called.
WEIGHTS = ("weight", "kernel", "w", "embedding")
# Paths that mean the same in memory, on disk, and before and after transformers 4.52 and 5.
_ALIKE = (
    (("model", "language_model"), ("language_model", "model"), ("model",)),
    (("model", "visual"), ("visual",)),
    (("model", "vision_tower"), ("vision_tower",)),
    (("model", "audio_tower"), ("audio_tower",)),
    (("model", "multi_modal_projector"), ("multi_modal_projector",)),
    (("lm_head",), ("language_model", "lm_head")),
)
_MIDDLES = (("mlp", "block_sparse_moe"), ("block_sparse_moe", "mlp"))
# What the names of kohya begin with: the part of a pipeline that they are for.
_PARTS = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_", "lora_prior_unet_")


@dataclass(frozen=True)
class Slot:
    """What products can be added to: a leaf, or a parameter that the base holds as a leaf for each expert and side."""

    name: str  # that of the parameter
    spec: Spec
    # The leaves: number, the expert that it is, None for all of them, and its rows.
    places: tuple[tuple[int, int | None, range], ...]


class Fused(NamedTuple):
    """Where a fused leaf has a projection of one expert: which of how many sides it is."""

    number: int
    expert: int
    side: int
    sides: int


class Destinations:
    """The leaves of a base by module."""

    def __init__(self, leaves: Editable) -> None:
        self.leaves = leaves
        self.modules: dict[Pieces, dict[str, int]] = {}
        for number in leaves.index.numbers:
            *module, name = leaves.index.pieces(number)
            self.modules.setdefault(tuple(module), {})[name] = number
        self.config = configuration(leaves)  # {} if there is none
        inner = self.config.get("text_config")
        types = [part.get("model_type") for part in (self.config, inner) if isinstance(part, Mapping)]
        self.families = tuple(str(each) for each in types if each)  # its model type, and that of the text model in it

    def among(self, families: Any) -> bool:
        return any(family in families for family in self.families)

    def path(self, path: Pieces) -> int | None:
        """The leaf at a path, which an adapter may call otherwise."""
        found = self.module(path[:-1])
        return None if found is None else self.modules[found].get(path[-1])

    def module(self, named: Pieces) -> Pieces | None:
        if named in self.modules:
            return named
        if len(named) == 1 and named[0].startswith("lora_"):
            bare = next((named[0].removeprefix(part) for part in _PARTS if named[0].startswith(part)), named[0])
            found = self._joined.get(bare, [])
        else:
            found = [each for each in dict.fromkeys(self._called(named)) if each in self._known]
        return found[0] if len(found) == 1 else None

    @cached_property
    def _known(self) -> set[Pieces]:
        """The modules, and those above leaves for each expert."""
        return {module[:depth] for module in self.modules for depth in range(len(module) + 1)}

    @cached_property
    def _joined(self) -> dict[str, list[Pieces]]:
        found: dict[str, list[Pieces]] = {}
        for module in self.modules:
            found.setdefault("_".join(module), []).append(module)
        return found

    def _called(self, named: Pieces) -> Iterator[Pieces]:
        """The names that a module may have."""
        yield named
        for old, new in _MIDDLES:
            yield tuple(new if piece == old else piece for piece in named)
        for row in _ALIKE:
            begin = next((each for each in row if named[: len(each)] == each), None)
            if begin is not None:
                yield from ((*each, *named[len(begin) :]) for each in row)
        firsts = {module[0] for module in self.modules if module}
        if named and named[0] not in firsts:  # with the prefix of the class, or without it
            yield from [named[1:]] if len(named) > 1 else []
            yield from ((first, *named) for first in firsts)

    def weight(self, module: Pieces) -> int | None:
        held = self.modules.get(module, {})
        return next((held[name] for name in WEIGHTS if name in held), None)

    def parameters(self, module: Pieces) -> list[Slot]:
        """The parameters of a module without a weight, also those of which the base has parts."""
        held = self.modules.get(module, {})
        whole = [Slot(name, self.leaves.spec(number), ((number, None, range(0)),)) for name, number in held.items()]
        parts = [slot for name in EXPERTS if name not in held and (slot := self._parted(module, name))]
        return [*(slot for slot in whole if slot.spec.ndim > 1), *parts]

    def _parted(self, module: Pieces, name: str) -> Slot | None:
        """A fused parameter of experts that the base holds one by one, gates and inputs apart."""
        places: list[tuple[int, int | None, range]] = []
        shapes: set[tuple[int, ...]] = set()
        expert, spec = 0, Spec((), "")
        while (*module, str(expert)) in self._known:
            for side, names in enumerate(EXPERTS[name]):
                here = [self.weight((*module, str(expert), each)) for each in names]
                number = next((each for each in here if each is not None), None)
                if number is None:
                    return None
                spec = self.leaves.spec(number)
                shapes.add(spec.shape)
                places.append((number, expert, range(side * spec.shape[0], (side + 1) * spec.shape[0])))
            expert += 1
        if len(shapes) != 1 or spec.ndim != 2:
            return None
        rows = spec.shape[0] * len(EXPERTS[name])
        return Slot(name, Spec((expert, rows, spec.shape[1]), spec.dtype), tuple(places))

    def fused(self, named: Pieces) -> Fused | None:
        """The place in a fused leaf of a module that is a projection of one expert; None if there is none."""
        expert = number_of(named[-2]) if len(named) > 1 else None
        if expert is None:
            return None
        held = self.modules.get(self.module(named[:-2]) or (), {})
        for fused, sides in EXPERTS.items():
            for side, names in enumerate(sides):
                if named[-1] in names and fused in held:
                    return Fused(held[fused], expert, side, len(sides))
        return None

    def interleaved(self, number: int) -> bool:
        """Whether the two sides of a fused leaf take turns."""
        module, name = self.leaves.index.pieces(number)[:-1], self.leaves.index.pieces(number)[-1]
        return self.among(INTERLEAVED) or (not self.families and f"{name}_bias" in self.modules[module])

    def inputs_first(self, number: int, *, conv1d: bool) -> bool:
        """Whether a square matrix has its inputs first; `conv1d` is what the adapter says.

        A file of PEFT says it once, for modules of both kinds: what is known of the family, then of the weights beside
        it, comes first.
        """
        *module, name = self.leaves.index.pieces(number)
        if name in ("kernel", "w"):
            return True
        known = self.is_conv1d(tuple(module))
        return conv1d if known is None else known

    def is_conv1d(self, module: Pieces) -> bool | None:
        """Whether a module is a Conv1D; None if that is not known."""
        named = bool(module) and any(module[-1] in names for names in CONV1D.values())
        if self.among(CONV1D) or self._transposed:
            return named
        return self._transposed if named else None

    @cached_property
    def _transposed(self) -> bool | None:
        """Whether weights with names of Conv1D have their inputs first, as their biases say; None if none does."""
        for module, held in self.modules.items():
            if module and any(module[-1] in names for names in CONV1D.values()) and {"weight", "bias"} <= held.keys():
                shape, bias = (self.leaves.spec(held[name]).shape for name in ("weight", "bias"))
                if len(shape) == 2 and shape[0] != shape[1] and len(bias) == 1:
                    return shape[1] == bias[0]
        return None

    def experts_first(self, version: str) -> bool | None:
        """Whether fused square experts have their inputs first for an adapter that this version of PEFT wrote; None if
        that cannot be known. Up to 0.18 it took all of them so; from then on those whose module says it."""
        numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
        if (numbers and numbers < (0, 19)) or (self.among(INPUTS_FIRST) and not self.among(UNSAID)):
            return True
        return False if numbers and self.families else None

    @property
    def stored_inputs_first(self) -> bool | None:
        """Whether fused experts have their inputs first in this family; None if it is not known."""
        return self.among(INPUTS_FIRST) if self.families else None

    @cached_property
    def tie(self) -> tuple[int, int | None, bool] | None:
        """The embedding that the head shares its weight with, the leaf of the head if there is one, and whether that is
        known: a head that is not here may never have been. None if nothing is shared."""
        numbers = [[self.weight(one) for one in self.modules if one and one[-1] in names] for names in (_ROWS, HEADS)]
        embedding, head = (next((number for number in each if number is not None), None) for each in numbers)
        if embedding is None:
            return None
        if head is not None:
            same = head in self.leaves.twins(embedding) or bool(said(self.config))
            return (embedding, head, True) if same else None
        path = getattr(self.leaves, "path", None) or Path("/dev/null/none")
        absent = absent_head("lm_head.weight", self.leaves.index, path)
        kinds = self.config.get("architectures")
        headed = not isinstance(kinds, list) or not kinds or str(kinds[0]).endswith(WITH_HEAD)
        return None if absent is None else (embedding, None, bool(self.config) and headed)

    def is_tied(self, named: Pieces) -> bool:
        """Whether a module is a head or an embedding that share a weight."""
        if self.tie is None or not named or named[-1] not in (*HEADS, *_ROWS):
            return False
        module, (embedding, head, known) = self.module(named), self.tie
        if module is None:
            return named[-1] in HEADS and head is None
        return known and self.weight(module) in (embedding, head)
