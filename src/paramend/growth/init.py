"""Initial values with which a branch, or an added part, contributes nothing at first but is trained from there.

A zero in the right place keeps what a model computes; a second zero behind it keeps it forever. So each scheme says
what receives gradients first, and `pm.check_live` shows it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from paramend.anatomy import sections
from paramend.anatomy.families import modules_of, values
from paramend.edits.call import Call
from paramend.edits.memory import Memory
from paramend.edits.ops import OPS
from paramend.errors import BadArgument, NoMatch, Unsupported
from paramend.growth import identities, numbered
from paramend.growth.deepening import configuration
from paramend.growth.identities import Writers
from paramend.growth.zeroing import zero_
from paramend.leaves.paths import number_of
from paramend.reports import wording
from paramend.selectors.patterns import parse

__all__ = ["SCHEMES", "Scheme", "fixup", "zero", "zero_", "zero_residual"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way to make an added part contribute nothing at first."""

    name: str
    says: str  # what becomes zero
    selectors: tuple[str, ...]  # selectors of the names in use; those that match nothing are skipped
    alive: str  # what receives a gradient, and when
    size: int | None = None  # the most scalars that such a leaf may have; None for any


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "gamma",
            "gain and bias of the last norm of each branch (zero-gamma of ResNets)",
            (),
            "that norm at step 1, what is before it at step 2",
        ),
        Scheme(
            "gates",
            "the scalar gate of each branch (ReZero, arXiv:2003.04887; SkipInit, arXiv:2002.10444)",
            ("**/{resweight,rezero,re_zero,rezero_alpha,skipinit_gain,skip_gain,alpha}",),
            "the gates at step 1, the branches at step 2; a branch whose last layer is zero too is dead",
            size=1,
        ),
        Scheme(
            "adaln",
            "the layer that makes shift, scale and gate, and the last layer (adaLN-zero of DiT, arXiv:2212.09748)",
            ("**/adaLN_modulation[-1]/*", "**/adaLN_modulation/{weight,bias,kernel}", "**/final_layer/linear/*"),
            "these at step 1, the branches at step 2",
        ),
        Scheme(
            "lora",
            "B of each pair, and A of embeddings (LoRA, arXiv:2106.09685)",
            ("**/{lora_B,lora_b,lora_up}/**", "**/{lora_B,lora_b,lora_up}", "**/lora_embedding_A/**"),
            "B at step 1, A at step 2; with A zero as well the pair is dead",
        ),
        Scheme(
            "convs",
            "weights and biases of the 1x1 convolutions around a trained copy (ControlNet, arXiv:2302.05543)",
            ("**/{zero_convs,controlnet_down_blocks}/**", "**/{middle_block_out,controlnet_mid_block}/**"),
            "the outermost at step 1, what is before it one step later each",
        ),
    )
}


def zero(tree: T, scheme: str) -> T:
    """A new tree in which the leaves that a scheme names are zero; `pm.init.SCHEMES` describes the schemes.

    In place for a torch module: `module.load_state_dict(pm.init.zero(module.state_dict(), "lora"))`. `pm.init.zero_`
    sets a whole torch layer to zero.

    Args:
        tree: any tree of parameters.
        scheme: "gamma", "gates", "adaln", "lora" or "convs".

    Raises:
        BadArgument: there is no such scheme.
        NoMatch: no leaf has a name that the scheme knows.

    >>> zero({"q": {"lora_A": np.ones(2), "lora_B": np.ones(2)}}, "lora")["q"]
    {'lora_A': array([1., 1.]), 'lora_B': array([0., 0.])}
    """
    row = SCHEMES.get(scheme)
    if row is None:
        near = wording.closest(scheme, SCHEMES, limit=1) if isinstance(scheme, str) else []
        raise BadArgument(f"{scheme!r} is not a scheme: {', '.join(SCHEMES)}", hint=f'"{(near or list(SCHEMES))[0]}"')
    memory = Memory(tree)
    found = _last_norms(memory) if scheme == "gamma" else []
    for text in row.selectors:
        found += parse(text).reach(memory.index.names)[0]
    chosen = [n for n in found if row.size is None or memory.spec(n).size <= row.size]
    if not chosen:
        looked = wording.listing(row.selectors) or "several numbered norms in one block, such as bn1 and bn2"
        why = f'no leaf of this tree has a name that the scheme "{scheme}" knows: {looked}'
        raise NoMatch(why, hint='pm.at(tree, "**/gate").zero() works for any name')
    return memory.edited(dict.fromkeys(chosen, Call(OPS["zero"])))  # type: ignore[no-any-return]


_NORMS = ("bn", "norm", "BatchNorm_", "GroupNorm_", "LayerNorm_")


