"""Configurations of mergekit, carried out: methods, slices, parameters with filters and gradients, dtypes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from paramend.anatomy.beside import EMBEDDINGS
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.edits.weights import exact
from paramend.errors import BadArgument, BadRecipe, Problem
from paramend.growth import numbered
from paramend.growth.deepening import deepen
from paramend.leaves.origins.origin import Origin
from paramend.leaves.specs import dtype_name
from paramend.mapping.report import LayoutReport
from paramend.merging.merge import Models, check_models, finished, reduced
from paramend.merging.methods import METHODS, settings_of
from paramend.merging.settings import Settings
from paramend.reports import wording

# What mergekit calls methods and parameters that have other names here.
_HOW = {"dare_linear": "dare", "passthrough": "linear"}
_NAMES = {"weight": "weights", "lambda": "scale", "normalize": "divide", "normalize_weights": "divide"}
_EACH = ("weight", "density", "gamma", "epsilon")
_KEYS = {
    "": ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source"),
    "models": ("model", "parameters"),
    "slices": ("sources", "parameters"),
    "sources": ("model", "layer_range", "parameters"),
}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")


@dataclass(frozen=True)
class Slice:
    """Some layers of the result: the models they are made of, with the first of their layers and the parameters for
    each model, and how many they are (0: all of a model, with all else that it has)."""

    models: tuple[str, ...]
    firsts: tuple[int, ...]
    levels: tuple[Mapping[str, Any], ...]
    count: int
    own: Mapping[str, Any]


class Configuration:
    """A configuration of mergekit."""

    def __init__(self, data: Mapping[str, Any], name: str, folder: Path) -> None:
        self.data, self.folder = data, folder
        self.problems: list[Problem] = []
        self.copies = data.get("merge_method") == "passthrough"
        how = _HOW.get(str(data.get("merge_method")), str(data.get("merge_method")))
        if how not in METHODS:
            self._wrong("$.merge_method", f"{how!r} is not supported", wording.listing([*METHODS]))
        self.method = METHODS.get(how, METHODS["linear"])
        self._check("", data, "$")
        self.top = data.get("parameters") or {}
        if bool(data.get("models")) == bool(data.get("slices")):
            self._wrong("$", "one of models and slices is needed", "models: [{model: a}, {model: b}]")
        self.base: str | None = data.get("base_model")
        self.slices = [] if self.problems else list(self._sliced())
        self.dtype = ""
        try:
            self.dtype = dtype_name(data.get("out_dtype") or data.get("dtype") or "float32")
        except BadArgument as error:
            self._wrong("$.dtype", str(error).partition("\n")[0])
        if self.problems:
            raise BadRecipe(name, self.problems)

    def _wrong(self, address: str, message: str, hint: str = "") -> None:
        self.problems.append(Problem(address, message, hint, "unsupported"))

    def _check(self, kind: str, data: Any, address: str) -> None:
        """Note keys that are not known, in all parts."""
        if not isinstance(data, Mapping):
            return self._wrong(address, f"a map of {', '.join(_KEYS[kind])} is needed")
        for key, value in data.items():
            here = f"{address}.{key}"
            if key not in _KEYS[kind]:
                self._wrong(here, f"{key} is not supported")
            elif key == "parameters":
                self._check_parameters(value, here)
            elif key in _KEYS:
                for at, part in enumerate(value if isinstance(value, list) else [value]):
                    self._check(key, part, f"{here}[{at}]")
            elif key in ("model", "base_model") and self._path(value) is None:
                model, adapted, adapter = str(value).partition("+")
                hint = f"hf download {value} --local-dir {model.rpartition('/')[2]}"
                hint = f"paramend fold {model} {adapter} -o OUT, and its path here" if adapted else hint
                self._wrong(here, f"there is no file or folder {value!r}", hint)
        for key in ("model", "sources"):
            if key in _KEYS[kind] and not data.get(key):
                self._wrong(address, f"there is no {key}")
        return None

    def _check_parameters(self, value: Any, address: str) -> None:
        known = {mine: theirs for theirs, mine in _NAMES.items()}
        takes = {known.get(name, name) for name in self.method.takes} - {"seed"} if not self.copies else set()
        takes |= {"normalize", "int8_mask"} if self.method.divides or "scale" in self.method.takes else set()
        takes |= {"rescale"} if self.method.keep in ("random", "ranked") else set()
        takes |= {"normalize_weights"} if self.method.name == "multislerp" else set()
        for key in value if isinstance(value, Mapping) else ():
            if key not in takes - ({"normalize_weights"} if self.method.name != "multislerp" else {"normalize"}):
                self._wrong(f"{address}.{key}", f"{key} is not supported for {self.data.get('merge_method')}")

    def _path(self, model: Any) -> Path | None:
        found = (path for path in (self.folder / str(model), Path(str(model))) if isinstance(model, str))
        return next((path for path in found if path.exists()), None)

    def _sliced(self) -> Iterator[Slice]:
        if self.data.get("models"):
            entries = [(each["model"], each.get("parameters") or {}) for each in self.data["models"]]
            if self.base and self.base not in dict(entries):
                entries.append((self.base, {}))
            names, levels = zip(*entries, strict=True)
            yield Slice(names, (0,) * len(names), levels, 0, {})
        for at, each in enumerate(self.data.get("slices") or ()):
            ranges = [source.get("layer_range") for source in each["sources"]]
            whole = all(isinstance(pair, list) and [*map(type, pair)] == [int, int] for pair in ranges)
            counts = {pair[1] - pair[0] for pair in ranges} if whole else set()
            names = tuple(source["model"] for source in each["sources"])
            if len(counts) != 1 or min(counts) < 1 or len({*names}) < len(names):
                message = "layer_range: [first, end] is needed for each source, of one length, and each model once"
                self._wrong(f"$.slices[{at}].sources", message)
                continue
            levels = tuple(source.get("parameters") or {} for source in each["sources"])
            yield Slice(names, tuple(pair[0] for pair in ranges), levels, counts.pop(), each.get("parameters") or {})

    @cached_property
    def models(self) -> dict[str, Path]:
        """The models, that of which the files beside the weights are taken first."""
        names = dict.fromkeys([*filter(None, [self.base]), *(name for each in self.slices for name in each.models)])
        return {name: path for name in names if (path := self._path(name)) is not None}


def merge_configured(
    data: Mapping[str, Any], name: str, folder: Path, open: Callable[[Path], Checkpoint]
) -> tuple[Checkpoint, Checkpoint, LayoutReport]:
    """The model whose configuration the result takes, the result of a configuration of mergekit, and the report."""
    config = Configuration(data, name, folder)
    opened = {model: open(path) for model, path in config.models.items()}
    first = next(iter(opened.values()))
    _check_tokenizers(config, opened, name)
    trees = {model: _relayered(tree, config.slices, model) for model, tree in opened.items()}
    host, made = next(iter(trees.values())), dict[int, Origin]()
    places = _places(host, config)
    dtype = config.dtype if data.get("dtype") or data.get("out_dtype") else ""
    for at, each in enumerate(config.slices):
        numbers = [number for number, (place, _) in places.items() if place == at]
        names = [model for model in each.models if model != config.base or config.method.base == "refused"]
        names.sort(key=lambda model: config.method.name == "slerp" and model != config.base)
        based = None if config.base is None or config.method.base == "refused" else trees[config.base]
        if config.copies and len(names) == 1 and not dtype:
            made |= _copied(host, trees[names[0]], numbers)
            continue
        check_models(config.method.name, len(names), based=based is not None)
        models = Models(host, [trees[model] for model in names], based)
        found = models.match(only=numbers)
        settings = {n: _settings(config, each, names, host.index.name(n), places[n][1]) for n in numbers}
        made |= reduced(models, found, settings.__getitem__, dtype)
    tree, report = finished(host, made, how=str(data["merge_method"]))
    return first, tree, report


def _relayered(tree: Checkpoint, slices: Sequence[Slice], model: str) -> Checkpoint:
    """A model with as many layers as the result, each the one that goes there; any where none does."""
    order = [
        (each.firsts[each.models.index(model)] + at) if model in each.models else 0
        for each in slices
        for at in range(each.count)
    ]
    try:
        return deepen(tree, order=order, identity=None)[0] if order else tree
    except BadArgument as error:  # a layer that it lacks
        said, hint = str(error).partition("\n")[0], "layer_range: [first, end]"
        raise BadArgument(f"the slices of {model}: {said}", hint=hint) from None


def _places(host: Checkpoint, config: Configuration) -> dict[int, tuple[int, float]]:
    """For each leaf the slice that it is in, and how far in it, from 0 to 1: what is before the layers is in the first,
    what is behind them in the last."""
    index, last = host.index, len(config.slices) - 1
    count = sum(each.count for each in config.slices)
    runs = numbered.find(host, None) if count or _graded(config.data) else []
    starts = [at for at, each in enumerate(config.slices) for _ in range(each.count)]
    found: dict[int, tuple[int, float]] = {}
    for number in index.numbers:
        pieces = index.pieces(number)
        place = numbered.place_in(runs, pieces)
        if place is None:
            early = any(piece in EMBEDDINGS or "embed" in piece for piece in pieces)
            found[number] = (0 if early else last), 0.0
            continue
        layers, layer = place[0].numbers, place[1] - place[0].numbers[0]
        at = starts[layer] if starts else 0
        length = config.slices[at].count or len(layers)
        found[number] = at, (layer - starts.index(at) if starts else layer) / (length - 1) if length > 1 else 1.0
    return found


def _graded(data: Any) -> bool:
    """Whether some parameter differs by the layer."""
    if isinstance(data, Mapping):
        return any(_graded(value) for key, value in data.items() if key != "layer_range")
    return isinstance(data, list) and (
        any(map(_graded, data)) or (len(data) > 1 and not any(isinstance(each, Mapping | str) for each in data))
    )


def _settings(config: Configuration, each: Slice, names: Sequence[str], leaf: str, t: float) -> Settings:
    """The settings of a leaf, a share t through its slice."""
    given: dict[str, Any] = {"how": config.method.name, "convention": "mergekit"}
    levels = dict(zip(each.models, each.levels, strict=True))
    for name in dict.fromkeys(key for level in (config.top, each.own, *each.levels) for key in level):
        if name == "int8_mask":  # how mergekit holds its masks
            continue
        mine = [_value(name, (levels[model], each.own, config.top), leaf, t) for model in names]
        shared = _value(name, (each.own, config.top), leaf, t)
        if name in _EACH and None in mine:
            raise BadArgument(f"{leaf}: there is no {name} for {names[mine.index(None)]}")
        given[_NAMES.get(name, name)] = mine if name in _EACH else shared
    return settings_of(given, len(names))


def _value(name: str, levels: Sequence[Mapping[str, Any]], leaf: str, t: float) -> Any:
    return next((found for level in levels if (found := _evaluated(level.get(name), leaf, t)) is not None), None)


def _evaluated(setting: Any, leaf: str, t: float) -> Any:
    """A parameter: a number, numbers from the first layer to the last, or one of these for names that hold a text."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if setting and all(isinstance(each, Mapping) for each in setting):
        fits = (each["value"] for each in setting if each.get("filter") in (None, "*") or str(each["filter"]) in leaf)
        return _evaluated(next(fits, None), leaf, t)
    place = t * (len(setting) - 1)
    low = int(place)
    high = min(low + 1, len(setting) - 1)
    return (1 - (place - low)) * setting[low] + (place - low) * setting[high]


