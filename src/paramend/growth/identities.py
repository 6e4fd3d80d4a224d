"""Identities: which leaves of a layer are set to which values, so that the layer returns its input unchanged."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from paramend.anatomy import families
from paramend.edits import quantized
from paramend.edits.call import Call
from paramend.edits.ops import OPS
from paramend.errors import BadArgument, NoMatch, Unsupported
from paramend.growth.numbered import leaves_below
from paramend.leaves.leaves import Leaves
from paramend.leaves.paths import Names
from paramend.reports import wording
from paramend.selectors.patterns import parse

Rules = Mapping[str, float]
# "auto", a family, selectors of leaves that become zero, or these with their values.
Writers: TypeAlias = str | Iterable[str] | Rules
# None: layers are only copied.
Identity: TypeAlias = Writers | None


def rules_of(identity: Identity) -> Rules | None:
    """The rules that the user gave: selector relative to a layer → value; None for "auto" or the name of a family."""
    if isinstance(identity, str):
        if identity == "auto" or identity in families.NAMES:
            return None
        return {identity: 0.0}
    if isinstance(identity, Mapping) and all(isinstance(key, str) for key in identity):
        return {key: float(value) for key, value in identity.items()}
    if isinstance(identity, Iterable):
        listed = list(identity)
        if listed and all(isinstance(text, str) for text in listed):
            return dict.fromkeys(listed, 0.0)
    raise BadArgument(
        f'identity={identity!r} is not "auto", the name of a family, selectors relative to a layer, a dict from these '
        "to values, or None",
        hint='identity=["mlp.down_proj.*", "self_attn.o_proj.*"]',
    )


def family_of(modules: set[str], identity: str, model_type: str | None) -> families.Family:
    """The family of a layer with these modules."""
    return families.find(modules, model_type, None if identity == "auto" else identity)


def calls(leaves: Leaves, layers: list[Names], rules: Rules, where: str, *, strict: bool) -> dict[int, Call]:
    """The edits that make one layer the identity."""
    found: dict[int, Call] = {}
    for text, value in rules.items():
        pattern = parse(text)
        numbers = [number for names in layers for number in pattern.find(names)]
        if strict and not numbers:
            have = [leaves.index.path(n)[len(where) + 1 :] for n in leaves_below(layers)]
            near = wording.closest(text, [*families.NAMES, *have], limit=1) or have[:1]
            why = f"identity={text!r} matches none of the leaves of {where}, which has {wording.listing(have, 6)}"
            raise NoMatch(why, hint="\n      ".join(f'identity="{name}"' for name in near), near=near)
        for number in numbers:
            found[number] = call(value)
    if not found:
        raise NoMatch(f"no leaf of {where} matches the identity rules", hint='identity=["mlp.down_proj.*"]')
    check_values(leaves, found)
    return found


def check_values(leaves: Leaves, numbers: Iterable[int]) -> None:
    """Refuse to make a layer the identity by leaves of quantised weights."""
    way = "identity=None copies layers as they are"
    quantized.check_values(leaves, numbers, "cannot be set in an identity layer", way)


def call(value: float, index: Any = None) -> Call:
    """The edit that sets a leaf, or a slice of it, to a value."""
    return Call(OPS["fill"], {"value": value}, index) if value else Call(OPS["zero"], {}, index)


def check_untied(leaves: Leaves, numbers: Iterable[int], within: set[int]) -> None:
    """Check that no leaf is tied to a leaf outside the layer."""
    for number in numbers:
        first = leaves.ties.get(number)
        others = [n for n, one in leaves.ties.items() if one == first and n not in within] if first is not None else []
        if others:
            raise Unsupported(
                f"{leaves.index.path(number)} is the same leaf as {leaves.index.path(others[0])}: it cannot be set in "
                "only one layer",
                hint="identity=None copies layers as they are",
            )
