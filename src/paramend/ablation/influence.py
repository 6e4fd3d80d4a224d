"""Block influence: how much each block of a torch module rotates its input."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from paramend.errors import BadArgument, NoMatch
from paramend.growth.writers import call_with
from paramend.leaves.leaves import Index
from paramend.leaves.specs import AnyTree
from paramend.reports import wording
from paramend.selectors.layers import hint_of, layers_of, notation
from paramend.trees.lookup import is_torch_module

if TYPE_CHECKING:
    import torch


def block_influence(
    module: "torch.nn.Module", inputs: Iterable[AnyTree], *, layers: str | Sequence[str]
) -> dict[str, float]:
    """The influence of each block: one minus the mean cosine similarity of its input and output.

    It is 0 for a block that only scales its input; a low influence suggests that the model may not need the block.
    Forward hooks see the output of the last block before the norm that follows it. Source: Men et al. 2024, ShortGPT
    (arXiv 2403.03853), over all tokens.

    Args:
        module: a torch module, in evaluation mode.
        inputs: batches: a mapping is passed as keyword arguments, a tuple as arguments, anything else as one argument.
        layers: the blocks: "model.layers[*]", "model.layers.<n>", "Dense_[:-1]", or a list of names.

    Returns:
        Name of block → influence, between 0 and 2, in the given order.

    Raises:
        NoMatch: there is no such block.
        BadArgument: a block changes the shape or was not called, or there are no inputs.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(2, 2, bias=False))
    >>> _ = torch.nn.init.eye_(model[1].weight).data.mul_(-1)
    >>> block_influence(model, [torch.tensor([[3.0, 4.0]])], layers="[*]")
    {'0': 0.0, '1': 2.0}
    """
    if not is_torch_module(module):
        raise BadArgument(f"block influence is measured in a torch module, and this is {type(module).__name__}")
    import torch

    blocks = _blocks(module, layers)
    sums = dict.fromkeys(blocks, 0.0)
    counts = dict.fromkeys(blocks, 0)

    def hook(name: str) -> Any:
        def look(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            before = args[0] if args else next(iter(kwargs.values()))
            after = out[0] if isinstance(out, tuple | list) else out
            if getattr(before, "shape", None) != getattr(after, "shape", 0):
                shapes = [list(getattr(x, "shape", ())) for x in (before, after)]
                raise BadArgument(f"{name} turns {shapes[0]} into {shapes[1]}, and a block keeps the shape")
            found = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1).clamp(-1, 1)
            sums[name] += float(found.sum())
            counts[name] += found.numel()

        return look

    with ExitStack() as stack, torch.no_grad():
        for name, block in blocks.items():
            stack.callback(block.register_forward_hook(hook(name), with_kwargs=True).remove)
        for given in inputs:
            call_with(module, given)
    idle = [name for name, count in counts.items() if not count]
    if len(idle) == len(blocks):
        raise BadArgument("no block was called: there are no inputs, or the model does not use these blocks")
    if idle:
        raise BadArgument(f"the model did not call {wording.listing(idle)}")
    return {name: 1 - total / counts[name] for name, total in sums.items()}


def _blocks(module: Any, layers: str | Sequence[str]) -> dict[str, Any]:
    known = dict(module.named_modules())
    names = [layers] if isinstance(layers, str) else list(layers)
    index = Index.of_names([name for name, inner in known.items() if name and not inner._modules])
    found: dict[str, Any] = {}
    for name in names:
        if name in known:
            found[name] = known[name]
            continue
        if notation(name) is None:
            near = wording.closest(name, [other for other in known if other], limit=2)
            raise NoMatch(
                f"{name!r} is not among the names of {wording.plural(len(known), 'module')}",
                hint=f"layers={near}" if near else hint_of(index, name),
                near=near,
            )
        said, numbered = layers_of(index, name)
        paths = ((*one.parent, one.piece(one.numbers[place])) for one in numbered for place in said.pick(one))
        found |= {(path := ".".join(keys)): known[path] for keys in paths}
    return found
