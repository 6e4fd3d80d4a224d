"""The life of a checkpoint: patched, undone, killed at, copied, moved, held open and replaced, in any order.

    PYTHONPATH=src:tests python tests/support/stateful.py KIND|all STEPS [SEED]      KIND: see tests/support/kinds.py

Beside it goes a model of arrays in memory, with the bytes that were on disk at each patch that can be taken back. After
each step the library that defines the format reads what the model says, an undo record is there for each patch and for
nothing else, and what nobody touched is as it was.
"""

import contextlib
import itertools
import os
import shutil
import signal
import sys
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, seed, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import paramend as pm
from paramend.errors import BadCheckpoint, CannotWrite, ParamendError, Unsupported
from paramend.journal.store import UndoStore
from paramend.journal.undo import drop, recover
from support.crashing import Crash, Machine
from support.kinds import KINDS

# Thousands of fsyncs, of which memory does nothing.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def bits(tree):
    return {name: (leaf.dtype.name, leaf.shape, leaf.tobytes()) for name, leaf in tree.items()}


def files_of(path):
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def visible(path):
    """Each file of a checkpoint with its bytes; undo records are none of it."""
    inside = {file.relative_to(path): file for file in files_of(path)}
    return {str(name): file.read_bytes() for name, file in inside.items() if ".undo" not in name.parts}


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def records_of(path):
    return path / ".undo" if path.is_dir() else path.with_name(f".{path.name}.undo")


@dataclass(frozen=True)
class State:
    """What a checkpoint holds, and the leaves and files that the patch before it named; `files` once they were seen."""

    tree: dict
    config: dict
    named: frozenset = frozenset()
    files: dict | None = field(default=None, compare=False)

    def now(self, path):
        return State(self.tree, self.config, self.named, visible(path))


# ---- changes: what Paramend does, and what numpy does ---------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """A verb on leaves, or on the first axis of them; whole numbers stay exact, and one step of a float rounds once."""

    names: tuple[str, ...]
    verb: str
    value: object
    index: slice | None = None

    def __call__(self, tree):
        chosen = pm.at(tree, list(self.names))
        chosen = chosen if self.index is None else chosen[self.index]
        return getattr(chosen, self.verb)(*(() if self.value is None else (self.value,)))

    def after(self, state):
        tree = dict(state.tree)
        for name in self.names:
            part = ... if self.index is None else self.index
            leaf = tree[name] = tree[name].copy()
            wide = leaf[part] if leaf.dtype.kind == "i" else leaf[part].astype("float64")
            with np.errstate(over="ignore"):
                leaf[part] = np.asarray(COMPUTED[self.verb](wide, self.value)).astype(leaf.dtype)
        part = [tree[name] if self.index is None else tree[name][self.index] for name in self.names]
        named = frozenset(name for name, piece in zip(self.names, part, strict=True) if piece.size)
        return State(tree, state.config, named) if named else None


COMPUTED = {
    "zero": lambda x, _: x * 0 * 0 if x.dtype.kind == "i" else np.zeros_like(x),
    "fill": lambda x, value: np.full_like(x, value),
    "add": np.add,
    "multiply": np.multiply,
    "set": lambda x, value: value,
    "apply": lambda x, value: value(x),
}
VALUES = {"zero": [None], "fill": [3, -1], "add": [1], "multiply": [-2], "apply": [np.negative]}


@dataclass(frozen=True)
class Configured:
    """A configuration that gets other entries, and a leaf."""

    config: dict
    edit: Edit | None

    def __call__(self, tree):
        return pm.config(self.edit(tree) if self.edit else tree).set(self.config)

    def after(self, state):
        edited = self.edit and self.edit.after(state)
        config = {**state.config, **self.config}
        if config == state.config:
            return edited
        named = {"its configuration"} | (edited.named if edited else set())
        return State(edited.tree if edited else state.tree, config, frozenset(named))


@dataclass(frozen=True)
class Inserted:
    """A leaf that comes."""

    name: str
    leaf: np.ndarray

    def __call__(self, tree):
        return pm.insert(tree, {self.name: self.leaf}, "**")[0]

    def after(self, state):
        return State({**state.tree, self.name: self.leaf}, state.config, frozenset({self.name}))


