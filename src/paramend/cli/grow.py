"""The commands that make a model of another depth, or with experts: `deepen`, `experts`, `upcycle`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from paramend.cli.opening import open_checkpoint
from paramend.cli.options import ADDRESS, makes, numbers, one_of
from paramend.cli.recipe import keyed
from paramend.cli.writing import write_made
from paramend.disk.urls import path_of
from paramend.growth import depth, numbered
from paramend.growth.deepening import deepen as deepen_model
from paramend.growth.depth import Order, order_of
from paramend.growth.experts import experts as experts_of
from paramend.growth.upcycling import upcycle as upcycled
from paramend.recipes.donors import read_npy


def _values(ctx: click.Context, option: click.Parameter, given: tuple[str, ...]) -> Any:
    """Selector → the value that its leaves get, 0 by default; or the name of a family."""
    if len(given) <= 1 and not any("=" in text for text in given):
        return given[0] if given else "auto"
    found: dict[str, float] = {}
    for text in given:
        selector, _, value = text.partition("=")
        try:
            found[selector] = float(value or 0)
        except ValueError:
            raise click.BadParameter(f"{text!r} is not SELECTOR=VALUE; write 'mlp.down_proj.*=0'") from None
    return found


# Option → the order that it makes for a model of n layers.
_ORDERS: dict[str, Callable[[int, Any], Order]] = {
    "blocks": lambda n, count: depth.blocks(n, count=count),
    "stack": lambda n, times: depth.stack(n, times),
    "interleave": lambda n, times: depth.interleave(n, times),
    "overlap": lambda n, drop: depth.overlap(n, drop),
    "drop": lambda n, layers: depth.drop(n, layers=layers),
    "order": lambda n, sources: order_of(sources, n),
}


@click.command()
@click.argument("path", type=ADDRESS)
@click.option("--blocks", type=int, metavar="COUNT", help="Insert COUNT identity layers, spread evenly (LLaMA-Pro).")
@click.option("--stack", type=int, metavar="TIMES", help="Put TIMES copies of the whole stack on each other (G_stack).")
@click.option("--interleave", type=int, metavar="TIMES", help="Put TIMES copies of each layer in its place.")
@click.option("--overlap", type=int, metavar="DROP", help="All but the last DROP, then all but the first (SOLAR).")
@click.option("--drop", callback=numbers, metavar="LAYERS", help="Leave layers out: 3,4.")
@click.option("--order", callback=numbers, metavar="LAYERS", help="The old layer of each new one: 0,1,1,2.")
@click.option(
    "--layers", metavar="LAYERS", help="Which layers, such as 'model.layers[*]', if the model has several lists."
)
@click.option(
    "--identity",
    multiple=True,
    callback=_values,
    metavar="NAME|SELECTOR[=VALUE]",
    help="How a layer becomes the identity: the name of a family, or leaves of a layer with the value that they get, "
    "such as 'mlp.down_proj.*'; may be repeated. Known families do not need it.",
)
@click.option(
    "--set",
    "config",
    multiple=True,
    callback=keyed,
    metavar="KEY=VALUE",
    help="What config.json says in OUT, where that is not to follow from the order; VALUE is JSON, dots in KEY lead "
    "into parts; may be repeated. With it, or with --set none, layers also go to places that had other leaves.",
)
@makes("what each layer would be made of")
def deepen(path: Path, layers: str | None, identity: Any, config: dict[str, Any] | None, **options: Any) -> None:
    """Write the model in PATH with its layers repeated, left out, or in another order.

    With --blocks the new layers are the identity: the model computes what it did, and has more to train. With the other
    orders it computes something else. config.json follows: the number of layers, and what it says of single layers.
    Kinds of layers that it tells by their numbers are written out; where it cannot say them, the order is refused.

    Exit status: 0 done; 2 an unreadable or damaged file, an order that does not fit, a family in which no layer can be
    the identity, or an OUT that cannot be written.
    """
    name, value = one_of(options, *_ORDERS)
    with open_checkpoint(path) as checkpoint:
        count = len(numbered.find(checkpoint, layers)[0].numbers)
        order = _ORDERS[name](count, value)
        made, report = deepen_model(checkpoint, layers=layers, order=order, identity=identity, config=config)
        write_made(made, path, report, **options)


def _ids(ctx: click.Context, option: click.Parameter, text: str | None) -> Any:
    """Experts, or a map from layers to those of each."""
    if text is None or not text.lstrip().startswith("{"):
        return numbers(ctx, option, text)
    try:
        return json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not JSON: {error}") from None


_IDS = '0,3,8-15, or as JSON for each layer: \'{"0": [3, 5], "1": [0, 5]}\''


@click.command()
@click.argument("path", metavar="MODEL", type=ADDRESS)
@click.option("--keep", callback=_ids, metavar="IDS", help=f"The experts that stay, in this order: {_IDS}.")
@click.option("--drop", callback=_ids, metavar="IDS", help="The experts that are left out, in the same form.")
@click.option("--duplicate", type=int, metavar="TIMES", help="Put each expert there TIMES times.")
@makes("which experts each layer would have")
def experts(path: Path, **options: Any) -> None:
    """Write the model in MODEL with some of its experts, or with each several times.

    The router, its biases, scales of quantised experts and config.json follow. With --keep and --drop the model
    computes what it does where the router never chooses the others; with --duplicate, where a token goes to TIMES times
    as many, what it did.

    Exit status: 0 done; 2 there is no such expert, fewer would be left than a token goes to, groups of experts would
    differ, it is not known what counts experts, a file is unreadable or damaged, or OUT cannot be written.
    """
    name, value = one_of(options, "keep", "drop", "duplicate")
    with open_checkpoint(path) as checkpoint:
        made, report = getattr(experts_of(checkpoint), name)(value)
        write_made(made, path, report, **options)


@click.command()
@click.argument("path", metavar="MODEL", type=ADDRESS)
@click.option("--experts", type=int, required=True, help="How many experts each layer gets.")
@click.option("--top-k", type=int, required=True, help="How many of them a token goes to.")
@click.option("--router", default="random", metavar="random|FILE", help="An .npy file: the weight of all routers.")
@click.option("--drop", type=float, default=0.0, help="The share of hidden units that are drawn anew in each expert.")
@click.option("--seed", type=int, default=0, help="Of all that is drawn.")
@makes("what would be made")
def upcycle(path: Path, experts: int, top_k: int, router: Any, drop: float, seed: int, **options: Any) -> None:
    """Write the dense model in MODEL as a mixture of experts, each a copy of its MLP.

    Llama and Mistral become Mixtral, Qwen2 and Qwen3 their MoE; config.json follows. The mixture computes what the
    model did, unless --drop draws units anew, without which the router gets no gradient.

    Exit status: 0 done; 2 no mixture is known for the family, a number does not fit, weights are quantised, a file is
    unreadable or damaged, or OUT cannot be written.
    """
    with open_checkpoint(path) as checkpoint:
        router = read_npy(path_of(router)) if str(router).endswith(".npy") else router
        made, report = upcycled(checkpoint, experts=experts, top_k=top_k, router=router, drop=drop, seed=seed)
        write_made(made, path, report, **options)
