"""What edits of a model of a trillion parameters cost on several machines: the table of docs/scale.md.

    python bench/scale.py measure            the constants of this machine, into bench/scale.json: 4 GB of disk
    python bench/scale.py plan               plans of all edits, over sparse files, into the same file
    python bench/scale.py table --write      the table, from that file, into docs/scale.md
    python bench/scale.py check              a small edit, predicted and run with one worker and two

`table` takes `--cores`, the workers of each machine, and `--link`, the bytes per second that a machine reads from the
shared store, and as many that it writes to it at the same time.
"""

import argparse
import heapq
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import models
from run import write

import paramend as pm
from paramend.rewriting import jobs
from paramend.rewriting.files import Computed, Copy
from paramend.rewriting.layouts import lay_out

HERE = Path(__file__).parent
SAVED, PAGE = HERE / "scale.json", HERE.parent / "docs" / "scale.md"
MACHINES, CORES, LINK = (1, 8, 64), 16, 3.125e9


# ---- the edits -----------------------------------------------------------------------------------------------


def grafted(model, donor):
    return pm.graft(model, donor, only="model.layers[0].**", unused="ok")[0]


# says → (edit, link, the command whose rate its computed bytes have)
EDITS = {
    "zero the last layer, `--link`": (lambda m, _: pm.at(m, "model.layers[-1].**").zero(), True, "zero"),
    "zero the last layer": (lambda m, _: pm.at(m, "model.layers[-1].**").zero(), False, "zero"),
    "multiply one layer by 0.5, `--link`": (
        lambda m, _: pm.at(m, "model.layers[0].**").multiply(0.5),
        True,
        "multiply",
    ),
    "multiply everything by 0.5": (lambda m, _: pm.at(m, "**").multiply(0.5), False, "multiply"),
    "cast everything to float16": (lambda m, _: pm.at(m, "**").cast("float16"), False, "cast"),
    "add noise to everything": (lambda m, _: pm.at(m, "**").noise(0.01), False, "noise"),
    "graft one layer of another model": (grafted, False, "zero"),
    "keep 192 of 384 experts": (lambda m, _: pm.experts(m).keep(list(range(192)))[0], False, "zero"),
}
# What is measured: an edit of all leaves of a small model.
RATES = {
    "copy": lambda model: pm.at(model, "model.norm.weight").fill(1.0),
    "multiply": lambda model: pm.at(model, "**").multiply(0.5),
    "cast": lambda model: pm.at(model, "**").cast("float16"),
    "noise": lambda model: pm.at(model, "**").noise(0.01),
}