@dataclass(frozen=True)
class Relabelled:
    """A leaf that gets another name, or goes."""

    name: str
    new: str | None

    def __call__(self, tree):
        chosen = pm.at(tree, self.name)
        return chosen.rename(self.new) if self.new else chosen.delete()

    def after(self, state):
        tree = {name: leaf for name, leaf in state.tree.items() if name != self.name}
        tree |= {self.new: state.tree[self.name]} if self.new else {}
        return State(tree, state.config, frozenset({self.new or self.name}))


def edits(tree):
    """Edits of some of the leaves of a tree."""

    def of(names):
        verbs = st.sampled_from([(verb, value) for verb, values in VALUES.items() for value in values])
        axes = all(tree[name].ndim for name in names)
        parts = st.sampled_from([None, slice(1, 3), slice(None, None, -2)] if axes else [None])
        made = st.builds(lambda pair, index: Edit(names, *pair, index), verbs, parts)
        if len(names) > 1:
            return made
        return made | st.just(Edit(names, "set", np.full_like(tree[names[0]], 7)))

    names = st.lists(st.sampled_from(sorted(tree)), min_size=1, max_size=4, unique=True)
    return names.map(tuple).flatmap(of)


# ---- kills ---------------------------------------------------------------------------------------------------------

MORE_CALLS = ("replace", "link", "symlink", "copy_file_range", "sendfile", "chmod", "fchmod", "fchown", "close")


def killed(action, stop):
    """Whether a child that runs an action was killed at a call of the system, and not before it ended."""
    child = os.fork()
    if not child:
        status, count = 1, itertools.count(1)

        def counted(real):
            def run(*args, **options):
                if next(count) == stop:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)

            return run

        try:
            for name in (*Machine.CALLS, *MORE_CALLS):
                setattr(os, name, counted(getattr(os, name)))
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    ended = os.waitpid(child, 0)[1]
    assert ended in (0, signal.SIGKILL)
    return bool(ended)


def refused_to_others(path, change):
    """Check, in a child that is nobody, that a read-only checkpoint can be read and not patched."""
    child = os.fork()
    if not child:
        status = 1
        try:
            if not os.geteuid():
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            pm.open(path).close()
            try:
                pm.patch(path, change)
            except CannotWrite:
                status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


# ---- the machine ---------------------------------------------------------------------------------------------------


