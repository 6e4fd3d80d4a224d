"""Blocks that predict further tokens: configurations count them apart, and their numbers follow those of layers."""

from collections.abc import Iterator
from pathlib import Path

from paramend.anatomy.sections import config_beside, counted
from paramend.formats.source import Source
from paramend.leaves.paths import Names, number_of, text_of


def mark_blocks(source: Source, path: Path) -> None:
    """Mark the blocks among the numbered layers of a checkpoint, so that positions such as `[-1]` do not count them.

    The configuration in its folder says how many layers there are. A damaged one says nothing here: whoever needs it
    reports it.
    """
    config = config_beside(path)
    for layers, blocks in dict.fromkeys(counted(config)):
        for place in list(_places(source.index.names, (), layers, blocks)):
            source.index.mark(place, layers)


def _places(names: Names, path: tuple[str, ...], layers: int, blocks: int) -> Iterator[tuple[str, ...]]:
    """Where entries are numbered as so many layers with blocks after them."""
    numbers: set[int] = set()
    for label, child in names.items():
        if type(child) is not int:
            text = text_of(label)
            number = number_of(text)
            if number is None:
                yield from _places(child, (*path, text), layers, blocks)
            else:
                numbers.add(number)
    if path and {layers - 1, layers} <= numbers and max(numbers) < layers + blocks:
        yield path
