"""Checkpoints in remote stores, read through obstore: the same leaves as from files, and few requests for headers."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import paramend as pm
from paramend.cli.main import cli
from paramend.disk import remote
from paramend.disk.remote import PART
from paramend.disk.urls import path_of
from paramend.errors import BadCheckpoint, CannotRead
from support.stores import KEYS, Files, Proxy, Server, environment, hub

pytestmark = pytest.mark.far


@pytest.fixture(scope="module")
def server():
    found = Server()
    yield found
    found.stop()


@pytest.fixture
def proxy(server, monkeypatch):
    with Proxy(server.port) as found:
        for name, value in environment(found.url).items():
            monkeypatch.setenv(name, value)
        yield found


def tree_of(seed=0, layers=6, width=64):
    draw = np.random.default_rng(seed)
    names = [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in ("up", "down")]
    return {name: draw.standard_normal((width, 32)).astype("float32") for name in names}


def upload(server, folder, prefix):
    for path in folder.iterdir():
        server.put(f"{prefix}/{path.name}", path.read_bytes())


@pytest.fixture
def model(tmp_path, server):
    """A model in shards, in a folder and in the store."""
    plain = tmp_path / "plain"
    plain.mkdir()
    pm.save(tree_of(), plain / "model.safetensors")
    (plain / "config.json").write_text('{"num_hidden_layers": 6}')
    pm.open(plain).save(tmp_path / "model", max_shard_size="20KB")
    upload(server, tmp_path / "model", "model")
    return tmp_path / "model"


def assert_same(url, path):
    with pm.open(url) as one, pm.open(path) as other:
        assert one.keys() == other.keys()
        for name in other:
            assert str(one.spec(name) if isinstance(name, int) else one[name].dtype) == str(other[name].dtype)
            assert np.array_equal(one[name], other[name])
        assert one.source.format == other.source.format
    assert not pm.diff(url, path).changed


def _torch(path):
    base = torch.arange(600.0).reshape(20, 30)
    tied = torch.ones(7)
    state = {"t": base.T, "part": base[3:9, ::2], "a": tied, "b": tied, "scalar": torch.tensor(3), "empty": base[:0]}
    torch.save({**state, "half": base.bfloat16(), "step": 7}, path)


MAKERS = {
    "m.safetensors": lambda path: pm.save({**tree_of(), "scalar": np.float32(3), "empty": np.ones((0, 3))}, path),
    "m.npz": lambda path: np.savez(path, a=np.arange(99.0), f=np.asfortranarray(np.ones((3, 4))), n=np.int64(3)),
    "c.npz": lambda path: np.savez_compressed(path, a=np.arange(9999.0), f=np.asfortranarray(np.ones((3, 4)))),
    "m.msgpack": lambda path: pm.save({"a": {"b": np.arange(9.0)}, "c": np.ones((2, 3), "int8")}, path),
    "m.pt": _torch,
}


@pytest.mark.parametrize("name", MAKERS)
def test_every_format_of_a_file(proxy, server, tmp_path, name):
    MAKERS[name](tmp_path / name)
    server.put(name, (tmp_path / name).read_bytes())
    url = f"s3://models/{name}"
    with pm.open(url) as one, pm.open(tmp_path / name) as other:
        assert str(one.path) == url
        assert [str(one.spec(n)) for n in one.index.numbers] == [str(other.spec(n)) for n in other.index.numbers]
        for number in other.index.numbers:
            mine, its = one.source.read(number), other.source.read(number)
            assert mine.tobytes() == its.tobytes()
            ends = one.spec(number).size // 3, one.spec(number).size
            assert one.source.read_range(number, *ends).tobytes() == its.reshape(-1)[slice(*ends)].tobytes()
        pm.at(one, "**").get()
        made = [pm.at(each, "**").multiply(1).save(tmp_path / f"{n}-{name}") for n, each in enumerate((one, other))]
    assert made[0].bytes_copied == made[1].bytes_copied
    assert (tmp_path / f"0-{name}").read_bytes() == (tmp_path / f"1-{name}").read_bytes()
    loaded, same = pm.load(url, nested=False), pm.load(tmp_path / name, nested=False)
    assert pickle.dumps(loaded) == pickle.dumps(same)


def test_a_folder_of_shards(proxy, model):
    with pm.open("s3://models/model") as one, pm.open("s3://models/model/model.safetensors.index.json") as same:
        assert {name: value.tobytes() for name, value in one.items()} == {n: v.tobytes() for n, v in tree_of().items()}
        assert list(one.keys()) == list(same.keys())
        assert len(one.source.files) == 6
        assert "6" in str(pm.anatomy(one))
        assert pm.config(one)["num_hidden_layers"] == 6
    assert not pm.diff("s3://models/model", model).changed


def test_a_model_is_listed_from_its_headers(proxy, model):
    with pm.open("s3://models/model") as opened:
        assert len(opened.index.numbers) == 12
    names = [path.rsplit("/", 1)[-1].partition("?")[0] for _, path, _ in proxy.seen]
    assert [names.count(path.name) for path in sorted(model.glob("*.safetensors"))] == [1] * 6
    assert len(proxy.seen) <= 6 + 6  # a list, the index, the configuration; each asked for what it is, and read


class _Huge(Files):
    """A model of 70 GB, of which only headers are real."""

    def __init__(self, shards=14, each=5_000_000_000):
        table, files, leaf = {}, {}, each // 1000
        for number in range(shards):
            name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
            header = {
                f"layers.{number}.{part}": {"dtype": "U8", "shape": [leaf], "data_offsets": [n, n + leaf]}
                for part, n in enumerate(range(0, each, leaf))
            }
            raw = json.dumps(header).encode()
            files[f"/m/{name}"] = len(raw).to_bytes(8, "little") + raw, 8 + len(raw) + each
            table |= dict.fromkeys(header, name)
        files["/m/model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": table}).encode()
        files["/m/config.json"] = b'{"num_hidden_layers": 14}'
        super().__init__(files)


@pytest.mark.parametrize("path", ["m", "m/model.safetensors.index.json"])
def test_seventy_gigabytes_are_listed_from_a_web_server(path):
    with _Huge() as web, pm.open(f"{web.url}/{path}") as opened:
        assert opened.source.nbytes(0) == 5_000_000
        assert sum(map(opened.source.nbytes, opened.index.numbers)) == 70_000_000_000
        ranges = [path for _, path, said in web.seen if said and path.endswith(".safetensors")]
        assert len(ranges) == len(set(ranges)) == 14
        assert web.sent < 14 * (1 << 17) + 2_000_000
        one = opened.source.read_range(3_500, 1000, 3000)  # of the fourth shard
        assert not one.any()
        assert len(one) == 2000
        assert web.sent < 14 * (1 << 17) + 2_100_000


def test_long_reads_are_several_requests_at_once(monkeypatch):
    monkeypatch.setattr(remote, "PART", 1 << 16)
    monkeypatch.setattr(remote, "_NEAR", 1 << 10)
    monkeypatch.setattr(remote, "_RUN", 1 << 15)
    data = np.random.default_rng(0).bytes(3_000_001)
    with Files({"/f.bin": data}) as web:
        file = path_of(f"{web.url}/f.bin").opened()
        assert file.read(200_000, 1_000_000) == data[200_000:1_200_000]
        assert len(web.seen) == 1 + 16
        for at in range(1_300_000, 2_999_000, 9_999):  # in steps, ahead of which is fetched
            assert file.read(at, 9_999) == data[at : at + 9_999]
        asked = [said for _, _, said in web.seen[17:]]
        assert len(asked) < 4 + 27
        assert file.read(17, 3_000_001 - 17) == data[17:]
        for at in (2_999_990, 5, 1_700_000, 140_000, 139_000, 0):
            assert file.read(at, 11) == data[at : at + 11]
        with pytest.raises(CannotRead, match="3,000,001 bytes"):
            file.read(2_999_999, 3)
    assert PART == 8 << 20


@pytest.mark.parametrize("tags", [True, False])
def test_a_file_that_is_replaced_while_it_is_read(tmp_path, tags):
    pm.save({"a": np.zeros(1 << 16), "b": np.zeros(1 << 16)}, tmp_path / "m.safetensors")
    data = (tmp_path / "m.safetensors").read_bytes()
    with Files({"/m.safetensors": data}, tags=tags) as web, pm.open(f"{web.url}/m.safetensors") as opened:
        web.files["/m.safetensors"] = data[:-8] + b"12345678" + (b"" if tags else b"longer")
        with pytest.raises(CannotRead, match="another version") as caught:
            opened["b"]
        assert caught.value.hint == "open the checkpoint again"


def test_a_file_that_is_replaced_before_it_is_copied(proxy, server, tmp_path):
    pm.save({"a": np.zeros(9)}, tmp_path / "m.safetensors")
    server.put("changed.safetensors", (tmp_path / "m.safetensors").read_bytes())
    with pm.open("s3://models/changed.safetensors") as opened:
        pm.save({"a": np.ones(9)}, tmp_path / "new.safetensors")
        server.put("changed.safetensors", (tmp_path / "new.safetensors").read_bytes())
        with pytest.raises((BadCheckpoint, CannotRead), match=r"changed it since|another version"):
            pm.at(opened, "a").multiply(2).save(tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    assert pm.load("s3://models/changed.safetensors")["a"][0] == 1  # by a name that is opened anew


def test_what_is_opened_goes_to_another_process(proxy, model):
    with pm.open("s3://models/model") as opened:
        edited = pm.at(opened, "**.0.up.*").multiply(2)
        sent = pickle.dumps(edited)
    code = "import pickle, sys; t = pickle.load(sys.stdin.buffer); print(float(t['model.layers.0.up.weight'].sum()))"
    ran = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True)
    assert float(ran.stdout) == float((tree_of()["model.layers.0.up.weight"] * np.float32(2)).sum())
    assert KEYS["AWS_SECRET_ACCESS_KEY"].encode() not in sent


def run(*args):
    return CliRunner().invoke(cli, list(map(str, args)))


URL = "s3://models/model"


def test_commands_read_addresses(proxy, model, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "fix.yaml").write_text(f'version: 1\nsteps:\n  - set: {{at: "**.1.up.*", from: "{URL}"}}\n')
    other = tmp_path / "other"
    pm.at(pm.open(model), "**").multiply(2).save(other)
    for args in (
        ("show", URL),
        ("show", URL, "--stats"),
        ("show", URL, "**/up/*", "--json"),
        ("diff", URL, other),
        ("diff", other, URL),
        ("config", URL),
        ("zero", URL, "**.0.**", "--dry-run"),
        ("zero", URL, "**.0.**", "-o", out / "zero", "--record"),
        ("verify", out / "zero"),
        ("convert", URL, out / "one.npz"),
        ("graft", URL, "--into", other, "-o", out / "graft"),
        ("merge", URL, other, "-o", out / "merge"),
        ("set", other, "**.1.up.*", URL, "-o", out / "set"),
        ("set", other, "**.1.up.*", f"{URL}:model.layers.0.up.weight", "-o", out / "leaf"),
        ("apply", tmp_path / "fix.yaml", other, "-o", out / "apply", "--record"),
        ("verify", out / "apply", "--source", URL),
        ("deepen", URL, "--drop", "1", "-o", out / "deep"),
    ):
        out.mkdir(exist_ok=True)
        ran = run(*args)
        assert ran.exit_code in (0, 1 if args[0] == "diff" else 0), (args, ran.output)
    tree = tree_of()
    name = "model.layers.1.up.weight"
    assert np.array_equal(pm.load(out / "set", nested=False)[name], tree[name])
    assert np.array_equal(pm.load(out / "leaf", nested=False)[name], tree["model.layers.0.up.weight"])
    assert np.array_equal(pm.load(out / "apply", nested=False)[name], tree[name])
    assert np.array_equal(pm.load(out / "graft", nested=False)[name], tree[name])
    assert np.array_equal(pm.load(out / "one.npz", nested=False)[name], tree[name])
    assert URL in pm.record(out / "apply").recipe


def test_a_recipe_in_a_store_names_files_beside_it(proxy, model, server):
    server.put("recipes/fix.yaml", b'version: 1\nsteps:\n  - set: {at: "**.1.up.*", from: values.npy}\n')
    values = np.arange(64 * 32, dtype="float32").reshape(64, 32)
    np.save(model / "v.npy", values)
    server.put("recipes/values.npy", (model / "v.npy").read_bytes())
    made = pm.Recipe.load("s3://models/recipes/fix.yaml").apply(pm.open(model))
    assert np.array_equal(made["model.layers.1.up.weight"], values)


def test_nothing_is_there(proxy):
    for url in ("s3://models/none", "s3://models/none.safetensors", "s3://no-such-bucket/m.pt"):
        with pytest.raises(CannotRead, match="there is no such"):
            pm.open(url)
    ran = run("show", "s3://models/none")
    assert ran.exit_code == 2
    assert "Traceback" not in ran.output


# ---- web servers and the Hub -----------------------------------------------------------------------------------


def test_web_addresses_with_logins_and_signatures(tmp_path):
    pm.save({"w": np.arange(9.0)}, tmp_path / "m.safetensors")
    data = (tmp_path / "m.safetensors").read_bytes()
    with Files({"/a b/m.safetensors": data}, login="X-Amz-Signature=abc/def") as web:
        url = f"{web.url}/a%20b/m.safetensors"
        with pm.open(f"{url}?X-Amz-Signature=abc/def") as opened:
            assert opened["w"].sum() == 36
            report = pm.at(opened, "w").zero().save(tmp_path / "out.safetensors", record=True)
            texts = [
                repr(opened),
                str(report),
                json.dumps(report.to_dict()),
                str(pm.record(tmp_path / "out.safetensors")),
            ]
        with pytest.raises(CannotRead, match="refuses access") as caught:
            pm.open(f"{url}?X-Amz-Signature=wrong-secret")
        texts += [repr(caught.value), (tmp_path / "out.safetensors").read_bytes().decode("latin-1")]
        assert all(secret not in text for text in texts for secret in ("abc", "wrong-secret"))
    with Files({"/m.safetensors": data}, login="Basic bWU6cGFzcy13b3Jk") as web:
        said = web.url.replace("http://", "http://me:pass-word@")
        with pm.open(f"{said}/m.safetensors") as opened:
            assert opened["w"].sum() == 36
            assert "pass-word" not in repr(opened)
        ran = run("show", f"{said}/none.safetensors", "--json")
        assert ran.exit_code == 2
        assert "pass-word" not in ran.output


@pytest.mark.parametrize("token", ["", "hf_secret-token"])
@pytest.mark.parametrize("revision", ["main", "v1.0"])
def test_the_hub(model, monkeypatch, tmp_path, token, revision):
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    site, store = hub(files, revision, token)
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(f"{token}\n")
    at = "" if revision == "main" else f"@{revision}"
    with site, store:
        with pm.open(f"hf://owner/name{at}") as opened:
            assert pm.config(opened)["num_hidden_layers"] == 6
            assert str(opened.path) == f"hf://owner/name{at}"
            assert all(value.tobytes() == tree_of()[name].tobytes() for name, value in opened.items())
        with pm.open(f"hf://owner/name{at}/model-00002-of-00006.safetensors") as one:
            assert len(one.index.numbers)
        with pytest.raises(CannotRead):
            pm.open("hf://owner/other")
        assert not any("authorization" in map(str.lower, headers) for headers in store.headers)
        assert all(headers.get("authorization") == f"Bearer {token}" for headers in site.headers if token)


def test_a_web_server_without_ranges(tmp_path, server, monkeypatch):
    pm.save({"w": np.arange(9000.0)}, tmp_path / "m.safetensors")
    server.put("m.safetensors", (tmp_path / "m.safetensors").read_bytes())
    with Proxy(server.port) as web:
        for name, value in environment(web.url).items():
            monkeypatch.setenv(name, value)
        web.fault = lambda *_: "whole"
        with pytest.raises(CannotRead, match="ignores ranges"):
            pm.open("s3://models/m.safetensors")
