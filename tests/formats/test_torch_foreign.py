"""Files of `torch.save` with objects beside the weights: carried unread, byte for byte, or refused with a way round."""

import argparse
import collections
import datetime
import decimal
import enum
import importlib
import pathlib
import pickle
import sys
import tarfile
import types
import uuid
import zipfile
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import paramend as pm
from paramend.cli.main import cli
from paramend.errors import BadCheckpoint, Unsupported


@dataclass
class Config:
    lr: float = 0.1


class Color(enum.Enum):
    RED = 1


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(2, 2)


OBJECTS = {
    "namespace": argparse.Namespace(lr=0.1, layers=[1, 2], path=pathlib.Path("a/b")),
    "array": np.arange(6, dtype=">i4").reshape(2, 3),
    "texts": np.array(["a", "ü"]),
    "structured": np.zeros(2, [("a", "i4")]),
    "path": pathlib.Path("runs/1"),
    "time": datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC),
    "delta": [datetime.timedelta(1), datetime.date(2024, 1, 2)],
    "default": collections.defaultdict(list, a=[1], b=[torch.ones(1)]),
    "deque": collections.deque([1, 2], maxlen=3),
    "simple": types.SimpleNamespace(a=1),
    "decimal": decimal.Decimal("1.5"),
    "uuid": uuid.UUID(int=5),
    "frozen": frozenset({1, 2}),
    "range": range(3),
    "config": Config(),
    "enum": {Color.RED: 1, "kinds": {Color.RED}},
    "function": torch.nn.functional.relu,
    "class": Config,
    "random": np.random.default_rng(0),
    "scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0), 2),
}


def pickle_of(path):
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def save(path, thing):
    torch.save({"epoch": 3, "w": torch.ones(2), "thing": thing, "model": {"a.b": torch.arange(3.0)}}, path)
    return path


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_are_carried_unread(name, tmp_path):
    path = save(tmp_path / "x.pt", OBJECTS[name])
    with pm.open(path) as checkpoint:
        assert checkpoint["model.a.b"].tolist() == [0, 1, 2]
        pm.at(checkpoint, "model.**").multiply(2).save(tmp_path / "y.pt")
        loaded = pm.load(path)
        twin = pickle.loads(pickle.dumps(checkpoint))
        assert twin["w"].tolist() == [1, 1] and twin.metadata.keys() == checkpoint.metadata.keys()
        report = checkpoint.save(tmp_path / "z.safetensors")
        if name not in ("function", "class", "default"):
            assert any(said.startswith("thing") for said in report.left_out)
        for edit in (lambda at: at.rename("v"), lambda at: at.delete(), lambda at: at.cast("float16")):
            with pytest.raises(Unsupported, match="carried unread") as caught:
                edit(pm.at(checkpoint, "w")).save(tmp_path / "never.pt")
            assert "leaves them out" in caught.value.hint
    assert loaded["epoch"] == 3 and loaded["model"]["a.b"].tolist() == [0, 1, 2]
    assert pickle_of(tmp_path / "y.pt") == pickle_of(path)
    found = torch.load(tmp_path / "y.pt", weights_only=False)
    assert found["model"]["a.b"].tolist() == [0, 2, 4] and found["w"].tolist() == [1, 1]
    assert type(found["thing"]) is type(OBJECTS[name])
    pm.patch(path, lambda tree: pm.at(tree, "w").zero())
    assert not torch.load(path, weights_only=False)["w"].any()
    assert pm.load(tmp_path / "z.safetensors")["w"].tolist() == [1, 1]


def test_keys_that_are_objects_become_text_in_a_new_file(tmp_path):
    path = save(tmp_path / "x.pt", {Color.RED: torch.ones(1)})
    with pm.open(path) as checkpoint:
        checkpoint.save(tmp_path / "x.msgpack")
        assert pm.load(tmp_path / "x.msgpack")["thing"][f"<{Color.__module__}.Color, not read>"].tolist() == [1]


