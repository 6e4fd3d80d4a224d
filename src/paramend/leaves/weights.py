"""Weights: what the groups of a tree or a checkpoint are as leaves of the model, with their values as origins."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from paramend.errors import Quantized
from paramend.leaves.codecs.codec import NOTHING, Codec, Stated, disagree
from paramend.leaves.groups import Group, Named, weight_name
from paramend.leaves.origins.decoded import decoded
from paramend.leaves.origins.origin import Origin
from paramend.leaves.paths import Label, renamed, text_of, write_path
from paramend.leaves.specs import Spec


@dataclass(frozen=True, eq=False, slots=True)
class Weight:
    """A group as one leaf of its model."""

    path: str  # `<module>.weight`, or the name that the parameter has without its quantisation
    group: Group
    codec: Codec
    parts: Mapping[str, Origin]  # role → leaf

    @property
    def spec(self) -> Spec:
        """Its shape, (out, in) also where the leaves are stored otherwise, and the dtype of its library."""
        return self.origin().spec

    def origin(self, dtype: str = "") -> Origin:
        """Its values, computed piece by piece as they are read, and rounded once to a dtype, by default its own."""
        return decoded(self.codec, self.parts, dtype)

    @property
    def scheme(self) -> str:
        """The name of its scheme."""
        return self.codec.scheme


def weight_of(
    leaves: Named, group: Group, leaf_of: Callable[[int], Origin], stated: Callable[[str], Stated] | None = None
) -> Weight:
    """The weight that a group of some leaves is: number → origin of the leaf as it is stored, name of a module → what
    the configuration says of it, from `anatomy.quantization`.

    Raises:
        Quantized: no codec of its scheme is known.
        SpecMismatch: leaves and configuration disagree.
    """
    index, scheme = leaves.index, group.scheme
    here = ", ".join(index.path(number) for number in group.numbers)
    says = stated(write_path(index.paths[group.numbers[0]][:-1], index.separator)) if stated else NOTHING
    if group.missing:
        if says.ignored:
            raise disagree(f"{here} is quantised", f"{says.ignored!r} of the ignore list names it")
        raise disagree(f"{here} is here", f"the {' and the '.join(group.missing)} of it is not")
    parts = {group.role(number): leaf_of(number) for number in group.numbers}
    if says.ignored:
        ignored = f"{says.ignored!r} of the ignore list names it"
        raise disagree(f"{here} are a quantised weight ({scheme.name})", ignored, *parts.values())
    if scheme.codec is None:
        raise Quantized(
            f"{here} is a weight in {scheme.name} ({scheme.says}), which cannot be decoded",
            scheme=scheme.name,
            payload="" if group.payload is None else index.path(group.payload),
            companions=tuple(map(index.path, group.companions)),
            hint="open it with raw=True to see what is stored",
        )
    last = index.pieces(group.numbers[0])[-1] in ("kernel", "w")
    codec = scheme.codec(scheme.name, parts, replace(says, outputs_last=last))
    return Weight(write_path(labels_of(leaves, group), index.separator), group, codec, parts)


def labels_of(leaves: Named, group: Group) -> tuple[Label, ...]:
    """The path of the weight that a group is: its payload's, if that has no name of its own."""
    assert group.payload is not None
    path = leaves.index.paths[group.payload]
    return renamed(path, weight_name(text_of(path[-1]), group.scheme))
