"""Layers of a configuration: it follows when they are copied, left out or put in another order."""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from paramend.anatomy.entries import CYCLES, LISTS, NAMING, OTHERS, entries, entry_of, moved
from paramend.anatomy.moves import Move, check_places
from paramend.anatomy.schedules import COMMON, FULL, LAST_FULL, SCHEDULES, Schedule, schedules_of
from paramend.anatomy.sections import BLOCKS, COUNTS, SIDES, counts_of, kind_at, part_at, sections_of, senses, side_of
from paramend.errors import BadArgument, Unsupported

# Keys that scale layers by their number or by the number of layers: a copy would get another scale than its source.
SCALED: Mapping[str, str] = {
    "scale_attn_by_inverse_layer_idx": "the scores of layer i are divided by i + 1",
    **dict.fromkeys(("use_deepnorm", "deepnorm", "depth_scaled_init"), "residuals are scaled by the number of layers"),
    "scale_depth": "residuals are divided by the root of the number of layers",
    **dict.fromkeys(("layernorm_scaling", "layer_norm_scaling"), "the norm of layer i is divided by the root of i"),
    "use_mup": "scales depend on the number of layers",
    "num_kv_shared_layers": "the last layers read the cache of others, counted from the end",
    "hidden_size_per_layer_input": "an embedding beside the layers holds columns for each of them",
    "loop_layer_index_start": "some layers are run several times, by their numbers",
}
# What these keys are if they are left out.
_DEFAULTS: Mapping[tuple[str, str], Any] = {
    ("gemma3n_text", "num_kv_shared_layers"): 15,
    ("gemma3n_text", "hidden_size_per_layer_input"): 256,
    ("embedding_gemma2_text", "hidden_size_per_layer_input"): 512,
    ("gemma4_text", "hidden_size_per_layer_input"): 256,
    ("minicpm3", "scale_depth"): 1.4,
}
_DECAYS = "the decay of linear attention depends on the number of its layer"
# Families in which a layer computes something else under another number, each with the leaf that would store it.
BOUND: Mapping[str, tuple[str, str]] = {
    "diffllama": ("the differential attention of layer i starts from 0.8 - 0.6 exp(-0.3 i)", ""),
    "dory": ("layers are of the input, of the loop or of the output, by their numbers", ""),
    "esmc": ("residuals are divided by the root of the number of layers", ""),
    "evolla": ("adapters stand at layers that depend on the number of layers", ""),
    "hrm_text": ("its layers are run in cycles, by their numbers", ""),
    "idefics": ("cross attention stands before every k-th layer", ""),
    "inkling2_loop_text": ("some layers are run several times, by their numbers", ""),
    **dict.fromkeys(("bailing_moe_linear", "minimax_m1", "minimax_text_01"), (_DECAYS, "")),
    "minimax": (_DECAYS, "slope_rate"),
    "neomme": ("windows and residuals depend on the numbers of layers", ""),
    **dict.fromkeys(("zamba", "zamba2"), ("layers share blocks, one after the other", "")),
}
# Keys that name layers whose outputs other parts of a model read.
_FEATURES = ("vision_feature_layer", "feature_layer", "out_indices", "backbone_out_indices", "extract_layers")
# Numbers that make a period, and those that set the first or the last layers apart, where no schedule reads them.
_PERIOD = re.compile(r"(?:.*_)?(?:period|interval|freq|frequency|step|every\w*|pattern|layer_group_size)")
_ENDS = re.compile(r".*layers?(?:_(?:start|end|index|idx|id))*|(?:first|last)_k_.*")
# Words of keys that count or time something else.
_ELSE = re.compile(
    r"time|audio|frame|mel|hop|ema|stat|delta|inference|symbol|cache|rope|base|sample|train|save|log|eval|max_|min_|rescale"
    r"|adapter|decoder|encoder|feat|conv|lstm|residual|pool|proj|vision|text|speech|nextn|mtp|fusion|memory|fov|mask"
    r"|perceiver|predict|iou|auxiliary|prior|temporal|spatial|query|cross_modal|link|token|insert|quant|head|num_kv|lqe|num_global|_num_"
)


@dataclass
class Section:
    """One section that counts the layers, while it is adapted."""

    place: tuple[str, ...]  # the keys that lead to it
    part: dict[str, Any]
    said: list[str] = field(default_factory=list)
    # For each old layer, all that the configuration says of it alone.
    kinds: list[list[object]] = field(default_factory=list)
    done: set[str] = field(default_factory=set)  # the keys that follow already

    def set(self, path: Sequence[str], value: Any, says: str = "") -> None:
        part_at(self.part, path[:-1])[path[-1]] = value
        self.done.add(path[-1])
        self.tell(f"{'.'.join(path)}: {says or value}")

    def tell(self, text: str) -> None:
        self.said.append("".join(f"{key}." for key in self.place) + text)

    def note(self, kinds: Sequence[object]) -> None:
        for layer, kind in zip(self.kinds, kinds, strict=True):
            layer.append(kind)


