"""Paramend beside the libraries that can do a task: bench/tasks has a folder for each, and in it a short file for each
tool, which is what one writes with it. Its lines are the ones that are counted.

    python bench/comparison.py run --peers VENV/bin/python     all of it; saves comparison.json
    python bench/comparison.py run --peers ... --only zero     a part, printed and not saved
    python bench/comparison.py table --write                   puts the tables into docs/benchmarks.md

Each run is a process of its own, in a folder with the inputs; it ends when its output is on the disk. Tools take turns.
Kept are the least wall and processor times of the rounds, the kernel's peak of memory (children included), and the
bytes that went through write calls. Outcomes are judged by bench/outcomes.py.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import models

HERE = Path(__file__).parent
SAVED, PAGE = HERE / "comparison.json", HERE.parent / "docs" / "benchmarks.md"
LARGE = 1e9
LONG = 60  # seconds from which on one round does
TASKS = {
    "zero": "Zero one tensor",
    "scale": "Multiply all tensors by 0.5",
    "rename": "Rename keys: `model.` becomes `decoder.`",
    "cast": "Cast to float16",
    "drop": "Leave out two layers of eight",
    "deepen": "Two identity layers more (LLaMA-Pro)",
    "merge": "The mean of two models",
    "fold": "Fold a LoRA into its base",
    "extract": "Extract a LoRA of rank 8 from a fine-tune; right is within 5 % of the least error",
    "graft": "Graft into a model with more layers and a longer vocabulary",
    "experts": "Keep four experts of eight",
    "fp8": "Double 64 rows of a weight in FP8 with block scales",
    "gguf": "Another name in a GGUF file, with a longer value",
    "in_place": "Zero one tensor of a file in place; Paramend writes an undo record too",
    "leaf": "Zero one leaf of a tree of 10,000 in memory",
}
TOOLS = {
    "paramend": "Paramend", "safetensors": "safetensors", "torch": "torch", "transformers": "transformers",
    "mergekit": "mergekit", "peft": "PEFT", "brainsurgery": "BrainSurgery", "sft": "sft-cli", "gguf": "gguf",
    "by_hand": "bytes by hand",
    "jax": "jax.tree_util", "equinox": "Equinox", "penzai": "penzai",
}  # fmt: skip
# What BrainSurgery publishes of the plans for GPT-2: usability-tests/README.md, "Verification", of its repository.
USABILITY = {
    "T1": ("Remove three blocks, renumber the others", 16),
    "T2": ("Remove a head from every layer", 60),
    "T3": ("Projections to bfloat16, no masks, in shards", 14),
    "T4": ("Add two task vectors to the MLPs, if nothing else differs", 20),
    "T5": ("Fold a LoRA, in shards", 20),
}
PACKAGES = (
    *("numpy", "safetensors", "torch", "transformers", "mergekit", "peft", "brainsurgery", "sft-cli", "gguf"),
    *("jax", "equinox", "penzai"),
)


def scripts(task):
    """The files of a task, Paramend's first, the others in the order of TOOLS."""
    files = {file.stem: file for file in (HERE / "tasks" / task).iterdir()}
    return [files[tool] for tool in TOOLS if tool in files]


def lines_of(file):
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in file.read_text().splitlines())


# ---- a run -----------------------------------------------------------------------------------------------------------


