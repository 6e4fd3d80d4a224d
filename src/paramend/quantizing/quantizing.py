"""Floats as a scheme would have them, or in it: `pm.quantize`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np

from paramend.anatomy.beside import EMBEDDINGS, HEADS
from paramend.anatomy.quantization import quantised
from paramend.arrays.registry import backend, to_numpy
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.edits.call import explained
from paramend.edits.decoding import floats, followed, keys, modules
from paramend.edits.memory import editable
from paramend.edits.own import decoded_by, encoded_by
from paramend.edits.plan import call
from paramend.edits.weights import Weights
from paramend.errors import BadArgument, Quantized, SpecMismatch, Unsupported
from paramend.leaves.codecs.fresh import check_scheme, codec_for, layout_of
from paramend.leaves.codecs.ggml import WRITABLE
from paramend.leaves.groups import groups_of
from paramend.leaves.leaves import Group
from paramend.leaves.origins.decoded import decoded
from paramend.leaves.origins.encoded import encoded
from paramend.leaves.origins.moved import permute_axes
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Held, Made
from paramend.leaves.paths import Label, renamed, write_path
from paramend.leaves.rules import Codec
from paramend.leaves.schemes import WEIGHTS
from paramend.leaves.specs import Array, Spec
from paramend.quantizing.dequantizing import Coded, QuantizeReport, named, whole
from paramend.selectors.selector import SelectorLike, Union, resolve, sel

T = TypeVar("T")


def quantize(
    model: T,
    selector: SelectorLike,
    *,
    scheme: str = "",
    simulate: bool = False,
    group_size: int | None = None,
    codec: Codec | None = None,
) -> tuple[T, QuantizeReport]:
    """A model with weights in a quantised scheme, rounded to the nearest, and the report: how far they are off.

    Scales are chosen by the greatest magnitude of each block. There is no calibration. Embeddings and heads stay floats
    unless the selector names them, and so do norms and biases, which are no matrices. Beside a checkpoint,
    `quantization_config` says what is quantised, as transformers and compressed-tensors read it.

    Args:
        model: a checkpoint from `pm.open`, which is written in bounded memory, and read once here for the report; or a
            tree in memory: dicts, a state dict; with `simulate` modules and kernels of JAX too.
        selector: the weights.
        scheme: "fp8-tensor", "fp8-channel", "fp8-block", "int8" or "int4" (as compressed-tensors packs them), "gptq",
            "awq", "mxfp4", "nvfp4", "nf4", "fp4", "bnb-int8"; "q8_0" or "q4_0", which GGUF files alone hold.
        simulate: whether the leaves stay floats, with the values that the scheme gives: what int4 in this layer costs.
        group_size: how many inputs share a scale, where the scheme leaves it open; -1 for all. int4, GPTQ and AWQ have
            128, int8 all of them.
        codec: a `pm.Codec` in place of a scheme, whose `encode` gets the weight, and None for each leaf. It takes whole
            leaves, called as the first of its own.

    Returns:
        The model, of the same type, and for each weight its relative L2 and its greatest difference to what it was.

    Raises:
        NoMatch: the selector names nothing.
        SpecMismatch: a weight has no such form, such as one whose inputs the groups do not divide.
        Quantized: a selected weight is quantised already.
        Unsupported: what is there is quantised in another way, or is no `weight` of a state dict.
        BadArgument: there is no such scheme, or none with groups of a size that is chosen, or neither or both of
            `scheme` and `codec` are given; a codec does not encode, or not all of its leaves.

    >>> model = {"fc": {"kernel": np.linspace(-1, 1, 256, dtype="float32").reshape(128, 2)}}
    >>> tree, report = pm.quantize(model, "**", scheme="int4", simulate=True)
    >>> tree["fc"]["kernel"].shape, len(np.unique(tree["fc"]["kernel"])) <= 32, f"{report.rows[0].relative_l2:.2f}"
    ((128, 2), True, '0.07')
    """
    if codec is None:
        check_scheme(scheme)
    elif scheme or group_size or codec.encode is None:
        wrong = "has no encode" if codec.encode is None else "stands in place of a scheme and its groups"
        raise BadArgument(f"codec={codec.name} {wrong}", hint="pm.quantize(model, selector, codec=codec)")
    leaves = editable(model)
    seen = whole(leaves, codec)
    numbers = _chosen(seen, selector)
    news = [
        _ruled(seen, number, codec) if codec else _new(seen, number, scheme, group_size, simulate=simulate)
        for number in numbers
    ]
    rows = tuple(explained(seen.index.path(new.number), new.row, seen) for new in news)
    said: tuple[str, ...] = ()
    tree: Any
    if simulate and not isinstance(leaves, Checkpoint):
        values = {new.number: new.values("").read() for new in news}
        tree = leaves.edited({number: call("set", {"value": value}) for number, value in values.items()})
    else:
        tree = leaves.regrouped([new.regrouped(seen, simulate=simulate) for new in news])
    if not simulate and scheme and scheme not in WRITABLE:  # each leaf in blocks says itself what it is
        left = floats(leaves, [*numbers, *(each for group in seen.groups.values() for each in group.numbers)])
        named_ = modules(leaves, numbers)
        says = partial(quantised, scheme=scheme, group_size=group_size, modules=named_, floats=left)
        tree, said = followed(tree, says)
    kept = named(leaves, groups_of(leaves))
    others = len(seen.index.numbers) - len(rows) - len(kept)
    return cast(T, tree), QuantizeReport("simulated" if simulate else "quantised", rows, kept, others, said)


def _chosen(seen: Weights, selector: SelectorLike) -> list[int]:
    """The leaves that a selector means: of what wildcards take, the matrices that schemes are for."""
    selector, found = sel(selector), set[int]()
    for part in selector.parts if isinstance(selector, Union) else (selector,):
        numbers = resolve(part, seen)
        some = {number for number in numbers if not _hindrance(seen, number, repr(part))}
        if not some:
            path, why = seen.index.path(numbers[0]), _hindrance(seen, numbers[0], repr(part))
            if numbers[0] in seen.groups:
                scheme = seen.groups[numbers[0]].scheme.name
                raise Quantized(f"{path} {why}", scheme=scheme, payload=path, hint="tree, _ = pm.dequantize(model)")
            raise SpecMismatch(f"{path} cannot be quantised: it {why}", hint='"**/*_proj/weight"')
        found |= some
    return seen.index.ordered(found)


def _hindrance(seen: Weights, number: int, said: str) -> str:
    """Why a leaf is not quantised where a selector takes it among others, or ""."""
    if number in seen.groups:
        return f"is quantised already ({seen.groups[number].scheme.name})"
    spec, (*above, name) = seen.spec(number), seen.index.pieces(number)
    if seen.rule is not None:
        called = seen.rule.called(name)
        why = "" if called else f"is not called {seen.rule.leaves[0]}, as leaves of {seen.rule.name} are"
        return why or ("" if spec.kind == "float" else f"is {spec}, no floats")
    if spec.kind != "float" or spec.ndim not in (2, 3):
        return f"is {spec}, no matrix of floats"
    if name not in WEIGHTS and not name.endswith("_proj"):
        return f"is no {' or '.join(WEIGHTS)} of a module"
    module = above[-1] if above else ""
    apart = module in HEADS or module in EMBEDDINGS
    return f"is the weight of {module}, which counts only where it is named" if apart and module not in said else ""


@dataclass(frozen=True, eq=False)
class _New:
    """A weight and the leaves that it becomes."""

    number: int  # that of its leaf
    scheme: str
    names: Sequence[str]  # those of the leaves
    parts: Callable[[], list[Origin]]  # makes them
    values: Callable[[str], Origin]  # makes the values that they stand for, in a dtype; "" for that of the weight

    def paths(self, seen: Weights) -> list[tuple[Label, ...]]:
        return [renamed(seen.index.paths[self.number], name) for name in self.names]

    def row(self, seen: Weights) -> Coded:
        """The row of a report; the weight is read."""
        weight, path = seen.expression(self.number), seen.index.path(self.number)
        values, norm, off, most = self.values("float32"), 0.0, 0.0, 0.0
        for start, stop in values.ranges():
            was = weight.read_range(start, stop).astype(np.float64)
            gap = np.abs(values.read_range(start, stop) - was)
            norm, off, most = norm + float(was @ was), off + float(gap @ gap), max(most, float(gap.max(initial=0)))
        if not np.isfinite(off):
            raise SpecMismatch("it holds values that are not finite, for which there is no scale")
        names = tuple(write_path(each, seen.index.separator) for each in self.paths(seen))
        return Coded(path, self.scheme, weight.spec, names, (off / norm) ** 0.5 if norm else 0.0, most)

    def regrouped(self, seen: Weights, *, simulate: bool) -> Group:
        """The leaf, which becomes several, or one with the values that they stand for."""

        def make(old: Sequence[Any]) -> list[Any]:
            made = [self.values("")] if simulate else self.parts()
            return made if isinstance(old[0], Origin) else [backend(old[0]).resized(e.read(), old[0]) for e in made]

        paths = [seen.index.paths[self.number]] if simulate else self.paths(seen)
        return Group((self.number,), tuple(map(keys, paths)), make)


def _new(seen: Weights, number: int, scheme: str, group_size: int | None, *, simulate: bool) -> _New:
    """What a leaf becomes in a scheme."""
    spec, path, name = seen.spec(number), seen.index.path(number), seen.index.pieces(number)[-1]
    turned = name in ("kernel", "w")  # the outputs are last, as in JAX
    if spec.ndim > 2 and (turned or scheme != "fp8-block"):
        why = f"{path} is {spec}: which of its axes are inputs is not known"
        raise Unsupported(why, hint="pm.sel(selector).where(ndim=2)")
    if not simulate and turned:
        raise Unsupported(f"{path} has its inputs first, as JAX does, and {scheme} its outputs", hint="simulate=True")
    if not simulate and len(seen.twins(number)) > 1:
        raise Unsupported(f"{path} is one leaf under several paths, which quantised ones cannot be")
    inner = Spec(spec.shape[::-1], spec.dtype) if turned else spec
    layout = explained(path, layout_of, scheme, inner, group_size)
    codec = codec_for(scheme, layout)

    def turn(weight: Origin) -> Origin:
        return permute_axes(weight, (1, 0)) if turned else weight

    def parts() -> dict[str, Origin]:
        known: dict[str, Origin] = {role: Held(values) for role, values in layout.known.items()}
        found = known | encoded(codec, turn(seen.expression(number)), layout.specs, known)
        return {role: found[role] for role in layout.names}

    def values(dtype: str) -> Origin:
        return turn(decoded(codec, parts(), dtype or spec.dtype))

    names = [each.replace("*", name) for each in layout.names.values()]
    return _New(number, codec.scheme, names, lambda: [*parts().values()], values)


def _ruled(seen: Weights, number: int, rule: Codec) -> _New:
    """What a leaf becomes by a codec of the user's, which makes all leaves at once."""
    spec, names = seen.spec(number), rule.called(seen.index.pieces(number)[-1])

    def parts() -> list[Origin]:
        specs = [backend(each).spec(each) for each in _encoded(seen, number, rule)]
        return [Made(each, partial(_part, seen, number, rule, place)) for place, each in enumerate(specs)]

    def values(dtype: str) -> Origin:
        each = Spec(spec.shape, dtype or spec.dtype)
        return Made(each, partial(_decoded, seen, number, rule, each))

    return _New(number, rule.name, names, parts, values)


def _encoded(seen: Weights, number: int, rule: Codec) -> list[Any]:
    """The leaves that a codec of the user's makes of one."""
    path = seen.index.path(number)
    names = rule.called(seen.index.pieces(number)[-1])
    found = encoded_by(rule, seen.read(number), [None] * len(names), path)
    missing = [name for name in rule.leaves if name not in found]
    if missing:
        raise BadArgument(f"encode of {rule.name} gives no {' and no '.join(missing)} for {path}")
    return [found[name] for name in rule.leaves]


def _part(seen: Weights, number: int, rule: Codec, place: int) -> Array:
    return to_numpy(_encoded(seen, number, rule)[place])


def _decoded(seen: Weights, number: int, rule: Codec, spec: Spec) -> Array:
    """What the leaves that it makes stand for."""
    path = seen.index.path(number)
    values = decoded_by(rule, _encoded(seen, number, rule), path)
    if (found := backend(values).spec(values)).shape != spec.shape:
        raise SpecMismatch(f"decode of {rule.name} gives {found} for {path}, which is {seen.spec(number)}")
    return to_numpy(backend(values).cast(values, spec.dtype))
