"""Drawings: the map of a page as a matplotlib figure, for papers and slides."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from paramend._optional import need
from paramend.leaves.leaves import separator_of
from paramend.pages.page import Page

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# The same colours (Okabe and Ito) and textures as on the page.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#8a8a8a")
_TEXTURES = ("", "//", "\\\\", "xx", "--", "..")
# Boxes narrower than this share of the whole are left out.
_LEAST = 1 / 1500


@dataclass(slots=True)
class _Node:
    """A subtree or a leaf: its name, its size, what is below it, and its place in the page; -1 for a subtree."""

    name: str
    size: int = 0
    inner: "dict[Any, _Node]" = field(default_factory=dict)
    leaf: int = -1

    @property
    def depth(self) -> int:
        return 1 + max((node.depth for node in self.inner.values()), default=0)


def draw(page: Page) -> "Figure":
    """A matplotlib figure of a page's map: each leaf as wide as it is large, below the subtrees that contain it. Leaves
    are coloured by their groups, which also have textures, or by the column that colours the page."""
    figures: Any = need("matplotlib.figure", extra="plot", to="draw a report")
    patches: Any = need("matplotlib.patches", extra="plot", to="draw a report")
    root = _tree(page)
    depth = min(root.depth, 8)
    figure: Figure = figures.Figure(figsize=(10, 1.2 + 0.5 * depth), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(depth, 0))
    axes.axis("off")
    axes.set_title(page.headline, loc="left", fontsize=9, parse_math=False)
    names = list(dict.fromkeys(page.groups))
    shades = _shades(page)
    for node, left, width, level in _boxes(root, 0.0, 1.0, 0):
        leaf = node.leaf >= 0
        height = depth - level if leaf else 1
        style: dict[str, Any] = {"facecolor": "#e6eaee"}
        if leaf and shades:
            style = {"facecolor": shades[node.leaf]}
        elif leaf:
            place = names.index(page.groups[node.leaf]) if names else 0
            style = {"facecolor": _COLOURS[place % 8], "hatch": _TEXTURES[place % 6]}
        box = patches.Rectangle((left, level), width, height, edgecolor="white", linewidth=0.4, **style)
        axes.add_patch(box)
        if width > 0.012 * len(node.name):
            text = axes.text(
                left + width / 2, level + 0.5, node.name, ha="center", va="center", fontsize=7, parse_math=False
            )
            text.set_clip_path(box)
            if leaf:
                text.set_bbox({"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6})
    if names and not shades:
        keys = [
            patches.Patch(facecolor=_COLOURS[place % 8], hatch=_TEXTURES[place % 6], edgecolor="white", label=name)
            for place, name in enumerate(names)
        ]
        figure.legend(handles=keys, loc="outside lower left", ncols=6, fontsize=8, frameon=False)
    return figure


def _tree(page: Page) -> _Node:
    separator = separator_of(page.paths)
    root = _Node("all leaves")
    for place, (path, size) in enumerate(zip(page.paths, page.sizes, strict=True)):
        node = root
        node.size += max(size, 1)
        for key in path.split(separator):
            node = node.inner.setdefault(key, _Node(key))
            node.size += max(size, 1)
        if node.leaf >= 0:  # two leaves with one path, as in two parts of a report
            node = node.inner.setdefault(place, _Node(node.name, max(size, 1)))
        node.leaf = place
    return root


def _boxes(node: _Node, left: float, width: float, level: int) -> Iterator[tuple[_Node, float, float, int]]:
    yield node, left, width, level
    if level == 7:
        return
    for inner in node.inner.values():
        part = width * inner.size / node.size
        if part >= _LEAST:
            yield from _boxes(inner, left, part, level + 1)
        left += part


def _shades(page: Page) -> list[str]:
    """A colour for each leaf by the column that colours the page; empty if the groups colour it."""
    column = next((column for column in page.columns if column.name == page.colour), None)
    if column is None:
        return []
    matplotlib: Any = need("matplotlib", extra="plot", to="draw a report")
    ramp, to_hex = matplotlib.colormaps["viridis_r"], matplotlib.colors.to_hex
    sizes = [abs(v) if isinstance(v, int | float) and math.isfinite(v) else None for v in column.values]
    most = max((size for size in sizes if size is not None), default=0) or 1
    shades: list[str] = ["#e6eaee" if size is None else to_hex(ramp(size / most)) for size in sizes]
    return shades