class Bench:
    def __init__(self, top, peers):
        self.inputs, self.run, self.peers = top / "inputs", top / "run", str(peers)
        bins = [str(Path(sys.executable).parent), str(Path(peers).parent), os.environ["PATH"]]
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(os.cpu_count())}
        self.environment = os.environ | quiet | {"PATH": os.pathsep.join(bins)}
        for name in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE"):  # the second would let every start compile
            self.environment.pop(name, None)

    def make_inputs(self):
        self.inputs.mkdir()
        for python, what in ((sys.executable, "make"), (self.peers, "foreign")):
            subprocess.run([python, HERE / "outcomes.py", what, self.inputs], check=True)
        models.make(models.write_file, self.inputs / "large.safetensors", models.llama(models.layers_of(LARGE)))

    def command(self, file):
        """What runs a script, and the environment."""
        environment = dict(self.environment)
        if file.stem == "paramend":
            environment["PYTHONPATH"] = str(HERE.parent / "src")
        python = sys.executable if file.stem == "paramend" else self.peers
        if file.parent.name == "leaf":
            return [python, HERE / "leaf.py", file], environment
        if file.suffix == ".py":
            return [python, "edit.py"], environment
        if file.suffix == ".sh":
            return ["sh", "-e", "edit.sh"], environment
        tool = (
            ["mergekit-yaml", "edit.yaml", "out", "--no-write-model-card", "--lora-merge-cache", "merged"]
            if file.stem == "mergekit"
            else ["brainsurgery", "edit.yaml"]
        )
        return [Path(self.peers).with_name(tool[0]), *tool[1:]], environment

    def prepare(self, task, file):
        shutil.rmtree(self.run, ignore_errors=True)
        self.run.mkdir()
        for source in self.inputs.iterdir():
            if source.name != "large.safetensors":
                (self.run / source.name).symlink_to(source)
            elif task == "in_place":
                shutil.copy(source, self.run)
        shutil.copy(file, self.run / f"edit{file.suffix}")

    def measure(self, task, file):
        """The figures of one run; `failed` alone, if it did."""
        self.prepare(task, file)
        command, environment = self.command(file)
        os.sync()
        start = time.perf_counter()
        with (self.run / "said").open("w+b") as said:
            process = subprocess.Popen(list(map(str, command)), cwd=self.run, env=environment, stdout=said, stderr=said)
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its figures stay until it is reaped
            for path in [path for path in self.run.rglob("*") if path.is_file() and not path.is_symlink()]:
                with path.open("rb") as written:
                    os.fsync(written.fileno())
            wall = time.perf_counter() - start
            counts = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            said.seek(0)
            words = said.read().decode(errors="replace")
        if process.returncode:
            print(words[-3000:], file=sys.stderr)
            return {"failed": reason(words)}
        figures = {
            "wall": wall,
            "cpu": usage.ru_utime + usage.ru_stime,
            "rss": usage.ru_maxrss * 1024,
            "written": int(counts["wchar"]),
        }
        if task == "leaf":
            timed = json.loads(words.splitlines()[-1])
            figures |= {"wall": timed["seconds"], "cpu": timed["cpu"], "written": None, "outcome": timed["outcome"]}
        return figures

    def outcome(self, task):
        """What bench/outcomes.py says of what lies in the folder of the run."""
        names = {"in_place": ["large.safetensors"]}.get(task, ["out", "out.safetensors", "out.pt", "out.gguf"])
        out = next(self.run / name for name in names if (self.run / name).exists())
        if out.suffix == ".pt":
            subprocess.run([self.peers, HERE / "outcomes.py", "safetensors", out], check=True)
            out = self.run / "out-pt.safetensors"
        python = self.peers if out.suffix == ".gguf" else sys.executable
        command = [python, HERE / "outcomes.py", "check", task, self.inputs, out]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def task(self, task, rounds):
        rows = {file.stem: {"lines": lines_of(file)} for file in scripts(task)}
        for turn in range(rounds):
            for file in scripts(task):
                row = rows[file.stem]
                if "failed" in row or (turn and row["wall"] > LONG):
                    continue
                found = self.measure(task, file)
                if "failed" not in found and not turn and task != "leaf":
                    found["outcome"] = self.outcome(task)
                row |= found if not turn else {key: min(row[key], found[key]) for key in ("wall", "cpu")}
                print(task, file.stem, turn, row, file=sys.stderr, flush=True)
        return rows


def reason(words):
    """The line of what a tool said that names the fault."""
    lines = [re.sub(r"[\u2500-\u257f]", "", line).strip() for line in words.splitlines()]
    lines = [line for line in lines if line and line != "Error"]
    faults = [line for line in lines if re.search(r"error|exception|unexpected", line, re.IGNORECASE)]
    return (faults or lines or ["nothing said"])[-1][:160]


def machine(peers):
    """What the figures depend on; no names of hosts or users."""
    ask = "import json, sys, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    versions = json.loads(
        subprocess.run([peers, "-c", ask, *PACKAGES], check=True, capture_output=True, text=True).stdout
    )
    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    processor = re.search(r"model name\s+: (.*)", Path("/proc/cpuinfo").read_text())
    theirs = subprocess.run(
        [peers, "-c", "import platform; print(platform.python_version())"], check=True, capture_output=True, text=True
    )
    return {
        "date": date.today().isoformat(),
        "processor": processor[1] if processor else platform.machine(),
        "cores": os.cpu_count(),
        "memory": int(memory[1]) * 1024,
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": {"paramend": platform.python_version(), "peers": theirs.stdout.strip()},
        "versions": {"paramend": version()} | versions,
        "large": LARGE,
    }


def version():
    return re.search(r'^version = "(.*)"', (HERE.parent / "pyproject.toml").read_text(), re.MULTILINE)[1]


