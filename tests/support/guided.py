"""Damage that learns: inputs which reach new lines of the package are changed further.

    python tests/support/guided.py KIND SECONDS [SEED] [--keep FOLDER]    one kind or "all"; of CPU time

A loop of its own rather than atheris: it needs no wheel for the Python at hand, changes structure with the functions
of `support.fuzzing`, and follows only the package's own lines, which `sys.settrace` tells everywhere.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import paramend as pm
from paramend.errors import ParamendError
from support import fuzzing

PACKAGE = str(Path(pm.__file__).parent)

# ---- changes -------------------------------------------------------------------------------------------------------


def of_table(rng, raw):
    """JSON changed as JSON, if it is some."""
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError):
        table = None
    # Deep nesting is for the readers, not for the functions that change it.
    return (
        fuzzing.of_json(rng, table)
        if table and isinstance(table, dict) and raw.count(b"[") < 500
        else fuzzing.of_bytes(rng, raw)
    )


def of_header(rng, raw):
    length = int.from_bytes(raw[:8], "little")
    if rng.random() < 0.3 or length > len(raw):
        return fuzzing.of_bytes(rng, raw)
    text = of_table(rng, raw[8 : 8 + length])
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def of_archive(rng, raw):
    try:
        return fuzzing.of_bytes(rng, raw) if rng.random() < 0.3 else fuzzing.of_zip(rng, raw)
    except Exception:  # what is no zip file any more, in one of many ways
        return fuzzing.of_bytes(rng, raw)


def framed(kind, payload):
    data = struct.pack("<4sQ", kind, len(payload)) + payload
    return data + hashlib.sha256(data).digest()


def of_frames(rng, raw):
    """An undo record with a frame changed, left out or doubled, its digests true."""
    frames, at = [], 8
    while at + 12 <= len(raw):
        kind, length = struct.unpack_from("<4sQ", raw, at)
        frames.append((kind, raw[at + 12 : at + 12 + length]))
        at += 12 + length + 32
    if not frames or rng.random() < 0.1:
        return fuzzing.of_bytes(rng, raw)
    chosen = rng.randrange(len(frames))
    kind, payload = frames[chosen]
    match rng.randrange(8):
        case 0:
            frames.pop(chosen)
        case 1:
            frames.insert(rng.randrange(len(frames) + 1), (kind, payload))
        case _:
            frames[chosen] = (kind, of_table(rng, payload))
    return raw[:8] + b"".join(framed(*frame) for frame in frames)


def of_sealed(rng, raw):
    """The manifest of a delta, with the digest that it begins with made true."""
    head = len(b'{\n"sha256":""') + 65
    text = of_table(rng, b"{" + raw[head:])[1:]
    return b'{\n"sha256":"' + hashlib.sha256(text).hexdigest().encode() + b'",' + text


def of_words(*words):
    """Text with words of a language put in, left out and doubled."""

    def change(rng, raw):
        text = raw.decode("utf-8", "replace")
        for _ in range(rng.choice([1, 1, 2, 3, 8])):
            at = rng.randrange(len(text) + 1)
            stop = min(len(text), at + rng.choice([0, 1, 1, 2, 5, 20]))
            text = (
                text[:at]
                + rng.choice([rng.choice(words), text[at:stop] * 2, "", chr(rng.randrange(1, 300))])
                + text[stop:]
            )
        return text[:2000].encode()

    return change


# ---- kinds ---------------------------------------------------------------------------------------------------------


@dataclass
class Kind:
    """Sound files of a folder, which of them are changed, how, and what is done with the one that is opened."""

    files: dict[str, bytes]
    changed: list[str]
    change: object
    opened: str = "."
    use: object = fuzzing.use


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def one(change):
    """A kind of `support.fuzzing` whose input is one file."""

    def make(folder, name):
        made = fuzzing.KINDS[name](folder)
        raw = getattr(made, "raws", None) or [made.raw]
        return Kind({made.path.name: raw[0]}, [made.path.name], change, made.path.name)

    return make


def index(folder, name):
    made = fuzzing.Index(folder)
    made.path.write_text(json.dumps(made.table))
    return Kind(files_of(folder), [made.path.name], of_table)


def orbax(folder, name):
    made = fuzzing.Orbax(folder)
    return Kind(files_of(folder), [str(path.relative_to(folder)) for path in made.files], of_table, "step")


def small():
    return {"a/w": np.arange(6.0), "a/b": np.arange(4.0), "c/0/w": np.ones((3, 20), "float32")}


def delta(folder, name):
    for stem, tree in (("old", small()), ("new", small() | {"a/b": np.zeros(4), "d": np.ones(2)})):
        pm.save(tree, folder / f"{stem}.safetensors")
    pm.delta(folder / "old.safetensors", folder / "new.safetensors").save(folder / "delta")

    def use(path, out):
        found = pm.Delta.load(path)
        str(found), found.to_dict()
        found.apply(small())

    files = files_of(folder)
    return Kind(files, ["delta/delta.json"], of_sealed, "delta", told(use))


def record(folder, name):
    """The record of edits beside a file."""
    pm.save(small(), folder / "old.npz")
    pm.at(pm.open(folder / "old.npz"), "a/**").multiply(2).save(folder / "new.npz", record=True)

    def use(path, out):
        found = pm.record(path)
        str(found), found and found.to_dict()
        pm.verify_record(path)

    return Kind(files_of(folder), ["new.npz.record.json"], of_table, "new.npz", told(use))


def undo(folder, name):
    """The undo record of a file."""
    path = folder / "model.safetensors"
    pm.save(small(), path)
    pm.patch(path, lambda tree: pm.at(pm.at(tree, "a/b").zero(), "c/**")[:, 0].fill(2))

    def use(path, out):
        before = path.read_bytes()
        for force in (False, True):
            try:
                pm.history(path)
                pm.undo(path, force=force)
            except ParamendError:
                assert path.read_bytes() == before, "a refused record changed the file"
                if force:
                    raise
            else:
                return

    files = files_of(folder)
    changed = [file for file in files if file.endswith(".done")]
    return Kind(files, changed, of_frames, "model.safetensors", told(use))


SELECTOR = (
    "*",
    "**",
    "?",
    "[",
    "]",
    "{",
    "}",
    ",",
    "|",
    "&",
    "!",
    "~",
    "(",
    ")",
    "/",
    ".",
    ":",
    "-1",
    "0",
    "<n>",
    "<",
    ">",
)
SELECTOR += (
    "\\",
    '"',
    "'",
    "re:",
    "layers",
    "w",
    " ",
    "[0:2]",
    "[-1]",
    "{a,b}",
    "99999999999999999999",
    "^",
    "$",
    "%",
    "@",
    "=",
)


SELECTORS = (
    "**",
    "a/{w,b}",
    "c/[-1]/w",
    "c.[0:2].*",
    "c/<n>/**",
    '"a".w',
    "a/w | c/**",
    "**[0, :4]",
    "c[0]/w",
    "{a,c}/**/w",
)


def selector(folder, name):
    def use(path, out):
        text = path.read_bytes().decode()
        chosen = pm.sel(text)
        repr(chosen)
        for tree in (small(), {"a": {"w": np.ones(3)}, "c": [{"w": np.ones(2)}, {"w": np.ones(2)}]}):
            pm.at(tree, text).zero()
            pm.at(tree, chosen & pm.sel("**")).zero()

    return Kind({"text": SELECTORS[0].encode()}, ["text"], of_words(*SELECTOR, *SELECTORS), "text", told(use))


RECIPE = b"""version: 1
steps:
  - zero: a/b
  - fill: {at: "c/**", value: 0.5, index: "0:1"}
  - rename: {at: "c/<n>/**", to: "x/<n>/**"}
  - delete: a/w
