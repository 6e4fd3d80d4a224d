"""Random damage for every format: only errors of our own may come out, nothing is written, time and memory are bounded.

    python tests/support/fuzzing.py KIND COUNT [SEED]        one kind, or "all"

Each kind takes good files that the real libraries wrote, and changes bytes, text and structure: lengths, offsets,
shapes, dtypes, names and nesting, with checksums made true again where a reader would stop at them.
"""

import copy
import io
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np

import paramend as pm
from paramend.errors import BadCheckpoint, ParamendError

SECONDS = 10  # of the processor, however busy it is with other programs

# ---- changes -------------------------------------------------------------------------------------------------------

NUMBERS = [0, 1, -1, 2, 7, 8, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30]
TEXTS = ["", "/", "..", "../x", "a/../b", "/etc/passwd", "\0", "\\", "x" * 300, "F32", "I4", "BF16", "ü", "\ud800"]
TEXTS += ["a." * 120, "__metadata__", "data_offsets", "shape", "model.safetensors", "con:", "\x1b[31m", "."]
PIECES = [b"", b"\0", b"\xff" * 4, bytes(8), b"{", b"}", b"[" * 200, b'"', b",", b"9" * 40, b"-", b"\n", b"PK\3\4"]


def of_bytes(rng, raw):
    """Bytes changed, cut out, put in, doubled or cut off."""
    raw = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        at = rng.randrange(len(raw) + 1)
        length = rng.choice([1, 1, 2, 4, 8, 64])
        match rng.randrange(8):
            case 0 | 1:
                raw[at : at + 1] = bytes([rng.randrange(256)])
            case 2:
                raw[at : at + length] = b""
            case 3:
                raw[at:at] = rng.choice([rng.randbytes(length), rng.choice(PIECES)])
            case 4:
                raw[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 2**31, 2**32 - 1, rng.randrange(2**32)]))
            case 5:
                raw[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**63, 2**64 - 1, len(raw), rng.randrange(999)]))
            case 6:
                raw[at:at] = raw[at : at + length * rng.choice([1, 8])]
            case 7:
                del raw[at if rng.random() < 0.3 else len(raw) :]
    return bytes(raw)


def of_json(rng, table):
    """A JSON value with some of its values, keys or entries replaced."""
    table = copy.deepcopy(table)
    for _ in range(rng.choice([1, 1, 2, 3])):
        places = [*walked(table)]
        node, key = rng.choice(places)
        value = rng.choice(
            [
                rng.choice(NUMBERS),
                rng.choice(TEXTS),
                rng.choice([None, True, False, 0.5, 1e308, -0.0, [], {}, [[]], {"a": {}}]),
                [rng.choice(NUMBERS) for _ in range(rng.choice([1, 2, 2, 3, 70]))],
                copy.deepcopy(rng.choice(places)[0]),
            ]
        )
        if isinstance(node, dict) and rng.random() < 0.3:
            new = rng.choice([*TEXTS, *(k for n, k in places if isinstance(n, dict))])
            node[new] = node.pop(key) if rng.random() < 0.7 else copy.deepcopy(node[key])
        elif rng.random() < 0.15:
            node.pop(key)
        elif isinstance(node[key], int) and rng.random() < 0.5:
            node[key] = node[key] + rng.choice([-8, -4, -1, 1, 4, 8])
        else:
            node[key] = value
        if not isinstance(table, dict) or not table:
            break
    text = json.dumps(table, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        text = text.replace(b"{", b'{"a": ' + b"[" * 2000 + b"]" * 2000 + b", ", 1)
    if rng.random() < 0.15:
        at = text.find(b'": ', rng.randrange(len(text)))
        start = text.rfind(b'"', 0, at)
        if start >= 0:
            text = text[:start] + text[start : at + 3] + b"1, " + text[start:]  # a duplicate key
    return of_bytes(rng, text) if rng.random() < 0.1 else text


def walked(node):
    for key, child in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(child, dict | list):
            yield from walked(child)


def of_zip(rng, raw):
    """A zip file with records changed, renamed, left out or packed, its own checksums true."""
    with zipfile.ZipFile(io.BytesIO(raw)) as old:
        records = [(name, old.read(name)) for name in old.namelist()]
    chosen = rng.randrange(len(records))
    if rng.random() < 0.7:  # what says how the rest is to be read
        chosen = next((i for i, (name, _) in enumerate(records) if name.endswith(".pkl")), chosen)
    name, data = records[chosen]
    match rng.randrange(10):
        case 0:
            records.pop(chosen)
        case 1:
            records[chosen] = (
                rng.choice(["x", "../x", "/x", "x/data.pkl", "x/data/0", "x/", "a" * 300, "w.npy"]),
                data,
            )
        case 2:
            records.append((rng.choice(["x/data/9", "x/code/a.py", "x/constants.pkl", "y/data.pkl", "z.npy"]), data))
        case _:
            records[chosen] = (name, of_bytes(rng, data))
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(out, "w", method) as new:
            for name, data in records:
                new.writestr(name, data)
    return out.getvalue()


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
        head = raw.index(b"output_norm") + 60
        self.path.write_bytes(of_bytes(rng, raw[:head]) + raw[head:])
        return self.path


KINDS = {
    "gguf": Gguf,
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
        if kind == "orbax":  # which is only read
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