def _last_norms(memory: Memory) -> list[int]:
    """Gains and biases of the last of several numbered norms under one parent."""
    norms: dict[tuple[tuple[str, ...], str], dict[int, list[int]]] = {}
    for number in memory.index.numbers:
        *parent, name, leaf = ("", *memory.index.pieces(number))
        stem = next((stem for stem in _NORMS if name.startswith(stem)), None)
        which = number_of(name.removeprefix(stem)) if stem is not None else None
        if stem is not None and which is not None and leaf in ("weight", "bias", "scale"):
            norms.setdefault((tuple(parent), stem), {}).setdefault(which, []).append(number)
    return [number for found in norms.values() if len(found) > 1 for number in found[max(found)]]


def zero_residual(tree: T, *, layers: str | None = None, family: Writers = "auto") -> T:
    """A new tree in which every layer of a residual network returns its input unchanged.

    The last module of each branch becomes zero: the projection that writes to the residual stream, with its bias, or
    the gain of the norm that follows it. It receives a gradient at step 1, what is before it at step 2.

    Args:
        tree: the parameters of a network before training.
        layers: as in `pm.deepen`.
        family: as `identity` in `pm.deepen`.

    Raises:
        NoMatch: there are no such layers.
        BadArgument: it is not known which leaves make a layer the identity.
        Unsupported: none do (post-LN).

    >>> tree = {"blocks": [{"fc1": np.ones(2), "fc2": np.ones(2)}, {"fc1": np.ones(2), "fc2": np.ones(2)}]}
    >>> [block["fc2"].tolist() for block in zero_residual(tree, family="fc2")["blocks"]]
    [[0.0, 0.0], [0.0, 0.0]]
    """
    memory = Memory(tree)
    given = identities.rules_of(family)
    calls: dict[int, Call] = {}
    for run in numbered.find(memory, layers):
        config = configuration(tree, run.parent)
        model_type = sections.model_type(config, len(run.numbers), run.parent) if config else None
        for number in run.numbers:
            where, names = numbered.layer(memory.index, run, number)
            rules = given
            if rules is None:
                assert isinstance(family, str)
                leaves = [memory.index.pieces(n)[len(run.parent) + 1 :] for n in numbered.leaves_below(names)]
                rules = values(identities.family_of(modules_of(leaves), family, model_type))
            calls |= identities.calls(memory, names, rules, where, strict=given is not None)
    return memory.edited(calls)  # type: ignore[no-any-return]


def fixup(tree: T, *, layers: str | Sequence[str], head: str | None = None) -> T:
    """A new tree in which the weights of a residual network without norms are scaled by Fixup (arXiv:1901.09321).

    With L blocks and m weights in each block: the last weight of a block is zero, the others are multiplied by
    L ** (-1 / (2 m - 2)), and biases of blocks and the classifier are zero. Weights are leaves of two or more axes, in
    tree order. The scalar biases and multipliers of Fixup are parts of the network: leaves of one scalar stay as they
    are. The last weights and the classifier receive gradients first, the others once these have moved.

    Args:
        tree: the initial parameters (He initialization).
        layers: the blocks, as in `pm.deepen`, or several such selectors, whose blocks are counted together.
        head: a selector of the leaves of the classifier.

    Raises:
        NoMatch: there are no such blocks, or no such leaves.
        Unsupported: a block has fewer than two weights.

    >>> block = {"w1": np.ones((2, 2)), "w2": np.ones((2, 2))}
    >>> new = fixup({"blocks": [block, block, block, block]}, layers="blocks[*]")
    >>> new["blocks"][0]["w1"].tolist(), new["blocks"][0]["w2"].tolist()
    ([[0.5, 0.5], [0.5, 0.5]], [[0.0, 0.0], [0.0, 0.0]])
    """
    memory = Memory(tree)
    texts = [layers] if isinstance(layers, str) else list(layers)
    blocks: dict[str, list[int]] = {}
    for text in texts:
        for run in numbered.find(memory, text):
            for number in run.numbers:
                where, names = numbered.layer(memory.index, run, number)
                blocks[where] = memory.index.ordered(numbered.leaves_below(names))
    calls: dict[int, Call] = {}
    for path, found in blocks.items():
        weights = [n for n in found if memory.spec(n).ndim >= 2]
        if len(weights) < 2:
            why = f"{path} has {wording.plural(len(weights), 'weight')}, and Fixup scales blocks of two or more"
            raise Unsupported(why, hint=f'pm.at(tree, "{path}/**").zero()')
        scale = len(blocks) ** (-1 / (2 * len(weights) - 2))
        calls |= dict.fromkeys((n for n in found if memory.spec(n).size > 1), Call(OPS["zero"]))
        calls |= dict.fromkeys(weights[:-1], Call(OPS["multiply"], {"value": scale}))
    if head is not None:
        chosen: Mapping[int, Call] = dict.fromkeys(parse(head).find(memory.index.names), Call(OPS["zero"]))
        if not chosen:
            raise NoMatch(f"head={head!r} matches no leaf", hint='head="**/fc/*"')
        calls |= chosen
    return memory.edited(calls)  # type: ignore[no-any-return]