def followed(config: Mapping[str, Any], move: Move) -> tuple[dict[str, Any], list[str]]:
    """A new configuration of the model that a move of layers makes, and what changed.

    >>> config = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    >>> followed(config, Move(("layers",), (0, 1, 1), 2))[1]
    ['num_hidden_layers: 2 -> 3', 'layer_types: 3 entries']
    """
    new: dict[str, Any] = copy.deepcopy(dict(config))
    if new.get("is_encoder_decoder") and side_of(move.where) == "decoder" and new.get("num_layers") == move.n:
        new.setdefault("num_decoder_layers", move.n)  # T5's count of both sides, unless the decoder has its own
    places = sections_of(new, move.n, move.where)
    said: list[str] = []
    for place in places:
        section = Section(place, part_at(new, place), kinds=[[] for _ in range(move.n)])
        kind = kind_at(config, place)
        _count(section, move)
        if not move.trivial:
            _refuse(section.part, kind, move)
            _follow_schedules(section, kind, move)
            _follow_entries(section, move)
            _follow_stages(section, move)
            _refuse_numbers(section, kind, move)
            _refuse_last(section, kind)
        if place != places[-1]:
            said += section.said
        else:
            _tell_features(new, section, move)
            said += section.said
            _follow_names(new, section, move, said)
            check_places(move, section.kinds)
    for name, value in (move.given or {}).items():
        *above, key = name.split(".")
        above = above or list(places[-1] if places else ())
        try:
            part = part_at(new, above)
            part[key] = value
        except (KeyError, TypeError):
            why = f"config={name!r}: the configuration has no part {'.'.join(above)!r}"
            raise BadArgument(why, hint=f"config={{{key!r}: ...}}") from None
        said.append(f"{'.'.join((*above, key))}: {value}, as given")
    return new, said


def _count(section: Section, move: Move) -> None:
    part, n = section.part, move.n
    for name in counts_of(part, move.where):
        if part.get(name) == n and not move.holds(section.place, name):
            part[name] = len(move.sources)
            if n != len(move.sources):
                section.tell(f"{name}: {n} -> {len(move.sources)}")


def _refuse(part: Mapping[str, Any], kind: str, move: Move) -> None:
    """Refuse what depends on the numbers of layers in a way that no configuration can say otherwise."""
    for name, why in SCALED.items():
        value = part.get(name, _DEFAULTS.get((kind, name)))
        if value and not move.holds((), name):
            raise Unsupported(
                f"the configuration has {name}={value!r}: {why}, so a layer would compute something else in another "
                "position",
                hint=f"if the model does not use {name}, turn it off in the configuration",
            )
    pair = part.get("qkv_multipliers")
    if isinstance(pair, list) and len(pair) == 2 and pair[0] != pair[1] and not move.holds((), "qkv_multipliers"):
        said = f"the configuration has qkv_multipliers={pair}: widths of layers are interpolated by their numbers"
        raise Unsupported(said, hint='config={"qkv_multipliers": [...]}, with one for each layer of the outcome')
    why, leaf = BOUND.get(kind, ("", ""))
    held = leaf and any(leaf in path for layer in move.leaves or () for path in layer)
    if why and not held and move.given is None:
        said = f"{kind}: {why}, so a layer would compute something else in another position"
        raise Unsupported(said, hint="config={} moves the layers all the same")


def _cannot(what: str, says: str, value: Any) -> Unsupported:
    return Unsupported(
        f"the configuration says {what}, which tells the kinds of layers by their numbers, and {says}",
        hint=f"an order that keeps the kinds in their places, or config={value!r}, the value in the outcome",
    )


def _follow_schedules(section: Section, kind: str, move: Move) -> None:
    _follow_sparse(section, move)
    _follow_attention_types(section, move)
    part, n = section.part, move.n
    for schedule in schedules_of(part, kind, side_of(move.where)):
        keys = [name for names in schedule.numbers for name in names.split("|")]
        old = schedule.kinds(part, n)
        if old is None:
            continue
        section.note(old)
        if any(move.holds(section.place, key) for key in (*keys, schedule.written) if key):
            continue
        new = [old[source] for source in move.sources]
        numbers = schedule.solved(part, new, move.sources)
        if numbers is not None:
            for key, value in numbers.items():
                section.set((key,), value, f"{part.get(key)} -> {value}")
        elif schedule.written:
            _write_out(section, schedule, new)
        else:
            told = ", ".join(f"{k}={v!r}" for k, v in zip(schedule.numbers, schedule.values(part), strict=True))
            says = "no numbers give the layers of the outcome their kinds"
            raise _cannot(told, says, dict(zip(schedule.numbers, schedule.values(part), strict=True)))


