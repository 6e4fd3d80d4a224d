"""Runs the scenarios, each in fresh processes, and prints their tables.

`--write` puts them into bench/README.md, and from there the four lines of costs into README.md.

`bench/run.py` runs those in memory. Those on disk take half an hour: `bench/disk.py --save figures.json` measures them,
and `bench/run.py --disk figures.json` makes their table of it.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import disk

HERE = Path(__file__).parent
SIZES = (20, 10_000, 50_000)
FIGURES, README = HERE / "README.md", HERE.parent / "README.md"
PEERS = json.loads((HERE / "comparison.json").read_text())


def run(*command):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def tables():
    found = [run(HERE / "editing.py", size) for size in SIZES]
    rows = [
        "Zero one leaf of a tree, time as a ratio to the hand-written `tree_map_with_path` with `keystr`:",
        "",
        "| | " + " | ".join(f"{size:,} leaves" for size in SIZES) + " |",
        "|---|" + "---|" * len(SIZES),
    ]
    rows += [f"| {way} | " + " | ".join(f"{ratios[way]:.2f}" for ratios in found) + " |" for way in found[0]]
    imports = run(HERE / "importing.py")
    bare, ours, jax = imports["paramend"], imports["paramend.at"], imports["jax"]
    says = f"`import paramend` takes {bare:.2f} × the time of `import numpy`, with the first `pm.at` {ours:.2f} ×"
    rows += ["", f"{says} (`import jax`: {jax:.1f} ×)."]
    gigabytes = 4
    diffs = run(HERE / "diffing.py", gigabytes)
    rows += ["", f"Compare two files of {gigabytes} GB in the page cache, time as a ratio to `cmp`:", ""]
    rows += ["| `paramend diff` | time | peak memory |", "|---|---|---|"]
    rows += [f"| {way} | {cost['ratio']:.2f} | {cost['rss']} MB |" for way, cost in diffs.items()]
    return "\n".join(rows)


def costs(figures):
    """The lines of README.md, made of cells of the tables in bench/README.md, and of the run beside other libraries.

    Args:
        figures: the text of bench/README.md.
    """

    def row(way, heading):
        """The cells of a row of the table that begins at a heading, spreads left out."""
        line = re.search(rf"^\| {re.escape(way)} \|(.*)\|$", figures[figures.index(heading) :], re.MULTILINE)
        return [re.sub(r" \(.*", "", cell.strip()) for cell in line[1].split("|")]

    edit, first = (row(way, "Zero one leaf of a tree")[1] for way in ("pm.at, repeated", "pm.at, first edit"))
    copied = row("paramend zero -o", "**Zero one tensor, new file: `cp` + sync**")
    library, ours = (PEERS["tasks"]["in_place"][tool]["rss"] / 1e6 for tool in ("safetensors", "paramend"))
    size = PEERS["large"] / 1e9
    small, large = (row(f"paramend zero --in-place, {size} GB", "**Zero 100 MB in place") for size in ("0.4", "7.9"))
    lines = (
        f"One leaf of 10,000 in memory: {edit} × the time of a hand-written `tree_map_with_path`, at first {first} ×.",
        f"One tensor of a 4 GB file, into a new file: {copied[0]} × the time of `cp`, in {copied[1]} of memory.",
        f"One tensor of a {size:.0f} GB file in place takes {ours:,.0f} MB of memory, and {library:,.0f} MB where "
        "safetensors loads and saves it.",
        f"100 MB in place, with undo: {small[0]} × the time of writing 200 MB; in a file of 7.9 GB {large[0]} ×.",
    )
    return "\n".join(f"- {line}" for line in lines)


def write(page, name, text):
    """Puts a text between its marks in a page."""
    block = f"<!-- {name} -->\n{text}\n<!-- /{name} -->"
    marks = f"<!-- {name} -->.*?<!-- /{name} -->"
    page.write_text(re.sub(marks, lambda _: block, page.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into bench/README.md, costs into README.md")
    parser.add_argument("--disk", type=Path, help="the figures that bench/disk.py saved")
    options = parser.parse_args()
    name, text = ("bench", tables()) if options.disk is None else ("bench disk", disk.table(options.disk))
    print(text)
    if options.write:
        write(FIGURES, name, text)
        write(README, "costs", costs(FIGURES.read_text()))
