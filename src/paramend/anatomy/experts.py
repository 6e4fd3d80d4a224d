"""Experts: what names, shapes and a configuration say of the mixtures of experts in a model."""

import copy
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from paramend.anatomy.counts import EXPERTS, Pieces
from paramend.anatomy.entries import Names, words
from paramend.anatomy.sections import counted, part_at, parts_in, senses
from paramend.errors import SpecMismatch, Unsupported
from paramend.leaves.groups import Named
from paramend.leaves.paths import number_of
from paramend.leaves.specs import Spec
from paramend.reports import wording

# Keys that say how many experts a token goes to.
TOP_K = (
    *("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "moe_k"),
    *("top_k_experts", "num_selected_experts", "expert_used_count"),
)


# Families by what becomes of the weights with which outputs of experts are added, where each expert is there m times
# and m times as many are chosen. In sum they stay where they are normalised, or the shares of a softmax.
_SUMMED = words("""
    mixtral qwen2_moe qwen3_moe qwen3_next qwen3_vl_moe qwen3_vl_moe_text qwen3_5_moe qwen3_5_moe_text olmoe flex_olmo
    gpt_oss granitemoe granitemoehybrid granitemoeshared jamba jetmoe minimax minimax_m2 ernie4_5_moe hunyuan_v1_moe
    aria_text gemma4 gemma4_text deepseek_v2 deepseek_v4 afmoe hy_v3 laguna mistral4
""")
# Here they are the scores of a sigmoid, normalised if the configuration says so, times a factor.
_SCORED = words("""
    deepseek_v3 deepseek_v32 dots1 glm4_moe glm4_moe_lite glm4v_moe glm4v_moe_text glm_moe_dsa exaone_moe solar_open
    mimo_v2_flash nemotron_h lfm2_moe axk1 bailing_hybrid kimi_linear
""")
# Here biases are added to the shares of a softmax, which become smaller.
SHARES = ("ernie4_5_moe",)
_NORMED, _FACTOR = ("norm_topk_prob", "moe_renormalize"), "routed_scaling_factor"
# Keys of groups of experts, of which a token goes to the best ones, and what they are if they are left out.
_GROUPS = ("n_group", "num_expert_group")
_EIGHT_GROUPS = ("deepseek_v3", "deepseek_v32", "axk1")
# Leaves of experts, by the path of their mixture: those of a single one, and those of all.
_OWN = re.compile(r"(?:(?P<path>.*)/)?(?P<before>experts/(?:expert_)?)(?P<expert>[0-9]+)/.+")
_ALL = re.compile(
    r"(?:(?P<path>.*)/)?(?:experts/.+|(?:input|output)_linear/weight|moe/(?:gate|up|down)_proj/weight|ffn_\w+_exps/\w+)"
)
# Leaves of a router that have an entry for each expert, and leaves of experts in which each one has several rows.
_ROUTER = re.compile(
    r"(?:gate|router|moe/gate)/(?:(?:wg|layer|classifier|proj|gate)/)?(?:weight|bias|kernel)"
    r"|(?:(?:gate|router|moe_statics|gate/moe_statics)/)?(?:e_score_correction_bias|expert_bias|per_expert_scale)"
    r"|(?:moe/)?router_bias|ffn_gate_inp/(?:weight|bias)|exp_probs_b/bias"
)
_ROWS = re.compile(r"experts/mlp/(?:w1|v1|w2)")
_LAST_AXIS = re.compile(r"(?!experts/).*/kernel|(?:.*/)?moe_statics/\w+")
_ROUTED = re.compile(r"(?:moe/)?(?:gate|router)/.+")
_SHARED = re.compile(r"shared?_(?:experts?|mlp)(?:_gate)?|ffn_\w+_shexp")
# What numbered layers are called, where other numbers come before them.
_LAYERS = ("layers", "blocks", "block", "h")
# Leaves of a router that have no axis of experts, whatever their length is.
_PLAIN = ("router/scale", "router/norm/weight")


class Along(NamedTuple):
    """Where a leaf has its experts: the axis, the places of each along it, and how many that are no experts follow."""

    axis: int
    each: int = 1
    rest: int = 0

    def places(self, ids: Sequence[int], count: int) -> list[int]:
        """The places along the axis of some of so many experts, and of what follows them.

        >>> Along(0, 2).places([2, 0], 3), Along(0, 1, 1).places([1], 3)
        ([4, 5, 0, 1], [1, 3])
        """
        own = [expert * self.each + place for expert in ids for place in range(self.each)]
        return [*own, *range(count * self.each, count * self.each + self.rest)]


@dataclass(frozen=True)
class Block:
    """The mixture of experts of one layer."""

    path: Pieces  # its module
    layers: Pieces  # the path of the numbered layers
    layer: int | None  # the number of its own; None if there are none
    predicts: bool  # whether it is in a block that predicts further tokens (multi-token prediction)
    along: Mapping[int, Along]  # leaf → its axis of experts: leaves of all experts, and of the router
    own: Mapping[int, int]  # leaf → its expert, for leaves of a single one
    before: str  # what is before the number of an expert in the names of its leaves, relative to the module
    router: tuple[str, ...]  # the leaves of the router that choose experts, relative to the module
    shared: tuple[str, ...]  # the modules of experts that take every token
    unknown: tuple[int, ...]  # leaves of which it is not known whether they count experts


@dataclass(frozen=True)
class Mixture:
    """The experts of a model."""

    count: int  # how many each mixture has
    top_k: int | None  # how many a token goes to; None if nothing says it
    storage: str  # "per expert"; "fused", one leaf; "gpt-oss", gate and up in turns; "rows", several for each (DBRX)
    places: tuple[Pieces, ...]  # the sections of the configuration that count them
    model_type: str  # that of the first one, or ""
    blocks: tuple[Block, ...]  # the mixtures, in order

    def to_dict(self) -> dict[str, Any]:

        def named(texts: Iterator[str]) -> str | None:
            return ", ".join(dict.fromkeys(texts)) or None

        return {
            "count": self.count,
            "top_k": self.top_k,
            "storage": self.storage,
            "router": named(name for block in self.blocks for name in block.router),
            "shared": named(name for block in self.blocks for name in block.shared),
            "where": [".".join(block.path) for block in self.blocks],
        }


def experts_of(leaves: Named, config: Mapping[str, Any] | None = None) -> Mixture | None:
    """The experts of a model; None if it has none.

    >>> from paramend.trees.tree import Tree
    >>> import numpy as np
    >>> layer = {"gate": {"weight": np.ones((4, 2))}, "experts": {"down_proj": np.ones((4, 2, 3))}}
    >>> found = experts_of(Tree({"layers": {"0": {"mlp": layer}}}), {"num_experts": 4, "num_experts_per_tok": 2})
    >>> found.count, found.top_k, found.storage, found.blocks[0].router
    (4, 2, 'fused', ('gate/weight',))
    """
    config = config or {}
    counts = {path: (count, inside) for path, inside in _modules(leaves).items() if (count := _count(leaves, inside))}
    if not counts:
        return None
    said = list(_said(config))
    held = Counter(count for count, _ in counts.values()).most_common(1)[0][0]
    count = held if not said or any(each == held for _, each in said) else said[0][1]
    for path, (found, _) in counts.items():
        if found != count:
            others = "config.json says" if said else "others have"
            raise SpecMismatch(f"{'.'.join(path)} has {wording.plural(found, 'expert')}, and {others} {count}")
    places = tuple(dict.fromkeys(place for place, each in said if each == count))
    section = part_at(config, places[0]) if places else {}
    zeros, ends = section.get("zero_expert_num") or 0, dict(counted(config))
    blocks = tuple(_block(leaves, path, inside, count, zeros, ends) for path, (_, inside) in counts.items())
    kind = section.get("model_type") or config.get("model_type") or ""
    tops = [each for key in TOP_K for each in _numbers(section.get(key))]
    return Mixture(count, max(tops, default=None), _storage(leaves, blocks), places, kind, blocks)


def _numbers(value: object) -> list[int]:
    """A whole number, or those of a list with one for each layer."""
    numbers: list[Any] = [*value] if isinstance(value, list | tuple) else [value]
    return numbers if all(type(number) is int for number in numbers) else []


@dataclass(frozen=True)
class Groups:
    """Groups of experts, one after the other: how many, to how many of them a token may go, and the least size of one
    (they are compared by the sum of so many scores)."""

    count: int
    top: int
    least: int


def groups_of(config: Mapping[str, Any], mixture: Mixture) -> Groups:
    """The groups that a router knows; a single one if it knows none."""
    part = part_at(config, mixture.places[0]) if mixture.places else {}
    known = (8, 4) if mixture.model_type in _EIGHT_GROUPS else (1, 1)
    count = next((part[key] for key in _GROUPS if key in part), known[0])
    if part.get("topk_method") == "greedy" or not count:
        return Groups(1, 1, 1)
    return Groups(count, part.get("topk_group", known[1]) or count, 1 if mixture.model_type == "deepseek_v2" else 2)


def recounted(config: Mapping[str, Any], mixture: Mixture, count: int, times: int = 1) -> dict[str, Any]:
    """The configuration of a model with another number of experts, of which a token goes to `times` as many.

    >>> mixture = Mixture(8, 2, "fused", ((),), "mixtral", ())
    >>> recounted({"num_local_experts": 8, "num_experts_per_tok": 2}, mixture, 16, 2)
    {'num_local_experts': 16, 'num_experts_per_tok': 4}
    """
    new = copy.deepcopy(dict(config))
    for part in (part_at(new, place) for place in mixture.places):
        for key in (*EXPERTS, *TOP_K):
            old = _numbers(part.get(key))
            if key in TOP_K or set(old) == {mixture.count}:
                now = [times * each if key in TOP_K else count for each in old]
                part |= {key: now if isinstance(part[key], list | tuple) else now[0]} if old else {}
        if times > 1:
            _reweigh(part, mixture, times)
    return new


def _reweigh(part: dict[str, Any], mixture: Mixture, times: int) -> None:
    """Make up for weights of experts that are not a share of one."""
    kind = mixture.model_type
    if kind in _SUMMED and not part.get("zero_expert_num"):
        return
    normed = next((part[key] for key in _NORMED if key in part), kind != "dots1")
    if kind not in _SCORED or not (normed or _FACTOR in part):
        raise Unsupported(
            f"it is not known that experts of {kind or 'this model'} add up to the same where each is there {times} "
            f"times, and {times} times as many are chosen"
        )
    if not normed:
        part[_FACTOR] /= times


def renumbered(values: Any, ids: Mapping[Pieces, Sequence[int]], count: int) -> Any:
    """A configuration in which names of modules follow their experts, of which there were so many; `ids` is path of a
    mixture → the old number of each.

    >>> renumbered({"ignore": ["layers.0.mlp.experts.2.up_proj", "lm_head"]}, {("layers", "0", "mlp"): [2, 0]}, 3)
    {'ignore': ['layers.0.mlp.experts.0.up_proj', 'lm_head']}
    """
    if len(set(map(tuple, ids.values()))) == 1:  # patterns name no layer
        ids = {(): next(iter(ids.values()))}
    for path, olds in ids.items():
        to = {one: [new for new, old in enumerate(olds) if old == one] for one in range(count)}
        values = Names((".".join((*path[-3:], "experts")),), to).moved(values)
    return values


def _said(config: Mapping[str, Any]) -> Iterator[tuple[Pieces, int]]:
    """Where a configuration counts experts, and how many."""
    for place, part in parts_in(config):
        counts = () if senses(place) else (set(_numbers(part.get(key))) for key in EXPERTS)
        yield from ((place, count.pop()) for count in counts if len(count) == 1)


def _modules(leaves: Named) -> dict[Pieces, dict[int, str]]:
    """The modules that may be mixtures, each with its leaves and their names in it."""
    paths = {number: leaves.index.pieces(number) for number in leaves.index.numbers}
    texts = {number: "/".join(path) for number, path in paths.items()}
    found: dict[Pieces, dict[int, str]] = {}
    for text in texts.values():
        match = _ALL.fullmatch(text)
        path = tuple((match["path"] or "").split("/")) if match else ()
        if match and not any(map(_SHARED.fullmatch, path)):
            found.setdefault(path if path != ("",) else (), {})
    for number, path in paths.items() if found else ():
        inside = next((path[:depth] for depth in range(len(path) - 1, -1, -1) if path[:depth] in found), None)
        if inside is not None:
            found[inside][number] = "/".join(path[len(inside) :])
    return found


def _count(leaves: Named, inside: Mapping[int, str]) -> int:
    """How many experts a module has: as many as are numbered, or as leaves of all are long; 0 if it is no mixture."""
    own = {int(match["expert"]) for name in inside.values() if (match := _OWN.fullmatch(name))}
    if own:
        if own != set(range(len(own))):
            numbers = wording.listing(list(map(str, sorted(own))), 12)
            raise SpecMismatch(f"{leaves.index.path(min(inside))} is of experts numbered {numbers}")
        return len(own)
    rows = any(map(_ROWS.fullmatch, inside.values()))
    pattern = _ROUTER if rows else _ALL
    specs = (leaves.spec(number) for number, name in inside.items() if pattern.fullmatch(name))
    shapes = (spec.shape for spec in specs if spec.ndim > 2 - rows)
    return min((shape[0] for shape in shapes), default=0)


def _block(
    leaves: Named, path: Pieces, inside: Mapping[int, str], count: int, zeros: int, ends: Mapping[int, int]
) -> Block:
    """A mixture. `zeros` experts without leaves follow in its router; `ends` is layers → blocks after the last one."""
    along: dict[int, Along] = {}
    own: dict[int, int] = {}
    unknown: list[int] = []
    before, shared = "", dict[str, None]()
    for number, name in inside.items():
        first, spec = name.partition("/")[0], leaves.spec(number)
        if match := _OWN.fullmatch(name):
            own[number], before = int(match["expert"]), match["before"]
        elif _SHARED.fullmatch(first):
            shared[first] = None
        elif _ALL.fullmatch(name) or _ROUTER.fullmatch(name):
            axis = _along(name, spec, count, zeros)
            if axis is not None:
                along[number] = axis
            elif spec.size > 1:
                unknown.append(number)
        elif _ROUTED.fullmatch(name) and name not in _PLAIN:
            unknown.append(number)
    numbers = [place for place, piece in enumerate(path) if number_of(piece) is not None]
    at = next((place for place in numbers if path[place - 1] in _LAYERS), next(iter(numbers), 0))
    layer = number_of(path[at]) if numbers else None
    predicts = any(piece.startswith("mtp") for piece in path)
    predicts = predicts or any(last <= (layer or 0) < last + more for last, more in ends.items())
    router = tuple(inside[number] for number in along if _ROUTER.fullmatch(inside[number].removeprefix("experts/")))
    return Block(path, path[:at], layer, predicts, along, own, before, router, tuple(shared), tuple(unknown))


def _along(name: str, spec: Spec, count: int, zeros: int) -> Along | None:
    """The axis of experts of a leaf that should have one; None if it has none."""
    if not spec.ndim or name.endswith("_shape"):
        return None
    axis = spec.ndim - 1 if _LAST_AXIS.fullmatch(name) else 0
    length = spec.shape[axis]
    if _ROWS.fullmatch(name):
        return None if length % count else Along(axis, length // count)
    return Along(axis, 1, length - count) if length in (count, count + zeros) else None


def _storage(leaves: Named, blocks: Sequence[Block]) -> str:
    if any(block.own for block in blocks):
        return "per expert"
    if any(axis.each > 1 for block in blocks for axis in block.along.values()):
        return "rows"
    names = {leaves.index.pieces(number)[-1] for block in blocks for number in block.along}
    return "fused" if names.isdisjoint(("gate_up_proj_bias", "gate_up_proj_blocks")) else "gpt-oss"
