"""Orbax checkpoints edited in place: what Orbax restores afterwards, and what undo gives back, whatever happens."""

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from click.testing import CliRunner

import paramend as pm
from paramend.cli.main import cli
from paramend.disk.locks import locked
from paramend.errors import BadCheckpoint, Busy, CannotWrite, SpecMismatch, Unsupported
from paramend.journal import records
from paramend.journal.store import UndoStore
from paramend.journal.undo import drop, recover
from paramend.piecewise import chunks
from paramend.piecewise.chunks import cells

LAYOUTS = {
    "ocdbt": {},
    "zarr": {"use_ocdbt": False},
    "ocdbt-zarr3": {"use_zarr3": True},
    "zarr3": {"use_ocdbt": False, "use_zarr3": True},
}

pytestmark = pytest.mark.filterwarnings("ignore")  # of orbax, about itself


def spread(array, *axes):
    """An array in several chunks: one a device."""
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    return jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))


def tree():
    rng = np.random.default_rng(0)
    return {
        "params": {
            "embed": spread(rng.normal(size=(8, 64)).astype("float32"), "a", "b"),
            "bias": jnp.asarray(rng.normal(size=5), "bfloat16"),
        },
        "layers": [jnp.arange(4.0), spread(rng.normal(size=(4, 2, 3)).astype("float16"), "a", "b")],
        "step": jnp.asarray(7, "int32"),
        "none": None,
        "empty": {},
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with one checkpoint of each layout, and the folder of a manager."""
    folder = tmp_path_factory.mktemp("orbax")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, options in LAYOUTS.items():
            ocp.PyTreeCheckpointer(**options).save(folder / name, tree())
        with ocp.StandardCheckpointer() as saver:
            saver.save(folder / "standard", tree())
        with ocp.CheckpointManager(folder / "run") as manager:
            for step in (1, 2):
                manager.save(step, args=ocp.args.StandardSave(tree()))
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    def make(name):
        shutil.copytree(saved / name, tmp_path / name)
        return tmp_path / name

    return make


def restored(path):
    """What Orbax itself restores."""
    if (path / "2").is_dir():
        with ocp.CheckpointManager(path) as manager:
            return manager.restore(2, args=ocp.args.StandardRestore())
    if path.name == "standard":
        with ocp.StandardCheckpointer() as saver:
            return saver.restore(path, jax.tree.map(np.zeros_like, tree()))
    return ocp.PyTreeCheckpointer().restore(path)


def bits(tree):
    return [(np.asarray(x).dtype.name, np.shape(x), np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def content(path):
    """The digest of each file that is no undo record."""
    files = [file for file in path.rglob("*") if file.is_file() and ".undo" not in file.parts]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# ---- what is written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LAYOUTS, "standard", "run"])
def test_orbax_restores_what_was_patched_and_undo_gives_back_every_byte(copy, name):
    path = copy(name)
    before = content(path)

    def edit(t):
        t = pm.at(t, "params/embed").zero()
        return pm.at(t, "layers[-1]")[1:3, 0].fill(2)

    report = pm.patch(path, edit)
    expected = tree()
    expected["params"]["embed"] = jnp.zeros((8, 64))
    expected["layers"][1] = np.array(expected["layers"][1])
    expected["layers"][1][1:3, 0] = 2
    assert bits(restored(path)) == bits(expected)
    assert bits(pm.at(pm.open(path), "**").get()) == bits(pm.at(expected, "**").get())
    if "ocdbt" in name or name in ("standard", "run"):  # copied on write: all that was there still is
        changed = {file for file, digest in before.items() if content(path)[file] != digest}
        assert changed == {"2/default/manifest.ocdbt" if name == "run" else "manifest.ocdbt"}
    pm.patch(path, lambda t: pm.at(t, "**/bias").multiply(0.5))
    assert [row.edit for row in pm.history(path)] == [
        "[1:3, 0] fill(2) at layers/1; zero() at params/embed",
        "multiply(0.5) at params/bias",
    ]
    assert (bits(restored(path)) == bits(expected)) is False
    assert pm.undo(path).left == 1
    assert bits(restored(path)) == bits(expected)
    assert report.record.endswith("000001.done")
    pm.undo(path)
    assert content(path) == before
    assert not list(path.rglob(".undo"))


def test_zeroing_a_leaf_of_a_database_adds_next_to_nothing(tmp_path):
    with ocp.StandardCheckpointer() as saver:
        noise = np.random.default_rng(0).normal(size=(500, 1000))
        saver.save(tmp_path / "x", {"a": noise, "b": noise + 1})
    size = sum(file.stat().st_size for file in (tmp_path / "x").rglob("*") if file.is_file())
    report = pm.patch(tmp_path / "x", lambda t: pm.at(t, "a").zero())
    assert report.bytes_written < 3000 < noise.nbytes
    assert report.bytes_recorded < 1000
    after = sum(file.stat().st_size for file in (tmp_path / "x").rglob("*") if file.is_file())
    assert after - size < 5000


def test_only_the_chunks_of_the_slice_are_exchanged(copy):
    path = copy("zarr")
    inodes = {file: file.stat().st_ino for file in path.rglob("*") if file.is_file()}
    pm.patch(path, lambda t: pm.at(t, "params/embed")[2:4, 50].fill(1))
    now = {file: file.stat().st_ino for file in path.rglob("*") if file.is_file() and ".undo" not in file.parts}
    assert now.keys() == inodes.keys()
    assert {str(file.relative_to(path)) for file in now if now[file] != inodes[file]} == {"params.embed/1.1"}


INDICES = [
    None,
    0,
    slice(1, 3),
    slice(None, None, -2),
    (slice(None), 0),
    (slice(None), slice(1, 5)),
    (slice(None), [2, 0]),
    [3, 0, -1],
    [1, 1, 0],
    ([0, 7, 0], [1, 5, 1]),
    (..., 1),
    (2, 1),
]
VERBS = [
    ("zero", {}),
    ("add", {"value": 0.25}),
    ("noise", {"std": 0.5, "seed": 3}),
    ("apply", {"fn": lambda x: np.sort(np.asarray(x).reshape(-1)).reshape(x.shape)}),
]


@pytest.mark.parametrize("name", ["ocdbt", "zarr3"])
@pytest.mark.parametrize("verb", VERBS, ids=[verb for verb, _ in VERBS])
def test_patching_gives_what_memory_gives(copy, name, verb):
    path = copy(name)
    array = np.asarray(tree()["params"]["embed"])
    memory = pm.at({"params": {"embed": array}}, "params/embed")
    for index in INDICES:
        chosen = memory if index is None else memory[index]
        expected = getattr(chosen, verb[0])(**verb[1])["params"]["embed"]

        def edit(t, index=index):
            chosen = pm.at(t, "params/embed")
            return getattr(chosen if index is None else chosen[index], verb[0])(**verb[1])

        pm.patch(path, edit)
        with pm.open(path) as checkpoint:
            assert checkpoint["params/embed"].tobytes() == expected.tobytes(), index
        pm.undo(path)
    with pm.open(path) as checkpoint:
        assert checkpoint["params/embed"].tobytes() == array.tobytes()


def test_an_array_is_set_and_cast_there_and_back(copy):
    path = copy("ocdbt")
    value = np.arange(512, dtype="float32").reshape(8, 64)
    pm.patch(path, lambda t: pm.at(t, "params/embed").set(value))
    assert (restored(path)["params"]["embed"] == value).all()

    def edit(t):
        return pm.at(pm.at(pm.at(t, "params/embed").add(0.001), "params/embed").cast("bfloat16"), "**/embed").cast(
            "float32"
        )

    pm.patch(path, edit)
    rounded = (value + np.float32(0.001)).astype(ml_dtypes.bfloat16).astype("float32")
    assert (restored(path)["params"]["embed"] == rounded).all()


@pytest.mark.parametrize(
    ("shape", "chunks"), [((), ()), ((7,), (3,)), ((4, 6), (2, 3)), ((5, 3, 4), (2, 2, 3)), ((3, 4), (1, 9))]
)
def test_the_chunks_of_a_run_are_those_that_hold_its_elements(shape, chunks):
    rng = np.random.default_rng(0)
    size = int(np.prod(shape))
    places = (
        np.stack([axis // chunk for axis, chunk in zip(np.indices(shape), chunks, strict=True)], -1) if shape else 0
    )
    for _ in range(200):
        edges = np.sort(rng.integers(0, size + 1, (rng.integers(1, 4), 2)), axis=1)
        runs = edges[edges[:, 0] < edges[:, 1]]
        held = np.zeros(size, bool)
        for start, stop in runs:
            held[start:stop] = True
        found = cells(runs, shape, chunks)
        if shape:
            expected = np.unique(places.reshape(size, -1)[held], axis=0)
            assert found.tolist() == expected.tolist()
        else:
            assert len(found) == held.any()


def test_memory_is_bounded_by_chunks_where_order_matters(tmp_path, monkeypatch):
    """The parts of a leaf that are read and written at once are single chunks, in every verb."""
    path = tmp_path / "x"
    ocp.PyTreeCheckpointer().save(path, {"w": spread(np.ones((64, 64), "float32"), "a", "b")})
    seen = []
    for verb, args in [("noise", {"std": 1.0, "seed": 0}), ("multiply", {"value": 2.0})]:
        with pm.open(path) as checkpoint, monkeypatch.context() as patch:
            real = type(checkpoint.source).read_box
            patch.setattr(
                type(checkpoint.source), "read_box", lambda *args, real=real: seen.append(real(*args)) or seen[-1]
            )
            pm.patch(path, lambda t, verb=verb, args=args: getattr(pm.at(t, "w"), verb)(**args))
    assert len(seen) == 16
    assert {array.shape for array in seen} == {(16, 32)}


def test_a_dry_run_and_progress(copy):
    path = copy("ocdbt")
    before = content(path)
    report = pm.patch(path, lambda t: pm.at(t, "params/embed")[:2].zero(), dry_run=True)
    assert report.dry_run and report.bytes_written == 2 * 64 * 4
    assert content(path) == before
    heard = []
    pm.patch(path, lambda t: pm.at(t, "params/embed").zero(), progress=heard.append)
    assert heard[-1].done == heard[-1].total == 8 * 64 * 4


# ---- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: pm.at(t, "params/bias").cast("float32"), "shape and dtype cannot change in place"),
        (lambda t: pm.at(t, "params/bias").delete(), "params/bias would be deleted"),
        (lambda t: pm.at(t, "params/bias").rename("params/b"), "params/bias would be renamed"),
    ],
)
def test_what_needs_a_new_checkpoint_is_refused_with_the_command_that_writes_it(copy, tmp_path, edit, message):
    path = copy("ocdbt")
    before = content(path)
    with pytest.raises(Unsupported, match=message) as caught:
        pm.patch(path, edit)
    assert content(path) == before
    command = caught.value.hint.replace("'", "").replace("OUT", str(tmp_path / "out")).split()
    assert command[0] == "paramend"
    assert CliRunner().invoke(cli, command[1:]).exit_code == 0
    assert "params" in ocp.PyTreeCheckpointer().restore(tmp_path / "out")
    with pytest.raises(SpecMismatch):
        pm.patch(path, lambda t: pm.at(t, "params/bias").set(np.ones(3)))


def test_links_are_refused(copy, tmp_path):
    path = copy("ocdbt")
    zero = lambda t: pm.at(t, "params/embed").zero()
    os.link(path / "manifest.ocdbt", tmp_path / "second")
    with pytest.raises(CannotWrite, match=r"manifest\.ocdbt has 2 names \(hard links\)"):
        pm.patch(path, zero)
    (path / "manifest.ocdbt").unlink()
    (path / "manifest.ocdbt").symlink_to(tmp_path / "second")
    with pytest.raises(CannotWrite, match="is a symbolic link"):
        pm.patch(path, zero, dry_run=True)
    path = copy("zarr")
    (tmp_path / "latest").symlink_to(path)
    with pytest.raises(CannotWrite, match="latest is a symbolic link"):
        pm.patch(tmp_path / "latest", zero)
    os.link(path / "params.embed" / "1.1", tmp_path / "third")
    with pytest.raises(CannotWrite, match="2 names"):
        pm.patch(path, zero)
    pm.patch(path, lambda t: pm.at(t, "params/bias").zero())  # lies elsewhere
    shutil.move(path / "params.bias", tmp_path / "bias")
    (path / "params.bias").symlink_to(tmp_path / "bias")
    with pytest.raises(CannotWrite, match="is a symbolic link"):
        pm.patch(path, lambda t: pm.at(t, "params/bias").fill(1))
    with pytest.raises(CannotWrite, match="is a symbolic link"):
        pm.undo(path)


AS_SOMEBODY = """
import os, sys, tensorstore
import paramend as pm
from paramend.errors import CannotWrite
path = sys.argv[1]
edit = lambda t: pm.at(t, "**/embed").zero()
pm.patch(path, edit, dry_run=True)  # opens what it needs while it may
if os.geteuid() == 0:  # root may write everywhere
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
try:
    pm.patch(path, edit)
except CannotWrite as error:
    print(error)
"""


def test_a_folder_without_permission(copy):
    path = copy("ocdbt")
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    folder = Path(tempfile.mkdtemp())  # which others may enter, unlike pytest's own
    try:
        moved = Path(shutil.move(path, folder / "model"))
        folder.chmod(0o755)
        moved.chmod(0o555)
        done = subprocess.run([sys.executable, "-c", AS_SOMEBODY, moved], capture_output=True, text=True, check=False)
        assert "Permission denied" in done.stdout, done.stderr
        moved.chmod(0o755)
        assert {
            path / file.relative_to(moved): file.read_bytes() for file in moved.rglob("*") if file.is_file()
        } == before
    finally:
        shutil.rmtree(folder)


def test_a_second_writer_is_told(copy):
    path = copy("run")
    tree = path / "2" / "default"
    (tree / ".undo").mkdir()
    with locked(tree / ".undo" / "lock", name=tree), pytest.raises(Busy, match="another program is writing"):
        pm.patch(path, lambda t: pm.at(t, "**/embed").zero())
    pm.patch(path / "2", lambda t: pm.at(t, "**/embed").zero())
    # However the checkpoint is named, there is one history.
    for name in (path, path / "2", tree):
        assert len(pm.history(name)) == 1
    assert pm.history(path / "1") == []


def test_an_exchange_in_the_middle_is_noticed(copy, monkeypatch):
    path = copy("ocdbt")
    before = content(path)
    real = chunks.restage

    def meddled(*args):
        real(*args)
        os.utime(path / "manifest.ocdbt", (1, 1))

    monkeypatch.setattr("paramend.checkpoints.patching.restage", meddled)
    with pytest.raises(BadCheckpoint, match="another program changed it"):
        pm.patch(path, lambda t: pm.at(t, "**/embed").zero())
    assert content(path) == before
    assert pm.history(path) == []


# ---- undo ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ocdbt", "zarr"])
def test_undo_refuses_what_was_changed_since(copy, name):
    path = copy(name)
    before = content(path)
    pm.patch(path, lambda t: pm.at(t, "**/embed").zero())
    file = path / ("manifest.ocdbt" if name == "ocdbt" else "params.embed/0.0")
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(CannotWrite, match=rf"{file.relative_to(path)} changed since patch 1; nothing was written"):
        pm.undo(path)
    pm.undo(path, force=True)
    assert content(path) == before


def test_records_can_be_dropped(copy):
    path = copy("zarr3")
    pm.patch(path, lambda t: pm.at(t, "**/embed").zero())
    after = content(path)
    assert len(drop(path)) == 1
    assert content(path) == after
    with pytest.raises(CannotWrite, match="nothing to take back"):
        pm.undo(path)


def test_the_permissions_stay(copy):
    path = copy("zarr")
    file = path / "params.bias" / "0"
    file.chmod(0o600)
    pm.patch(path, lambda t: pm.at(t, "**/bias").zero())
    assert file.stat().st_mode & 0o777 == 0o600
    pm.undo(path)
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_chunk_that_was_never_written_goes_again(tmp_path):
    import tensorstore

    path = tmp_path / "x"
    ocp.PyTreeCheckpointer(use_ocdbt=False).save(path, {"w": np.ones(4, "float32")})
    shutil.rmtree(path / "w")
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path}/w/"}}
    tensorstore.open(spec | {"metadata": {"shape": [4], "chunks": [2], "dtype": "<f4"}}, create=True).result()
    table = (path / "_METADATA").read_text()
    (path / "_METADATA").write_text(table.replace('equal_to_fill_value": true', 'equal_to_fill_value": false'))
    before = content(path)
    pm.patch(path, lambda t: pm.at(t, "w")[0].fill(3))
    assert pm.load(path)["w"].tolist() == [3, 0, 0, 0]
    assert (path / "w" / "0").is_file() and not (path / "w" / "1").exists()
    pm.undo(path)
    assert content(path) == before


# ---- cut short -----------------------------------------------------------------------------------------------


class Crash(BaseException):
    pass


def dies_at(monkeypatch, step, folder):
    """From a chosen call of the system on, everything that would change something fails, as for a killed program."""
    count = 0

    def wrapped(real):
        def run(*args, **options):
            nonlocal count
            count += 1
            if count >= step:
                raise Crash
            return real(*args, **options)

        return run

    for name in ("write", "fsync", "rename", "unlink", "mkdir", "rmdir", "chmod"):
        monkeypatch.setattr(os, name, wrapped(getattr(os, name)))
    monkeypatch.setattr(shutil, "rmtree", wrapped(shutil.rmtree))


@pytest.mark.parametrize("name", ["ocdbt", "zarr"])
@pytest.mark.parametrize("what", ["patch", "undo"])
def test_cut_short_anywhere_leaves_old_or_new(saved, tmp_path, name, what):
    edit = lambda t: pm.at(t, pm.sel("params/bias") | pm.sel("layers[0]")).add(1)
    template = tmp_path / "template"
    shutil.copytree(saved / name, template)
    old = content(template)
    if what == "undo":
        pm.patch(template, edit)
    start = content(template)
    states = set()
    for step in range(1, 200):
        path = tmp_path / "x"
        shutil.copytree(template, path)
        with pytest.MonkeyPatch.context() as monkeypatch:
            dies_at(monkeypatch, step, path)
            dead = False
            try:
                pm.patch(path, edit) if what == "patch" else pm.undo(path)
            except Crash:
                dead = True
        recover(path)
        now = content(path)
        states.add(now == old)
        if what == "undo" and now != old:
            assert now == start
        assert len(pm.history(path)) == (now != old)
        if now != old:
            pm.undo(path)
            assert content(path) == old
        assert {file.name for file in path.rglob(".undo/**/*")} <= {"lock"}
        shutil.rmtree(path)
        if not dead:
            break
    assert step > 10
    assert states == {True, False}


def test_what_was_exchanged_after_a_crash_is_not_put_back_blindly(copy):
    path = copy("ocdbt")
    before = content(path)
    pm.patch(path, lambda t: pm.at(t, "**/embed").zero())
    with records.Record(path / ".undo" / "000001.done") as record:
        record.become_pending()
    manifest = (path / "manifest.ocdbt").read_bytes()
    (path / "manifest.ocdbt").write_bytes(b"new")
    with pytest.raises(BadCheckpoint, match=r"manifest\.ocdbt is not the one that was patched"):
        pm.open(path)
    (path / "manifest.ocdbt").write_bytes(manifest)
    pm.open(path).close()
    assert content(path) == before


@pytest.mark.parametrize(
    "change",
    [
        {"files": ["../x"]},
        {"files": ["/x"]},
        {"whole": False},
        {"files": []},
        {"rows": [["a", 7]]},
    ],
)
def test_hostile_records_are_refused(copy, change):
    import json

    path = copy("ocdbt")
    pm.patch(path, lambda t: pm.at(t, "**/embed").zero())
    now = content(path)
    record = path / ".undo" / "000001.done"
    data = record.read_bytes()
    length = int.from_bytes(data[12:20], "little")
    payload = json.dumps(json.loads(data[20 : 20 + length]) | change).encode()
    framed = b"HEAD" + len(payload).to_bytes(8, "little") + payload
    record.write_bytes(data[:8] + framed + hashlib.sha256(framed).digest() + data[20 + length + 32 :])
    with pytest.raises((BadCheckpoint, CannotWrite)):
        pm.undo(path)
    assert content(path) == now


KILLER = """
    import hashlib, os, random, signal, sys, time
    from pathlib import Path
    import numpy as np
    import paramend as pm
    from paramend.journal.records import PENDING
    from paramend.journal.store import UndoStore
    from paramend.journal.undo import history, recover, undo

    path, rounds, signum = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    edit = lambda t: pm.at(t, "**").add(1)

    def content():
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and ".undo" not in file.parts]
        return [(str(file), hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]

    def child(run):
        # tensorstore has threads, and must not be there when a program forks.
        assert "tensorstore" not in sys.modules
        ready, tell = os.pipe()
        number = os.fork()
        if number:
            os.read(ready, 1); os.close(ready); os.close(tell)
            return number
        code = 1
        try:
            import tensorstore
            os.write(tell, b"x")
            run()
            code = 0
        except KeyboardInterrupt:
            code = 0
        finally:
            os._exit(code)

    def check_new():
        for leaf in pm.load(path, nested=False).values():
            assert (leaf == 2).all()

    old = content()
    number = child(lambda: pm.patch(path, edit))
    began = time.monotonic(); os.waitpid(number, 0); took = time.monotonic() - began
    assert len(history(path)) == 1
    undo(path)
    assert content() == old
    rng = random.Random(0)
    seen = {"old": 0, "new": 0, "cut short": 0}
    for _ in range(rounds):
        number = child(lambda: pm.patch(path, edit))
        time.sleep(rng.random() * took)
        os.kill(number, signum)
        os.waitpid(number, 0)
        pending = len(UndoStore(path).records(PENDING))
        assert not (pending and signum == signal.SIGINT), "Ctrl-C left a half"
        recover(path)
        if not history(path):
            assert content() == old, "a third state"
            seen["old"] += 1
            seen["cut short"] += pending
        else:
            assert os.waitstatus_to_exitcode(os.waitpid(child(check_new), 0)[1]) == 0, "a third state"
            seen["new"] += 1
            undo(path)
            assert content() == old
        assert not set(os.listdir(path / ".undo") if (path / ".undo").exists() else ()) - {"lock"}
    print(seen, f"{took:.3f} s")
"""


@pytest.mark.far
@pytest.mark.parametrize(
    ("name", "signum", "rounds"),
    [("ocdbt", signal.SIGKILL, 12), ("zarr", signal.SIGKILL, 12), ("ocdbt", signal.SIGINT, 5)],
    ids=["ocdbt-kill", "zarr-kill", "ocdbt-ctrl-c"],
)
def test_stopped_at_random_moments(tmp_path, name, signum, rounds):
    path = tmp_path / "x"
    ocp.PyTreeCheckpointer(**LAYOUTS[name]).save(path, {f"w{n}": np.ones((64, 256), "float32") for n in range(6)})
    command = [sys.executable, "-c", textwrap.dedent(KILLER), str(path), str(rounds), str(int(signum))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    print(done.stdout)


# ---- the commands --------------------------------------------------------------------------------------------


def test_the_commands(copy):
    path = copy("run")
    before = content(path)
    run = lambda *args: CliRunner().invoke(cli, [*map(str, args)])
    done = run("zero", path, "params/embed", "--in-place")
    assert done.exit_code == 0, done.output
    assert "written in place" in done.output
    assert not restored(path)["params"]["embed"].any()
    assert "zero() at params/embed" in run("history", path).output
    done = run("undo", path)
    assert done.exit_code == 0 and "took back the last patch" in done.output
    assert content(path) == before
    assert run("undo", path).exit_code == 2


def test_without_tensorstore(copy, monkeypatch):
    path = copy("zarr")
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    before = content(path)
    with pytest.raises(pm.errors.MissingExtra, match=r"paramend\[orbax\]"):
        pm.patch(path, lambda t: pm.at(t, "params/embed").zero())
    assert content(path) == before
    with contextlib.suppress(FileNotFoundError):
        assert not UndoStore(path).records(records.PENDING)


def test_a_full_disk_changes_nothing(copy, monkeypatch):
    from paramend.formats.orbax.store import Stage

    for name, call in [("ocdbt", "flush"), ("zarr", "write")]:
        path = copy(name)
        before = content(path)

        def full(*args):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(Stage, call, full)
            with pytest.raises(CannotWrite, match="the disk is full; nothing was changed"):
                pm.patch(path, lambda t: pm.at(t, "**/bias").zero())
        assert content(path) == before
        assert not (path / ".undo").exists()