class Life(RuleBasedStateMachine):
    """A checkpoint in a folder with a neighbour.

    `stacks` are what it can be: one list of states, the last of which it is now; two after a kill, until it is opened.
    """

    kind = KINDS["file"]
    forks = False  # whether programs are killed that are other processes: in a thousand steps, not in ten

    def __init__(self):
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="life-", dir=MEMORY))
        self.root.chmod(0o755)
        self.numbers = itertools.count(1)
        self.folder = self.root / "home"
        self.folder.mkdir()
        self.path = self.kind.make(self.folder)
        for file in files_of(self.path):
            file.chmod(0o644)
        first = State(*self.kind.read(self.path))
        self.stacks = [[first.now(self.path)]]
        neighbour = self.folder / "neighbour"
        neighbour.mkdir()
        pm.save({"w": np.ones(3, "float32")}, neighbour / "x.safetensors")
        pm.patch(neighbour / "x.safetensors", lambda t: pm.at(t, "w").zero())
        self.others = {neighbour: visible(neighbour)}
        self.held, self.since = None, []
        self.believed = True  # whether what is half done may be taken back unasked

    # What is known

    @property
    def stack(self):
        return self.stacks[0]

    def sure(self):
        return len(self.stacks) == 1

    def patchable(self):
        return self.sure() and len(self.stack) < 8

    def patched(self):
        return self.sure() and len(self.stack) > 1

    def begun(self, state):
        """The stack after a patch, which makes nothing if all its leaves are empty."""
        return [*self.stack, state] if state else self.stack

    def is_now(self, *stacks):
        """One of these stacks is true; which one, the number of records says."""
        self.stacks = [*stacks]
        if len(stacks) == 1 or stacks[0] is stacks[1]:
            self.settle()

    def settle(self):
        if not self.believed:  # what was begun elsewhere is swept by the next that writes
            with UndoStore.of(self.path).writing():
                pass
        done = sorted(path.name for path in records_of(self.path).glob("[0-9]*"))
        assert all(name.endswith(".done") for name in done), done
        fits = [stack for stack in self.stacks if len(stack) - 1 == len(done)]
        assert fits, (done, [len(stack) for stack in self.stacks])
        *below, top = fits[0]
        self.stacks, self.believed = [[*below, top if top.files is not None else top.now(self.path)]], True
        self.since.append(self.stack[-1])

    def change(self, data, tops):
        """A change that is possible in all of these states."""
        common = set.intersection(*({*top.tree} for top in tops))
        edited = edits({name: tops[0].tree[name] for name in common})
        if len(tops) > 1:
            return data.draw(edited)
        kinds, names = [edited, edited], st.sampled_from(sorted(common))
        if self.kind.settings:
            kinds.append(st.builds(Configured, st.sampled_from(self.kind.settings), st.none() | edited))
        if self.kind.inserts:
            kinds.append(st.just(Inserted(f"more.{next(self.numbers)}", np.arange(5, dtype="float32"))))
        if self.kind.relabels and len(common) > 2:
            kinds.append(st.builds(Relabelled, names, st.sampled_from([None, f"other.{next(self.numbers)}"])))
        return data.draw(st.one_of(kinds))

    # What is done

    @precondition(patchable)
    @rule(data=st.data())
    def patch(self, data):
        change = self.change(data, self.stack[-1:])
        report = pm.patch(self.path, change)
        state = change.after(self.stack[-1])
        assert bool(report.record) == bool(state)
        self.is_now(self.begun(state))

    @precondition(sure)
    @rule(data=st.data())
    def refuse(self, data):
        """What cannot be done in place, and an error in the midst of an edit, change nothing."""
        self.since.append(self.stack[-1])  # files may have been written, as they were
        name = data.draw(st.sampled_from(sorted(self.stack[-1].tree)))
        with pytest.raises(Unsupported):
            pm.patch(self.path, lambda t: pm.at(t, name).cast("float64"))
        if self.stack[-1].tree[name].size:
            with pytest.raises(ZeroDivisionError):
                pm.patch(self.path, lambda t: pm.at(t, name).apply(lambda x: 1 / 0))
        if not self.kind.relabels:
            with pytest.raises(Unsupported):
                pm.patch(self.path, lambda t: pm.at(t, name).delete())
        if len(self.stack) == 1:
            with pytest.raises(CannotWrite, match="nothing to take back"):
                pm.undo(self.path)

    @precondition(patched)
    @rule(force=st.booleans())
    def undo(self, force):
        report = pm.undo(self.path, force=force)
        assert report.left == len(self.stack) - 2 and not report.interrupted
        assert named(report.undone) == self.stack[-1].named
        self.is_now(self.stack[:-1])

    @precondition(patched)
    @rule()
    def unwind(self):
        """All patches of a copy are taken back, one after the other."""
        copy = self.copied("unwound")
        for state in reversed(self.stack[:-1]):
            pm.undo(copy)
            assert state.files in (None, visible(copy))
        assert not records_of(copy).exists()
        shutil.rmtree(copy.parent)

    @precondition(patched)
    @rule(keep=st.integers(0, 3))
    def drop(self, keep):
        gone = drop(self.path, keep=keep)
        assert len(gone) == max(len(self.stack) - 1 - keep, 0)
        self.is_now(self.stack[-keep - 1 :])

    @precondition(patched)
    @rule()
    def meddle(self):
        """Another program changes what a patch wrote: it is not taken back."""
        now, old = self.stack[-1].files, self.stack[-2].files or {}
        places = [
            (name, at)
            for name in now.keys() & old.keys()
            for at, (one, other) in enumerate(zip(now[name], old[name], strict=False))
            if one != other
        ]
        if places and len(now) == len(old):
            name, at = min(places)
            file = self.path if self.path.is_file() else self.path / name
            file.write_bytes(now[name][:at] + bytes([now[name][at] ^ 0xFF]) + now[name][at + 1 :])
            then = visible(self.path)
            with pytest.raises((CannotWrite, BadCheckpoint), match=r"changed since|damaged|nothing was written"):
                pm.undo(self.path)
            assert visible(self.path) == then
            file.write_bytes(now[name])
            self.held = None

    @precondition(sure)
    @rule(data=st.data())
    def forbid(self, data):
        if self.forks:
            change = self.change(data, self.stack[-1:])
            self.since.append(self.stack[-1])
            files = files_of(self.path)
            folders = [self.folder, *(file for file in self.path.rglob("*") if file.is_dir()), self.path.parent]
            folders += [self.path] if self.path.is_dir() else []
            modes = {file: file.stat().st_mode & 0o7777 for file in (*files, *folders)}
            for file in modes:
                file.chmod(0o444 if file in files else 0o555)
            try:
                if change.after(self.stack[-1]):
                    refused_to_others(self.path, change)
            finally:
                for file, mode in modes.items():
                    file.chmod(mode)

    # Programs that hold it open

    @rule()
    def hold(self):
        if self.sure() and self.held is None:
            self.held, self.since = pm.open(self.path), [self.stack[-1]]

    @precondition(lambda self: self.held is not None and self.sure())
    @rule(close=st.booleans())
    def read_held(self, close):
        """A program that opened it before finds what was there then or since, or an error; no save is a mixture."""
        out = self.root / f"held{self.path.suffix}"
        try:
            for name in self.since[0].tree:
                found = self.held[name.replace(".", "/") if "/" in self.held.paths[0] else name]
                assert bits({"": found})[""] in [bits(state.tree).get(name) for state in self.since]
            self.held.save(out)
        except ParamendError:
            assert len(self.since) > 1
        else:
            tree, config = self.kind.read(out)
            assert any(bits(tree) == bits(state.tree) and config == state.config for state in self.since)
        finally:
            remove(out)
        assert not [*self.root.glob(".paramend-*")]
        if close:
            self.held.close()
            self.held = None

    # Other places

    @precondition(lambda self: self.sure() or self.believed)
    @rule(records=st.booleans(), on=st.booleans())
    def copy(self, records, on):
        """A copy, with its undo records or without; one of the two is used from now on."""
        if not self.sure() and not records:
            return
        new = self.copied(f"copy{next(self.numbers)}", records=records)
        if on:
            self.others = {path: seen for path, seen in self.others.items() if path.parent != self.folder}
            self.moved_to(new, records=records)
        else:
            shutil.rmtree(new.parent)

    def copied(self, name, *, records=True):
        folder = self.root / name
        shutil.copytree(self.folder, folder, copy_function=shutil.copy)
        path = folder / self.path.name
        if not records and records_of(path).exists():
            shutil.rmtree(records_of(path))
        return path

    def moved_to(self, path, *, records=True):
        old, self.folder, self.path = self.folder, path.parent, path
        self.others = {self.folder / file.relative_to(old) if file.is_relative_to(old) else file: seen
                       for file, seen in self.others.items()}  # fmt: skip
        self.believed = self.sure()
        self.since.append(self.stack[-1])
        if self.sure():
            self.is_now(self.stack if records else self.stack[-1:])

    @rule(how=st.sampled_from(["folder", "alone", "with records", "there and back"]))
    def move(self, how):
        records = records_of(self.path)
        beside = not self.path.is_dir() and records.exists()
        if how == "folder" or (how == "alone" and not self.sure()):
            new = self.folder.with_name(f"moved{next(self.numbers)}")
            self.folder.rename(new)
            self.moved_to(new / self.path.name)
            return
        new = self.path.with_name(f"moved{next(self.numbers)}{self.path.suffix}")
        self.path.rename(new)
        if how == "there and back":
            if self.sure() and beside:
                assert pm.history(new) == []
            new.rename(self.path)
            self.since.append(self.stack[-1])
            return
        if beside and how == "alone":
            shutil.rmtree(records)
        elif beside:
            records.rename(records_of(new))
        self.moved_to(new, records=how == "with records" or not beside)

    @precondition(sure)
    @rule(data=st.data(), stop=st.integers(1, 90), on=st.booleans())
    def save(self, data, stop, on):
        """A save to another place that is killed, and made once more."""
        change = data.draw(edits(self.stack[-1].tree))
        state = change.after(self.stack[-1]) or self.stack[-1]
        out = self.folder / f"out{next(self.numbers)}{self.path.suffix}"

        def action(**options):
            with pm.open(self.path) as opened:
                change(opened).save(out, **options)

        self.dies(action, stop, {})
        if out.exists():
            assert bits(self.kind.read(out)[0]) == bits(state.tree)
        action(force=True)
        tree, config = self.kind.read(out)
        assert bits(tree) == bits(state.tree) and config == state.config and pm.history(out) == []
        if on:
            remove(self.path)
            remove(records_of(self.path))
            self.path, self.held = out, None
            self.stacks = [[State(tree, config).now(out)]]
        else:
            remove(out)

    @precondition(sure)
    @rule(data=st.data(), stop=st.integers(1, 140))
    def replace(self, data, stop):
        """A save over it, which may be killed and is then made again, ends what can be taken back."""
        change = data.draw(edits(self.stack[-1].tree))
        state = State((change.after(self.stack[-1]) or self.stack[-1]).tree, self.stack[-1].config)

        copy = self.copied("other")

        def action():
            with pm.open(copy) as opened:
                change(opened).save(self.path, force=True)

        if self.dies(action, stop, {}):
            found = self.kind.read(self.path)
            assert bits(found[0]) in [bits(self.stack[-1].tree), bits(state.tree)]
            action()
        shutil.rmtree(copy.parent)
        self.since.append(state)
        self.stacks = [[state.now(self.path)]]

    # Kills, and what comes after them

    def dies(self, action, stop, how):
        """Whether a program was killed at a call of the system before it was done."""
        if self.forks and not how and stop % 2:
            return killed(action, stop)
        with pytest.MonkeyPatch.context() as monkeypatch:
            machine = Machine(monkeypatch, stop, **how)
            with contextlib.suppress(Crash):
                action()
        if machine.power is not None:
            machine.lose(self.folder)
        return machine.dead or machine.power is not None

    HOW = st.sampled_from([{}, {}, {"torn": True}, {"power": 0}, {"power": 1, "torn": True}, {"power": 2}])

    @precondition(patchable)
    @rule(data=st.data(), stop=st.integers(1, 60), how=HOW)
    def kill_patch(self, data, stop, how):
        change = self.change(data, self.stack[-1:])
        new = self.begun(change.after(self.stack[-1]))
        dead = self.dies(lambda: pm.patch(self.path, change), stop, how)
        self.is_now(*([self.stack, new] if dead else [new]))

    @precondition(patched)
    @rule(stop=st.integers(1, 30), how=HOW, drops=st.booleans())
    def kill_undo(self, stop, how, drops):
        dead = self.dies(lambda: drop(self.path, keep=1) if drops else pm.undo(self.path), stop, how)
        new = [self.stack[-keep:] for keep in range(2, len(self.stack))] if drops else [self.stack[:-1]]
        self.stacks = [*([self.stack] if dead or not new else []), *new]
        if not dead or drops:
            recover(self.path)
            self.settle()

    @precondition(lambda self: not self.sure())
    @rule(stop=st.integers(1, 20), how=HOW)
    def kill_recovery(self, stop, how):
        def action():
            with contextlib.suppress(*([] if self.believed else [BadCheckpoint])):
                pm.open(self.path).close()

        self.dies(action, stop, how)

    @precondition(lambda self: not self.sure())
    @rule(data=st.data(), how=st.sampled_from(["open", "load", "history", "undo", "patch", "save"]))
    def reopen(self, data, how):
        """The next program finds the old state or the new one; if it is elsewhere, it asks first."""
        pending = list(records_of(self.path).glob("*.pending"))
        if pending and not self.believed:
            before = visible(self.path)
            with pytest.raises(BadCheckpoint, match="not known as a patch that you made here"):
                pm.open(self.path)
            assert visible(self.path) == before
            how = "undo"
        if how == "undo":
            try:
                report = pm.undo(self.path)
            except CannotWrite:
                assert not pending and any(len(stack) == 1 for stack in self.stacks)
            else:
                assert report.interrupted == bool(pending)
                if not pending:
                    self.stacks = [stack[:-1] for stack in self.stacks if len(stack) > 1]
        elif how == "patch":
            change = self.change(data, [stack[-1] for stack in self.stacks])
            report, after = pm.patch(self.path, change), [change.after(stack[-1]) for stack in self.stacks]
            if report.record:
                self.stacks = [[*stack, state] for stack, state in zip(self.stacks, after, strict=True)]
        elif how == "save":
            out = self.folder / f"out{self.path.suffix}"
            with pm.open(self.path) as opened:
                opened.save(out)
            assert bits(self.kind.read(out)[0]) in [bits(stack[-1].tree) for stack in self.stacks]
            remove(out)
        else:
            {"open": lambda path: pm.open(path).close(), "load": pm.load, "history": pm.history}[how](self.path)
        self.settle()

    # What holds after each step

    @invariant()
    def others_are_as_they_were(self):
        for path, seen in self.others.items():
            assert visible(path) == seen

    @invariant()
    def holds(self):
        if not self.sure():
            return
        state = self.stack[-1]
        assert visible(self.path) == state.files
        tree, config = self.kind.read(self.path)
        assert bits(tree) == bits(state.tree) and config == state.config
        assert [named(row) for row in pm.history(self.path)] == [each.named for each in self.stack[1:]]
        records = records_of(self.path)
        beside = {self.path.name, "neighbour"} | ({records.name} if self.patched() and self.path.is_file() else set())
        assert names_in(self.folder) == beside
        assert records.exists() == (len(self.stack) > 1)
        if records.exists():
            numbers = names_in(records) - {"lock"}
            assert len(numbers) == len(self.stack) - 1 and all(name.endswith(".done") for name in numbers)
            with UndoStore.of(self.path).locked():  # nobody has it
                pass

    def teardown(self):
        try:
            if self.held is not None:
                self.held.close()
            for state in reversed(self.stack[:-1] if self.sure() else []):
                pm.undo(self.path)
                assert state.files in (None, visible(self.path))
        finally:
            shutil.rmtree(self.root)


