"""Checkpoints written into remote stores through obstore: the bytes of files, whole or not there at all."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import paramend as pm
from paramend.cli.main import cli
from paramend.disk import remote
from paramend.errors import BadCheckpoint, CannotRead, CannotWrite, Unsupported
from support.stores import KEYS, Proxy, Server, environment

pytestmark = pytest.mark.far
MIB = 1 << 20


@pytest.fixture(scope="module")
def server():
    found = Server()
    yield found
    found.stop()


@pytest.fixture
def proxy(server, monkeypatch):
    """A proxy before a store without objects."""
    for key in server.keys(""):
        server.ask("DELETE", f"/models/{key}")
    with Proxy(server.port) as found:
        for name, value in environment(found.url).items():
            monkeypatch.setenv(name, value)
        yield found


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "PATIENCE", 1)
    monkeypatch.setattr(remote, "SILENCE", 1)


def tree_of(seed=0, count=6, size=300_000):
    draw = np.random.default_rng(seed)
    return {f"model.layers.{i}.weight": draw.standard_normal((3, size // 3)).astype("float32") for i in range(count)}


@pytest.fixture
def model(tmp_path):
    """A model in three shards."""
    plain = tmp_path / "plain"
    plain.mkdir()
    pm.save(tree_of(), plain / "model.safetensors")
    (plain / "config.json").write_text('{"num_hidden_layers": 6}')
    pm.open(plain).save(tmp_path / "model", max_shard_size="2500KB")
    return tmp_path / "model"


def doubled(path):
    return pm.at(pm.open(path), "**.1.*").multiply(2)


def verified(path):
    return CliRunner().invoke(cli, ["verify", path]).exit_code == 0


def contents(server, prefix):
    return {key.removeprefix(f"{prefix}/"): server.get(key) for key in server.keys(prefix)}


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("record", [False, True])
def test_a_folder_of_shards(proxy, server, model, tmp_path, record, workers):
    here = doubled(model).save(tmp_path / "out", record=record)
    there = doubled(model).save("s3://models/a/out", record=record, workers=workers)
    assert there.files == here.files
    assert (there.bytes_computed, there.path) == (here.bytes_computed, "s3://models/a/out")
    mine, its = contents(server, "a/out"), files(tmp_path / "out")
    assert mine.keys() == its.keys()
    told = {name for name in its if mine[name] != its[name]}
    assert told <= ({"paramend.record.json"} if record else set())  # it has a time
    if record:
        assert verified("s3://models/a/out")
    assert server.uploads() == 0


def test_the_index_is_written_last(proxy, model):
    pm.open(model).save("s3://models/out/", max_shard_size="1300KB")
    put = [path for method, path, _ in proxy.seen if method == "PUT" or (method == "POST" and "uploadId" in path)]
    names = list(dict.fromkeys(path.rsplit("/", 1)[-1].partition("?")[0] for path in put))
    assert {*names[-2:]} == {"config.json", "model.safetensors.index.json"}
    assert all(name.endswith(".safetensors") for name in names[:-2])


def _torch(path):
    torch.save({name: torch.from_numpy(value) for name, value in tree_of().items()}, path)


MAKERS = {
    "m.safetensors": lambda path: pm.save(tree_of(), path),
    "m.npz": lambda path: np.savez(path, **tree_of()),
    "m.msgpack": lambda path: pm.save(tree_of(), path),
    "m.pt": _torch,
}


@pytest.mark.parametrize("name", MAKERS)
def test_every_format_of_a_file(proxy, server, tmp_path, name):
    MAKERS[name](tmp_path / name)
    server.put(f"in/{name}", (tmp_path / name).read_bytes())
    here = doubled(tmp_path / name).save(tmp_path / f"out-{name}")
    there = doubled(f"s3://models/in/{name}").save(f"s3://models/out/{name}")  # from a store into a store
    assert server.get(f"out/{name}") == (tmp_path / f"out-{name}").read_bytes()
    assert there.bytes_computed == here.bytes_computed
    doubled(tmp_path / name).save(f"s3://models/told/{name}", record=True)
    assert verified(f"s3://models/told/{name}")
    with pytest.raises(CannotWrite, match="already exists"):
        doubled(tmp_path / name).save(f"s3://models/out/{name}")
    pm.at(pm.open(tmp_path / name), "**").zero().save(f"s3://models/told/{name}", force=True)
    assert not any(value.any() for value in pm.load(f"s3://models/told/{name}", nested=False).values())
    assert [key for key in server.keys("told/") if key.endswith(".record.json")] == []  # it was of the old file
    assert server.uploads() == 0


def test_trees_in_memory(proxy, server, tmp_path):
    pm.save(tree_of(), tmp_path / "m.safetensors")
    pm.save(tree_of(), "s3://models/m.safetensors")
    assert server.get("m.safetensors") == (tmp_path / "m.safetensors").read_bytes()
    pm.save(tree_of(), "s3://models/folder/", max_shard_size="2MB")
    assert pm.load("s3://models/folder", nested=False).keys() == tree_of().keys()


def test_a_folder_is_replaced_only_if_asked(proxy, server, model):
    pm.open(model).save("s3://models/out/", max_shard_size="1300KB")
    server.put("out/notes.txt", b"of the old one")
    with pytest.raises(CannotWrite, match="already exists"):
        doubled(model).save("s3://models/out")
    assert len(server.keys("out/")) == 9
    doubled(model).save("s3://models/out", force=True)
    assert contents(server, "out").keys() == files(model).keys()
    assert not pm.diff(doubled(model), "s3://models/out").changed
    server.put("other/notes.txt", b"no checkpoint")
    with pytest.raises(CannotWrite, match="without a checkpoint"):
        doubled(model).save("s3://models/other", force=True)
    assert server.keys("other") == ["other/notes.txt"]


def test_a_replacement_that_fails_leaves_the_old_one(proxy, server, model, impatient):
    pm.open(model).save("s3://models/out")
    before = contents(server, "out")
    proxy.fault = lambda method, path, _: 500 if method != "GET" and "00003-of" in path else None
    with pytest.raises(CannotWrite):
        doubled(model).save("s3://models/out", force=True)
    proxy.fault = lambda *_: None
    assert contents(server, "out") == before


FAULTS = {
    "a part": lambda method, path, _: 500 if "partNumber=2" in path else None,
    "a part, by the line": lambda method, path, _: "reset" if "partNumber=2" in path else None,
    "its end": lambda method, path, _: 500 if method == "POST" and "uploadId" in path else None,
    "its beginning": lambda method, path, _: 403 if method == "POST" and "?uploads" in path else None,
    "the last file": lambda method, path, _: 503 if method == "PUT" and path.endswith("index.json") else None,
    "no answer": lambda method, path, _: "hang" if method == "PUT" and "00002-of" in path else None,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_upload_that_fails_leaves_no_object(proxy, server, tmp_path, impatient, fault):
    (tmp_path / "in").mkdir()
    pm.save(tree_of(count=3, size=3_000_000), tmp_path / "in" / "model.safetensors")
    proxy.fault = FAULTS[fault]
    with pytest.raises(CannotWrite) as caught:
        pm.open(tmp_path / "in").save("s3://models/out/", max_shard_size="13MB")
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)
    proxy.fault = lambda *_: None
    assert server.keys() == []
    assert server.uploads() == 0


def test_faults_that_pass_do_no_harm(proxy, server, tmp_path):
    pm.save(tree_of(count=2, size=3_000_000), tmp_path / "m.safetensors")
    kinds = {3: 503, 5: "reset", 6: 500, 8: 503, 9: "reset"}
    begins = "?uploads"  # what begins an upload is not asked for twice
    proxy.fault = lambda method, path, number: None if begins in path else kinds.get(number)
    pm.at(pm.open(tmp_path / "m.safetensors"), "**").multiply(1).save("s3://models/m.safetensors")
    assert server.get("m.safetensors") == (tmp_path / "m.safetensors").read_bytes()
    proxy.count = 0
    kinds[2], kinds[7] = ("cut", 2000), ("short", 2000)
    assert not pm.diff("s3://models/m.safetensors", tmp_path / "m.safetensors").changed


def test_an_answer_that_is_lost_is_looked_up(proxy, server, tmp_path):
    pm.save(tree_of(count=2, size=3_000_000), tmp_path / "m.safetensors")
    proxy.fault = lambda method, path, _: ("cut", 20) if method == "POST" and "uploadId" in path else None
    pm.at(pm.open(tmp_path / "m.safetensors"), "**").multiply(1).save("s3://models/m.safetensors")
    assert server.get("m.safetensors") == (tmp_path / "m.safetensors").read_bytes()


def test_a_source_that_fails_leaves_no_object(proxy, server, model, tmp_path):
    edited = doubled(model)
    (model / "model-00002-of-00003.safetensors").write_bytes(b"another one")
    with pytest.raises(Exception, match=r"changed|became shorter"):
        edited.save("s3://models/out")
    assert server.keys() == []
    assert server.uploads() == 0


def test_memory_is_bounded(proxy, server, tmp_path):
    """What is sent passes through; no file is made here."""
    pm.save({"w": np.zeros(96 * MIB // 4, "float32")}, tmp_path / "m.safetensors")
    code = (
        "import re, sys, paramend as pm; from pathlib import Path\n"
        "source, out = sys.argv[1:]; opened = pm.at(pm.open(source), 'w').multiply(2)\n"
        "pm.at(pm.open(source), 'w').multiply(2).save('s3://models/warm.safetensors')\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) / 1024\n"
        "Path('/proc/self/clear_refs').write_text('5'); before = peak(); opened.save(out); print(peak() - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "m.safetensors"), "s3://models/out.safetensors"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(ran.stdout) < 80
    assert len(server.get("out.safetensors")) == (tmp_path / "m.safetensors").stat().st_size


def test_what_cannot_be_written(proxy, tmp_path):
    pm.save(tree_of(), tmp_path / "m.safetensors")
    opened = pm.open(tmp_path / "m.safetensors")
    with pytest.raises(Unsupported, match="onto this machine"):
        opened.save("s3://models/out.orbax")
    with pytest.raises(Unsupported, match="not taken up"):
        opened.save("s3://models/out.safetensors", resume=True)
    with pytest.raises(CannotRead, match="no such bucket"):
        opened.save("s3://no-such-bucket/out.safetensors")


def test_commands_write_to_addresses(proxy, server, model, tmp_path):
    for args in (
        ["zero", model, "**.0.*", "-o", "s3://models/zero", "--record"],
        ["verify", "s3://models/zero"],
        ["merge", model, "s3://models/zero", "-o", "s3://models/merged"],
        ["convert", "s3://models/zero", "s3://models/one.npz"],
        ["graft", "s3://models/zero", "--into", model, "-o", "s3://models/grafted.safetensors"],
        ["zero", "s3://models/zero", "**", "-o", "s3://models/zero2", "--workers", "2"],
        ["show", "s3://models/zero2"],
    ):
        ran = CliRunner().invoke(cli, list(map(str, args)))
        assert ran.exit_code == 0, (args, ran.output)
    ran = CliRunner().invoke(cli, ["zero", "s3://models/zero", "**", "--in-place"])
    assert ran.exit_code == 2
    assert "-o OUT" in ran.output
    assert not any(value.any() for value in pm.load("s3://models/zero2", nested=False).values())


# ---- servers that stop -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("direction", ["read", "write"])
def test_a_server_that_stops(tmp_path, way, direction):
    """The command ends within a minute, and says why."""
    assert remote.SILENCE + 3 + remote.PATIENCE + remote.SILENCE < 60  # what it waits for, one after the other
    server = Server()
    try:
        pm.save(tree_of(count=8, size=6_000_000), tmp_path / "m.safetensors")
        server.put("m.safetensors", (tmp_path / "m.safetensors").read_bytes())
        with Proxy(server.port) as proxy:
            reached = threading.Event()
            proxy.fault = lambda method, path, number: reached.set() if number > 8 else None
            there, here = "s3://models/m.safetensors", tmp_path / "m.safetensors"
            names = (
                (there, tmp_path / "out.safetensors") if direction == "read" else (here, "s3://models/out.safetensors")
            )
            command = [sys.executable, "-m", "paramend", "multiply", str(names[0]), "**", "2", "-o", str(names[1])]
            settings = {**os.environ, **environment(proxy.url)}
            ran = subprocess.Popen(command, env=settings, stderr=subprocess.PIPE, text=True)
            assert reached.wait(60)
            server.process.send_signal(way)
            _, said = ran.communicate(timeout=600)
        assert ran.returncode == 2, said
        assert "s3://models/" in said
        assert "server" in said
        assert "Traceback" not in said
        assert KEYS["AWS_SECRET_ACCESS_KEY"] not in said
        assert not (tmp_path / "out.safetensors").exists()
    finally:
        server.stop()


@pytest.mark.slow
def test_a_killed_writer_leaves_no_object(proxy, server, model):
    proxy.fault = lambda method, path, number: time.sleep(0.05)
    code = "import paramend as pm, sys; pm.at(pm.open(sys.argv[1]), '**').multiply(2).save('s3://models/out')"
    for after in (0.6, 0.8, 1.0):
        ran = subprocess.Popen([sys.executable, "-c", code, str(model)])
        time.sleep(after)
        ran.kill()
        ran.wait()
        if server.keys("out") and not any(key.endswith("index.json") for key in server.keys("out")):
            with pytest.raises(BadCheckpoint, match="of 3 shards, and no index"):
                pm.open("s3://models/out")
        for key in server.keys("out"):
            server.ask("DELETE", f"/models/{key}")


def test_some_shards_are_no_model(proxy, server, model):
    for name in ("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors", "config.json"):
        server.put(f"some/{name}", (model / name).read_bytes())
    with pytest.raises(BadCheckpoint, match="2 of 3 shards, and no index"):
        pm.open("s3://models/some")


def test_an_interrupted_writer_leaves_no_object(proxy, server, model):
    proxy.fault = lambda method, path, number: time.sleep(0.1)
    code = (  # what runs in the background of a shell begins without Ctrl-C
        "import paramend as pm, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "pm.at(pm.open(sys.argv[1]), '**').multiply(2).save('s3://models/out')"
    )
    ran = subprocess.Popen([sys.executable, "-c", code, str(model)], stderr=subprocess.PIPE, text=True)
    while not any(method == "PUT" for method, _, _ in proxy.seen):
        time.sleep(0.01)
    ran.send_signal(signal.SIGINT)
    _, said = ran.communicate(timeout=600)
    assert "KeyboardInterrupt" in said
    assert server.keys() == []
    assert server.uploads() == 0
