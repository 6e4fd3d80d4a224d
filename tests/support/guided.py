"""Damage that learns: inputs which reach new lines of the package are changed further.

    PYTHONPATH=tests python tests/support/guided.py KIND SECONDS [SEED] [--keep FOLDER] [--blind]    of CPU time

A loop of its own rather than atheris: it needs no wheel for the Python at hand, changes structure with the functions
of `support.damaging`, and follows only the package's own lines, which `sys.settrace` tells everywhere.
"""

import argparse
import contextlib
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

import paramend as pm
from paramend.disk.publishing import manifest_of, unpublished
from paramend.errors import ParamendError
from paramend.recipes.verbs import VERBS
from paramend.rewriting import jobs
from support import fuzzing
from support.damaging import (
    of_archive,
    of_bytes,
    of_frames,
    of_gguf,
    of_header,
    of_lines,
    of_pickle,
    of_sealed,
    of_sharding,
    of_steps,
    of_streams,
    of_table,
    of_words,
    sealed,
)

PACKAGE = str(Path(pm.__file__).parent)

# ---- kinds ---------------------------------------------------------------------------------------------------------


@dataclass
class Kind:
    """Sound files of a folder, which of them are changed, how, and what is done with the one that is opened."""

    files: dict[str, bytes]
    changed: list[str]
    change: object
    opened: str = "."
    use: object = fuzzing.use
    stays: bool = True  # whether what is opened is only read


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


def parts(folder, name):
    """A model in several GGUF files, which are damaged one at a time."""
    from support.gguf_files import model

    model(folder / "m.gguf", layers=1, kinds={}, split_max_tensors=1)
    files = files_of(folder)
    return Kind(files, list(files), of_gguf, next(iter(files)))


def dcp(folder, name):
    from support import distributed

    distributed.write(folder / "step")
    return Kind(files_of(folder), ["step/.metadata"], of_pickle, "step")


def chunks(folder, name):
    """The files of a distributed checkpoint, each of one chunk, whose length is corrected."""
    import torch

    from support import distributed

    rows = [((0, 0), (3, 4)), ((3, 0), (3, 4))]
    distributed.write(folder / "step", {"w": (torch.arange(24.0).reshape(6, 4), rows)}, {})
    sound = (folder / "step/.metadata").read_bytes()

    def use(path, out):
        metadata = pickle.loads(sound)
        for info in metadata.storage_data.values():
            info.length = (path / info.relative_path).stat().st_size
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
        return fuzzing.use(path, out)

    files = files_of(folder)
    return Kind(files, [file for file in files if file.endswith(".distcp")], of_archive, "step", use, stays=False)


def sharded(folder, name):
    """A checkpoint as ranks write it by `HuggingFaceStorageWriter`."""
    fuzzing.sharded(folder / "step")
    files = files_of(folder)
    return Kind(files, list(files), of_sharding, "step")


def small():
    return {"a/w": np.arange(6.0), "a/b": np.arange(4.0), "c/0/w": np.ones((3, 20), "float32")}


def changed():
    return small() | {"a/b": np.zeros(4), "d": np.ones(2), "c/0/w": np.full((3, 20), 2, "float32")}


def delta(folder, name):
    """The manifest of a delta, or its payload, whose digest is made true."""
    pm.delta(small(), changed()).save(folder / "delta")
    manifest, payload = (folder / "delta" / name for name in ("delta.json", "delta.safetensors"))
    sound, digest = manifest.read_bytes(), hashlib.sha256(payload.read_bytes()).hexdigest().encode()
    pm.save(small(), folder / "old.safetensors")
    opened = folder / "old.safetensors"

    def use(path, out):
        if name == "payload":
            now = hashlib.sha256((path / "delta.safetensors").read_bytes()).hexdigest().encode()
            text = sound[len(b'{\n"sha256":""') + 65 :].replace(digest, now)
            (path / "delta.json").write_bytes(sealed(text))
        found = pm.Delta.load(path)
        str(found), found.to_dict()
        found.apply(small())
        found.apply(pm.open(opened)).save(out.with_suffix(".safetensors"))

    files = files_of(folder)
    change, file = (of_header, payload) if name == "payload" else (of_sealed, manifest)
    return Kind(files, [f"delta/{file.name}"], change, "delta", told(use), stays=name != "payload")


def slime(folder, name):
    """The index of a delta of slime, and its streams."""
    before, after = ({key.replace("/", "."): leaf for key, leaf in tree.items()} for tree in (small(), changed()))
    del after["d"]
    encoding = "xor" if name == "slime" else "overwrite"
    pm.delta(before, after, encoding=encoding, checksum="adler32").save(folder / "weight_v000002", slime=True)

    def change(rng, raw):
        return (of_table if raw.startswith(b"{") else of_streams)(rng, raw)

    def use(path, out):
        found = pm.Delta.load(path)
        str(found), found.to_dict()
        found.apply(before)

    files = files_of(folder)
    return Kind(files, list(files), change, "weight_v000002", told(use))


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
    return Kind(files, changed, of_frames, "model.safetensors", told(use), stays=False)


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


