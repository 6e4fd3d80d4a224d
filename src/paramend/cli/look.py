"""`paramend show`: what a checkpoint holds."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paramend.cli import _ui
from paramend.cli.choosing import EXCEPT, chosen
from paramend.cli.opening import open_checkpoint
from paramend.cli.options import ADDRESS, takes
from paramend.edits.weights import Weights, is_coded, weighed
from paramend.formats.safetensors import RECORD
from paramend.formats.source import Source
from paramend.leaves.paths import natural
from paramend.reports import wording
from paramend.reports.fields import data_of
from paramend.reports.progress import Meter
from paramend.reports.report import Line, fold
from paramend.reports.tables import aligned

if TYPE_CHECKING:
    from paramend.evidence.measures import Measures

# A table shows at most this many entries of metadata, and this many characters of each.
_ENTRIES, _WIDTH = 20, 200


@click.command()
@click.argument("path", type=ADDRESS)
@click.argument("selectors", metavar="[SELECTOR]...", nargs=-1)
@click.option("--except", "excepts", **EXCEPT)
@click.option(
    "--stats", is_flag=True, help="Read the values and show their min, max, mean, std, L2 norm, zeros, NaNs and infs."
)
@click.option("--all", "every", is_flag=True, help="Print a line for each leaf, even if layers agree.")
@click.option(
    "--anatomy", is_flag=True, help="Show layers, experts, heads, widths, vocabulary, ties and parts instead."
)
@takes("html", "json", html="Write the anatomy as an HTML page too.")
def show(
    path: Path,
    selectors: tuple[str, ...],
    excepts: tuple[str, ...],
    stats: bool,
    every: bool,
    anatomy: bool,
    html: Path | None,
    as_json: bool,
) -> None:
    """List the leaves of a checkpoint, or those that a SELECTOR matches; layers that agree share a line.

    PATH is a file or a directory; the format is detected from its content.

    Only the header is read, unless --stats is given. A quantised weight is one leaf, with its scheme, the size of its
    blocks and the shape that it has as floats; --raw lists what it is stored in. Mean, std and norm are of the finite
    values. Numbers that JSON lacks are printed as the strings "NaN", "Infinity" and "-Infinity".

    Exit status: 0 done; 2 an unreadable or damaged file, or a selector that matches nothing.
    """
    if (html is not None and not anatomy) or (anatomy and (selectors or excepts or stats or every)):
        raise click.UsageError("--anatomy is of the whole model, and --html is for --anatomy.")
    with open_checkpoint(path) as checkpoint:
        if anatomy:
            from paramend.checkpoints.anatomy import anatomy as anatomy_of  # only for --anatomy

            _ui.check_page(html)
            _ui.tell(anatomy_of(checkpoint), checkpoint.path, page=html, as_json=as_json)
            return
        seen = weighed(checkpoint)
        file: Any = seen if isinstance(seen, Weights) else checkpoint.source
        numbers = chosen(selectors, excepts).numbers(file) if selectors or excepts else file.index.numbers
        # In the file `layers.10` comes before `layers.2`.
        numbers = sorted(numbers, key=lambda number: natural(file.index.path(number)))
        found: dict[int, Measures | str] = {}
        if stats:
            with _ui.bar(f"reading {path.name}") as progress:
                from paramend.evidence.stats import measured  # only for --stats

                found = measured(seen, numbers, Meter(progress, sum(map(file.nbytes, numbers))))
        if as_json:
            _ui.emit(_data(checkpoint.source, file, numbers, found))
        else:
            _ui.show_lines(_table(checkpoint.source, file, numbers, found, every=every or stats), header=True)


def _data(source: Source, file: Any, numbers: list[int], found: "dict[int, Measures | str]") -> dict[str, Any]:
    leaves = []
    for number in numbers:
        spec = file.spec(number)
        leaf: dict[str, Any] = {
            "path": file.index.path(number),
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "nbytes": file.nbytes(number),
        }
        if is_coded(file, number):
            leaf |= {"scheme": file.weight(number).codec.scheme, "stored": [*map(_named(file), file.members(number))]}
        if number in found:
            measures = found[number]
            leaf["stats"] = None if isinstance(measures, str) else data_of(measures)
        leaves.append(leaf)
    return {
        "path": str(source.path),
        "format": source.format or None,
        "metadata": {key: _plain(value) for key, value in source.metadata.items()},
        "leaves": leaves,
        "count": len(numbers),
        "size": sum(file.spec(number).size for number in numbers),
        "nbytes": sum(map(file.nbytes, numbers)),
    }


def _table(
    source: Source, file: Any, numbers: list[int], found: "dict[int, Measures | str]", *, every: bool
) -> list[str]:
    leaves = []
    known: dict[Any, tuple[str, str]] = {}  # most leaves are like others, and there may be 100,000
    for number in numbers:
        spec = file.spec(number)
        codec = file.weight(number).codec if is_coded(file, number) else None
        dtype = f"{codec.scheme} {codec.block}".rstrip() if codec else spec.dtype
        cells = known.setdefault((dtype, spec.shape), (dtype, f"[{','.join(map(str, spec.shape))}]"))
        leaves.append(Line((file.index.path(number),), cells, file.nbytes(number)))
    if not every:
        leaves = fold(leaves, limit=len(leaves))
    rows: list[tuple[str, ...]] = [("path", "dtype", "shape", "size")]
    rows += [(*line.paths, *line.cells, wording.size(line.size)) for line in leaves]
    if found:
        from paramend.evidence.measures import MEASURES  # only for --stats
        from paramend.evidence.statistics import shown  # only for --stats

        rows[0] += MEASURES
        for place, number in enumerate(numbers, 1):
            rows[place] += tuple(shown(getattr(found[number], name, None)) for name in MEASURES)
    count = wording.plural(len(numbers), "leaf", "leaves")
    if len(numbers) < len(file.index.numbers):
        count = f"{len(numbers):,} of {wording.plural(len(file.index.numbers), 'leaf', 'leaves')}"
    scalars = wording.plural(sum(file.spec(number).size for number in numbers), "scalar")
    total = f"{count}, {scalars}, {wording.size(sum(map(file.nbytes, numbers)))}"
    lines = [*aligned(rows, right="lll" + "r" * len(rows[0])), "", total]
    if source.metadata:
        told = {**source.metadata, **({RECORD: "(see paramend history)"} if RECORD in source.metadata else {})}
        said = [f"{key}={_short(_number(value))}" for key, value in islice(told.items(), _ENTRIES)]
        more = len(source.metadata) - len(said)
        lines += aligned([("metadata", *said, *([f"and {more:,} more"] if more else []))])
    return lines


def _named(file: Weights) -> Callable[[int], str]:
    return file.stored.index.path


def _plain(value: Any) -> Any:
    """A value of a file's metadata as JSON can hold it; others as text."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return _short(value) if (number := _number(value)) is value else number


def _number(value: Any) -> Any:
    """A number of numpy as one of Python, with no more digits than it needs; an array as a list."""
    if not hasattr(value, "tolist"):
        return value
    return (
        [_number(each) for each in value]
        if value.ndim
        else float(str(value))
        if value.dtype.kind == "f"
        else value.item()
    )


def _short(value: Any) -> str:
    """A value of a file's metadata as one cell of a table."""
    text = value if isinstance(value, str) else f"{len(value):,} bytes" if isinstance(value, bytes) else repr(value)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."