def test_tensors_in_a_defaultdict_are_leaves(tmp_path):
    path = save(tmp_path / "x.pt", collections.defaultdict(list, b=[torch.ones(1)]))
    with pm.open(path) as checkpoint:
        assert "thing.b.0" in checkpoint.index.texts.values()


def test_nothing_of_an_object_runs(tmp_path, monkeypatch):
    """A class whose module writes a file when it is imported, and whose objects write one when they are made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "trap.py").write_text(
        "open('imported', 'w').close()\nclass Trap:\n    def __reduce__(self):\n        return Trap, ()\n"
        "    def __init__(self):\n        open('made', 'w').close()\n"
    )
    trap = importlib.import_module("trap")
    torch.save({"w": torch.ones(2), "x": trap.Trap()}, "x.pt")
    for name in ("imported", "made"):
        (tmp_path / name).unlink()
    del sys.modules["trap"]
    with pm.open("x.pt") as checkpoint:
        assert str(checkpoint.metadata["x"]) == "<trap.Trap, not read>"
        pm.at(checkpoint, "w").zero().save("y.pt")
    pm.load("x.pt", "torch")
    assert "trap" not in sys.modules
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"trap.py", "x.pt", "y.pt"}


@pytest.mark.parametrize("tree", [Net(), {"epoch": 3, "model": Net()}, [Net(), torch.ones(1)]])
def test_a_pickled_module_is_refused_with_what_to_save(tree, tmp_path):
    torch.save(tree, tmp_path / "x.pt")
    with pytest.raises(
        BadCheckpoint, match=r"it holds a whole module, a pickled .*Net: save model.state_dict\(\)"
    ) as caught:
        pm.open(tmp_path / "x.pt")
    assert "state_dict()" in caught.value.hint and "only if you trust it" in caught.value.hint
    if type(tree) is Net:
        exec(caught.value.hint, {"torch": torch})
        assert pm.load(tmp_path / "x-new.pt")["fc"]["weight"].shape == (2, 2)
    done = CliRunner().invoke(cli, ["show", str(tmp_path / "x.pt")])
    assert done.exit_code == 2 and "state_dict()" in done.stderr


def test_another_object_at_the_root(tmp_path):
    torch.save(argparse.Namespace(w=torch.ones(1)), tmp_path / "x.pt")
    with pytest.raises(BadCheckpoint, match=r"a pickled argparse\.Namespace, not a dict of tensors"):
        pm.open(tmp_path / "x.pt")


# ---- what else torch writes --------------------------------------------------------------------------------------


def test_tar_archives_say_so(tmp_path):
    pm.save({"w": np.ones(2)}, tmp_path / "model.safetensors")
    for name in ("x.tar", "x.nemo", "x", "x.pt", "x.pth.tar"):
        with tarfile.open(tmp_path / name, "w") as archive:
            archive.add(tmp_path / "model.safetensors", "model.safetensors")
        with pytest.raises(BadCheckpoint, match="it is a tar archive") as caught:
            pm.open(tmp_path / name)
        assert caught.value.hint.startswith(f"tar -xf {tmp_path / name}")


@pytest.mark.parametrize("module", ["torch.distributed.tensor", "torch.distributed._tensor.api"])
def test_dtensors_say_so(module, tmp_path):
    """The names are those of `torch.save` of a DTensor; making one needs a process group."""
    path = save(tmp_path / "x.pt", Config())
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in records if name.endswith("/data.pkl"))
    records[name] = (
        b"\x80\x02}X\x01\x00\x00\x00wctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_wrapper_subclass\nc"
    )
    records[name] += f"{module}\nDTensor\n".encode() + b"t}tRs."
    with zipfile.ZipFile(path, "w") as archive:
        for record, data in records.items():
            archive.writestr(record, data)
    with pytest.raises(BadCheckpoint, match=r"DTensor, one part of a tensor that is spread over devices") as caught:
        pm.open(path)
    assert "full_state_dict=True" in caught.value.hint
