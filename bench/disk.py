"""Edits of checkpoints on disk against `cp`.

Every run is a process of its own, start-up included, and ends when its output is durable; ways take turns. What is
printed of each way: the ratio of its median time to that of the reference, in brackets the lowest and the highest ratio
within a round; and the kernel's own figures of the last run: peak RSS, and bytes that went through write calls.
"""

import argparse
import compileall
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import models

HERE = Path(__file__).parent
LONG = 15  # seconds from which on three rounds do
TENSOR = "model.layers[-1].mlp.down_proj.weight"


class Way:
    """One way of doing a thing.

    Attributes:
        name: as the table has it.
        command: what is run and measured.
        after: what is done after it, unmeasured: it removes the output.
        before: what is done before it, unmeasured.
    """

    def __init__(self, name, command, after=lambda: None, before=lambda: None):
        self.name, self.command, self.after, self.before = name, list(map(str, command)), after, before
        self.seconds, self.rss, self.written = [], 0, 0

    def run(self):
        self.before()
        os.sync()
        start = time.perf_counter()
        process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        os.set_blocking(process.stderr.fileno(), True)
        said = process.stderr.read()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its figures stay until it is reaped
        self.seconds.append(time.perf_counter() - start)
        counts = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{self.name}: {' '.join(self.command)}\n{said.decode()}")
        self.rss, self.written = usage.ru_maxrss * 1024, int(counts["wchar"])
        self.after()


def compare(ways, rounds):
    """Rows of figures; the first way is the reference."""
    for turn in range(rounds):
        for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:  # none is always the one after another
            if turn < 3 or median(way.seconds) < LONG:
                way.run()
        print(".", end="", file=sys.stderr, flush=True)
    reference = ways[0]
    rows = []
    for way in ways:
        both = list(zip(way.seconds, reference.seconds, strict=False))  # the rounds in which both ran
        mine, theirs = zip(*both, strict=True)
        pairs = [a / b for a, b in both]
        rows.append(
            {
                "way": way.name,
                "ratio": round(median(mine) / median(theirs), 3),
                "lowest": round(min(pairs), 3),
                "highest": round(max(pairs), 3),
                "seconds": round(median(way.seconds), 3),
                "rounds": len(way.seconds),
                "rss": way.rss,
                "written": way.written,
            }
        )
        print(" ", rows[-1], file=sys.stderr)
    return rows


def remove(*paths):
    def act():
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    return act


def paramend(*args):
    return [sys.executable, "-m", "paramend", *args]


def cp(source, out):
    return ["sh", "-c", 'cp "$1" "$2" && sync "$2"', "sh", source, out]