def _copied(host: Checkpoint, tree: Checkpoint, numbers: Sequence[int]) -> dict[int, Origin]:
    """The leaves of another model in the place of those of the host."""
    known = {tree.index.pieces(number): number for number in tree.index.numbers}
    lacking = [host.index.path(number) for number in numbers if host.index.pieces(number) not in known]
    if lacking:
        raise BadArgument(f"{wording.listing(lacking, 4)} are not in {tree.path}")
    return {n: exact(tree, known[host.index.pieces(n)]) for n in numbers} if tree is not host else {}


def _check_tokenizers(config: Configuration, opened: Mapping[str, Checkpoint], name: str) -> None:
    """Raise if the result would need another tokenizer than that which is copied with the first model."""
    source = config.data.get("tokenizer_source")
    wanted = [*opened] if source == "union" else [config.base] if source == "base" else [source] if source else []
    first, *_ = opened
    for model in map(str, wanted):
        if model not in opened or _tokenizer(opened[model]) != _tokenizer(opened[first]):
            message = f"the tokenizer is copied from {first}, and {source!r} asks for another one"
            raise BadRecipe(name, [Problem("$.tokenizer_source", message, f"tokenizer_source: {first}", "unsupported")])


def _tokenizer(tree: Checkpoint) -> list[bytes]:
    files = (tree.path / name for name in _TOKENIZERS)
    return [file.read_bytes() for file in files if file.is_file()]
