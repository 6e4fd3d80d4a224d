"""What the steps that are no edits make of a tree: each takes it, the keys of the step, and the files that it names."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from paramend.checkpoints import tying
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.edits.memory import Memory
from paramend.errors import BadArgument
from paramend.mapping import joining
from paramend.recipes.donors import Donors
from paramend.selectors.selector import Selector, Union, sel

Given: TypeAlias = Mapping[str, Any]
Make: TypeAlias = Callable[[Any, Given, Donors], Any]


def texts_of(at: str | list[str]) -> list[str]:
    """The selectors of `at`."""
    return at if isinstance(at, list) else [at]


def _selector(given: Given) -> Selector:
    return Union(tuple(map(sel, texts_of(given["at"]))))


def concat(tree: Any, given: Given, donors: Donors) -> Any:
    """Several leaves as one, one after the other."""
    return joining.concat(tree, texts_of(given["at"]), into=given["into"], axis=given.get("axis", 0))


def interleave(tree: Any, given: Given, donors: Donors) -> Any:
    """Several leaves as one, their places in turns."""
    return joining.interleave(tree, texts_of(given["at"]), into=given["into"], axis=given.get("axis", 0))


def split(tree: Any, given: Given, donors: Donors) -> Any:
    """A leaf as several."""
    texts = texts_of(given["at"])
    if len(texts) > 1:
        raise BadArgument(f"split cuts one leaf, and at names {len(texts)}", hint="a step for each")
    return joining.split(tree, texts[0], into=given["into"], axis=given.get("axis", 0), sizes=given.get("sizes"))


def pad(tree: Any, given: Given, donors: Donors) -> Any:
    """Zeros behind the places along an axis."""
    length = {"to": given["length"]} if "length" in given else {"multiple": given["multiple"]}
    args = {"size": 0, "axis": given.get("axis", 0), **length}
    for text in texts_of(given["at"]):
        tree = joining.ruled(tree, [text], [text], joining.Step("pad", args))
    return tree


def tie(tree: Any, given: Given, donors: Donors) -> Any:
    """The embedding as the head; or a leaf under further names."""
    if "at" not in given and "into" not in given:
        return tying.tie(_whole(tree), **given)[0]
    if given.keys() != {"at", "into"}:
        raise BadArgument("a leaf gets further names by at and into alone", hint="{at: a/w, into: [b/w]}")
    texts = texts_of(given["at"])
    if len(texts) > 1:
        raise BadArgument(f"tie gives names to one leaf, and at names {len(texts)}", hint="a step for each")
    return joining.ruled(tree, texts, [*texts, *given["into"]], joining.Step("tie", {}))


def untie(tree: Any, given: Given, donors: Donors) -> Any:
    """A head with a weight of its own."""
    return tying.untie(_whole(tree), **given)[0]


def dequantize(tree: Any, given: Given, donors: Donors) -> Any:
    """Quantised weights as floats."""
    from paramend.quantizing import dequantizing  # most recipes have no such step

    return dequantizing.dequantize(tree, _selector(given), given.get("dtype", "bfloat16"))[0]


def quantize(tree: Any, given: Given, donors: Donors) -> Any:
    """Weights in a quantised scheme."""
    from paramend.quantizing import quantizing  # as above

    group_size = given.get("group_size")
    return quantizing.quantize(tree, _selector(given), scheme=given["scheme"], group_size=group_size)[0]


def part(tree: Any, given: Given, donors: Donors) -> Any:
    """Some leaves as a model of their own."""
    from paramend.grafting import parts  # as above

    return parts.part(tree, _selector(given), rename=given.get("rename"))[0]


def insert(tree: Any, given: Given, donors: Donors) -> Any:
    """A tree with leaves of a file that it lacks."""
    from paramend.grafting import parts  # as above

    name = given["from"]
    donor = donors.open(name)
    if not isinstance(donor, Checkpoint):
        raise BadArgument(f"{name} holds one array, without a name", hint='pm.save({"w": array}, "new.safetensors")')
    return parts.insert(tree, donor, _selector(given), rename=given.get("rename"))[0]


def experts(tree: Any, given: Given, donors: Donors) -> Any:
    """A mixture with some of its experts, or with each several times."""
    from paramend.growth.experts import experts as of  # as above

    ((name, value),) = given.items()
    return getattr(of(_whole(tree)), name)(value)[0]


def upcycle(tree: Any, given: Given, donors: Donors) -> Any:
    """A dense model as a mixture of experts."""
    from paramend.growth import upcycling  # as above

    router = given.get("router", "random")
    return upcycling.upcycle(
        _whole(tree), **{**given, "router": donors.open(router) if router.endswith(".npy") else router}
    )[0]


def widen(tree: Any, given: Given, donors: Donors) -> Any:
    """A model with longer axes."""
    from paramend.growth import widening  # as above

    return widening.widen(_whole(tree), **given)[0]


def narrow(tree: Any, given: Given, donors: Donors) -> Any:
    """A model with some places of its axes."""
    from paramend.growth import narrowing  # as above

    keep = {axis: what for axis, what in given.items() if axis not in ("features", "by")} | given.get("features", {})
    if given.get("by", "norm") == "norm":
        return narrowing.narrow(_whole(tree), keep)[0]
    scores = donors.open(given["by"])
    if not isinstance(scores, Checkpoint):
        hint = 'np.savez("scores.npz", mlp=scores)'
        raise BadArgument(f"{given['by']} holds one array, without the name of an axis", hint=hint)
    return narrowing.narrow(_whole(tree), keep, by=dict(scores.items()))[0]


def fold(tree: Any, given: Given, donors: Donors) -> Any:
    """A model with adapters added to its weights."""
    from paramend.merging import folding  # as above

    options = dict(given)
    sources = [donors.place(name, tree) for name in options.pop("source")]
    return folding.fold(_whole(tree), sources, **options)[0]


def vocabulary(tree: Any, given: Given, donors: Donors) -> Any:
    """A model with some of its tokens, or more."""
    from paramend.tokens import vocabulary as of  # as above

    how = {"init": given["init"]} if "init" in given else {}
    ((name, value),) = ((key, each) for key, each in given.items() if key != "init")
    value = donors.open(value) if name == "transplant" else value
    return getattr(of.vocabulary(_whole(tree)), name)(value, **how)[0]


def merge(tree: Any, given: Given, donors: Donors) -> Any:
    """A model made of several, of which the tree is the first."""
    from paramend.merging import merge as of  # as above

    how = dict(given)
    models = [tree, *(donors.model(name, tree) for name in how.pop("source"))]
    base = donors.model(how.pop("base"), tree) if "base" in how else None
    return of.merge(models, base=base, **how)[0]


def _whole(tree: Any) -> Any:
    """The model itself: a checkpoint, or what a tree in memory was made of."""
    return tree.root if isinstance(tree, Memory) else tree