def named(row):
    """The leaves that a row of a history names, and whether it names a file with a configuration."""
    files = {"config.json", *row.files}
    return frozenset("its configuration" if path in files else path.replace("/", ".") for path, _ in row.leaves)


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def live(kind, steps, *, forks=False, number=None, each=30, shrinks=True):
    """Run lives of a kind of checkpoint for about so many steps, the same ones without a number to draw from."""
    made = type(f"Life_{kind}", (Life,), {"kind": KINDS[kind], "forks": forks})
    run = made if number is None else seed(number)(made)
    patient = settings(
        max_examples=max(steps // each, 1) + 1,  # the first is the simplest one: nothing happens in it
        stateful_step_count=each,
        deadline=None,
        database=None,
        derandomize=number is None,
        report_multiple_bugs=False,
        phases=[Phase.generate, *([Phase.shrink] * shrinks)],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    run_state_machine_as_test(run, settings=patient)


if __name__ == "__main__":
    which, steps, *rest = sys.argv[1:]
    with tempfile.TemporaryDirectory(dir=MEMORY) as state:
        os.environ["XDG_STATE_HOME"] = state
        for name in KINDS if which == "all" else [which]:
            live(name, int(steps), forks=True, number=int(rest[0]) if rest else 0, shrinks=len(rest) > 1)
            print(f"{name}: {steps} steps", flush=True)