def run(options):
    os.nice(options.nice)
    found = machine(options.peers) | {"rounds": options.rounds, "tasks": {}}
    with tempfile.TemporaryDirectory(prefix="paramend-bench-", dir=options.folder) as top:
        bench = Bench(Path(top), options.peers)
        bench.make_inputs()
        found["model"] = (bench.inputs / "model" / "model.safetensors").stat().st_size
        loads = [os.getloadavg()[0]]
        for task in options.only or TASKS:
            found["tasks"][task] = bench.task(task, options.rounds)
            loads.append(os.getloadavg()[0])
            found["load"] = [round(min(loads), 1), round(max(loads), 1)]
            if not options.only:
                SAVED.write_text(json.dumps(found, indent=1) + "\n")


# ---- the page --------------------------------------------------------------------------------------------------------


def table(found):
    """The tables of docs/benchmarks.md from what a run saved."""
    blocks = [facts(found)]
    for task, rows in found["tasks"].items():
        blocks.append(f"## {TASKS[task]}\n\n{grid(rows)}")
        notes = [f"{TOOLS[tool]}: {note(row)}." for tool, row in rows.items() if note(row)]
        blocks += [" ".join(notes)] if notes else []
    study = (
        "## The usability tasks of BrainSurgery\n\nThe study in its repository (`usability-tests`) has five tasks, and "
        "its README counts the lines of the plans for GPT-2. Ours are commands and a recipe; the commands are counted:"
    )
    return "\n\n".join([*blocks, study, usability()])


def usability():
    """The table of the tasks of BrainSurgery's usability study: lines, ours and theirs."""
    lines = ["| task | lines of a plan | Paramend | |", "|---|---|---|---|"]
    for task, (title, theirs) in USABILITY.items():
        files = sorted((HERE / "brainsurgery").glob(f"{task}.*"))
        links = ", ".join(f"[{file.name}](../bench/brainsurgery/{file.name})" for file in files)
        lines.append(f"| {title} | {theirs} | {sum(map(lines_of, files))} | {links} |")
    return "\n".join(lines)


def facts(found):
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    low, high = found["load"]
    python = found["python"]
    return (
        f"Run on {found['date']}: {found['processor']}, {found['cores']} cores, {found['memory'] / 1e9:.0f} GB of "
        f"memory, {found['system']}; Python {python['paramend']}, of the others {python['peers']}. Load average "
        f"{low:.0f} to {high:.0f}: other programs were at work. The model has {found['model'] / 1e6:.0f} MB in "
        f"bfloat16, the file that is edited in place {found['large'] / 1e9:.0f} GB. Least of {found['rounds']} rounds."
        f"\n\n{versions}."
    )


def grid(rows):
    lines = [
        "| | time | processor | peak RSS | written | lines | edit | others | metadata | config |",
        "|---|" + "---|" * 9,
    ]
    ours = rows["paramend"]
    for tool, row in rows.items():
        if "failed" in row:
            cells = ["failed", "", "", "", str(row["lines"]), "", "", "", ""]
        else:
            ratios = [f"{row[key] / ours[key]:.2f}" for key in ("wall", "cpu")]
            written = (
                "" if row["written"] is None else f"{row['written'] / 1e6:,.{0 if row['written'] > 1e6 else 1}f} MB"
            )
            told = [
                {True: "yes", False: "**no**", None: ""}[row["outcome"][key]]
                for key in ("edit", "others", "metadata", "config")
            ]
            cells = [*ratios, f"{row['rss'] / 1e6:,.0f} MB", written, str(row["lines"]), *told]
        lines.append(f"| {TOOLS[tool]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def note(row):
    return f"`{row['failed']}`" if "failed" in row else ", ".join(row["outcome"]["says"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--peers", help="the python of an environment with the other libraries")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each task (3); one of what takes a minute")
    parser.add_argument("--nice", type=int, default=3, help="how nice the run is to other programs (3)")
    parser.add_argument("--folder", help="where models are made: 5 GB must be free")
    parser.add_argument("--only", nargs="*", choices=TASKS, help="tasks to run")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    options = parser.parse_args()
    if options.what == "run":
        run(options)
        return
    text = table(json.loads(SAVED.read_text()))
    print(text)
    if options.write:
        block = f"<!-- benchmarks -->\n{text}\n<!-- /benchmarks -->"
        PAGE.write_text(
            re.sub("<!-- benchmarks -->.*<!-- /benchmarks -->", lambda _: block, PAGE.read_text(), flags=re.DOTALL)
        )


if __name__ == "__main__":
    main()
