"""Writers that are stopped at random moments: what is left is the old state or the new one, never a third.

    PYTHONPATH=tests python tests/support/killing.py rewrite|patch|resume KIND ROUNDS [SIGNAL] [SEED]

KIND is file, shards, torch, structure, inserted, split, delta, gguf, gguf-long, dcp or dcp-names.

A child writes and is killed. Then the output is looked at, and the next writer must leave nothing of the killed one;
one that resumes makes what an undisturbed one makes.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

import paramend as pm
from paramend.journal.records import PENDING
from paramend.journal.store import UndoStore

NAMES = [f"layers.{i}.w" for i in range(6)]


def tree():
    return {name: np.full((256, 256), i, "float32") for i, name in enumerate(NAMES)}


def make(folder, kind):
    """A model of a kind, a quarter of a megabyte in each leaf."""
    import safetensors.numpy

    if kind == "file":
        safetensors.numpy.save_file(tree(), folder / "model.safetensors")
        return folder / "model.safetensors"
    if kind == "split":  # of a single file, which becomes the first of two
        (folder / "model").mkdir()
        safetensors.numpy.save_file(tree(), folder / "model" / "model.safetensors")
        return folder / "model"
    if kind in ("shards", "inserted", "delta"):
        model = folder / "model"
        model.mkdir()
        for n in range(3):
            safetensors.numpy.save_file({k: tree()[k] for k in NAMES[n::3]}, model / f"model-{n}.safetensors")
        weight_map = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(NAMES)}
        table = {"metadata": {"total_size": 6 << 18}, "weight_map": weight_map}
        (model / "model.safetensors.index.json").write_text(json.dumps(table))
        (model / "config.json").write_text("{}")
        return model
    if kind.startswith("gguf"):  # of which keys change too: in place, or in files made anew
        import gguf

        (folder / "model").mkdir()
        writer = gguf.GGUFWriter(folder / "model" / "m.gguf", "llama", split_max_tensors=3)
        writer.add_name("name")
        for name, leaf in tree().items():
            writer.add_tensor(name, leaf)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return folder / "model"
    import torch

    if kind.startswith("dcp"):
        from support import distributed

        halves = [((0, 0), (128, 256)), ((128, 0), (128, 256))]
        tensors = {name: (torch.from_numpy(leaf), halves) for name, leaf in tree().items()}
        return distributed.write(folder / "model.dcp", tensors)
    torch.save({"model": {k: torch.from_numpy(v) for k, v in tree().items()}, "epoch": 3}, folder / "model.pt")
    return folder / "model.pt"


def edit(kind):
    """An edit of all leaves; of shards also of the configuration, of a kind of torch also one of the structure."""
    if kind == "structure":
        return lambda t: pm.at(pm.at(t, "model.layers[0].w").rename("model.first"), "**.layers.1.w").cast("float16")
    if kind == "shards":
        return lambda t: pm.config(pm.at(t, "**").add(1)).set({"a key": "a value"})
    if kind.startswith("gguf"):
        name = "eman" if kind == "gguf" else "a longer name " * 9
        return lambda t: pm.config(pm.at(t, "**").add(1)).set({"general.name": name})
    if kind == "dcp-names":
        return lambda t: pm.at(pm.at(t, "**").add(1), "layers.0.w").rename("first")
    if kind in ("inserted", "split"):
        return lambda t: pm.insert(t, {"new": tree()}, "**")[0]
    if kind == "delta":
        after = {name: array + (np.arange(array.size).reshape(array.shape) % 50 == 0) for name, array in tree().items()}
        return pm.delta(tree(), {name: array.astype("float32") for name, array in after.items()}).apply
    return lambda t: pm.at(t, "**").add(1)


def content(path):
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    visible = (file for file in files if ".undo" not in str(file.relative_to(path.parent)))
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in visible)).hexdigest()


def stopped(action, after, signum):
    """Runs an action in a child that gets a signal after some seconds. Whether the child was still at work."""
    child = os.fork()
    if not child:
        status = 1
        try:
            action()
            status = 0
        except KeyboardInterrupt:
            status = 2
        finally:
            os._exit(status)
    time.sleep(after)
    os.kill(child, signum)
    return os.waitpid(child, 0)[1] != 0


def timed(action):
    """Seconds that an action takes in a child."""
    child, began = os.fork(), time.monotonic()
    if not child:
        action()
        os._exit(0)
    assert not os.waitpid(child, 0)[1]
    return time.monotonic() - began


def rewrites(folder, kind, rounds, signum, rng):
    source = make(folder, kind)
    out = folder / f"out{source.suffix}"
    change = edit(kind)

    def save():
        change(pm.open(source)).save(out, force=True)

    save()
    new = content(out)
    pm.open(source).save(out, force=True)
    old = content(out)
    assert old != new
    took, seen = timed(save), Counter()
    for _ in range(rounds):
        pm.open(source).save(out, force=True)
        names = sorted(path.name for path in folder.iterdir())
        assert names == sorted([source.name, out.name]), f"left behind: {names}"
        at_work = stopped(save, rng.random() * took * 1.2, signum)
        found = content(out)
        assert found in (old, new), "a third state"
        left = {path.name for path in folder.iterdir()} - {source.name, out.name}
        assert signum == signal.SIGKILL or not left, f"left behind: {left}"
        seen["old" if found == old else "new"] += 1
        seen["at work"] += at_work
        seen["temporary left"] += bool(left)
    save()
    assert sorted(path.name for path in folder.iterdir()) == sorted([source.name, out.name])
    return seen


def resumed(folder, kind, rounds, signum, rng):
    """Runs with two workers, each killed and taken up until one comes to its end."""
    from paramend.rewriting import jobs

    jobs._COMPUTED, jobs._COPIED = 1 << 18, 1 << 18  # each leaf is a job
    source = make(folder, kind)
    whole, out = (folder / f"{name}{source.suffix}" for name in ("whole", "out"))
    change = edit(kind)
    change(pm.open(source)).save(whole)
    (folder / "other").mkdir()
    whole = whole.rename(folder / "other" / out.name)
    kept = sorted(path.name for path in folder.iterdir())

    def save():
        change(pm.open(source)).save(out, resume=True, workers=2)

    took, seen = timed(save), Counter()
    for _ in range(rounds):
        shutil.rmtree(out) if out.is_dir() else out.unlink()
        longest = took
        while not out.exists():
            seen["at work"] += stopped(save, rng.random() * longest, signum)
            longest *= 1.5
            seen["taken up"] += any(folder.glob(".paramend-*.jsonl"))
        assert content(out) == content(whole), "another outcome"
        left = [name for name in sorted(path.name for path in folder.iterdir()) if name not in (*kept, out.name)]
        assert not left, f"left behind: {left}"
    return seen


def patches(folder, kind, rounds, signum, rng):
    path = make(folder, kind)
    change, old = edit(kind), content(path)

    def patch():
        pm.patch(path, change)

    patch()
    new = content(path)
    pm.undo(path)
    assert content(path) == old
    took, seen = timed(patch), Counter()
    pm.undo(path)
    for _ in range(rounds):
        at_work = stopped(patch, rng.random() * took * 1.2, signum)
        pending = len(UndoStore(path).records(PENDING))
        assert signum == signal.SIGKILL or not pending, "Ctrl-C left a half"
        pm.open(path).close()
        found = content(path)
        assert found in (old, new), "a third state"
        assert len(pm.history(path)) == (found == new)
        seen["old" if found == old else "new"] += 1
        seen["at work"] += at_work
        seen["rolled back"] += pending
        if found == new:
            pm.undo(path)
            assert content(path) == old
        assert not UndoStore(path).folder.exists() or at_work
    patch()
    assert content(path) == new
    return seen


def main(engine, kind, rounds, signum="9", seed="0"):
    run = {"rewrite": rewrites, "patch": patches, "resume": resumed}[engine]
    # Opened lazily: not in the child.
    assert all((pm.patch, pm.undo, pm.history, pm.open, pm.config, pm.insert))
    with tempfile.TemporaryDirectory() as folder:
        seen = run(Path(folder), kind, int(rounds), int(signum), random.Random(seed))
    print(f"{engine} {kind}, signal {signum}: {rounds} rounds: {dict(seen)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