"""
WORDS = (
    "zero",
    "scale",
    "fill",
    "tie",
    "cast",
    "at",
    "value",
    ":",
    "- ",
    "{",
    "}",
    "[",
    "]",
    "&a ",
    "*a",
    "!!python/name:os.system",
    "|",
    ">",
)
WORDS += (
    "\n",
    "  ",
    "1e999",
    ".nan",
    "0x10",
    "~",
    "null",
    "yes",
    "'",
    '"',
    "%",
    "---\n",
    "...",
    "<<: ",
    "? ",
    "#",
    "\t",
    "9" * 5000,
)


def recipe(folder, name):
    (folder / "recipe.yaml").write_bytes(RECIPE)

    def use(path, out):
        found = pm.Recipe.load(path)
        assert pm.Recipe.parse(str(found)) == found, "its text is another recipe"
        found.apply(small())

    return Kind(files_of(folder), ["recipe.yaml"], of_words(*WORDS), "recipe.yaml", told(use))


def told(use):
    def run(path, out):
        try:
            use(path, out)
        except ParamendError as error:
            str(error)
            return type(error).__name__
        return "read"

    return run


KINDS = {
    "safetensors": one(of_header),
    "torch": one(of_archive),
    "npz": one(of_archive),
    "msgpack": one(fuzzing.of_bytes),
    **{made.__name__: made for made in (index, orbax, delta, record, undo, selector, recipe)},
}

# ---- running -------------------------------------------------------------------------------------------------------


class Coverage:
    """The steps from line to line in the package that were ever taken."""

    def __init__(self):
        self.seen, self.grown = set(), False

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        code, last = frame.f_code, 0

        def step(frame, event, argument):
            nonlocal last
            key = (code, last, frame.f_lineno)
            last = frame.f_lineno
            if key not in self.seen:
                self.seen.add(key)
                self.grown = True
            return step

        return step


def put(kind, folder, changed, raw):
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in (kind.files | {changed: raw}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder / kind.opened


def search(name, seconds, seed=0, keep=None, count=None):
    """How many inputs ended how, how many were kept as new, and one input of each kind of failure."""
    rng, seen, failures, coverage = random.Random(f"{name} {seed}"), Counter(), {}, Coverage()
    with tempfile.TemporaryDirectory() as scratch:
        sound, folder, out = (Path(scratch, part) for part in ("sound", "in", "out"))
        sound.mkdir()
        kind = KINDS[name](sound, name)
        corpus = [(changed, kind.files[changed]) for changed in kind.changed]
        old = signal.signal(signal.SIGPROF, fuzzing.too_long)
        began, tried = time.process_time(), 0
        while (tried < count) if count else (time.process_time() - began < seconds):
            tried += 1
            changed, raw = (
                corpus[tried - 1]
                if tried <= len(kind.changed)
                else rng.choice(corpus if rng.random() < 0.5 else corpus[-20:])
            )
            for _ in range(0 if tried <= len(kind.changed) else rng.choice([1, 1, 2, 3])):
                raw = kind.change(rng, raw)
            path = put(kind, folder, changed, raw)
            out.mkdir()
            signal.setitimer(signal.ITIMER_PROF, fuzzing.SECONDS)
            sys.settrace(coverage)
            try:
                seen[kind.use(path, out / ("copy.safetensors" if name == "orbax" else f"copy{path.suffix}"))] += 1
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                failures.setdefault(place(error), (changed, raw, error))
                seen["FAILED"] += 1
            finally:
                sys.settrace(None)
                signal.setitimer(signal.ITIMER_PROF, 0)
            if tried == len(kind.changed):
                assert set(seen) == {"read"}, f"{name}: the sound files give {dict(seen)}"
            if coverage.grown and len(raw) < 1 << 16:
                corpus.append((changed, raw))
            coverage.grown = False
            shutil.rmtree(out)
        signal.signal(signal.SIGPROF, old)
    for number, (changed, raw, error) in enumerate(failures.values()):
        print("".join(traceback.format_exception(error)[-4:]), f"input: {raw[:300]!r}\n", sep="")
        if keep:
            Path(keep, f"{name}-{number}-{Path(changed).name}").write_bytes(raw)
    print(f"{name}: {tried} inputs, {len(corpus)} kept, {len(coverage.seen)} steps: {dict(seen)}", flush=True)
    return failures


def place(error):
    """Where in the package an error came from."""
    frames = [one for one in traceback.extract_tb(error.__traceback__) if one.filename.startswith(PACKAGE)]
    return type(error).__name__, *((frames[-1].filename, frames[-1].lineno) if frames else ())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["all", *KINDS])
    parser.add_argument("seconds", type=float)
    parser.add_argument("seed", nargs="?", default="0")
    parser.add_argument("--keep", type=Path, help="where inputs that fail are written")
    given = parser.parse_args()
    os.umask(0o077)
    failed = 0
    for name in KINDS if given.kind == "all" else [given.kind]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            failed += len(search(name, given.seconds, given.seed, given.keep))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
