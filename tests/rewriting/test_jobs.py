"""Rewrites job by job: the bytes of one run, whoever makes them, and however often it was stopped."""

import json
import os
import pickle
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import paramend as pm
from paramend.cli.main import cli
from paramend.disk.publishing import manifest_of, unpublished
from paramend.rewriting import crews, jobs, workers
from paramend.rewriting.crews import Crew
from paramend.rewriting.files import Computed, Copy
from support.rewrites import VERBS, content, edited, left, model, tree

FORMATS = ("shards", ".safetensors", ".npz", ".pt", ".msgpack", ".orbax")
VARIETIES = [(verb, "shards") for verb in VERBS] + [("edit", kind) for kind in FORMATS[1:]]
# What real processes write in tests; of the rest, the jobs are done in this one, after a pickle.
BY_PROCESSES = [(verb, "shards") for verb in ("edit", "graft", "merge", "fold", "dequantize", "deepen")] + [
    ("edit", ".npz")
]


@pytest.fixture(autouse=True)
def small_jobs(monkeypatch):
    """Every leaf is a job."""
    monkeypatch.setattr(jobs, "_COMPUTED", 1)
    monkeypatch.setattr(jobs, "_COPIED", 5000)


def made(folder, verb, kind):
    return VERBS[verb](folder) if kind == "shards" else edited(pm.open(model(folder, kind)))


def name_for(kind):
    return "out" if kind == "shards" else f"out{kind}"


def same(folder, kind):
    """Whether an output is that of one run; Orbax gives its files names by chance."""
    one, many = folder / f"one-{name_for(kind)}", folder / name_for(kind)
    if kind == ".orbax":
        return not pm.diff(one, many)
    return [each[1:] for each in content(many)] == [each[1:] for each in content(one)]


def told(report, folder):
    """What a report says, but for the name of its output."""
    unlike = {"path": "", "record": ""} | ({"files": []} if report.format == "orbax" else {})
    return json.dumps(report.to_dict() | unlike), str(report.plan).replace(str(folder), "")


class Elsewhere(crews._Here):
    """This process, which knows of jobs only what goes to others."""

    def __init__(self, order):
        super().__init__(pickle.loads(crews._sent(order)))

    def wait(self):
        for task, done in super().wait():
            yield task, pickle.loads(pickle.dumps(done))


@pytest.mark.parametrize(("verb", "kind"), VARIETIES)
def test_jobs_make_what_one_run_makes(verb, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(crews, "_Here", Elsewhere)
    one = made(tmp_path, verb, kind).save(tmp_path / f"one-{name_for(kind)}")
    events = []
    many = made(tmp_path, verb, kind).save(tmp_path / name_for(kind), resume=True, progress=events.append)
    assert same(tmp_path, kind)
    assert told(many, tmp_path) == told(one, tmp_path)
    assert not left(tmp_path)
    assert events[-1].done == events[-1].total


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "kind"), BY_PROCESSES)
def test_workers_make_what_one_run_makes(verb, kind, tmp_path):
    one = made(tmp_path, verb, kind).save(tmp_path / f"one-{name_for(kind)}")
    for count in (2, 3):
        many = made(tmp_path, verb, kind).save(tmp_path / name_for(kind), workers=count, force=True)
        assert same(tmp_path, kind)
        assert told(many, tmp_path) == told(one, tmp_path)
        assert not left(tmp_path)


@pytest.mark.parametrize("kind", ["shards", ".safetensors", ".npz"])
def test_a_record_has_the_digests_of_what_jobs_made(kind, tmp_path):
    out = tmp_path / name_for(kind)
    recipe = pm.Recipe([{"noise": {"at": "**.fc.weight", "std": 0.5}}, {"delete": "empty"}])
    recipe.apply(pm.open(model(tmp_path, kind))).save(out, resume=True, record=True)
    assert len(pm.record(out).leaves) == 4
    assert pm.verify_record(out)


