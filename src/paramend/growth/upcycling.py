"""Upcycling: dense models as mixtures of experts, each a copy of what was dense (arXiv:2212.05055, 2502.19261)."""

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from paramend.arrays.initializers import NOWHERE, Site, generator, normal
from paramend.arrays.registry import backend, to_numpy
from paramend.edits import hands
from paramend.edits.moves import whole_numbers
from paramend.errors import BadArgument, Quantized, SpecMismatch, Unsupported
from paramend.formats.jsontext import CONFIG
from paramend.growth.configured import Configured
from paramend.growth.experts import ExpertsReport
from paramend.leaves.groups import groups_of
from paramend.leaves.leaves import Group, plain
from paramend.leaves.origins.boxes import Box, shape_of
from paramend.leaves.origins.moved import join, take
from paramend.leaves.origins.origin import Given, Origin
from paramend.leaves.origins.stored import Held
from paramend.leaves.specs import AnyArray, Array, Spec, numpy_dtype
from paramend.reports import wording

T = TypeVar("T")
_ROLES = ("gate_proj", "up_proj", "down_proj")


class _Family(NamedTuple):
    """How a dense family becomes one of mixtures."""

    kind: str  # its new model type
    stems: tuple[str, str]  # what the names of its classes begin with, and what those of the mixtures do
    module: str  # the module of a mixture in published checkpoints
    names: tuple[str, ...]  # the projections of an expert there: gate, up, down
    defaults: Mapping[str, Any]  # what the dense family takes for granted, and the mixtures otherwise
    # What the configuration of the mixtures says too; "I" stands for the hidden units of an expert.
    says: Mapping[str, Any]
    counts: str = "num_experts"  # the key that counts experts


