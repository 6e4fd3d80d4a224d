"""`Adapter`: the low-rank terms that were trained for a model, from a PEFT folder, a kohya file or a tree."""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from paramend.anatomy.sections import parsed
from paramend.checkpoints.assemble import origin_of
from paramend.checkpoints.checkpoint import Checkpoint, open as open_checkpoint
from paramend.checkpoints.whole import save
from paramend.disk.io import write_file
from paramend.disk.permissions import NEW_FOLDER, access_of, of_folder
from paramend.disk.publishing import published
from paramend.disk.urls import path_of
from paramend.edits.memory import valued
from paramend.errors import BadArgument, BadCheckpoint, CannotRead, Unsupported
from paramend.leaves.leaves import Editable
from paramend.leaves.origins.origin import Origin
from paramend.leaves.paths import labels, text_of
from paramend.leaves.specs import AnyTree
from paramend.reports import wording
from paramend.selectors.renames import keys, rename

Pieces: TypeAlias = tuple[str, ...]
CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")

# How the names of an adapter's leaves end, and what the leaf is then. Capitals have the axes of torch, (rank, in) and
# (out, rank); the others those of JAX, (in, rank) and (rank, out).
_ENDS: Mapping[Pieces, str] = {
    tuple(end.split("/")): role
    for role, ends in {
        "A": ("lora_A/weight", "lora_down/weight", "lora/down/weight"),
        "B": ("lora_B/weight", "lora_up/weight", "lora/up/weight"),
        "a": ("lora/lora_a", "lora_a"),
        "b": ("lora/lora_b", "lora_b"),
        "bias": ("lora_B/bias",),
        "alpha": ("alpha",),
        "tokens": ("token_adapter/trainable_tokens_delta",),
        "rows A": ("lora_embedding_A",),
        "rows B": ("lora_embedding_B",),
        "magnitude": ("lora_magnitude_vector", "lora_magnitude_vector/weight"),
    }.items()
    for end in ends
}
_WRAPPED = ("base_layer", "modules_to_save")
# Keys of a configuration that change what its tensors mean, and how.
_REFUSED = {
    "alora_invocation_tokens": "acts on some tokens alone",
    "arrow_config": "chooses among several for each token",
    "use_bdlora": "has blocks on its diagonal",
    "use_qalora": "averages its inputs in groups",
    "kasa_config": "changes the weights of the base",
    "monteclora_config": "samples its terms",
}
# Ways to begin that move a part of the base's weights into the adapter.
_MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Term:
    """What an adapter holds for one module, as it names it: what each leaf is → its number; and the name of the leaf
    that they change, "" for the weight of the module."""

    module: Pieces
    leaf: str
    roles: dict[str, int] = field(default_factory=dict)


