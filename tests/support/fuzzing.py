"""Random damage for every format: only errors of our own may come out, nothing is written, time and memory are bounded.

    PYTHONPATH=tests python tests/support/fuzzing.py KIND COUNT [SEED]        one kind, or "all"

Each kind takes good files that the real libraries wrote, and changes bytes, text and structure: lengths, offsets,
shapes, dtypes, names and nesting, with checksums made true again where a reader would stop at them.
"""

import io
import json
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

import paramend as pm
from paramend.errors import BadCheckpoint, ParamendError
from support.damaging import of_bytes, of_gguf, of_json, of_pickle, of_sharding, of_zip

SECONDS = 10  # of the processor, however busy it is with other programs

# ---- kinds ---------------------------------------------------------------------------------------------------------


def tree():
    return {
        "model.embed.weight": np.arange(6, dtype="float32").reshape(2, 3),
        "model.layers.0.w": np.ones((2, 2), "float16"),
        "model.layers.1.w": np.ones((0, 2), "int64"),
        "step": np.array(3),
    }


class Safetensors:
    """The header, as text and as a table, and whole files."""

    def __init__(self, folder):
        import safetensors.numpy

        raw = safetensors.numpy.save(tree(), metadata={"format": "pt"})
        length = int.from_bytes(raw[:8], "little")
        self.raw, self.header, self.data = raw, json.loads(raw[8 : 8 + length]), raw[8 + length :]
        self.path = folder / "model.safetensors"

    def make(self, rng):
        if rng.random() < 0.4:
            raw = of_bytes(rng, self.raw)
        else:
            text = of_json(rng, self.header)
            length = len(text) if rng.random() < 0.95 else rng.choice([0, 1, 2**63, 10**8 + 1, len(text) + 1])
            raw = length.to_bytes(8, "little") + text + self.data
        self.path.write_bytes(raw)
        return self.path


class Index:
    """The index of a model in shards."""

    def __init__(self, folder):
        import safetensors.numpy

        names = list(tree())
        for n, half in enumerate((names[:2], names[2:])):
            safetensors.numpy.save_file({k: tree()[k] for k in half}, folder / f"model-{n}.safetensors")
        weight_map = {name: f"model-{n // 2}.safetensors" for n, name in enumerate(names)}
        self.table = {"metadata": {"total_size": 48, "total_parameters": 11}, "weight_map": weight_map}
        self.path = folder / "model.safetensors.index.json"

    def make(self, rng):
        self.path.write_bytes(of_json(rng, self.table))
        return self.path.parent if rng.random() < 0.5 else self.path