def _write_out(section: Section, schedule: Schedule, kinds: Sequence[Any]) -> None:
    if schedule.numbered:
        section.set((schedule.written,), [layer for layer, kind in enumerate(kinds) if kind])
    else:
        section.set((schedule.written,), list(kinds), f"{len(kinds)} entries, written out")


def _follow_sparse(section: Section, move: Move) -> None:
    """Replace the interval at which layers have experts by the list of layers without experts."""
    part, n = section.part, move.n
    step = part.get("decoder_sparse_step")
    if not isinstance(step, int) or step <= 1 or part.get("is_encoder_decoder"):
        return
    if move.holds(section.place, "decoder_sparse_step"):
        return
    dense = [bool((layer + 1) % step) or layer in (part.get("mlp_only_layers") or ()) for layer in range(n)]
    section.note(dense)
    part["mlp_only_layers"] = [layer for layer in range(n) if dense[layer]]
    section.set(("decoder_sparse_step",), 1, f"{step} -> 1, mlp_only_layers written out")


def _follow_attention_types(section: Section, move: Move) -> None:
    """Write out kinds that are told as `[[["global", "local"], 12]]`, as GPT-Neo does."""
    told = section.part.get("attention_types")
    if not isinstance(told, list) or not all(isinstance(one, list) and len(one) == 2 for one in told):
        return
    kinds = [kind for kinds, times in told for _ in range(times) for kind in kinds]
    if len(kinds) == move.n:
        section.note(kinds)
        section.set(("attention_types",), [[[kinds[source] for source in move.sources], 1]], "written out")


def _follow_entries(section: Section, move: Move) -> None:
    n, done = move.n, section.done | set(move.given or ())
    for path, how in list(entries(section.part, n, move.blocks)):
        value = part_at(section.part, path)
        name = path[-1]
        if move.holds(section.place, ".".join(path)) or name in done:
            continue
        if how == "unknown":
            raise Unsupported(
                f"the configuration has {'.'.join(path)} with {n} entries, as many as there are layers, and it is not "
                "known whether each is for one layer",
                hint=f"config={{'{'.'.join((*section.place, *path))}': [...]}}, its value in the outcome",
            )
        said = [entry_of(value, how, layer) for layer in range(n)]
        section.note([repr(one) if isinstance(one, list | dict) else one for one in said])
        if name == "kv_source_layers" and list(value) != list(range(n)):
            raise _cannot(f"{name}={value}", "layers read the cache of others", {name: [...]})
        try:
            new = moved(value, how, move.sources, n)
        except IndexError:
            key = ".".join((*section.place, *path))
            why = f"the configuration says {key}: {value}, and the outcome has not all of these layers"
            raise Unsupported(why, hint=f"config={{{key!r}: [...]}}, the layers that are read in the outcome") from None
        if name == "kv_source_layers":
            new = list(range(len(move.sources)))
        if new != value:
            whole = how in ("list", "cycle")
            section.set(path, new, f"{len(new)} entries" if whole else str(new))


def _follow_stages(section: Section, move: Move) -> None:
    """The layers of a backbone as stages: `stage1` to `stage12`, some of which others read. The last one stays last."""
    part, n, m = section.part, move.n, len(move.sources)
    names = part.get("stage_names")
    if not isinstance(names, list) or names != ["stem", *(f"stage{layer + 1}" for layer in range(n))]:
        return
    part["stage_names"] = ["stem", *(f"stage{layer + 1}" for layer in range(m))]
    section.done.add("stage_names")
    last = {source: target for target, source in enumerate(move.sources)} | {n - 1: m - 1}
    for key, read in (("out_features", "stage{}".format), ("out_indices", int)):
        old = part.get(key)
        if not isinstance(old, list) or move.holds(section.place, key):
            continue
        new = [stage if stage in ("stem", 0) else read(last.get(_stage(stage) - 1, -2) + 1) for stage in old]
        if any(_stage(stage) < 0 for stage in new):
            why = f"the configuration says {key}: {old}, and the outcome has not all of these layers"
            raise Unsupported(why, hint=f"config={{{key!r}: {old[-1:]}}}, the layers that are read in the outcome")
        if new != old:
            section.set((key,), new)


def _stage(stage: Any) -> int:
    return int(str(stage).removeprefix("stage").replace("stem", "0"))


