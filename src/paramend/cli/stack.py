"""The commands that make leaves of others: `stack`, `unstack`, `concat`, `interleave`, `split`, `layout`."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click

from paramend.checkpoints import tying
from paramend.checkpoints.assemble import origin_of
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.cli.opening import open_checkpoint
from paramend.cli.options import ADDRESS, makes
from paramend.cli.writing import write_made
from paramend.edits.arguments import SIZES
from paramend.leaves.origins.texts import shortened
from paramend.leaves.specs import Spec
from paramend.mapping import joining
from paramend.mapping.report import Moved
from paramend.pages.page import Page
from paramend.pages.paged import Paged
from paramend.reports import wording
from paramend.reports.fields import picked
from paramend.reports.report import Line, Section
from paramend.stacking.stack import stack_layers, unstack_layers


@dataclass(frozen=True, repr=False)
class _Told(Paged):
    """What becomes of the leaves: those that are removed, and those that replace them."""

    old: Checkpoint
    new: Checkpoint

    @cached_property
    def _made(self) -> list[Moved]:
        """The new leaves, and what they are made of."""
        rows = [row for row in self.new.plan.rows if row.made or not row.stays]
        return [Moved(row.path, row.spec, str(origin_of(self.new, row.source)), ()) for row in rows]

    @cached_property
    def _gone(self) -> dict[str, Spec]:
        """The old leaves whose paths are gone: path → spec."""
        paths = {self.old.index.path(number): number for number in self.old.index.numbers}
        return {path: self.old.spec(number) for path, number in paths.items() if path not in self.new}

    def headline(self) -> str:
        before = wording.plural(len(self.old), "leaf", "leaves")
        return f"{before} before, {len(self.new):,} after"

    def sections(self) -> list[Section]:
        gone = [Line((path,), (str(spec),)) for path, spec in self._gone.items()]
        come = [Line((row.path, shortened(row.origin)), (str(row.spec),)) for row in self._made]
        return [Section("from", gone), Section("to", come)]

    def page(self) -> Page:
        """The result as a map: what is new in it, and what was kept."""
        rows, come = self.new.plan.rows, {row.path for row in self._made}
        groups = ["new" if row.path in come else "kept" for row in rows]
        return Page.of_rows("leaves", self.headline(), rows, "spec", groups=groups)

    def to_dict(self) -> dict[str, Any]:
        made = [picked(row, "path", "spec.dtype", "spec.shape", "origin") for row in self._made]
        return {"from": list(self._gone), "to": made, "kept": len(self.new) - len(made)}


def _axis(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for the axis of the layers, and those of all commands that make a checkpoint."""
    like = click.option("--like", type=ADDRESS, help="A checkpoint whose shapes determine the axis.")
    axis = click.option("--axis", type=int, default=0, show_default=True, help="The axis of the layers.")
    return axis(like(makes("what would be made")(command)))


@click.command()
@click.argument("path", type=ADDRESS)
@click.argument("layers")
@click.option("--into", metavar="PATH", help="The path of the stack, by default that of the layers without the number.")
@_axis
def stack(path: Path, layers: str, **options: Any) -> None:
    """Write a checkpoint whose numbered layers are one stack, as in nn.scan.

    LAYERS are the layers: 'params/layers_<n>', 'model.layers[*]'. Along axis 0 bytes are copied.

    Exit status: 0 done; 2 there are no such layers, they differ, a file is unreadable or damaged, or OUT cannot be
    written.
    """
    _write(path, stack_layers, layers, **options)


@click.command()
@click.argument("path", type=ADDRESS)
@click.argument("layers", metavar="STACK")
@click.option(
    "--into", required=True, metavar="PATTERN", help="The path of the layers with a number: 'params/layers_<n>'."
)
@_axis
def unstack(path: Path, layers: str, **options: Any) -> None:
    """Write a checkpoint with the layers of a stack under numbered names.

    STACK is the path of the stack: 'params/layers'. Along axis 0 bytes are copied.

    Exit status: 0 done; 2 there is no such stack, its leaves hold different numbers of layers, a file is unreadable or
    damaged, or OUT cannot be written.
    """
    _write(path, unstack_layers, layers, **options)


def _write(
    path: Path,
    verb: Callable[..., Checkpoint],
    layers: str,
    *,
    into: str | None,
    axis: int,
    like: Path | None,
    **options: Any,
) -> None:
    with ExitStack() as opened:
        old = opened.enter_context(open_checkpoint(path))
        other = None if like is None else opened.enter_context(open_checkpoint(like))
        new = verb(old, layers, into=into, axis=axis, like=other)
        write_made(new, path, _Told(old, new), **options)


_ALONG = click.option("--axis", type=int, default=0, show_default=True, help="The axis.")


