"""What a configuration says of one quantised weight, and the error where its leaves say something else."""

from dataclasses import dataclass

from paramend.errors import SpecMismatch
from paramend.leaves.origins.origin import Origin


@dataclass(frozen=True, slots=True)
class Stated:
    """What a configuration says of one weight; None where it says nothing."""

    method: str = ""  # `quant_method`, "" if there is none
    bits: int | None = None  # of a code
    group: int | None = None  # how many inputs share a scale; -1 for all
    block: tuple[int, int] | None = None  # how many outputs and inputs share a scale
    symmetric: bool | None = None  # whether there are no zero points
    form: str = ""  # how a method stores it, such as `checkpoint_format` of GPTQ, or `version` of AWQ
    ignored: str = ""  # the entry of an ignore list that names the module, "" if none does
    # Whether outputs are the last axis, as in kernels of JAX; they are the first of weights of torch.
    outputs_last: bool = False


NOTHING = Stated()


def disagree(here: str, there: str, *leaves: Origin, hint: str = "") -> SpecMismatch:
    """The error for leaves that are not as the configuration, or another leaf, says."""
    rows = "\n".join(f"    {leaf}  {leaf.spec}" for leaf in leaves)
    way = hint or "correct the configuration, or open the file with raw=True to see what is stored"
    return SpecMismatch(f"a quantised weight and what is said of it disagree: {here}, and {there}\n\n{rows}", hint=way)
