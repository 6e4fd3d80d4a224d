"""Models as a port sees them: leaves, modules with their classes where there are modules, and units to be matched."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from paramend.errors import BadArgument
from paramend.leaves.leaves import Editable, keys_of
from paramend.leaves.paths import labels, text_of
from paramend.porting.calls import Call
from paramend.porting.forms import FORMS, NESTED, PARAMETER, Form, Path, Shaped
from paramend.porting.frameworks import is_linen
from paramend.trees.tree import Tree
from paramend.trees.walks import containers

# The top keys of linen variables: the path of a module begins below them.
_COLLECTIONS = ("params", "batch_stats")
_LIBRARIES = ("torch", "flax", "equinox", "haiku", "transformers", "timm")
# Layers of a recurrent torch module: each is a layer of its own elsewhere.
_RECURRENT = re.compile(r"((?:weight|bias)_(?:ih|hh))_(l\d+)(_reverse)?").fullmatch
_WEIGHT_NORM = {"original0": "weight_g", "original1": "weight_v"}
_AUTO = re.compile(r"([A-Z][A-Za-z]*\d?[dD]?)_\d+").fullmatch
_HAIKU_TRANSPOSE = re.compile(r"conv(\d)_d_transpose(?:_\d+)?").fullmatch
_KNOWN = {name.rpartition(":")[2] for form in FORMS for name in form.classes} | {"ConvTranspose"}
_SPECIAL = re.compile(r"(equinox|Einsum):\w+").fullmatch
_NOT_LEARNED = ("RngKey", "RngCount", "RngState", "Cache", "Intermediate")


@dataclass(frozen=True, eq=False)
class Unit:
    """Leaves that belong together: a layer, or a parameter that belongs to none."""

    path: Path
    leaves: dict[str, int]  # the paths of the leaves within it, and their numbers
    shaped: tuple[Shaped, ...]  # the forms that it may have
    kind: str = ""  # the name of its class; "" if that is not known
    module: Any = field(default=None, repr=False)  # the module, or None

    def __str__(self) -> str:
        leaves = ", ".join(f"{name or 'value'} {list(shape)}" for name, shape in self.shaped[0].shapes)
        return f"{'/'.join(self.path)}  {leaves}"


class Model:
    """One side of a port."""

    def __init__(self, root: Any) -> None:
        self.root = root  # what the user gave
        self.bound = is_linen(root)
        if self.bound and root.scope is None:
            why = "a linen module holds no parameters"
            raise BadArgument(why, hint="module.bind(variables), where variables = module.init(key, x)")
        # The tree of its leaves: the variables of a bound linen module, else `root`.
        self.tree = root.variables if self.bound else root
        self.leaves: Any = root if isinstance(root, Editable) else Tree(self.tree)
        # The path of each module → the module.
        self.modules: dict[Path, Any] = {} if isinstance(root, Editable) else dict(_modules(self.tree))
        pieces = {number: self.leaves.index.pieces(number) for number in self.leaves.index.numbers}
        self._paths = {*pieces.values()}
        tops = {path[0] for path in pieces.values() if len(path) > 1}
        self._collected = "params" in tops and not self.modules and all(len(path) > 1 for path in pieces.values())
        # Leaf number → the path of its module and its name there, without the collection. Leaves that are no
        # parameters, such as keys of random numbers, are left out.
        self.names = {number: name for number, path in pieces.items() if (name := self._name(number, path)) is not None}

    def _name(self, number: int, path: Path) -> Path | None:
        box = getattr(self.leaves, "boxes", {}).get(number)
        if box is not None and {base.__name__ for base in type(box).__mro__} & {*_NOT_LEARNED}:
            return None
        if path[-1] == "num_batches_tracked" or (self._collected and path[0] not in _COLLECTIONS):
            return None
        *above, last = path[1:] if self._collected else path
        layer = _RECURRENT(last)
        if layer is not None:
            both = layer[3] or ((*above, f"{last}_reverse") in self._paths)
            return (*above, layer[2], *(["reverse1" if layer[3] else "forward0"] if both else []), layer[1])
        if last in _WEIGHT_NORM and above[-2:] == ["parametrizations", "weight"]:
            return (*above[:-2], _WEIGHT_NORM[last])
        if above[-1:] == ["kernel"] and last == "scale" and len(above) > 2 and above[-3].startswith("WeightNorm_"):
            own = above[:-1] if above[-2] == "layer_instance" else [*above[:-3], above[-2]]
            return (*own, "kernel/scale")
        return (*above, last)

    def class_of(self, path: Path) -> str:
        """The name of the class of a module; "" if it is not known."""
        if path in self.modules:
            return type(self.modules[path]).__name__
        if path and (auto := _AUTO(path[-1])) and auto[1] in _KNOWN:
            return auto[1]
        haiku = path and _HAIKU_TRANSPOSE(path[-1])
        return f"Conv{haiku[1]}DTranspose" if haiku else ""

    def learn(self, calls: Sequence[Call]) -> dict[Path, int]:
        """The place of the first call of each module; modules that linen makes when it runs are kept."""
        places: dict[Path, int] = {}
        for place, call in enumerate(calls):
            path = tuple(map(text_of, labels(call.path))) if call.path else ()
            places.setdefault(path, place)
            self.modules.setdefault(path, call.module)
        vars(self).pop("units", None)
        return places

    @cached_property
    def units(self) -> list[Unit]:
        """Its leaves by layer, in the order in which it lists them."""
        under: dict[Path, dict[str, int]] = {}
        for number, name in self.names.items():
            for depth in range(len(name) - 1, max(len(name) - 4, -1), -1):
                under.setdefault(name[:depth], {})["/".join(name[depth:])] = number
        taken: set[int] = set()
        units: list[Unit] = []
        for path, leaves in sorted(under.items(), key=lambda item: len(item[0])):
            shaped = self._shaped(path, leaves, NESTED) if len(leaves) <= 16 else ()
            if shaped and not taken & {*leaves.values()}:
                units.append(self._unit(path, leaves, shaped))
                taken |= {*leaves.values()}
        for path, below in under.items():
            leaves = {name: n for name, n in below.items() if "/" not in name and n not in taken}
            units += self._parted(path, leaves)
        rank = {number: place for place, number in enumerate(self.names)}
        return sorted(units, key=lambda unit: min(rank[number] for number in unit.leaves.values()))

    def simple(self, unit: Unit) -> list[Unit]:
        below: dict[Path, dict[str, int]] = {}
        for name, number in unit.leaves.items():
            *above, last = name.split("/")
            below.setdefault((*unit.path, *above), {})[last] = number
        return [part for path, leaves in below.items() for part in self._parted(path, leaves)]

    def _parted(self, path: Path, leaves: dict[str, int]) -> Iterator[Unit]:
        """The leaves of one module as a layer, and those of its leaves that belong to none."""
        while leaves:
            shaped = self._shaped(path, leaves, FORMS)
            if shaped:
                most = max(len(each.shapes) for each in shaped)
                shaped = tuple(each for each in shaped if len(each.shapes) == most)
                names = {name for each in shaped for name, _ in each.shapes}
                yield self._unit(path, {name: leaves[name] for name in leaves if name in names}, shaped)
            else:
                names = {next(iter(leaves))}
                (name,) = names
                shape = self.leaves.spec(leaves[name]).shape
                yield Unit((*path, name), {"": leaves[name]}, (Shaped(PARAMETER, (("", shape),)),))
            leaves = {name: number for name, number in leaves.items() if name not in names}

    def _unit(self, path: Path, leaves: dict[str, int], shaped: tuple[Shaped, ...]) -> Unit:
        return Unit(path, leaves, shaped, self.class_of(path), self.modules.get(path))

    def _shaped(self, path: Path, leaves: dict[str, int], forms: Sequence[Form]) -> tuple[Shaped, ...]:
        """The forms that a module with these leaves may have: those of its class, if it is one that is known."""
        all_ = forms is NESTED  # a layer of several modules takes all that is below
        fit = [form for form in forms if form.needed <= leaves.keys() and not (all_ and leaves.keys() - form.names)]
        # What only some classes hold so is not tried without the class.
        fit = [f for f in fit if self._is_of(f, path) or not f.classes or not all(map(_SPECIAL, f.classes))]
        named = [form for form in fit if self._is_of(form, path)]
        if not named and fit and self.class_of(path) in _KNOWN and _library(self.modules.get(path)):
            named = [form for form in fit if not form.classes]
        out = []
        for form in named or fit:
            names = [name for hold in form.present(leaves) for name in hold.names]
            shaped = Shaped(form, tuple((name, self.leaves.spec(leaves[name]).shape) for name in names))
            if names and shaped.key is not None:
                out.append(shaped)
        return tuple(out)

    def _is_of(self, form: Form, path: Path) -> bool:
        kind, module = self.class_of(path), self.modules.get(path)
        names = {kind, f"{_library(module)}:{kind}"}
        if kind == "ConvTranspose":
            turned = getattr(module, "transpose_kernel", None)
            names = {*names, f"{kind}:transposed"} if turned is None else {f"{kind}:transposed" if turned else kind}
        elif kind == "Einsum":
            names = einsum_names(getattr(module, "einsum_str", None))
        return bool(kind) and not names.isdisjoint(form.classes)

    def text(self, number: int) -> str:
        """The path of a leaf, as its library writes it; it is a selector."""
        return str(self.leaves.index.path(number))

    @property
    def framework(self) -> str:
        """The framework of a model, "jax" for all but Equinox; "" for parameters that do not say."""
        for name in ("torch", "equinox"):
            if any(_library(module) == name for module in self.modules.values()):
                return name
        if self.modules:
            return "jax"
        if self.leaves.index.separator == "." and not isinstance(self.root, Editable):
            return "torch"
        last = {name[-1] for name in self.names.values()}
        return "jax" if last & {"kernel", "scale", "embedding", "w"} else "torch" if "weight" in last else ""

    @property
    def stored(self) -> str:
        """What a layout makes in place of this tree: "flat" names or "nested" dicts; "" where keys hold separators."""
        index = self.leaves.index
        keys = [keys_of(path) for path in index.paths.values()]
        if all(len(path) == 1 and "/" not in path[0] for path in keys) or index.separator == ".":
            return "flat"
        return "" if any("/" in key or "." in key for path in keys for key in path) else "nested"

    def flat(self) -> dict[str, Any]:
        return {self.leaves.index.name(number): self.leaves.read(number) for number in self.leaves.index.numbers}


def _library(module: Any) -> str:
    """The framework that a class is made of, "" if it is none of those known."""
    roots = [base.__module__.partition(".")[0] for base in type(module).__mro__]
    return next((root for root in roots if root in _LIBRARIES), "")


def einsum_names(text: str | None) -> set[str]:
    """The names of the forms that a kernel may have in an einsum: inputs first, outputs first, or both if unknown.

    >>> einsum_names("btd,dhk->bthk"), einsum_names("btd,ed->bte")
    ({'Einsum'}, {'Einsum:out_first'})
    """
    both = {"Einsum", "Einsum:out_first"}
    operands, arrow, result = (text or "").replace(" ", "").partition("->")
    axes = operands.partition(",")[2]
    if not arrow or not axes:
        return both
    summed = "".join("i" if axis not in result else "o" for axis in axes)
    return {"Einsum"} if "oi" not in summed else {"Einsum:out_first"} if "io" not in summed else set()


def _modules(root: Any) -> Iterator[tuple[Path, Any]]:
    """The modules of a tree, objects of classes that are not containers, each under all of its paths."""
    for path, node, kind in containers(root):
        own = type(node).__module__.partition(".")[0] not in ("builtins", "collections", "jax")
        if kind.assign is None and (own or kind.replace is not None):
            yield tuple(map(text_of, path)), node
