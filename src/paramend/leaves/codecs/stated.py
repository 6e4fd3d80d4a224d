"""What a configuration says of one quantised weight, and the error where its leaves say something else."""

from dataclasses import dataclass

from paramend.errors import SpecMismatch
from paramend.leaves.origins.origin import Origin


@dataclass(frozen=True, slots=True)
class Stated:
    """What a configuration says of one weight; None where it says nothing.

    Attributes:
        method: `quant_method`, "" if there is none.
        bits: of a code.
        group: how many inputs share a scale; -1 for all.
        block: how many outputs and inputs share a scale.
        symmetric: whether there are no zero points.
        form: how a method stores it, such as `checkpoint_format` of GPTQ, or `version` of AWQ.
        ignored: the entry of an ignore list that names the module, "" if none does.
        outputs_last: whether outputs are the last axis, as in kernels of JAX; they are the first of weights of torch.
    """

    method: str = ""
    bits: int | None = None
    group: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool | None = None
    form: str = ""
    ignored: str = ""
    outputs_last: bool = False


NOTHING = Stated()


def disagree(here: str, there: str, *leaves: Origin, hint: str = "") -> SpecMismatch:
    """The error for leaves that are not as something else says.

    Args:
        here: what the leaves say.
        there: what the configuration, or another leaf, says.
        leaves: the leaves.
        hint: what to do.
    """
    rows = "\n".join(f"    {leaf}  {leaf.spec}" for leaf in leaves)
    way = hint or "correct the configuration, or open the file with raw=True to see what is stored"
    return SpecMismatch(f"a quantised weight and what is said of it disagree: {here}, and {there}\n\n{rows}", hint=way)