def test_the_command_writes_with_workers(tmp_path):
    source, out, plain = model(tmp_path), tmp_path / "out", tmp_path / "plain"
    args = ["noise", str(source), "**.fc.weight", "0.1"]
    for more in (["-o", str(plain)], ["-o", str(out), "--workers", "2"]):
        done = CliRunner().invoke(cli, [*args, *more])
        assert done.exit_code == 0, done.output
    assert content(out) == content(plain) and not left(tmp_path)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--engine", "dask"], "--engine dask is not an engine"),
        (["--workers", "0"], "0 is not in the range"),
        (["--workers", "two"], "'two' is not a valid integer"),
    ],
)
def test_who_works_is_checked_first(args, says, tmp_path):
    done = CliRunner().invoke(cli, ["zero", str(model(tmp_path)), "head.bias", "-o", str(tmp_path / "out"), *args])
    assert done.exit_code == 2 and says in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [["--workers", "2"], ["--engine", "ray"], ["--resume"]])
def test_what_changes_in_place_has_no_workers(more, tmp_path):
    done = CliRunner().invoke(cli, ["zero", str(model(tmp_path)), "head.bias", "--in-place", *more])
    assert done.exit_code == 2 and "--in-place changes PATH itself" in done.output


def test_workers_are_a_number(tmp_path):
    for given in (0, -1, 1.5, True):
        with pytest.raises(pm.errors.BadArgument, match="is not a number of workers"):
            pm.open(model(tmp_path)).save(tmp_path / "out", workers=given)


def test_without_ray_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(pm.errors.MissingExtra) as caught:
        edited(pm.open(model(tmp_path))).save(tmp_path / "out", engine="ray")
    assert caught.value.hint == "pip install 'paramend[ray]'" and not left(tmp_path)


# ---- what a job is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS[1:-1])
def test_jobs_cover_each_file_and_begin_with_a_leaf(kind, tmp_path):
    from paramend.rewriting.layouts import lay_out

    plan = edited(pm.open(model(tmp_path, kind))).plan
    for file in lay_out(plan, tmp_path / f"out{kind}").files:
        found = jobs.jobs_of(plan, file)
        assert len(found) > 3
        assert [job.start for job in found] == [0, *(job.stop for job in found[:-1])] and found[-1].stop == file.nbytes
        for job in found:
            spans = [piece for piece in job.pieces if isinstance(piece, Computed)]
            assert sum(piece.stop - piece.start for piece in spans) == sum(row.spec.nbytes for row in job.rows)


def test_long_copies_are_cut_where_blocks_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "_COPIED", 10_000)
    found = list(jobs._cut([Copy(tmp_path, 100, 30_000), b"x", Copy(tmp_path, 3, 5)]))
    assert [(piece.start, piece.stop) for piece in found if piece != b"x"] == [
        (100, 8192), (8192, 16384), (16384, 24576), (24576, 30_000), (3, 5)
    ]  # fmt: skip


def test_leaves_that_are_encoded_together_are_one_job(tmp_path):
    from paramend.rewriting.layouts import lay_out

    plan = VERBS["quantize"](tmp_path).plan
    for file in lay_out(plan, tmp_path / "out.safetensors").files:
        assert len(jobs.jobs_of(plan, file)) == 1


# ---- errors and kills ----------------------------------------------------------------------------------------------


class Lossy(crews._Here):
    """An engine whose worker is lost at every job, the first times."""

    times = 1

    def __init__(self, order):
        super().__init__(order)
        self.lost = {}

    def wait(self):
        task = self._task
        self.lost[task.number] = self.lost.get(task.number, 0) + 1
        if self.lost[task.number] > self.times:
            yield from super().wait()
            return
        job = self._hand._order.jobs[task.number]  # it has written something else by then
        with (self._hand._order.place / job.name).open("r+b") as file:
            file.seek(job.start)
            file.write(b"\xff" * (job.stop - job.start))
        self._task = None
        yield task, "killed by SIGKILL"


