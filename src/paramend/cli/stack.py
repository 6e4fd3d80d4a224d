"""The commands that change the form of layers: `stack`, `unstack`."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from paramend import _text
from paramend.checkpoints import Checkpoint
from paramend.checkpoints import open as open_checkpoint
from paramend.cli.writing import RECORD, carry_out
from paramend.reports import Line, Report, Section
from paramend.specs import Spec
from paramend.stacking import stack_layers, unstack_layers


@dataclass(frozen=True, repr=False)
class _Told(Report):
    """What becomes of the leaves: those that go, and those that come in their place."""

    old: Checkpoint
    new: Checkpoint

    def headline(self) -> str:
        """How many there are before and after."""
        before = _text.plural(len(self.old), "leaf", "leaves")
        return f"{before} before, {len(self.new):,} after"

    def sections(self) -> list[Section]:
        """The leaves by their paths."""
        return [_section("from", _alone(self.old, self.new)), _section("to", _alone(self.new, self.old))]

    def to_dict(self) -> dict[str, Any]:
        """The paths, with what is known of the new ones."""
        gone, come = _alone(self.old, self.new), _alone(self.new, self.old)
        made = [{"path": path, "dtype": spec.dtype, "shape": list(spec.shape)} for path, spec in come.items()]
        return {"from": list(gone), "to": made, "kept": len(self.new) - len(made)}


def _alone(here: Checkpoint, there: Checkpoint) -> dict[str, Spec]:
    """The leaves that one of two checkpoints has and the other has not: path → spec."""
    other = {there.index.path(number) for number in there.index.numbers}
    paths = {here.index.path(number): number for number in here.index.numbers}
    return {path: here.spec(number) for path, number in paths.items() if path not in other}


def _section(title: str, leaves: Mapping[str, Spec]) -> Section:
    return Section(title, [Line((path,), (str(spec),)) for path, spec in leaves.items()])


def _options(into: dict[str, Any]) -> Callable[[Callable[..., Any]], Any]:
    """The options of both commands."""
    rows: list[tuple[tuple[str, ...], dict[str, Any]]] = [
        (("--into",), {"metavar": "PATTERN", **into}),
        (("--axis",), {"type": int, "default": 0, "show_default": True, "help": "The axis of the layers."}),
        (("--like",), {"type": click.Path(path_type=Path), "help": "A checkpoint whose shapes tell the axis."}),
        (("-o", "--out"), {"metavar": "OUT", "help": "The file or directory to write."}),
        (("--max-shard-size",), {"metavar": "SIZE", "help": 'The most bytes of tensors in one file, such as "5GB".'}),
        (("--record",), {"is_flag": True, "help": RECORD}),
        (("--force",), {"is_flag": True, "help": "Replace OUT if it exists."}),
        (("--dry-run",), {"is_flag": True, "help": "Show what would be made, and write nothing."}),
        (("--json", "as_json"), {"is_flag": True, "help": "Print data as JSON."}),
    ]

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for names, said in reversed(rows):
            command = click.option(*names, **said)(command)
        return command

    return add


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("layers")
@_options({"help": "The path of the stack, by default that of the layers without the number."})
def stack(path: Path, layers: str, **options: Any) -> None:
    """Write a checkpoint whose numbered layers are one stack, as nn.scan holds them.

    LAYERS is the path of the layers with a number in it: 'params/layers_<n>', 'model.layers.<n>'. Along axis 0 bytes
    are copied; along any other one leaf at a time is put together in memory.

    Exit status: 0 done; 2 there are no such layers, they differ, a file is unreadable or damaged, or OUT cannot be
    written.
    """
    _write(path, stack_layers, layers, **options)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("layers", metavar="STACK")
@_options({"required": True, "help": "The path of the layers with a number in it: 'params/layers_<n>'."})
def unstack(path: Path, layers: str, **options: Any) -> None:
    """Write a checkpoint in which the layers of a stack are side by side under numbered names.

    STACK is the path of the stack: 'params/layers'. Along axis 0 bytes are copied; along any other each layer is cut
    in memory out of its leaf.

    Exit status: 0 done; 2 there is no such stack, its leaves do not hold as many layers each, a file is unreadable or
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
    out: str | None,
    max_shard_size: str | None,
    record: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    if out is None and not dry_run:
        raise click.UsageError("-o OUT is needed.")
    with ExitStack() as opened:
        old = opened.enter_context(open_checkpoint(path))
        other = None if like is None else opened.enter_context(open_checkpoint(like))
        new = verb(old, layers, into=into, axis=axis, like=other)
        carry_out(
            new.plan,
            path,
            out,
            force=force,
            dry_run=dry_run,
            as_json=as_json,
            max_shard_size=max_shard_size,
            record="" if record else None,
            told=_Told(old, new),
        )