def manifest(folder, name):
    """What a stopped run wrote down of its jobs: another one goes on from there, or says why not."""
    source = folder / "source.npz"
    pm.save(small(), source)

    def write(out):
        pm.at(pm.open(source), "**").multiply(2).save(out, resume=True)

    class Stopped(BaseException):
        pass

    def stop(progress):
        if progress.done > 80:
            raise Stopped

    began = folder / "begun"
    began.mkdir()
    write(folder / "whole.npz")
    whole, sizes = (folder / "whole.npz").read_bytes(), (jobs._COMPUTED, jobs._COPIED)
    jobs._COMPUTED, jobs._COPIED = 1, 5000
    with contextlib.suppress(Stopped):
        pm.at(pm.open(source), "**").multiply(2).save(began / "out.npz", resume=True, progress=stop)
    jobs._COMPUTED, jobs._COPIED = sizes

    def use(path, out):
        jobs._COMPUTED, jobs._COPIED = 1, 5000
        try:
            write(path / "out.npz")
        finally:
            jobs._COMPUTED, jobs._COPIED = sizes
        assert (path / "out.npz").read_bytes() == whole, "another outcome"
        assert len(list(path.iterdir())) == 1, "something is left"

    files = files_of(began)
    (beside,) = (str(manifest_of(path).relative_to(began)) for path in unpublished(began / "out.npz"))
    return Kind(files, [beside], of_lines, ".", told(use), stays=False)


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


def steps(folder, name):
    """A recipe with a step of every verb."""
    examples = [verb.example for verb in VERBS.values()]
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"version": 1, "steps": examples}, sort_keys=False))

    def use(path, out):
        found = pm.Recipe.load(path)
        assert pm.Recipe.parse(str(found)) == found, "its text is another recipe"
        for tree in (small(), {"h": [{"w": np.ones((2, 2)), "q": np.ones((2, 2)), "k": np.ones((2, 2))}]}):
            for step in (step for step in yaml.safe_load(str(found))["steps"] if step not in examples):
                with contextlib.suppress(ParamendError):
                    pm.Recipe([step]).apply(tree)

    return Kind(files_of(folder), ["recipe.yaml"], of_steps, "recipe.yaml", told(use))


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
    "msgpack": one(of_bytes),
    "gguf": one(of_gguf),
    "payload": delta,
    "overwrite": slime,
    **{made.__name__: made for made in (index, orbax, parts, dcp, chunks, sharded, delta, slime)},
    **{made.__name__: made for made in (record, undo, manifest, selector, recipe, steps)},
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


def search(name, seconds, seed=0, keep=None, count=None, *, blind=False):
    """How many inputs ended how, how many were kept as new, and one input of each kind of failure. `blind`: which lines
    they reach is not followed, which is faster."""
    rng, seen, failures, coverage = random.Random(f"{name} {seed}"), Counter(), {}, Coverage()
    with tempfile.TemporaryDirectory() as scratch:
        made, folder, out = (Path(scratch, part) for part in ("sound", "in", "out"))
        made.mkdir()
        kind = KINDS[name](made, name)
        corpus = [(changed, kind.files[changed]) for changed in kind.changed]
        sound = list(corpus)  # what is still read: of most damage, the first fault is all that shows
        old = signal.signal(signal.SIGPROF, fuzzing.too_long)
        began, tried = time.process_time(), 0
        while (tried < count) if count else (time.process_time() - began < seconds):
            tried += 1
            changed, raw = (
                corpus[tried - 1]
                if tried <= len(kind.changed)
                else rng.choice(rng.choice([corpus, corpus[-20:], sound, sound]))
            )
            for _ in range(0 if tried <= len(kind.changed) else rng.choice([1, 1, 1, 2])):
                raw = kind.change(rng, raw)
            path = put(kind, folder, changed, raw)
            out.mkdir(mode=0o700)
            before, found = fuzzing.listed(folder), ""
            signal.setitimer(signal.ITIMER_PROF, fuzzing.SECONDS)
            sys.settrace(None if blind else coverage)
            try:
                found = kind.use(path, out / f"copy{path.suffix or '.safetensors'}")
                sys.settrace(None)
                seen[found] += 1
                assert not kind.stays or fuzzing.listed(folder) == before, "the folder of the input changed"
                assert found == "read" or not [*out.iterdir()], f"left: {[*out.iterdir()]}"
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
                if found == "read":
                    sound.append((changed, raw))
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
    parser.add_argument("--blind", action="store_true", help="do not follow which lines are reached: faster")
    parser.add_argument("--keep", type=Path, help="where inputs that fail are written")
    given = parser.parse_args()
    os.umask(0o077)
    failed = 0
    for name in KINDS if given.kind == "all" else [given.kind]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            failed += len(search(name, given.seconds, given.seed, given.keep, blind=given.blind))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
