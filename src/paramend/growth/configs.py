"""Configurations: the number and the kinds of layers in them are adapted to an order of layers."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paramend.errors import Unsupported
from paramend.growth.depth import Order

# Keys that count layers. If a configuration has several, all are changed.
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# The same for models with an encoder and a decoder.
_SIDES = {
    "encoder": ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
# Lists with one entry for each layer.
LISTS = ("layer_types", "no_rope_layers", "mlp_layer_types", "layers_block_type", "attention_types", "sparse_layers")
# Lists of the numbers of special layers.
NUMBERS = ("mlp_only_layers", "moe_layers", "full_attention_layers", "attn_layer_indices")

# Keys that scale layers by their number or by the number of layers: a copy would get another scale than its source.
SCALED: Mapping[str, str] = {
    "scale_attn_by_inverse_layer_idx": "the scores of layer i are divided by i + 1",
    "use_deepnorm": "residuals are scaled by the number of layers",
    "deepnorm": "residuals are scaled by the number of layers",
    "scale_depth": "residuals are divided by the root of the number of layers",
    "layernorm_scaling": "the norm of layer i is divided by the root of i",
    "layer_norm_scaling": "the norm of layer i is divided by the root of i",
    "depth_scaled_init": "residuals are scaled by the number of layers",
    "use_mup": "scales depend on the number of layers",
    "first_k_dense_replace": "the first layers are of another kind than the rest",
    "num_kv_shared_layers": "the last layers read the cache of others, counted from the end",
}


def _alternating(config: Mapping[str, Any], n: int) -> list[str]:
    return ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(n)]


def _every(config: Mapping[str, Any], n: int) -> list[str]:
    pattern = int(config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6)
    return ["full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(n)]


def _beyond(config: Mapping[str, Any], n: int) -> list[str] | None:
    if not config.get("use_sliding_window") or not config.get("sliding_window"):
        return None
    first = int(config.get("max_window_layers", 28))
    return ["sliding_attention" if layer >= first else "full_attention" for layer in range(n)]


# The kinds of layers where a configuration leaves them to a rule by number. They are written out, because the rule
# would give other kinds to the layers that move.
_UNWRITTEN: Mapping[str, Callable[[Mapping[str, Any], int], list[str] | None]] = {
    "gemma2": _alternating,
    "gemma3_text": _every,
    "gemma3": _every,
    "qwen2": _beyond,
    "qwen3": _beyond,
    "qwen3_moe": _beyond,
}


def section_of(config: Mapping[str, Any], n: int, where: Sequence[str] = ()) -> tuple[str, ...] | None:
    """Where a configuration counts n layers: () for itself, ("text_config",) for a part, None if nowhere.

    Args:
        config: the configuration.
        n: how many layers.
        where: the path of the layers in the model, which selects one of several parts.

    >>> section_of({"vision_config": {"num_hidden_layers": 2}, "text_config": {"num_hidden_layers": 4}}, 4)
    ('text_config',)
    """
    if any(config.get(name) == n for name in (*COUNTS, *_SIDES["encoder"], *_SIDES["decoder"])):
        return ()
    found = [
        (key, *inner)
        for key, part in config.items()
        if isinstance(part, Mapping) and (inner := section_of(part, n, where)) is not None
    ]
    if len(found) > 1:
        path = "/".join(where)
        found = [place for place in found if any(word in path for word in _words(place[0]))]
    return found[0] if len(found) == 1 else None


def _words(key: str) -> tuple[str, ...]:
    """The words in paths of models that correspond to a part of the configuration."""
    name = key.removesuffix("_config")
    return ("text", "language") if name in ("text", "llm", "language") else (name,)


def model_type(config: Mapping[str, Any], n: int, where: Sequence[str] = ()) -> str | None:
    """The model type of the part of a configuration that counts n layers."""
    part: Any = config
    for key in section_of(config, n, where) or ():
        part = part[key]
    found = part.get("model_type") or config.get("model_type")
    return found if isinstance(found, str) else None


def configured(config: Mapping[str, Any], order: Order, where: Sequence[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """The configuration of the model that an order makes, and a description of the changes.

    Args:
        config: the data of Hugging Face's `config.json`; it is not changed.
        order: the order of the layers.
        where: the path of the layers in the model, which selects one of several counts.

    Returns:
        A new configuration, in which the number of layers, lists with an entry for each layer, and lists of layer
        numbers are adapted. The description is empty if it counts no layers.

    Raises:
        Unsupported: it scales layers by their number.

    >>> config = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    >>> configured(config, Order((0, 1, 1)))[1]
    ['num_hidden_layers: 2 -> 3', 'layer_types: 3 entries']
    """
    new: dict[str, Any] = copy.deepcopy(dict(config))
    place = section_of(new, order.of, where)
    if place is None:
        return new, []
    part = new
    for key in place:
        part = part[key]
    _refuse_scaled(part)
    prefix = "".join(f"{key}." for key in place)
    said: list[str] = []
    n = order.of
    for name in _counts(part, where):
        if part.get(name) == n:
            part[name] = len(order)
            said.append(f"{prefix}{name}: {n} -> {len(order)}")
    rule = _UNWRITTEN.get(str(part.get("model_type")))
    if rule is not None and not part.get("layer_types"):
        written = rule(part, n)
        if written is not None:
            part["layer_types"] = written
    for name, value in list(part.items()):
        listed = name in LISTS or ("layer" in name and name not in NUMBERS)
        if isinstance(value, list) and len(value) == n and listed:
            part[name] = [value[source] for source in order.sources]
            said.append(f"{prefix}{name}: {len(order)} entries")
    for name in NUMBERS:
        value = part.get(name)
        if isinstance(value, list) and value:
            part[name] = [target for target, source in enumerate(order.sources) if source in value]
            said.append(f"{prefix}{name}: {part[name]}")
    _write_sparse(part, order, said, prefix)
    return new, said


def _counts(part: dict[str, Any], where: Sequence[str]) -> Sequence[str]:
    """The keys that count the layers at a path."""
    if not part.get("is_encoder_decoder"):
        return COUNTS
    if "decoder" not in where:
        return _SIDES["encoder"]
    if "num_layers" in part:  # T5's count of both sides, unless the decoder has its own
        part.setdefault("num_decoder_layers", part["num_layers"])
    return _SIDES["decoder"]


def _refuse_scaled(part: Mapping[str, Any]) -> None:
    for name, why in SCALED.items():
        if part.get(name):
            raise Unsupported(
                f"the configuration has {name}={part[name]!r}: {why}, so a layer would compute something else in "
                "another position",
                hint=f"if the model does not use {name}, turn it off in the configuration",
            )


def _write_sparse(part: dict[str, Any], order: Order, said: list[str], prefix: str) -> None:
    """Replace the interval at which layers have experts by the list of layers without experts."""
    step = part.get("decoder_sparse_step")
    if not isinstance(step, int) or step <= 1:
        return
    only = set(part.get("mlp_only_layers") or ())
    # `mlp_only_layers` has been mapped already; the old layers that the step leaves out are dense too.
    dense = {layer for layer in range(order.of) if (layer + 1) % step}
    part["mlp_only_layers"] = sorted(only | {j for j, source in enumerate(order.sources) if source in dense})
    part["decoder_sparse_step"] = 1
    said.append(f"{prefix}decoder_sparse_step: {step} -> 1, mlp_only_layers: {part['mlp_only_layers']}")