def _joins(verb: Callable[..., Checkpoint], how: str) -> click.Command:
    @click.command(
        verb.__name__,
        help=f"""Write a checkpoint in which several leaves are one, {how}.

        A LEAF is a selector; with a number, as in 'layers.<n>.q.weight', one leaf is made for each.

        Exit status: 0 done; 2 a leaf is missing, they do not fit together, a file is unreadable or damaged, or OUT
        cannot be written.
        """,
    )
    @click.argument("path", type=ADDRESS)
    @click.argument("leaves", metavar="LEAF...", nargs=-1, required=True)
    @click.option("--into", required=True, metavar="NEW", help="The path of the new leaf, with the same wildcards.")
    @_ALONG
    @makes("what would be made")
    def command(path: Path, leaves: Sequence[str], into: str, axis: int, **options: Any) -> None:
        rewrite(path, lambda old: verb(old, leaves, into=into, axis=axis), options)

    return command


concat = _joins(joining.concat, "one after the other along an axis")
interleave = _joins(joining.interleave, "their places along an axis in turns")


@click.command()
@click.argument("path", type=ADDRESS)
@click.argument("leaf")
@click.option("--into", required=True, multiple=True, metavar="NEW", help="The path of a part; repeat it for each.")
@click.option("--sizes", metavar="N,N,...", help="The length of each part along the axis; by default all are equal.")
@_ALONG
@makes("what would be made")
def split(path: Path, leaf: str, into: Sequence[str], sizes: str | None, axis: int, **options: Any) -> None:
    """Write a checkpoint in which a leaf is cut into several along an axis.

    LEAF is a selector; with a number, as in 'layers.<n>.qkv.weight', each leaf that it matches is cut.

    Exit status: 0 done; 2 there is no such leaf, the sizes do not fit, a file is unreadable or damaged, or OUT cannot
    be written.
    """
    lengths = None if sizes is None else SIZES.read(sizes)
    rewrite(path, lambda old: joining.split(old, leaf, into=into, axis=axis, sizes=lengths), options)


def rewrite(path: Path, verb: Callable[[Checkpoint], Checkpoint], options: Mapping[str, Any]) -> None:
    """Write what a verb makes of a checkpoint, and print which leaves went and which came."""
    with open_checkpoint(path) as old:
        new = verb(old)
        write_made(new, path, _Told(old, new), **options)


@click.command()
@click.argument("layout", metavar="NAME|FILE")
@click.argument("path", type=ADDRESS, metavar="MODEL")
@click.option("--back", is_flag=True, help="From right to left: the other way of storing the model to the first.")
@click.option(
    "--set", "numbers", multiple=True, metavar="NAME=NUMBER", help="A number that config.json lacks; may be repeated."
)
@makes("what would be made")
def layout(layout: str, path: Path, back: bool, numbers: Sequence[str], **options: Any) -> None:
    """Write a checkpoint stored another way, by the rules of a layout.

    NAME is one of those that ship, such as 'mixtral_4_to_5'; FILE is a YAML file of your own. Numbers that it needs,
    such as num_attention_heads, are read from config.json.

    Exit status: 0 done; 2 there is no such layout, a leaf is taken by no rule or by two, a number is not known, a file
    is unreadable or damaged, or OUT cannot be written.
    """
    from paramend.mapping.layout import (
        Layout,  # the other commands here have no rules
        layout as named_layout,
    )

    rules = Layout.load(layout) if layout.endswith((".yaml", ".yml", ".json")) else named_layout(layout)
    given = dict(map(_number, numbers))
    rewrite(path, lambda old: (rules.back(old, **given) if back else rules.to(old, **given))[0], options)


def _number(text: str) -> tuple[str, int]:
    name, equals, number = text.partition("=")
    if not name or not equals or not number.isdecimal():
        raise click.BadParameter(f"{text!r} is not NAME=NUMBER; write --set num_attention_heads=8")
    return name, int(number)


@click.command()
@click.argument("path", metavar="MODEL", type=ADDRESS)
@click.option("--head", metavar="LEAF", help="The path of the head's weight, where it has none of the usual names.")
@click.option("--keep", type=click.Choice(["embedding", "head"]), help="Whose values stay if they differ.")
@makes("what would be made")
def tie(path: Path, head: str | None, keep: Any, **options: Any) -> None:
    """Write a checkpoint whose head is its embedding; config.json follows.

    Exit status: 0 done; 2 there is no head with a weight of its own, the two differ, a file is unreadable or damaged,
    or OUT cannot be written.
    """
    rewrite(path, lambda old: tying.tie(old, head=head, keep=keep)[0], options)


@click.command()
@click.argument("path", metavar="MODEL", type=ADDRESS)
@click.option("--head", metavar="LEAF", help="The path that the head's weight gets, where the family is not known.")
@makes("what would be made")
def untie(path: Path, head: str | None, **options: Any) -> None:
    """Write a checkpoint whose head has a weight of its own, a copy of its embedding; config.json follows.

    Exit status: 0 done; 2 nothing is tied, a file is unreadable or damaged, or OUT cannot be written.
    """
    rewrite(path, lambda old: tying.untie(old, head=head)[0], options)
