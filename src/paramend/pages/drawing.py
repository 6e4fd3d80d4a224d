"""Drawings: the map of a page as a matplotlib figure, for papers and slides."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from paramend._optional import need
from paramend.leaves.leaves import separator_of
from paramend.pages.page import COLOURS, Page, Scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# The same textures and greys as on the page.
_QUIET, _NODE = "#c6cdd4", "#eef1f4"
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
    are coloured by their groups, which also have textures, or by the column that colours the page, with its scale."""
    figures: Any = need("matplotlib.figure", extra="plot", to="draw a report")
    patches: Any = need("matplotlib.patches", extra="plot", to="draw a report")
    root = _tree(page)
    depth = min(root.depth, 8)
    figure: Figure = figures.Figure(figsize=(10, 1.2 + 0.5 * depth), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(depth, 0))
    axes.axis("off")
    axes.set_title("\n".join(filter(None, (page.of, page.headline))), loc="left", fontsize=9, parse_math=False)
    styles = _styles(page)
    shades = _shades(page, figure)
    for node, left, width, level in _boxes(root, 0.0, 1.0, 0):
        leaf = node.leaf >= 0
        height = depth - level if leaf else 1
        style = styles[page.groups[node.leaf] if page.groups else ""] if leaf else {"facecolor": _NODE}
        if leaf and shades:
            style = {"facecolor": shades[node.leaf]}
        box = patches.Rectangle((left, level), width, height, edgecolor="white", linewidth=0.4, **style)
        axes.add_patch(box)
        if width > 0.012 * len(node.name):
            text = axes.text(
                left + width / 2, level + 0.5, node.name, ha="center", va="center", fontsize=7, parse_math=False
            )
            text.set_clip_path(box)
            text.set_color(_ink(box.get_facecolor()))
            if style.get("hatch"):
                text.set_bbox({"facecolor": style["facecolor"], "edgecolor": "none", "pad": 0.6})
    if page.groups and not shades:
        keys = [patches.Patch(**styles[name], edgecolor="white", label=name) for name in page.legend]
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


def _styles(page: Page) -> dict[str, dict[str, Any]]:
    """Colour and texture by group."""
    styles = {"": (COLOURS[1], 0), **dict(zip(page.legend, page.styles, strict=True))}
    return {name: {"facecolor": colour or _QUIET, "hatch": _TEXTURES[kind]} for name, (colour, kind) in styles.items()}


def _ink(colour: tuple[float, ...]) -> str:
    """Black or white, whichever can be read on a colour."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    return "black" if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.179 else "white"


def _shades(page: Page, figure: "Figure") -> list[str]:
    """A colour for each leaf by the column that colours the page, and its scale in the figure; empty if the groups
    colour it."""
    column = next((column for column in page.columns if column.name == page.colour), None)
    scale = None if column is None else Scale.of(column.values)
    if column is None or scale is None:
        return []
    matplotlib: Any = need("matplotlib", extra="plot", to="draw a report")
    colours: Any = need("matplotlib.colors", extra="plot", to="draw a report")
    signed = colours.LinearSegmentedColormap.from_list("signed", (COLOURS[1], _QUIET, COLOURS[0]))
    norm = (colours.LogNorm if scale.kind == "log" else colours.Normalize)(scale.low, scale.high, clip=True)
    ramp = matplotlib.cm.ScalarMappable(norm, signed if scale.kind == "signed" else "viridis_r")
    figure.colorbar(ramp, ax=figure.axes, location="bottom", fraction=0.06, aspect=60, label=page.colour)
    known = [max(value, scale.low) if isinstance(value, int | float) else None for value in column.values]
    return [_NODE if value is None else colours.to_hex(ramp.to_rgba(value)) for value in known]