_W = ("w1", "w3", "w2")
_LLAMA = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}
_QWEN = {"moe_intermediate_size": "I", "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
_SHARED = {"shared_expert_intermediate_size": "I"}
_MIXTRAL = partial(_Family, "mixtral", module="block_sparse_moe", names=_W, says={}, counts="num_local_experts")
_FAMILIES = {
    "llama": _MIXTRAL(("Llama", "Mixtral"), defaults=_LLAMA | {"max_position_embeddings": 2048}),
    "mistral": _MIXTRAL(("Mistral", "Mixtral"), defaults=_LLAMA | {"sliding_window": 4096}),
    "qwen2": _Family("qwen2_moe", ("Qwen2", "Qwen2Moe"), "mlp", _ROLES, {}, _QWEN | _SHARED),
    "qwen3": _Family("qwen3_moe", ("Qwen3", "Qwen3Moe"), "mlp", _ROLES, {"head_dim": 128}, _QWEN),
}


def upcycle(
    model: T, *, experts: int, top_k: int, router: str | AnyArray = "random", drop: float = 0.0, seed: int = 0
) -> tuple[T, ExpertsReport]:
    """A dense model as a mixture of experts, and the report.

    Each layer gets so many copies of its MLP, and a router. Weights of the experts of a token sum to one, so that the
    model computes what it did, whatever the router chooses. Llama and Mistral become Mixtral, Qwen2 becomes Qwen2-MoE,
    with a shared expert that contributes nothing at first, Qwen3 becomes Qwen3-MoE.

    Args:
        model: a checkpoint from `pm.open`, of which nothing is written before `.save(out)`; or a module of
            transformers, for which one of the other class is made.
        experts: how many experts each layer has.
        top_k: how many of them a token goes to.
        router: "random", normal values with the `initializer_range` of the configuration; or the weight of all routers,
            an array of shape (experts, hidden).
        drop: the share of hidden units that are drawn anew in each expert, with mean and deviation of what they
            replace: rows of gate and up and columns of down, the same units in all three. The model then computes
            something else; without it, copies are alike, and the router gets no gradient.
        seed: of all that is drawn, which depends on it and on paths alone.

    Raises:
        BadArgument: the model has no configuration, or a number does not fit.
        Unsupported: no family of mixtures is known for it, or it has leaves that a mixture has no place for.
        Quantized: its weights are quantised.
        SpecMismatch: the router has another shape.

    >>> pm.upcycle({"w": np.ones(2)}, experts=4, top_k=2)
    Traceback (most recent call last):
    paramend.errors.BadArgument: a model becomes a mixture with its configuration, and this one has none
    <BLANKLINE>
    hint: pm.upcycle(pm.open("model/"), experts=8, top_k=2)
    """
    configured = Configured(model)
    if not configured.config:
        why = "a model becomes a mixture with its configuration, and this one has none"
        raise BadArgument(why, hint='pm.upcycle(pm.open("model/"), experts=8, top_k=2)')
    if not (type(experts) is type(top_k) is int and 1 <= top_k <= experts):
        raise BadArgument(f"top_k={top_k!r} of experts={experts!r} cannot be chosen", hint="experts=8, top_k=2")
    if not (isinstance(drop, int | float) and 0 <= drop <= 1):
        raise BadArgument(f"drop={drop!r} is no share", hint="drop=0.5")
    whole_numbers([seed], "seed, in a list:", "seed=0")
    generator(seed, NOWHERE)
    work = _Upcycling(configured, configured.config, experts, router, drop, seed)
    family, config = work.family, work.followed(top_k)
    kind = type(model).__name__
    if kind.startswith(family.stems[0]):
        kind = family.stems[1] + kind.removeprefix(family.stems[0])
    new, said = configured.remade(work.groups(), lambda file, values: config if file == CONFIG else values, kind)
    if not work.redrawn:
        said.append("the experts are alike, and the router gets no gradient: drop=0.5 sets them apart")
    layers = {f"{path}.{family.module}": (0,) * experts for path in work.layers}
    return cast(T, new), ExpertsReport("upcycle", 0, experts, layers, work.redrawn, tuple(said))


class _Upcycling:
    """One upcycling: what there is, checked, and what is made of it. `layers` is path of a layer → its MLP by role."""

    def __init__(self, model: Configured, config: dict[str, Any], count: int, router: Any, drop: float, seed: int):
        self.model, self.config, self.count, self.seed = model, config, count, seed
        kind = config.get("model_type")
        if kind not in _FAMILIES:
            known = wording.listing([f"{name} ({row.kind})" for name, row in _FAMILIES.items()])
            raise Unsupported(f"it is not known what mixture a {kind!r} model becomes; known are {known}")
        self.family = _FAMILIES[kind]
        if groups := groups_of(model.leaves):
            path, scheme = model.leaves.index.path(groups[0].numbers[0]), groups[0].scheme.name
            hint = "model, _ = pm.dequantize(model)"
            raise Quantized(f"{path} is part of a quantised weight ({scheme})", scheme=scheme, payload=path, hint=hint)
        self.layers = self._found()
        self.inner, self.hidden = model.leaves.spec(next(iter(self.layers.values()))[0]).shape
        self.redrawn = round(drop * self.inner)
        self.router = None if isinstance(router, str) else to_numpy(router)
        if self.router is None and router != "random":
            raise BadArgument(f"router={router!r} is neither 'random' nor an array", hint='router="random"')
        wanted = count, self.hidden
        if self.router is not None and self.router.shape != wanted:
            needs = f"{count} experts of {self.hidden} inputs need {wanted}"
            raise SpecMismatch(f"router has the shape {self.router.shape}, and {needs}")

    def _found(self) -> dict[str, tuple[int, ...]]:
        index = self.model.leaves.index
        found: dict[str, dict[str, int]] = {}
        for number in index.numbers:
            path, pieces = index.paths[number], index.pieces(number)
            biased = self.family.kind == "mixtral" and pieces[-1] == "bias" and "layers" in pieces
            if biased or ("mlp" in pieces and pieces[-3:] not in {("mlp", role, "weight") for role in _ROLES}):
                raise Unsupported(f"a layer of {self.family.kind} has no place for {index.path(number)}")
            if "mlp" in pieces:
                found.setdefault(plain(path[:-3], index.separator), {})[pieces[-2]] = number
        wrong = next((path for path, roles in found.items() if len(roles) < len(_ROLES)), None)
        if wrong or not found or len(found) != self.config.get("num_hidden_layers", len(found)):
            raise Unsupported(f"{wrong or 'the model'} has not all of {wording.listing(_ROLES)} in each layer")
        return {path: tuple(roles[role] for role in _ROLES) for path, roles in found.items()}

    def followed(self, top_k: int) -> dict[str, Any]:
        config, family = dict(self.config), self.family
        theta = config.get("rope_theta", (config.get("rope_parameters") or {}).get("rope_theta"))
        defaults = {key: value for key, value in family.defaults.items() if key != "rope_theta" or theta is None}
        new = {**defaults, "intermediate_size": self.inner, "hidden_size": self.hidden, **config}
        new |= {"model_type": family.kind, family.counts: self.count, "num_experts_per_tok": top_k}
        new["num_key_value_heads"] = config.get("num_key_value_heads") or config.get("num_attention_heads")
        new |= {key: self.inner if value == "I" else value for key, value in family.says.items()}
        if config.get("architectures"):
            old, now = family.stems
            new["architectures"] = [now + each.removeprefix(old) for each in config["architectures"]]
        if family.kind == "qwen3_moe":
            new["use_sliding_window"] = _slides(config)
        return new

    def groups(self) -> list[Group]:
        """What becomes of the leaves. Files have the names of published mixtures, modules those of transformers."""
        if self.model.on_disk:
            module = f"{self.family.module}.experts"
            names = [f"{module}.{n}.{name}.weight" for n in range(self.count) for name in self.family.names]
        else:
            names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        names.insert(0, f"{self.family.module if self.model.on_disk else 'mlp'}.gate.weight")
        if self._shared:
            names += [f"mlp.shared_expert.{role}.weight" for role in _ROLES] + ["mlp.shared_expert_gate.weight"]
        return [
            Group(dense, tuple([(f"{path}.{name}", None)] for name in names), partial(self._made, path))
            for path, dense in self.layers.items()
        ]

    @property
    def _shared(self) -> bool:
        """Whether there is an expert for every token, which contributes nothing at first."""
        return _SHARED.items() <= self.family.says.items()

    def _made(self, path: str, values: Sequence[Any]) -> list[Any]:
        gate, up, down = values
        experts = [self._expert(path, number, values) for number in range(self.count)]
        made = [self._routing(path, gate)]
        if self.model.on_disk:
            made += [each for expert in experts for each in expert]
        else:
            made.append(hands.join([hands.join(expert[:2], 0, "concat") for expert in experts], 0, "stack"))
            made.append(hands.join([expert[2] for expert in experts], 0, "stack"))
        if self._shared:
            made += [gate, up, hands.zeros(down), hands.zeros(hands.take(gate, np.arange(1), 0))]
        return made

    def _routing(self, path: str, like: Any) -> Any:
        spec = Spec((self.count, self.hidden), hands.spec_of(like).dtype)
        if self.router is not None:
            found: Origin = Held(self.router.astype(numpy_dtype(spec.dtype)))
        else:
            found = _Drawn(spec, self.config.get("initializer_range") or 0.02, self.seed, (path, "router"))
        return found if isinstance(like, Origin) else backend(like).beside(found.read(), like)

    def _expert(self, path: str, number: int, values: Sequence[Any]) -> list[Any]:
        """The projections of an expert: those of the layer, with some hidden units drawn anew."""
        if not self.redrawn:
            return list(values)
        site = path, "experts", str(number)
        units = np.sort(generator(self.seed, Site(site)).permutation(self.inner)[: self.redrawn])
        rows = zip(values, _ROLES, (0, 0, 1), strict=True)
        return [_redrawn(value, units, axis, self.seed, (*site, role)) for value, role, axis in rows]


def _slides(config: Mapping[str, Any]) -> bool:
    """Whether all layers have a sliding window; `Unsupported` if some do."""
    count, first = config["num_hidden_layers"], config.get("max_window_layers", 28)
    kinds = config.get("layer_types") or ["sliding_attention" if n >= first else "" for n in range(count)]
    sliding = [kind == "sliding_attention" and bool(config.get("use_sliding_window")) for kind in kinds]
    if any(sliding) and not all(sliding):
        raise Unsupported("some layers have a sliding window, and in qwen3_moe all have one, or none")
    return all(sliding)


def _redrawn(x: Any, units: Array, axis: int, seed: int, site: tuple[str, ...]) -> Any:
    """A matrix with some places along an axis drawn anew."""
    if not isinstance(x, Origin):
        return backend(x).like(_redrawn(Held(to_numpy(x)), units, axis, seed, site).read(), x)
    old = take(x, units, axis)
    length = x.spec.shape[axis]
    places = np.arange(length)
    places[units] = length + np.arange(len(units))
    return take(join([x, _Drawn(old.spec, old, seed, site)], axis, "concat"), places, axis)


class _Drawn(Given):
    """Normal values. `scale` is their deviation, or an origin whose mean and deviation they have.

    Each block of rows has numbers of its own, so that any can be read without the others.
    """

    moves = False
    says = "random values"
    _last: tuple[int, Array] | None = None

    def __init__(self, spec: Spec, scale: float | Origin, seed: int, site: tuple[str, ...]) -> None:
        self._spec, self._scale, self._seed, self._site = spec, scale, seed, site
        self._rows = max((1 << 16) // max(spec.shape[1], 1), 1)

    @cached_property
    def _moments(self) -> tuple[float, float]:
        if not isinstance(self._scale, Origin):
            return 0.0, self._scale
        total = squares = 0.0
        for start, stop in self._scale.ranges():
            part = self._scale.read_range(start, stop).astype(np.float64)
            total, squares = total + float(part.sum()), squares + float(part @ part)
        mean = total / self.spec.size
        return mean, max(squares / self.spec.size - mean * mean, 0.0) ** 0.5

    def _block(self, number: int) -> Array:
        if self._last is None or self._last[0] != number:
            rows = min(self._rows, self.spec.shape[0] - number * self._rows)
            stream = generator(self._seed, Site((*self._site, str(number))))
            mean, deviation = self._moments
            values = normal(stream, (rows, self.spec.shape[1]), self.spec.dtype) * deviation + mean
            self._last = number, values.astype(numpy_dtype(self.spec.dtype))
        return self._last[1]

    def read_box(self, box: Box) -> Array:
        rows, columns = (np.asarray(places, np.int64) for places in box)
        found = np.empty(shape_of(box), numpy_dtype(self.spec.dtype))
        for number in np.unique(rows // self._rows).tolist():
            here = rows // self._rows == number
            found[here] = self._block(number)[np.ix_(rows[here] - number * self._rows, columns)]
        return found