@pytest.mark.parametrize("kind", ["shards", ".safetensors"])
def test_a_job_whose_worker_is_lost_is_done_again(kind, tmp_path, monkeypatch):
    edited(pm.open(model(tmp_path, kind))).save(tmp_path / f"one-{name_for(kind)}")
    monkeypatch.setattr(crews, "_Here", Lossy)
    edited(pm.open(model(tmp_path, kind))).save(tmp_path / name_for(kind), resume=True)
    assert same(tmp_path, kind)


def test_a_job_that_kills_its_workers_ends_with_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(crews, "_Here", Lossy)
    monkeypatch.setattr(Lossy, "times", 3)
    with pytest.raises(pm.errors.CannotWrite, match=r"3 workers were lost .* model-.* killed by SIGKILL"):
        edited(pm.open(model(tmp_path))).save(tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()


def refuse(x):
    raise pm.errors.SpecMismatch("this leaf is not for me")


def fail(x):
    raise ZeroDivisionError("there is nothing")


def grow(x):
    os.kill(os.getpid(), 9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "kind", "says"),
    [
        (refuse, pm.errors.SpecMismatch, "^this leaf is not for me$"),
        (fail, ZeroDivisionError, "^there is nothing"),
        (grow, pm.errors.CannotWrite, "3 workers were lost while they made the same part.*killed by SIGKILL"),
    ],
)
def test_an_error_of_a_worker_is_told_once(function, kind, says, tmp_path):
    applied = pm.at(pm.open(model(tmp_path)), "**.fc.weight").apply(function)
    with pytest.raises(kind, match=says):
        applied.save(tmp_path / "out", workers=2)
    assert not (tmp_path / "out").exists() and not left(tmp_path)


def test_what_a_worker_cannot_load_is_told_with_the_way_out():
    sent = pickle.dumps(refuse).replace(b"refuse", b"reuse_")
    with pytest.raises(pm.errors.Unsupported, match="cannot load the edits") as caught:
        workers.hand_for(sent)
    assert "top level of a module" in caught.value.hint


SCRIPT = """
import sys
import numpy as np
import paramend as pm

def halve(x):
    return x / 2

edited = pm.at(pm.open(sys.argv[1]), "**.fc.weight").apply(halve)
edited.save(sys.argv[2], workers=2)
print("once")
"""