def again(*args):
    """What a command of this file says, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *map(str, args)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def peak():
    return 1000 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


# ---- constants -----------------------------------------------------------------------------------------------


def rate(name, folder, out):
    """What one worker needs for an edit of all bytes of a model."""
    edited = RATES[name](pm.open(folder))
    began, used = time.perf_counter(), time.process_time()
    edited.save(out)
    wall, cpu = time.perf_counter() - began, time.process_time() - used
    nbytes = sum(file.stat().st_size for file in Path(out).glob("*.safetensors"))
    shutil.rmtree(out)
    return {"cpu": cpu / nbytes, "wall": wall / nbytes, "rss": peak()}


def measured(parent):
    """The constants of this machine; seconds are the least of three, so that other programs count little."""
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        models.make(models.make_one, Path(folder) / "model", models.layers_of(2e9))
        found = {}
        for name in RATES:
            runs = [again("rate", name, f"{folder}/model", f"{folder}/out") for _ in range(3)]
            found[name] = {key: min(run[key] for run in runs) for key in runs[0]}
        starts = [again("start") for _ in range(3)]
    disk = found["copy"].pop("wall")
    return {
        "start": min(starts),
        "disk": 1 / disk,
        "rates": {n: {"cpu": r["cpu"], "rss": r["rss"]} for n, r in found.items()},
    }


# ---- jobs ----------------------------------------------------------------------------------------------------


def jobs_of(plan, files):
    """(copied, computed, read, written) of each job."""
    for file in files:
        if not file.link:
            yield from (sum(map(counted, job.pieces), Counter()) for job in jobs.jobs_of(plan, file))


def counted(piece):
    if isinstance(piece, Copy):
        count = piece.stop - piece.start
        return Counter(copied=count, read=count, written=count)
    if not isinstance(piece, Computed):
        return Counter(written=len(piece))
    count, row = piece.stop - piece.start, piece.row
    if row.calls[-1].op.name == "zero" and count >= 1 << 20:  # a hole in the file
        return Counter()
    reads = row.before.nbytes * count // row.spec.nbytes if all(call.op.reads for call in row.calls) else 0
    return Counter(computed=count, read=reads, written=count)


def planned(name, folder, donor):
    """What the plan of an edit says, and what it cost to make."""
    edit, link, _ = EDITS[name]
    began = time.process_time()
    with pm.open(folder) as model, pm.open(donor) as other:
        plan = edit(model, other).plan
        files = lay_out(plan, f"{folder}-out", link=link).files
        seconds, memory = time.process_time() - began, peak()
        found = list(jobs_of(plan, files))
    total = sum(found, Counter())
    runs = Counter(tuple(round(job[key] / 1e6) for key in ("copied", "computed", "read", "written")) for job in found)
    return {
        "linked": sum(file.nbytes for file in files if file.link),
        **{key: total[key] for key in ("copied", "computed", "read", "written")},
        "plan": {"cpu": seconds, "rss": memory},
        "jobs": [[count, *job] for job, count in runs.items()],
    }


def plans(parent):
    """The plans of all edits of a model of a trillion parameters, and the bytes that its files take."""
    shapes = models.mixture()
    shapes |= {f"model.layers.{n}.mlp.gate.weight": (384, 7168) for n in range(61)}
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        models.make(models.write_shards, f"{folder}/model", shapes, 400, sparse=True)
        models.make(models.write_shards, f"{folder}/donor", models.mixture(layers=1), 8, sparse=True)
        return {name: again("jobs", name, f"{folder}/model", f"{folder}/donor") for name in EDITS}


# ---- schedule ------------------------------------------------------------------------------------------------


def seconds_of(edit, rate, constants, *, machines, cores=CORES, link=LINK):
    """How long the jobs of an edit take: each worker takes the next one as soon as it is free."""
    rates, share = constants["rates"], link / cores
    free = [constants["start"]] * (machines * cores)
    for job in edit["jobs"]:
        takes = max(spent(job, rate, rates), 1e6 * max(job[3:]) / share)
        for _ in range(job[0]):
            heapq.heapreplace(free, free[0] + takes)
    return edit["plan"]["cpu"] + max(free)


def spent(job, rate, rates):
    """The seconds of computing of a job."""
    _, copied, computed, _, _ = job
    return 1e6 * (copied * rates["copy"]["cpu"] + computed * rates.get(rate, rates["copy"])["cpu"])


def size(nbytes):
    """
    >>> size(2_075e9), size(0)
    ('2.08 TB', '0')
    """
    if not nbytes:
        return "0"
    step = min(int(math.log10(nbytes) / 3), 4)
    return f"{nbytes / 1000**step:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[step]}"


def duration(seconds):
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def table(saved, cores=CORES, link=LINK):
    """The table of the page."""
    constants = saved["constants"]
    rates = constants["rates"]
    heads = ["", "read", "written", "linked", "jobs", *(f"{n} machine{'s' * (n > 1)}" for n in MACHINES)]
    heads += ["memory of the planner", "of each machine"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---|" * (len(heads) - 1)]
    for name, edit in saved["plans"].items():
        rate = EDITS[name][2]
        times = (seconds_of(edit, rate, constants, machines=n, cores=cores, link=link) for n in MACHINES)
        worker = max(rates["copy"]["rss"], rates.get(rate, rates["copy"])["rss"])
        cells = [name, *(size(edit[key]) for key in ("read", "written", "linked"))]
        cells += [f"{sum(job[0] for job in edit['jobs']):,}", *map(duration, times)]
        cells += [size(edit["plan"]["rss"]), size(cores * worker)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Measured on one core of the machine that made this table:",
        "",
        "| | seconds per GB | memory of a worker |",
    ]
    lines += ["|---|---|---|"]
    lines += [f"| {name} | {1e9 * each['cpu']:.2f} | {size(each['rss'])} |" for name, each in rates.items()]
    says = f"A worker starts in {constants['start']:.2f} s; {cores} of them share {size(link)} per second each way."
    return "\n".join([*lines, "", says])


# ---- a small edit, predicted and run -------------------------------------------------------------------------


def check(parent, constants):
    """(workers, seconds, seconds of computing) of an edit on this machine, 2 GB multiplied: predicted, measured."""
    found = []
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        models.make(models.make_one, Path(folder) / "model", models.layers_of(2e9))
        edited = pm.at(pm.open(f"{folder}/model"), "**").multiply(0.5)
        some = list(jobs_of(edited.plan, lay_out(edited.plan, f"{folder}/out").files))
        # What is read lies in the page cache.
        rows = [[1, *(job[key] / 1e6 for key in ("copied", "computed")), 0, job["written"] / 1e6] for job in some]
        edit = {"jobs": rows, "plan": {"cpu": 0}}
        for workers in (1, 2):
            says = seconds_of(edit, "multiply", constants, machines=1, cores=workers, link=constants["disk"])
            work = sum(spent(row, "multiply", constants["rates"]) for row in rows)
            runs = []
            for _ in range(3):
                os.sync()
                began, used = time.perf_counter(), sum(os.times()[:4])
                edited.save(f"{folder}/out", workers=workers)
                runs.append((time.perf_counter() - began, sum(os.times()[:4]) - used))
                shutil.rmtree(f"{folder}/out")
            found.append((workers, (says, work), tuple(map(min, zip(*runs, strict=True)))))
    return found


def save(**found):
    saved = json.loads(SAVED.read_text()) if SAVED.exists() else {}
    SAVED.write_text(json.dumps(saved | found) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "plan", "table", "check", "rate", "jobs", "start"))
    parser.add_argument("args", nargs="*")
    parser.add_argument("--cores", type=int, default=CORES)
    parser.add_argument("--link", type=float, default=LINK)
    parser.add_argument("--folder", help="where models are made")
    parser.add_argument("--write", action="store_true", help="put the table into docs/scale.md")
    options = parser.parse_args()
    match options.what:
        case "rate":
            print(json.dumps(rate(*options.args)))
        case "jobs":
            print(json.dumps(planned(*options.args)))
        case "start":
            print(time.process_time())  # imports are done
        case "measure":
            save(constants=measured(options.folder))
        case "plan":
            save(plans=plans(options.folder))
        case "check":
            for workers, *both in check(options.folder, json.loads(SAVED.read_text())["constants"]):
                for what, says, took in zip(("seconds", "of computing"), *both, strict=True):
                    print(f"{workers} workers, {what}: predicted {says:.2f}, measured {took:.2f}: {took / says:.2f} ×")
            print(f"load average {os.getloadavg()[0]:.1f}")
        case "table":
            text = table(json.loads(SAVED.read_text()), options.cores, options.link)
            print(text)
            if options.write:
                write(PAGE, "scale", text)


if __name__ == "__main__":
    main()
