"""Addresses where a path is expected: what they are as text, what is kept out of it, and what refuses them."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import paramend as pm
from paramend.disk.remote import Address
from paramend.disk.urls import SCHEMES, Url, path_of
from paramend.errors import BadArgument, MissingExtra, Unsupported

SECRET = "https://me:pass@host.org:8443/a/model.safetensors?X-Amz-Signature=abc/def"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("s3://bucket/a/b.pt", Address("s3", "bucket", "a/b.pt")),
        ("S3://bucket/a/", Address("s3", "bucket", "a")),
        ("gs://bucket", Address("gs", "bucket", "")),
        ("az://container/what? is@this", Address("az", "container", "what? is@this")),
        ("hf://owner/name", Address("hf", "owner/name/resolve/main", "")),
        (
            "hf://owner/name@refs%2Fpr%2F1/f.safetensors",
            Address("hf", "owner/name/resolve/refs%2Fpr%2F1", "f.safetensors"),
        ),
        ("http://host:81/a%20b.npz", Address("http", "host:81", "a%20b.npz")),
        (SECRET, Address("https", "me:pass@host.org:8443", "a/model.safetensors", "X-Amz-Signature=abc/def")),
    ],
)
def test_where_an_address_is(text, address):
    path = path_of(text)
    assert isinstance(path, Url)
    assert path.at == address
    assert pickle.loads(pickle.dumps(path)).at == address
    assert path_of(Path(path)).at == address  # what a program made of it that wraps everything in Path
    assert path_of(path) is path


def test_parts_of_an_address_are_those_of_a_path():
    path = path_of("s3://bucket/model/a.safetensors")
    assert (path.name, path.suffix, path.stem) == ("a.safetensors", ".safetensors", "a")
    assert str(path.parent / "config.json") == "s3://bucket/model/config.json"
    assert str(path.with_name("b.pt")) == "s3://bucket/model/b.pt"
    assert path.relative_to(path.parent).as_posix() == "a.safetensors"
    assert path.is_relative_to(path.parent)
    assert path == path_of("s3://bucket/model/a.safetensors") != path_of("s3://bucket/model/b.safetensors")


@pytest.mark.parametrize("text", ["a/b", "./s3:/b", "/tmp/x:y", "C:\\models", "file:///a/b"])
def test_a_path_stays_one(text):
    assert path_of(text) == Path(text.removeprefix("file://"))
    assert not isinstance(path_of(text), Url)


def test_no_text_has_credentials():
    path = path_of(SECRET)
    for text in (str(path), repr(path), f"{path}", path.as_posix(), path.name, str(path.parent)):
        assert "pass" not in text
        assert "abc" not in text
    assert str(path) == "https://***@host.org:8443/a/model.safetensors"
    assert path.suffix == ".safetensors"


def test_a_store_that_is_not_known():
    with pytest.raises(BadArgument, match="ftp:// is not the address") as caught:
        pm.open("ftp://host/a.safetensors")
    assert all(f"{scheme}://" in caught.value.hint for scheme in SCHEMES)


def test_what_only_a_file_can_do_is_refused():
    with pytest.raises(Unsupported, match=r"s3://b/a\.npy: this needs a file on this machine"):
        np.load(path_of("s3://b/a.npy"))
    with pytest.raises(Unsupported):
        os.stat(path_of("s3://b/a.npy"))  # noqa: PTH116


@pytest.mark.parametrize("verb", [pm.undo, pm.history, lambda path: pm.patch(path, lambda t: pm.at(t, "**").zero())])
@pytest.mark.parametrize("path", ["s3://b/m.safetensors", "hf://owner/name", "https://me:pass@host/m.pt?sig=abc"])
def test_nothing_is_changed_in_place(verb, path):
    with pytest.raises(Unsupported, match="no checkpoint is changed in place") as caught:
        verb(path)
    assert "-o OUT" in caught.value.hint
    assert "pass" not in str(caught.value)
    assert "abc" not in str(caught.value)


def test_what_is_only_read(tmp_path):
    for out in ("https://host.org/m.safetensors", "hf://owner/name/"):
        with pytest.raises(Unsupported, match="is only read"):
            pm.save({"w": np.ones(2)}, out)


@pytest.mark.parametrize("path", ["s3://b/m.safetensors", "hf://owner/name", "gs://b/model", "http://localhost/m.npz"])
def test_the_library_is_named_where_it_is_missing(monkeypatch, path):
    for name in ("obstore", "obstore.store"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra) as caught:
        pm.open(path)
    assert caught.value.hint == "pip install 'paramend[remote]'"
    with pytest.raises(MissingExtra):
        pm.save({"w": np.ones(2)}, "s3://b/m.safetensors")


def test_the_command_says_so_too(tmp_path):
    (tmp_path / "obstore").mkdir()
    (tmp_path / "obstore" / "__init__.py").write_text("raise ImportError('there is none')")
    python_path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    ran = subprocess.run(
        [sys.executable, "-m", "paramend", "show", "https://me:pass@host/m.pt?sig=abc"],
        env={**os.environ, "PYTHONPATH": python_path},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2
    assert "pip install 'paramend[remote]'" in ran.stderr
    assert "pass" not in ran.stderr
    assert "abc" not in ran.stderr