@pytest.mark.slow
def test_a_program_without_a_guard_runs_once(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(SCRIPT)
    args = [sys.executable, program, model(tmp_path), tmp_path / "out"]
    done = subprocess.run(args, capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout == "once\n", done.stderr
    want = tree()["layers.2.fc.weight"] / 2
    assert np.array_equal(pm.open(tmp_path / "out")["layers.2.fc.weight"], want)


# ---- going on ------------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    pass


def stop_after(monkeypatch, count):
    """Stop this process, as a kill would, when so many jobs are done; what clears up then does not run."""
    do = jobs.Hand.do
    done = []

    def counted(self, task):
        if len(done) == count:
            raise Stopped
        done.append(task)
        return do(self, task)

    monkeypatch.setattr(jobs.Hand, "do", counted)
    return done


@pytest.mark.parametrize("kind", ["shards", ".safetensors", ".pt", ".npz"])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_resumed_run_does_only_what_is_missing(kind, count, tmp_path, monkeypatch):
    out = tmp_path / name_for(kind)
    one = edited(pm.open(model(tmp_path, kind))).save(tmp_path / f"one-{name_for(kind)}")
    with monkeypatch.context() as patch:
        stop_after(patch, count)
        with pytest.raises(Stopped):
            edited(pm.open(model(tmp_path, kind))).save(out, resume=True)
    assert not out.exists() and len(left(tmp_path)) == 2
    kept = []
    do = jobs.Hand.do
    monkeypatch.setattr(jobs.Hand, "do", lambda self, task: kept.append(do(self, task)) or kept[-1])
    events = []
    many = edited(pm.open(model(tmp_path, kind))).save(out, resume=True, progress=events.append)
    assert sum(done.kept for done in kept) == count
    assert same(tmp_path, kind)
    assert told(many, tmp_path) == told(one, tmp_path)
    assert not left(tmp_path) and events[-1].done == events[-1].total


def begun(folder, monkeypatch, count=5, edit=edited, kind="shards"):
    """An output that was begun: its temporary."""
    with monkeypatch.context() as patch:
        stop_after(patch, count)
        with pytest.raises(Stopped):
            edit(pm.open(model(folder, kind))).save(folder / name_for(kind), resume=True)
    (temporary,) = unpublished(folder / name_for(kind))
    return temporary


@pytest.mark.parametrize("kind", ["shards", ".safetensors"])
def test_what_was_damaged_since_is_made_again(kind, tmp_path, monkeypatch):
    edited(pm.open(model(tmp_path, kind))).save(tmp_path / f"one-{name_for(kind)}")
    temporary = begun(tmp_path, monkeypatch, 8, kind=kind)
    for file in [temporary] if temporary.is_file() else temporary.glob("*.safetensors"):
        damaged = bytearray(file.read_bytes())
        damaged[len(damaged) // 3] ^= 1
        file.write_bytes(damaged[:-7])
    if temporary.is_dir():
        (temporary / "stray.safetensors").write_bytes(b"not ours")
    edited(pm.open(model(tmp_path, kind))).save(tmp_path / name_for(kind), resume=True)
    assert same(tmp_path, kind)


@pytest.mark.parametrize("cut", [1, 40, 10_000])
def test_a_manifest_that_was_cut_short_counts_as_far_as_it_goes(cut, tmp_path, monkeypatch):
    edited(pm.open(model(tmp_path))).save(tmp_path / "one")
    manifest = manifest_of(begun(tmp_path, monkeypatch))
    manifest.write_bytes(manifest.read_bytes()[:-cut])
    edited(pm.open(model(tmp_path))).save(tmp_path / "out", resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "one") and not left(tmp_path)


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("new", [b"", b"2 * line", b"{}\n"])
def test_a_manifest_with_other_lines_counts_as_far_as_it_is_true(at, new, tmp_path, monkeypatch):
    edited(pm.open(model(tmp_path))).save(tmp_path / "one")
    manifest = manifest_of(begun(tmp_path, monkeypatch))
    lines = manifest.read_bytes().splitlines(keepends=True)
    lines[at] = 2 * lines[at] if new == b"2 * line" else new
    manifest.write_bytes(b"".join(lines))
    with monkeypatch.context() as patch, pytest.raises(Stopped):  # what is written now is appended to what is true
        stop_after(patch, 7)
        edited(pm.open(model(tmp_path))).save(tmp_path / "out", resume=True)
    edited(pm.open(model(tmp_path))).save(tmp_path / "out", resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "one") and not left(tmp_path)


def other_value(old):
    return pm.at(edited(old), "layers.1.proj.weight").add(np.full((32, 32), 2, "float16"))


def other_array(old):
    return pm.at(edited(old), "layers.1.proj.weight").add(np.full((32, 32), 3, "float16"))


def halved(old):
    return pm.at(old, "**.fc.weight").apply(lambda x: x / 2)


def doubled(old):
    return pm.at(old, "**.fc.weight").apply(lambda x: x * 2)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (edited, other_value),
        (other_value, other_array),
        (halved, doubled),
        (edited, lambda old: pm.at(edited(old), "head.bias").delete()),
        (
            lambda old: pm.at(old, "**.fc.weight").noise(0.1, seed=1),
            lambda old: pm.at(old, "**.fc.weight").noise(0.1, seed=2),
        ),
    ],
)
def test_other_edits_are_not_resumed(first, then, tmp_path, monkeypatch):
    temporary = begun(tmp_path, monkeypatch, edit=first)
    with pytest.raises(pm.errors.CannotWrite, match="what was begun here has other edits or options") as caught:
        then(pm.open(model(tmp_path))).save(tmp_path / "out", resume=True)
    assert "without --resume" in caught.value.hint and temporary.exists()
    first(pm.open(model(tmp_path))).save(tmp_path / "out", resume=True)
    assert not left(tmp_path)


def test_another_delta_of_the_same_name_is_not_resumed(tmp_path, monkeypatch):
    def edit(old):
        return pm.Delta.load(tmp_path / "delta").apply(old)

    pm.delta(tree(), tree(2.0)).save(tmp_path / "delta")
    begun(tmp_path, monkeypatch, edit=edit)
    pm.delta(tree(), tree(3.0)).save(tmp_path / "delta", force=True)
    with pytest.raises(pm.errors.CannotWrite, match="other edits or options"):
        edit(pm.open(model(tmp_path))).save(tmp_path / "out", resume=True)


def test_other_options_are_not_resumed(tmp_path, monkeypatch):
    begun(tmp_path, monkeypatch)
    for options in ({"record": True}, {"max_shard_size": 9000}):
        with pytest.raises(pm.errors.CannotWrite, match="other edits or options"):
            edited(pm.open(model(tmp_path))).save(tmp_path / "out", resume=True, **options)


@pytest.mark.parametrize("name", ["model-00001-of-00004.safetensors", "config.json"])
def test_a_source_that_changed_is_not_resumed(name, tmp_path, monkeypatch):
    begun(tmp_path, monkeypatch)
    os.utime(tmp_path / "model" / name, ns=(1, 1))
    with pytest.raises(pm.errors.CannotWrite, match=f"{name} has changed since this was begun"):
        edited(pm.open(model(tmp_path))).save(tmp_path / "out", resume=True)
    edited(pm.open(model(tmp_path))).save(tmp_path / "out")
    assert not left(tmp_path)


def test_without_resuming_it_begins_anew(tmp_path, monkeypatch):
    begun(tmp_path, monkeypatch)
    halved(pm.open(model(tmp_path))).save(tmp_path / "out")
    assert not left(tmp_path)


def test_an_error_leaves_what_was_made_to_those_who_resume(tmp_path, monkeypatch):
    fill = jobs.Filler.fill
    full = OSError(28, "No space left on device")

    def filled(self, pieces, target, **how):
        if len(calls) == 3:
            raise full
        calls.append(target)
        fill(self, pieces, target, **how)

    model(tmp_path)
    for resume in (False, True):
        calls = []
        with monkeypatch.context() as patch, pytest.raises(pm.errors.CannotWrite, match="the disk is full") as caught:
            patch.setattr(jobs.Filler, "fill", filled)
            edited(pm.open(model(tmp_path))).save(tmp_path / "out", resume=resume)
        assert bool(left(tmp_path)) == resume == ("--resume goes on" in caught.value.hint)
    edited(pm.open(model(tmp_path))).save(tmp_path / "out", resume=True)
    assert not left(tmp_path)


def test_links_are_never_written_through(tmp_path, monkeypatch):
    """What an earlier run linked may have to be copied by this one."""
    before = content(model(tmp_path))

    def edit(old):
        return pm.at(old, "layers.0.fc.weight").zero()

    stop_after(monkeypatch, 1)
    with pytest.raises(Stopped):
        edit(pm.open(model(tmp_path))).save(tmp_path / "out", resume=True, link=True)
    monkeypatch.undo()
    monkeypatch.setattr(jobs, "_COMPUTED", 1)
    monkeypatch.setattr("paramend.rewriting.rewrite._Run._link", lambda *_: False)
    edit(pm.open(model(tmp_path))).save(tmp_path / "out", resume=True, link=True)
    assert content(model(tmp_path)) == before
    assert not pm.open(tmp_path / "out")["layers.0.fc.weight"].any()


def test_two_do_not_resume_at_once(tmp_path, monkeypatch):
    temporary = begun(tmp_path, monkeypatch)
    from paramend.disk.locks import hold

    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        assert hold(descriptor)
        for resume in (True, False):
            with pytest.raises(pm.errors.Busy):
                edited(pm.open(model(tmp_path))).save(tmp_path / "out", resume=resume)
        assert len(left(tmp_path)) == 2
    finally:
        os.close(descriptor)


def test_what_is_left_needs_no_room_twice(tmp_path, monkeypatch):
    begun(tmp_path, monkeypatch, 8)
    free = 4096 * 6
    real = os.statvfs(tmp_path)

    class Disk:
        f_bavail, f_frsize, f_blocks = free // 4096, 4096, real.f_blocks

    monkeypatch.setattr(os, "statvfs", lambda path: Disk)
    with pytest.raises(pm.errors.CannotWrite, match="are free in"):
        edited(pm.open(model(tmp_path))).save(tmp_path / "out")
    edited(pm.open(model(tmp_path))).save(tmp_path / "out", resume=True)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_are_those_of_one_run(mask, tmp_path, monkeypatch):
    source = model(tmp_path)
    (source / "config.json").chmod(0o440)
    before = os.umask(mask)
    try:
        edited(pm.open(source)).save(tmp_path / "one")
        begun(tmp_path, monkeypatch, 9)
        edited(pm.open(source)).save(tmp_path / "out", resume=True)
        stat = [(tmp_path / name).stat().st_mode for name in ("one", "out")]
    finally:
        os.umask(before)
    assert stat[0] == stat[1] and content(tmp_path / "out") == content(tmp_path / "one")


@pytest.mark.far
@pytest.mark.parametrize("options", [[], ["--resume"]])
def test_a_killed_run_is_resumed(options, tmp_path):
    """A command and one of its workers are killed with work under way, and the next one goes on from there."""
    big = {f"layers.{n}.w": np.full((1 << 20,), n, "float32") for n in range(12)}
    pm.save(big, tmp_path / "model/", max_shard_size="9MB")
    args = [sys.executable, "-m", "paramend", "noise", "model", "**", "0.5", "-o", "out", "--workers", "2"]
    subprocess.run([*args[:-4], "-o", "one"], cwd=tmp_path, check=True, capture_output=True, timeout=600)
    running = subprocess.Popen([*args, *options], cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not any(manifest_of(path).read_bytes().count(b"\n") > 1 for path in unpublished(tmp_path / "out")):
        assert running.poll() is None
        time.sleep(0.005)
    children = [int(each) for each in _children(running.pid)]
    assert len(children) == 2
    os.kill(children[0], 9)
    running.kill()
    running.wait()
    assert not (tmp_path / "out").exists() and len(left(tmp_path)) == 2
    done = subprocess.run([*args, "--resume"], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == content(tmp_path / "one") and not left(tmp_path)


def _children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.far
def test_killed_workers_do_not_change_the_bytes(tmp_path):
    code = """
        import os, random, sys, threading, time
        import numpy as np
        import paramend as pm

        def kill():
            rng, mine = random.Random(4), f"/proc/{os.getpid()}/task/{os.getpid()}/children"
            for _ in range(3):
                time.sleep(rng.uniform(0.3, 0.8))
                there = open(mine).read().split()
                if there:
                    os.kill(int(rng.choice(there)), 9)

        threading.Thread(target=kill, daemon=True).start()
        pm.at(pm.open("model"), "**").noise(0.5).save("out", workers=2)
    """
    big = {f"layers.{n}.w": np.full((1 << 20,), n, "float32") for n in range(24)}
    pm.save(big, tmp_path / "model/", max_shard_size="9MB")
    pm.at(pm.open(tmp_path / "model"), "**").noise(0.5).save(tmp_path / "one")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == content(tmp_path / "one") and not left(tmp_path)


def test_a_crew_of_one_is_this_process():
    assert Crew().alone and not Crew(1).alone and not Crew(2).alone and not Crew(resume=True).alone
    assert Crew(1, resume=True).here and not Crew(2, resume=True).here and not Crew(1, "ray").here