class Adapter:
    """An adapter: its leaves and its configuration. `pm.extract` makes one, and `pm.fold` takes it.

    Attributes:
        name: what messages call it.
        leaves: its leaves.
        config: what `adapter_config.json` says; None for formats that have none.
        terms: what it holds for each module.
        replaced: the leaves that take the place of one of the base: its path → number.
        rest: the paths of leaves that are of no known kind.
    """

    def __init__(
        self,
        name: str,
        leaves: Editable,
        config: Mapping[str, Any] | None = None,
        rule: Sequence[str] | None = None,
        read: Sequence[os.stat_result] = (),
    ) -> None:
        self.name, self.leaves, self.config, self._read = name, leaves, config, read
        self.replaced: dict[Pieces, int] = {}
        self.rest: list[str] = []
        # Several parameters of a module are wrapped in each other: how deep tells their terms apart.
        terms: dict[tuple[Pieces, int, str], Term] = {}
        ruled = {} if rule is None else _ruled(leaves, rule)
        for number in leaves.index.numbers:
            role, module, leaf = ruled.get(number) or _role(leaves.index.pieces(number))
            bare = tuple(piece for piece in module if piece not in _WRAPPED)
            bare = bare[2:] if bare[:2] == ("base_model", "model") else bare
            if role and (role != "alpha" or config is None):
                key = bare, module.count("base_layer"), leaf
                terms.setdefault(key, Term(bare, leaf)).roles[role] = number
            elif config is not None:
                self.replaced[(*bare, "alpha") if role else bare] = number
            else:
                self.rest.append(leaves.index.path(number))
        self.terms = list(terms.values())

    def __repr__(self) -> str:
        return f"<{self.name}: {wording.plural(len(self.terms), 'term')}>"

    def save(self, folder: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the adapter as PEFT loads it: `adapter_model.safetensors` and `adapter_config.json`, both or none.

        Args:
            folder: the folder that they are in; it is as private as the models that the adapter was made of.
            force: whether it may already exist; it is then replaced in one step.

        Raises:
            CannotWrite: something is there, or the system refuses.
            Unsupported: the adapter has no configuration: it was read from another format.
        """
        if self.config is None or isinstance(self.leaves, Checkpoint):
            raise Unsupported(f"{self.name} was not extracted, and is a file already")
        access, index = of_folder(access_of(self._read, new=NEW_FOLDER)), self.leaves.index
        with published(path_of(folder), force=force, access=access, folder=True) as temporary:
            save({index.path(n): self.leaves.read(n) for n in index.numbers}, temporary / WEIGHTS[0])
            write_file(temporary / CONFIG, json.dumps(self.config, indent=2, sort_keys=True).encode() + b"\n")

    def origin(self, number: int) -> Origin:
        return origin_of(self.leaves, number)

    def paths(self, terms: Iterable[Term]) -> list[str]:
        return [self.leaves.index.path(number) for term in terms for number in term.roles.values()]

    def said(self, key: str, default: Any = None) -> Any:
        """What the configuration says; the default where it says nothing."""
        found = (self.config or {}).get(key)
        return default if found is None else found

    def scale(self, term: Term, rank: int, parameter: str = "") -> float:
        """The factor of the products of a term, alpha / rank or alpha / √rank."""
        if self.config is None:
            alpha = float(self.origin(term.roles["alpha"]).read().reshape(())) if "alpha" in term.roles else rank
            return alpha / rank
        alpha = self._by_module("alpha_pattern", "lora_alpha", term, parameter)
        return float(alpha / (math.sqrt(rank) if self.said("use_rslora") else rank))

    def rank(self, term: Term, length: int, parameter: str = "") -> int:
        """The rank of a term, whose leaf A has this length along its axis of ranks."""
        return length if self.config is None else int(self._by_module("rank_pattern", "r", term, parameter))

    def _by_module(self, pattern: str, key: str, term: Term, parameter: str) -> float:
        name = ".".join((*term.module, *([parameter] if parameter else [])))
        for text, value in self.said(pattern, {}).items():
            try:
                if re.match(rf"(.*\.)?({text})$", name):
                    return float(value)
            except re.error as error:
                raise BadCheckpoint(f"{self.name}: {pattern} has {text!r}, which is not a pattern: {error}") from None
        return float(self.said(key, 8))


def _ruled(leaves: Editable, rule: Sequence[str]) -> dict[int, tuple[str, Pieces, str]]:
    """The leaves that a rule names, each with what it is, the module and the leaf that it changes."""
    if isinstance(rule, str) or len(rule) != 3:
        why = f"rule={rule!r} is not three paths: of A, of B and of the leaf that they change"
        raise BadArgument(why, hint='rule=("**/lora_a", "**/lora_b", "**/kernel")')
    found: dict[int, tuple[str, Pieces, str]] = {}
    for role, path in zip("ab", rule, strict=False):
        for number, moved in rename(path, rule[2]).over(leaves.index).items():
            *module, leaf = (text_of(label) for key, _ in keys(moved) for label in labels(key))
            found[number] = role, tuple(module), leaf
    return found


def _role(pieces: Pieces) -> tuple[str, Pieces, str]:
    """What a leaf of an adapter is, its module, and the name of the leaf that a suffix of its own names.

    >>> _role(("fc", "lora_A", "weight")), _role(("fc", "kernel_lora_a")), _role(("fc", "bias"))
    (('A', ('fc',), ''), ('a', ('fc',), 'kernel'), ('', ('fc', 'bias'), ''))
    """
    for length in (3, 2, 1):
        role = _ENDS.get(pieces[-length:])
        if role and len(pieces) >= length:
            return role, pieces[:-length], ""
    leaf, mark, side = pieces[-1].rpartition("_lora_")
    return (side, pieces[:-1], leaf) if mark and side in ("a", "b") else ("", pieces, "")


def adapter(given: AnyTree, rule: Sequence[str] | None = None) -> Adapter:
    """An adapter from its path, or from a tree."""
    if isinstance(given, Adapter):
        return given
    leaves, config = given, None
    if isinstance(given, str | os.PathLike):
        path = path_of(given)
        leaves = open_checkpoint(next((each for name in WEIGHTS if (each := path / name).is_file()), path))
    if isinstance(leaves, Checkpoint):
        config = _config(leaves)
    place = given if isinstance(given, str | os.PathLike) else getattr(leaves, "path", "")
    found = Adapter(str(place) or "the adapter", valued(leaves), config, rule)
    index = found.leaves.index
    if config is None and any(index.pieces(number)[:2] == ("base_model", "model") for number in index.numbers):
        raise CannotRead(f"{found.name} is of PEFT, and there is no {CONFIG}, which says its alpha")
    _check(found)
    return found


def _config(weights: Checkpoint) -> dict[str, Any] | None:
    """What PEFT says beside its weights, and diffusers in the metadata of theirs; None if nothing is said."""
    file, held = weights.path.with_name(CONFIG), weights.metadata.get("lora_adapter_metadata")
    if weights.path.name in WEIGHTS and file.is_file():
        return parsed(file.read_bytes(), file)
    if not isinstance(held, str):
        return None
    values = parsed(held.encode(), weights.path)
    if len({key.partition(".")[0] for key in values}) != 1:
        raise Unsupported(f"{weights.path} has adapters of several models: {', '.join(values)}")
    return {key.partition(".")[2]: value for key, value in values.items()}


def _check(found: Adapter) -> None:
    kind, begun = found.said("peft_type", "LORA"), str(found.said("init_lora_weights", ""))
    if kind != "LORA":
        raise Unsupported(f"{found.name} is {kind}, not a LoRA: it is not a sum of a weight and low-rank terms")
    for key, how in _REFUSED.items():
        if found.said(key):
            raise Unsupported(f"{found.name} {how} ({key} in {CONFIG}), so no weights do the same")
    if begun.lower().startswith(_MOVED):
        raise Unsupported(
            f"{found.name} began with {begun}, which moved a part of the base's weights into it",
            hint="model.save_pretrained(folder, path_initial_model_for_weight_conversion=...) of PEFT makes it a LoRA",
        )
    if not found.terms and not found.replaced:
        raise BadArgument(f"{found.name} holds no low-rank terms", hint="a PEFT folder, a kohya file, or rule=")
    patterns = [found.said(key, {}) for key in ("rank_pattern", "alpha_pattern")]
    if not all(isinstance(each, Mapping) for each in patterns):
        raise BadCheckpoint(f"{found.name}: the patterns in {CONFIG} are not maps")
    ranks, alphas = [found.said("r", 8), *patterns[0].values()], [found.said("lora_alpha", 8), *patterns[1].values()]
    if not all(isinstance(each, int | float) for each in alphas) or not all(type(r) is int and r > 0 for r in ranks):
        raise BadCheckpoint(f"{found.name}: a rank or an alpha in {CONFIG} is not a number that it can be")
