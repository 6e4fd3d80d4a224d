"""Sections: which part of a configuration counts the layers at a path of a model, and under which keys."""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from paramend.disk.urls import unanswered
from paramend.errors import BadCheckpoint
from paramend.formats.jsontext import CONFIG
from paramend.leaves.nested import is_deep
from paramend.reports import wording

# Keys that count layers. If a section has several, all are changed.
COUNTS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers", "depth", "num_blocks"),
    *("num_layers_per_stack", "block_count"),
)
# The same for models with an encoder and a decoder.
SIDES: Mapping[str, tuple[str, ...]] = {
    "encoder": ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
# Keys that count the blocks that predict further tokens. They are numbered after the last layer.
BLOCKS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers", "mtp_num_hidden_layers", "num_mtp_modules")
# Names above such blocks, where they are numbered apart.
MTP = ("mtp", "mtp_layers", "mtp_block")
# Words in the paths of parts of a multimodal model that are not its text model.
SENSES = ("vision", "visual", "image", "audio", "speech", "vit")
# A configuration is a few kilobytes; larger files are none.
_MOST = 1 << 24
_TEXT = ("text", "llm", "language", "thinker", "decoder")


def parsed(text: bytes, file: Path) -> dict[str, Any]:
    """A configuration, read from its text; `BadCheckpoint` if it is damaged."""
    try:
        config = json.loads(text.removeprefix(BOM_UTF8).decode())
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{file} is not JSON: {error}", hint=f"python -m json.tool {file}") from None
    if is_deep(config):
        raise BadCheckpoint(f"{file}: brackets are nested too deeply")
    if not isinstance(config, dict):
        raise BadCheckpoint(f"{file} holds {wording.described(config)}, not an object")
    return config


def beside(path: Path, name: str = CONFIG) -> Path:
    """The file of this name beside a checkpoint, which is a directory or a file in one."""
    return (path if path.is_dir() else path.parent) / name


def config_beside(path: Path, name: str = CONFIG) -> dict[str, Any]:
    """The configuration beside the weights; {} if there is none, or a damaged one: whoever needs it reports that."""
    file = beside(path, name)
    try:
        return parsed(file.read_bytes(), file) if file.stat().st_size <= _MOST else {}
    except (OSError, BadCheckpoint) as error:
        if unanswered(error):
            raise
        return {}


def sections_of(config: Mapping[str, Any], n: int, where: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """Where a configuration counts n layers: () for itself, ("text_config",) for a part; empty if nowhere.

    There may be several: some configurations repeat what their text model counts. The path of the layers in the model,
    `where`, selects one of several parts.

    >>> sections_of({"vision_config": {"num_hidden_layers": 2}, "text_config": {"num_hidden_layers": 4}}, 4)
    [('text_config',)]
    """
    path = "/".join(where)
    sense = senses(where)
    counting = (place for place, part in parts_in(config) if n in map(part.get, counts_of(part, where)))
    found = [place for place in counting if not (sense and place[:1] == ("text_config",))]
    if len(found) < 2:
        return found
    named = [place for place in found if place and any(word in path for word in _words(place))]
    if not named and not sense and where:
        named = [place for place in found if not senses(place)]
    if named and not senses(named[0]):
        named = [place for place in found if not place or place in named]
    return named if len([place for place in named if place]) < 2 else []


def _words(place: Sequence[str]) -> tuple[str, ...]:
    """The words in paths of models that correspond to a part of the configuration."""
    name = place[0].removesuffix("_config")
    return SENSES[:2] if name == "vision" else _TEXT[:3] if name in _TEXT[:3] else (name,)


def counts_of(part: Mapping[str, Any], where: Sequence[str]) -> tuple[str, ...]:
    """The keys that count the layers at a path."""
    if any("single" in piece for piece in where) and "num_single_layers" in part:  # diffusion models have both kinds
        return ("num_single_layers",)
    if not part.get("is_encoder_decoder"):
        return (*COUNTS, *SIDES["encoder"][:2], *SIDES["decoder"])
    side = side_of(where)
    return SIDES[side] if side else (*SIDES["encoder"], *SIDES["decoder"])


def side_of(where: Sequence[str]) -> str:
    """The side of a model with an encoder and a decoder that a path leads to; "" if it says none."""
    return next((side for side in ("decoder", "encoder") if side in where), "")


def part_at(config: Mapping[str, Any], place: Sequence[str]) -> Any:
    """The section at a place."""
    part: Any = config
    for key in place:
        part = part[key]
    return part


def kind_at(config: Mapping[str, Any], place: Sequence[str]) -> str:
    """The model type of a section; "" for a part that sees or hears under the name of the whole model."""
    own, whole = part_at(config, place).get("model_type"), config.get("model_type")
    if senses(place):
        return str(own or "") if own != whole else ""
    return str(own or whole or "")


def model_type(config: Mapping[str, Any], n: int, where: Sequence[str] = ()) -> str | None:
    """The model type of the section that counts n layers."""
    places = sections_of(config, n, where)
    part = part_at(config, places[-1] if places else ())
    found = part.get("model_type") or config.get("model_type")
    return found if isinstance(found, str) else None


def counted(config: Any) -> Iterator[tuple[int, int]]:
    """How many layers each section counts, and how many blocks after the last one predict further tokens."""
    for _, part in parts_in(config):
        blocks = max((part[key] for key in BLOCKS if type(part.get(key)) is int), default=0)
        if blocks > 0:
            yield from ((part[key], blocks) for key in COUNTS if type(part.get(key)) is int)


def parts_in(config: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """A configuration and all maps in it, outer ones first, each with the keys that lead to it."""
    if isinstance(config, Mapping):
        yield above, config
        for key, part in config.items():
            yield from parts_in(part, (*above, key))


def senses(place: Sequence[str]) -> bool:
    """Whether keys or pieces of a path lead into a part that sees or hears."""
    return any(word in key for key in place for word in SENSES)


def enter(config: Any, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Write what changed into the configuration of a model."""
    for key, value in new.items():
        if key in old and old[key] == value:
            continue
        if isinstance(value, dict) and hasattr(getattr(config, key, None), "to_dict"):
            enter(getattr(config, key), old[key], value)
        else:
            setattr(config, key, value)