class Bench:
    """The folder that models are made in, and what is asked for."""

    def __init__(self, folder, options):
        self.folder, self.options = folder, options
        self.layers = models.layers_of(options.size)

    def model(self, nbytes=None):
        """A folder with one file; its size is about so many bytes."""
        layers = self.layers if nbytes is None else models.layers_of(nbytes)
        folder = self.folder / f"one-{layers}"
        if not folder.exists():
            models.make(models.make_one, folder, layers)
        return folder

    def compare(self, *ways):
        return compare(ways, self.options.rounds)

    # -- the scenarios

    def new_file(self):
        """Zero one tensor, new file: `cp` + sync"""
        source, out = self.model() / "model.safetensors", self.folder / "out.safetensors"
        gone = remove(out)
        return self.compare(
            Way("cp + sync", cp(source, out), gone),
            Way("paramend zero -o", paramend("zero", source, TENSOR, "-o", out), gone),
        )

    def full_cache(self):
        """Zero one tensor, new file, page cache full: `cp` + sync"""
        source, out, filler = self.model() / "model.safetensors", self.folder / "out.safetensors", self.folder / "holes"
        with filler.open("wb") as file:
            file.truncate(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))  # reads as pages of zeros

        def fill():
            for path in (filler, source):
                subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)

        gone = remove(out)
        rows = self.compare(
            Way("cp + sync", cp(source, out), gone, fill),
            Way("paramend zero -o", paramend("zero", source, TENSOR, "-o", out), gone, fill),
        )
        filler.unlink()
        return rows

    def memory(self):
        """Peak RSS of an edit of one tensor of 2 GB (sparse): no reference"""
        source, out = self.folder / "large.safetensors", self.folder / "out.safetensors"
        models.make(models.make_large, source)
        edits = {
            "zero": ("zero", source, "large.weight"),
            "scale": ("scale", source, "large.weight", "0.5"),
            "noise": ("noise", source, "large.weight", "0.1"),
            "cast": ("cast", source, "large.weight", "float32"),
        }
        ways = [Way(name, paramend(*args, "-o", out), remove(out)) for name, args in edits.items()]
        ways.append(
            Way(
                "zero, in place",
                paramend("zero", source, "large.weight", "--in-place"),
                remove(self.folder / ".large.safetensors.undo"),
            )
        )
        rows = compare(ways, 1)
        source.unlink()
        return rows

    def linked(self):
        """Zero one tensor of 4 shards, `--link`: `cp` + sync of the shard"""
        folder, out, copy = self.folder / "shards", self.folder / "out", self.folder / "out.safetensors"
        models.make(models.make_shards, folder, self.layers, 4)
        touched = folder / "model-00004-of-00004.safetensors"
        rows = self.compare(
            Way("cp + sync of the shard", cp(touched, copy), remove(copy)),
            Way("paramend zero --link -o", paramend("zero", folder, TENSOR, "--link", "-o", out), remove(out)),
        )
        shutil.rmtree(folder)
        return rows

    def inserted(self):
        """Insert a tenth into 4 shards: `cp` + sync of the tenth"""
        folder, out, copy = self.folder / "shards", self.folder / "out", self.folder / "out.safetensors"
        models.make(models.make_shards, folder, self.layers, 4)
        donor = self.folder / "head.safetensors"
        models.make(models.make_head, donor, self.options.size / 10)
        insert, renamed = paramend("insert", folder, donor, "**"), ["--rename", "mtp.**=model.mtp.**"]
        undo = list(map(str, paramend("undo", folder)))

        def take_back():
            subprocess.run(undo, check=True, stderr=subprocess.DEVNULL)

        rows = self.compare(
            Way("cp + sync of the tenth", cp(donor, copy), remove(copy)),
            Way("paramend insert --link -o, the file linked too", [*insert, "--link", "-o", out], remove(out)),
            Way("paramend insert --link -o, renamed", [*insert, *renamed, "--link", "-o", out], remove(out)),
            Way("paramend insert --in-place", [*insert, "--in-place"], take_back),
        )
        shutil.rmtree(folder)
        donor.unlink()
        return rows

    def in_place(self):
        """Zero 100 MB in place: 200 MB written and synced"""
        out = self.folder / "written"
        reference = ["dd", "if=/dev/zero", f"of={out}", "bs=1M", "count=192", "conv=fsync", "status=none"]
        ways = [Way("write 200 MB + sync", reference, remove(out))]
        for nbytes in (5e8, self.options.size, 2 * self.options.size):
            path = self.model(nbytes) / "model.safetensors"
            undo = paramend("undo", path)

            def take_back(undo=undo):
                subprocess.run(list(map(str, undo)), check=True, stderr=subprocess.DEVNULL)

            command = paramend("zero", path, "lm_head.weight", "--in-place")
            ways.append(Way(f"paramend zero --in-place, {path.stat().st_size / 1e9:.1f} GB", command, take_back))
        rows = self.compare(*ways)
        for path in self.folder.glob("one-*"):
            if path != self.model():
                shutil.rmtree(path)
        return rows

    def scale(self):
        """Multiply all tensors by 0.5: `cp` + sync"""
        source, out = self.model() / "model.safetensors", self.folder / "out.safetensors"
        gone = remove(out)
        return self.compare(
            Way("cp + sync", cp(source, out), gone),
            Way("paramend scale -o", paramend("scale", source, "**", "0.5", "-o", out), gone),
        )

    def deepen(self):
        """8 identity layers more, new directory: `cp` + sync of the outcome"""
        folder, out, deep = self.model(), self.folder / "out", self.folder / "deep"
        blocks = min(8, self.layers)
        grow = paramend("deepen", folder, "--blocks", blocks, "-o")
        subprocess.run(list(map(str, [*grow, deep])), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        again = ["sh", "-c", 'cp -r "$1" "$2" && find "$2" -type f -exec sync {} +', "sh", deep, out]
        rows = self.compare(
            Way("cp + sync", again, remove(out)),
            Way("paramend deepen", [*map(str, grow), out], remove(out)),
        )
        shutil.rmtree(deep)
        return rows

    def sharing(self):
        """On XFS, which shares blocks: `cp` of all bytes + sync"""
        image, top = self.folder / "xfs", self.folder / "mounted"
        top.mkdir()
        with image.open("wb") as file:
            file.truncate(int(3 * self.options.size) + (1 << 29))
        for command in (["mkfs.xfs", "-q", "-m", "reflink=1", image], ["mount", "-o", "loop", image, top]):
            subprocess.run(list(map(str, command)), check=True)
        try:
            models.make(models.make_one, top / "model", self.layers)
            folder, source, out = top / "model", top / "model" / "model.safetensors", top / "out.safetensors"
            gone, deep = remove(out), top / "deep"
            copy = ["sh", "-c", 'cp --reflink=never "$1" "$2" && sync "$2"', "sh", source, out]
            return self.compare(
                Way("cp + sync", copy, gone),
                Way("paramend zero --dry-run", paramend("zero", source, TENSOR, "--dry-run")),
                Way("paramend zero -o", paramend("zero", source, TENSOR, "-o", out), gone),
                Way("paramend rename -o", paramend("rename", source, "model.**", "decoder.**", "-o", out), gone),
                Way("paramend deepen", paramend("deepen", folder, "--blocks", 1, "-o", deep), remove(deep)),
            )
        finally:
            subprocess.run(["umount", top], check=True)
            image.unlink()

    def experts(self):
        """Experts fused by a layout, 18,432 tensors: `cp` + sync"""
        source, out = self.folder / "experts.safetensors", self.folder / "out.safetensors"
        models.make(models.make_experts, source, self.options.size)
        rows = self.compare(
            Way("cp + sync", cp(source, out), remove(out)),
            Way("paramend layout", paramend("layout", "qwen3_moe_4_to_5", source, "-o", out), remove(out)),
        )
        source.unlink()
        return rows

    def transpose(self):
        """One tensor transposed: `cp` + sync"""
        source, out = self.folder / "square.safetensors", self.folder / "out.safetensors"
        models.make(models.make_square, source, self.options.size)
        rows = self.compare(
            Way("cp + sync", cp(source, out), remove(out)),
            Way("paramend transpose", paramend("transpose", source, "w", "1,0", "-o", out), remove(out)),
        )
        source.unlink()
        return rows

    def show(self):
        """List 100 shards: `python -c 'import numpy'`"""
        folder = self.folder / "hundred"
        models.make(models.make_shards, folder, 100, 100, sparse=True)
        ways = [
            Way("import numpy", [sys.executable, "-c", "import numpy"]),
            Way("paramend show", paramend("show", folder)),
        ]
        rows = compare(ways, max(self.options.rounds, 15))
        shutil.rmtree(folder)
        return rows

    def trillion(self):
        """A trillion parameters, 400 shards, 71,000 tensors (sparse): no reference"""
        folder = self.folder / "trillion"
        models.make(models.make_shards, folder, None, 400, sparse=True)
        ways = [
            Way("paramend show", paramend("show", folder)),
            Way("paramend zero --dry-run, one tensor", paramend("zero", folder, "lm_head.weight", "--dry-run")),
            Way("paramend zero --dry-run, all tensors", paramend("zero", folder, "**", "--dry-run")),
        ]
        rows = self.compare(*ways)
        shutil.rmtree(folder)
        return rows


SCENARIOS = (
    *("new_file", "full_cache", "scale", "linked", "inserted", "in_place", "deepen", "experts", "transpose"),
    *("memory", "show", "trillion"),
)
# Needs root and mkfs.xfs, and so runs only when it is asked for.
MOUNTING = ("sharing",)
# Without these, the table has no ratios: nothing is the reference.
ALONE = ("memory", "trillion")


def measure(options):
    """Runs scenarios, and adds the figures of each to the file when it is done."""
    found = json.loads(options.save.read_text()) if options.save.exists() else {}
    with tempfile.TemporaryDirectory(prefix="paramend-bench-", dir=options.folder) as folder:
        free = shutil.disk_usage(folder).free
        needed = 6 * options.size
        if free < needed:
            raise SystemExit(f"{folder}: {needed / 1e9:.0f} GB are needed, and {free / 1e9:.0f} GB are free")
        # Packages that pip installs are compiled; of one that runs from a clone the first start would pay for it.
        package = importlib.util.find_spec("paramend").submodule_search_locations[0]
        compileall.compile_dir(package, quiet=1)
        bench = Bench(Path(folder), options)
        for name in options.only or SCENARIOS:
            print(name, file=sys.stderr)
            load = os.getloadavg()[0]
            rows = getattr(bench, name)()
            load = round((load + os.getloadavg()[0]) / 2, 1)  # 1 or 2 is this bench alone
            says = f"{getattr(bench, name).__doc__} ({options.size / 1e9:.1f} GB)".replace(" (4.0 GB)", "")
            found[name] = {"says": says, "load": load, "rows": rows}
            options.save.write_text(json.dumps(found, indent=1))


def table(path):
    """The figures that were saved in a file as a table of markdown."""
    found = json.loads(path.read_text())
    lines = ["| | time | peak RSS | written |", "|---|---|---|---|"]
    for name in filter(found.get, SCENARIOS + MOUNTING):
        load = found[name]["load"]
        busy = f", load average {load:.0f}" if load > os.cpu_count() + 1 else ""  # other programs were at work
        lines.append(f"| **{found[name]['says']}**{busy} | | | |")
        for row in found[name]["rows"]:
            ratio = f"{row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
            spent = f"{row['seconds']:.2f} s" if name in ALONE else ratio
            lines.append(f"| {row['way']} | {spent} | {row['rss'] / 1e6:,.0f} MB | {row['written'] / 1e6:,.0f} MB |")
    return "\n".join(lines)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=4e9, help="bytes of the model (4e9)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each scenario (5)")
    parser.add_argument("--folder", help="where models are made: six times the size must be free")
    parser.add_argument("--save", type=Path, default="figures.json", help="where the figures go (figures.json)")
    parser.add_argument("--only", nargs="*", choices=SCENARIOS + MOUNTING, help="scenarios to run")
    options = parser.parse_args(args)
    measure(options)
    print(table(options.save))


if __name__ == "__main__":
    main()