def _follow_names(config: dict[str, Any], section: Section, move: Move, said: list[str]) -> None:
    """Names of modules in quantised layers, and those of the blocks after them, follow."""
    names = move.names()
    for holder, prefix in ((config, ""), *([(section.part, ".".join((*section.place, "")))] if section.place else [])):
        for key in [key for key in NAMING if key in holder and not move.holds((), key)]:
            told = list(names.told(holder[key]))
            grouped = [text for text in told if names.groups.search(text)]
            if grouped and not move.trivial:
                raise Unsupported(
                    f"{prefix}{key} names layers by {grouped[0]!r}, and it is not known which of them these are",
                    hint=f'config={{"{prefix}{key}": {{...}}}}, its value in the outcome, with each layer named',
                )
            about: dict[int, list[str]] = {}
            for text in told:
                number = names.number(text)
                if number is not None:
                    about.setdefault(number - move.first, []).append(re.sub(r"\d+", "", text, count=1))
            if about and section.kinds:
                section.note([tuple(about.get(layer, ())) for layer in range(move.n)])
            new = names.moved(holder[key])
            if new != holder[key]:
                holder[key] = new
                said.append(f"{prefix}{key}: names of layers follow")


def renamed(told: Mapping[str, Any], move: Move) -> dict[str, Any]:
    """A file beside the configuration, in which names of modules, and `layers_to_transform`, follow the layers.

    >>> renamed({"layers_to_transform": [1], "rank_pattern": {"layers.1.q": 4}}, Move(("layers",), (0, 1, 1), 2))
    {'layers_to_transform': [1, 2], 'rank_pattern': {'layers.1.q': 4, 'layers.2.q': 4}}
    """
    names = move.names()
    new: dict[str, Any] = names.moved(told)
    chosen = new.get("layers_to_transform")
    if chosen is not None:
        listed = chosen if isinstance(chosen, list) else [chosen]
        new["layers_to_transform"] = sorted({to for number in listed for to in names.to.get(number, [number])})
    return new


def _tell_features(config: Mapping[str, Any], section: Section, move: Move) -> None:
    """Tell of numbers of layers whose outputs other parts of the model read: which they should be is not known."""
    sense = senses(move.where)
    held = {**section.part, **(config if section.place and sense else {})}
    told = [key for key in _FEATURES if held.get(key) and key not in section.done and not move.holds((), key)]
    for key in told if not move.trivial else ():
        section.tell(f"{key}: {held[key]}, not changed: other parts read the outputs of these layers")


def _refuse_numbers(section: Section, kind: str, move: Move) -> None:
    """Refuse numbers that may tell kinds of layers in a family that is not known, if the order would change these."""
    if kind in SCHEDULES or f"{kind}_text" in SCHEDULES:
        return
    n, m = move.n, len(move.sources)
    for key, value in section.part.items():
        known = key in _COUNTS or key in section.done or move.holds(section.place, key)
        kind_of = None if known else _told(key, value, n)
        if kind_of is None:
            continue
        before = [kind_of(layer, n) for layer in range(n)]
        section.note(before)
        if [before[source] for source in move.sources] != [kind_of(layer, m) for layer in range(m)]:
            raise _cannot(f"{key}={value!r}", "layers move to places of another kind", {key: value})


_COUNTS = {*COUNTS, *SIDES["encoder"], *SIDES["decoder"], *BLOCKS, *COMMON, "num_single_layers", "decoder_sparse_step"}


def _told(key: str, value: Any, n: int) -> Callable[[int, int], int] | None:
    """What a key may tell of a layer by its number and the number of layers; None if it tells nothing."""
    period = _period(key, value, n)
    if period:
        return lambda layer, count: layer % period
    if type(value) is not int or not 0 < value < n or not _ENDS.fullmatch(key) or _ELSE.search(key):
        return None
    if re.search("last|final|trailing", key):
        return lambda layer, count: count - layer <= value
    return lambda layer, count: layer < value


def _refuse_last(section: Section, kind: str) -> None:
    types = section.part.get("layer_types")
    if kind in LAST_FULL and types and types[-1] != FULL:
        why = f"the last layer of the outcome would be of {types[-1]}, and {kind} makes the last one full_attention"
        raise Unsupported(why, hint="an order that ends with a layer of full attention")


def _period(key: str, value: Any, n: int) -> int:
    """The period that a key may tell; 0 if it tells none."""
    if not _PERIOD.fullmatch(key) or _ELSE.search(key) or key in OTHERS or key in LISTS or key in CYCLES:
        return 0
    if type(value) is int:
        return value if 1 < value <= n else 0
    return len(value) if isinstance(value, str | list) and 1 < len(value) < n else 0