class Torch:
    """Zip files of torch.save, and the pickles in them."""

    def __init__(self, folder):
        import torch

        out = io.BytesIO()
        weight = torch.arange(6.0).reshape(2, 3)
        state = {"w": weight, "t": weight.T, "p": torch.nn.Parameter(torch.ones(2)), "n": {0: [torch.ones(1), None]}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(state | {"epoch": 3, "e": {"lr": 0.1, "s": torch.eye(2).to_sparse()}}, out)
        self.raw = out.getvalue()
        self.path = folder / "model.pt"

    def make(self, rng):
        self.path.write_bytes(of_bytes(rng, self.raw) if rng.random() < 0.3 else of_zip(rng, self.raw))
        return self.path


class Npz:
    """Zip files of numpy, stored and packed."""

    def __init__(self, folder):
        self.raws = []
        for saver in (np.savez, np.savez_compressed):
            out = io.BytesIO()
            saver(
                out, a=np.arange(6, dtype="float32").reshape(2, 3), b=np.asfortranarray(np.ones((3, 2))), c=np.array(1)
            )
            self.raws.append(out.getvalue())
        self.path = folder / "model.npz"

    def make(self, rng):
        raw = rng.choice(self.raws)
        self.path.write_bytes(of_bytes(rng, raw) if rng.random() < 0.4 else of_zip(rng, raw))
        return self.path


class Msgpack:
    """Files of Flax."""

    def __init__(self, folder):
        from flax import serialization

        state = {
            "params": {"kernel": np.ones((2, 3), "float32"), "bias": np.arange(3.0)},
            "step": 5,
            "list": {"0": None},
        }
        self.raw = serialization.msgpack_serialize(state | {"c": np.complex64(1), "text": "x" * 40})
        self.path = folder / "model.msgpack"

    def make(self, rng):
        self.path.write_bytes(of_bytes(rng, self.raw))
        return self.path


class Orbax:
    """The tables of Orbax: `_METADATA` and those of single arrays."""

    def __init__(self, folder):
        import orbax.checkpoint as ocp

        self.path = folder / "step"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ocp.PyTreeCheckpointer(use_ocdbt=False).save(self.path, {"a": {"w": np.ones((2, 3))}, "l": [np.ones(1)]})
        self.files = [path for path in self.path.rglob("*") if path.name in ("_METADATA", ".zarray")]
        self.tables = {path: json.loads(path.read_bytes()) for path in self.files}

    def make(self, rng):
        chosen = rng.choice([*self.files, self.path / "_METADATA"])
        for path in self.files:
            path.write_bytes(
                of_json(rng, self.tables[path]) if path == chosen else json.dumps(self.tables[path]).encode()
            )
        return self.path


class Gguf:
    """GGUF files, one model in one file and in two."""

    def __init__(self, folder):
        from support.gguf_files import model

        self.raws = [model(folder / "model.gguf", kinds={}).read_bytes()]
        self.raws.append(model(folder / "model.gguf", layers=1, experts=2).read_bytes())
        self.path = folder / "model.gguf"

    def make(self, rng):
        raw = rng.choice(self.raws)
        self.path.write_bytes(of_gguf(rng, raw))
        return self.path


class Dcp:
    """The `.metadata` of a distributed checkpoint, and its files of chunks."""

    def __init__(self, folder):
        from support import distributed

        self.path = distributed.write(folder / "step")
        self.files = {path: path.read_bytes() for path in self.path.iterdir()}

    def make(self, rng):
        chosen = rng.choice([self.path / ".metadata", *self.files])
        for path, raw in self.files.items():
            change = of_pickle if path.name == ".metadata" else of_bytes
            path.write_bytes(change(rng, raw) if path == chosen else raw)
        return self.path


class Sharded:
    """Files of ranks, which say where their tensors begin in the whole ones."""

    def __init__(self, folder):
        self.path = sharded(folder / "step")
        self.files = {path: path.read_bytes() for path in self.path.iterdir()}

    def make(self, rng):
        chosen = rng.choice(list(self.files))
        for path, raw in self.files.items():
            path.write_bytes(of_sharding(rng, raw) if path == chosen else raw)
        return self.path


def sharded(folder):
    """A checkpoint as two ranks write it by `HuggingFaceStorageWriter`."""
    import safetensors.numpy

    folder.mkdir()
    for rank in range(2):
        parts = {"w": np.arange(6.0).reshape(2, 3) + 6 * rank, "b": np.ones(2, "float32")}
        said = {"w": {"saved_offsets": [2 * rank, 0]}, "b": {"saved_offsets": [0]}}
        path = folder / f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"
        safetensors.numpy.save_file(parts, path, {"DCP_SHARDING_INFO": json.dumps(said), "DCP_VERSION": "1.0"})
    return folder


KINDS = {
    "gguf": Gguf,
    "dcp": Dcp,
    "sharded": Sharded,
    "safetensors": Safetensors,
    "index": Index,
    "torch": Torch,
    "npz": Npz,
    "msgpack": Msgpack,
    "orbax": Orbax,
}


# ---- running -------------------------------------------------------------------------------------------------------


class TooLong(BaseException):
    """An input took longer than it may."""


def use(path, out):
    """Does what users do with a file, and says how it ended."""
    try:
        with pm.open(path) as checkpoint:
            for number in checkpoint.index.numbers[:20]:
                spec = checkpoint.spec(number)
                checkpoint.source.extent(number)
                if not checkpoint.refusal(number) and spec.nbytes <= 1 << 20:
                    checkpoint.read(number)
                    checkpoint.source.read_range(number, 0, min(spec.size, 100))
            if sum(map(checkpoint.nbytes, checkpoint.index.numbers)) > 1 << 24:
                return "large"  # broadcast views may be: it opens, and is as large as it says
            numbers = checkpoint.index.numbers
            if not numbers:
                return "empty"
            chosen = [checkpoint.index.path(n) for n in numbers if not checkpoint.refusal(n)][:1]
            pm.at(checkpoint, chosen).add(0).save(out) if chosen else checkpoint.save(out)
    except BadCheckpoint:
        return "refused"
    except ParamendError as error:
        return type(error).__name__
    return "read"


def fuzz(kind, count, seed=0, folder=None):
    """How many inputs ended how.

    Raises:
        AssertionError: something but an error of our own came out, or something was written; the input is kept.
    """
    seen = Counter()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        good, out = Path(scratch, "in"), Path(scratch, "out", "copy")
        good.mkdir()
        out.parent.mkdir()
        made = KINDS[kind](good)
        if made.path.name == "step":  # a directory
            out = out.with_name("copy.safetensors")
        old = signal.signal(signal.SIGPROF, too_long)
        try:
            for number in range(count):
                path = made.make(random.Random(f"{kind} {seed} {number}"))
                before = listed(good)
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                try:
                    found = use(path, out)
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    raise AssertionError(
                        f"{kind}, seed {seed}, input {number}: {type(error).__name__}: {error}"
                    ) from error
                finally:
                    signal.setitimer(signal.ITIMER_PROF, 0)
                seen[found] += 1
                assert listed(good) == before, f"{kind}, seed {seed}, input {number}: the folder of the input changed"
                left = sorted(path.name for path in out.parent.iterdir())
                assert left == ([out.name] if found == "read" else []), (
                    f"{kind}, seed {seed}, input {number}: left {left}"
                )
                if found == "read":
                    remove(out)
        finally:
            signal.signal(signal.SIGPROF, old)
    return seen


def too_long(*_):
    raise TooLong(f"more than {SECONDS} seconds of the processor")


def listed(folder):
    return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*"))


def remove(path):
    if path.is_dir():
        for inner in path.iterdir():
            inner.unlink()
        path.rmdir()
    else:
        path.unlink()


def main(kind, count, seed="0"):
    warnings.simplefilter("error")
    for name in KINDS if kind == "all" else [kind]:
        fuzz(name, 1)  # what is imported comes now
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.monotonic()
        seen = fuzz(name, int(count), int(seed), "/dev/shm" if Path("/dev/shm").is_dir() else None)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used) / 1000
        print(
            f"{name}: {count} inputs in {time.monotonic() - began:.0f} s, {grown:.0f} MB more: {dict(seen)}", flush=True
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
