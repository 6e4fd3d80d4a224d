"""Records of edits: written with the checkpoint, read back, and checked against its bytes."""

import contextlib
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import paramend as pm
from paramend.cli.main import ROWS, cli
from paramend.errors import BadCheckpoint, CannotRead, UnexpectedChange
from paramend.rewriting.provenance import parse

KEY, FILE = "paramend.record", "paramend.record.json"


def tree():
    names = [f"layers.{i}.{name}" for i in range(3) for name in "wb"]
    return {name: np.full((4, 4), n, "float32") for n, name in enumerate(names)}


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(tree(), path, metadata={"format": "np", "note": "ü"})
    return path


@pytest.fixture
def folder(tmp_path):
    pm.save(tree(), tmp_path / "model", max_shard_size="130B")
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def run(*command, code=0):
    result = CliRunner().invoke(cli, list(map(str, command)))
    assert result.exit_code == code, result.output
    return result


def edited(path):
    """A plan with something of everything."""
    found = pm.at(pm.at(pm.open(path), "layers[-1]/w").zero(), "layers[0]/*").cast("float16")
    return pm.at(pm.at(found, "layers[1]/w").rename("middle.w"), "layers[1]/b").delete()


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


# ---- where it is, and what it says ---------------------------------------------------------------------------


def test_a_file_carries_it_in_its_header(model, tmp_path):
    out, plain = tmp_path / "out.safetensors", tmp_path / "plain.safetensors"
    report = edited(model).save(out, record=True)
    edited(model).save(plain)
    with safe_open(out, "np") as file, safe_open(plain, "np") as other:
        metadata = file.metadata()
        said = json.loads(metadata.pop(KEY))
        assert metadata == other.metadata() == {"format": "np", "note": "ü"}
        assert set(file.keys()) == set(other.keys())
    heads = [8 + int.from_bytes(path.read_bytes()[:8], "little") for path in (out, plain)]
    assert out.read_bytes()[heads[0] :] == plain.read_bytes()[heads[1] :] and not heads[0] % 8
    assert report.record == str(out) and "record" not in edited(model).save(plain, force=True).to_dict()
    arrays = load_file(out)
    assert {leaf["path"]: leaf["sha256"] for leaf in said["leaves"]} == {
        name: digest(arrays[name]) for name in ("layers.2.w", "layers.0.w", "layers.0.b", "middle.w")
    }
    assert {leaf["path"]: leaf["edit"] for leaf in said["leaves"]} == {
        "layers.2.w": "zero()",
        "layers.0.w": "cast('float16')",
        "layers.0.b": "cast('float16')",
        "middle.w": "renamed from layers.1.w",
    }
    assert (said["source"], said["deleted"], said["version"]) == ("model.safetensors", ["layers.1.b"], 1)
    assert said["paramend"] == pm.__version__ and said["time"].endswith("+00:00")
    assert str(tmp_path) not in metadata and str(tmp_path) not in json.dumps(said)
    assert pm.record(out).to_dict() == said and pm.record(plain) is pm.record(model) is None
    assert sorted(pm.verify_record(out)) == sorted(leaf["path"] for leaf in said["leaves"])
    assert "written from model.safetensors" in str(pm.record(out)) and "deleted: 1 leaf" in str(pm.record(out))


def test_a_file_without_metadata_says_that_it_is_of_torch(tmp_path):
    # transformers takes a file without metadata for one of torch, and refuses metadata without a format
    save_file(tree(), tmp_path / "model.safetensors")
    pm.at(pm.open(tmp_path / "model.safetensors"), "**").zero().save(tmp_path / "out.safetensors", record=True)
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        assert set(file.metadata()) == {"format", KEY} and file.metadata()["format"] == "pt"


@pytest.mark.parametrize("name", ["out", "out.npz", "out.pt", "out.msgpack", "out.orbax", "out.safetensors"])
def test_every_format_carries_it_and_is_read_as_before(folder, tmp_path, name):
    out = tmp_path / name
    report = edited(folder).save(out, record=True)
    where = out / FILE if out.is_dir() else out.with_name(f"{name}.record.json")
    where = out if name.endswith("safetensors") else where
    assert Path(report.record) == where and where.is_file()
    assert sorted(pm.verify_record(out)) == sorted(leaf.path for leaf in pm.record(out).leaves)
    held = list(tmp_path.glob(".*"))
    assert not held and (FILE in report.files) == out.is_dir()
    wanted = {leaf.path: leaf.sha256 for leaf in pm.record(out).leaves}
    if name == "out":
        arrays = {key: array for path in out.glob("*.safetensors") for key, array in load_file(path).items()}
        assert (out / "config.json").exists()
    elif name == "out.npz":
        arrays = dict(np.load(out))
    elif name == "out.pt":
        read = torch.load(out, weights_only=True)
        arrays = {key: value.view(torch.uint8).numpy() for key, value in read.items()}
    elif name == "out.orbax":
        import orbax.checkpoint as ocp

        arrays = ocp.StandardCheckpointer().restore(out)
    else:
        return
    assert wanted == {key: digest(arrays[key]) for key in wanted}


@pytest.mark.parametrize("kind", ["database", "folders"])
def test_an_orbax_checkpoint_whose_chunks_change(tmp_path, kind):
    import orbax.checkpoint as ocp

    state = {"a": np.arange(24, dtype="float32").reshape(4, 6), "b": np.ones(3, "int32")}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=kind == "database")
    ocp.Checkpointer(handler).save(tmp_path / "model", state)
    checkpoint = pm.open(tmp_path / "model")
    pm.at(pm.at(checkpoint, "a")[1:3].fill(7), "b").add(1).save(tmp_path / "out", record=True)
    read = ocp.PyTreeCheckpointer().restore(tmp_path / "out")
    assert {leaf.path: leaf.sha256 for leaf in pm.record(tmp_path / "out").leaves} == {
        "a": digest(read["a"]),
        "b": digest(read["b"]),
    }
    assert sorted(pm.verify_record(tmp_path / "out")) == ["a", "b"]


def test_what_is_large_packed_empty_or_shared(tmp_path):
    table, data = {}, b""
    for name, code, shape, raw in (
        ("packed", "F4", [2, 8], bytes(range(8))),
        ("unknown", "X7", [3], b"abcde"),
        ("empty", "F32", [0, 4], b""),
        ("large", "F32", [1 << 20], np.ones(1 << 20, "<f4").tobytes()),
    ):
        table[name] = {"dtype": code, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    head = json.dumps(table).encode()
    (tmp_path / "in.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)
    found = pm.at(pm.at(pm.open(tmp_path / "in.safetensors"), "{large,empty}").zero(), "*").rename("new.*")
    found.save(tmp_path / "out.safetensors", record=True)
    assert {leaf.path: leaf.sha256 for leaf in pm.record(tmp_path / "out.safetensors").leaves} == {
        "new.packed": hashlib.sha256(bytes(range(8))).hexdigest(),
        "new.unknown": hashlib.sha256(b"abcde").hexdigest(),
        "new.empty": hashlib.sha256().hexdigest(),
        "new.large": hashlib.sha256(bytes(4 << 20)).hexdigest(),
    }
    assert len(pm.verify_record(tmp_path / "out.safetensors")) == 4

    shared = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": shared, "tied": shared, "turned": shared.T, "n": 3}, tmp_path / "in.pt")
    for edit in (lambda t: pm.at(t, "a").fill(2), lambda t: pm.at(t, "turned").rename("t"), lambda t: t):
        edit(pm.open(tmp_path / "in.pt")).save(tmp_path / "out.pt", record=True, force=True)
        read = torch.load(tmp_path / "out.pt", weights_only=True)
        for leaf in pm.record(tmp_path / "out.pt").leaves:
            assert leaf.sha256 == digest(read[leaf.path].numpy())
        pm.verify_record(tmp_path / "out.pt")


OPS = st.sampled_from(["zero", "fill", "cast", "noise", "rename", "delete", "slice"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), suffix=st.sampled_from([".safetensors", "/", ".npz", ".pt"]))
def test_whatever_was_done_it_holds(model, tmp_path, data, suffix):
    checkpoint = pm.open(model)
    for _ in range(data.draw(st.integers(1, 4))):
        paths = [checkpoint.index.path(number) for number in checkpoint.index.numbers]
        if len(paths) < 2:
            break
        path, op = data.draw(st.sampled_from(paths)), data.draw(OPS)
        chosen = pm.at(checkpoint, path)
        checkpoint = {
            "zero": chosen.zero,
            "fill": lambda chosen=chosen: chosen.fill(3),
            "cast": lambda chosen=chosen: chosen.cast("float16"),
            "noise": lambda chosen=chosen: chosen.noise(1.0, seed=1),
            "rename": lambda chosen=chosen, path=path: chosen.rename(f"x.{path}"),
            "delete": chosen.delete,
            "slice": lambda chosen=chosen: chosen[1].add(1),
        }[op]()
    out = tmp_path / f"out{suffix}"
    checkpoint.save(f"{tmp_path}/out{suffix}", record=True, force=True)
    touched = {row.path for row in checkpoint.plan.changed}
    found = pm.record(out)
    assert {leaf.path for leaf in found.leaves} == touched == set(pm.verify_record(out))
    assert all(leaf.sha256 == digest(checkpoint[leaf.path]) for leaf in found.leaves)
    if touched:  # and a changed byte is seen
        with contextlib.suppress(pm.errors.Unsupported):
            pm.patch(out, lambda t: pm.at(t, sorted(touched)[0]).add(1))
            with pytest.raises(UnexpectedChange):
                pm.verify_record(out)


# ---- several edits ---------------------------------------------------------------------------------------------


def test_earlier_records_are_kept_and_the_latest_of_each_leaf_counts(model, tmp_path):
    first, second, third = (tmp_path / name for name in ("1.safetensors", "2.npz", "3"))
    pm.at(pm.open(model), "layers[:2]/w").fill(1).save(first, record=True)
    pm.at(pm.at(pm.open(first), "layers[0]/w").fill(2), "layers[1]/w").rename("w").save(second, record=True)
    pm.at(pm.open(second), "layers[0]/w").delete().save(f"{third}/", record=True)
    found = pm.record(third)
    assert [each.source for each in (*found.earlier, found)] == ["model.safetensors", "1.safetensors", "2.npz"]
    assert not any(each.earlier for each in found.earlier)
    assert pm.verify_record(first) == ["layers.0.w", "layers.1.w"]
    assert pm.verify_record(second) == ["layers.0.w", "w"]
    assert pm.verify_record(third) == ["w"]
    assert parse(json.dumps(found.to_dict()).encode(), "x") == found


def test_an_edit_without_a_record_keeps_the_old_one_which_then_tells(model, tmp_path):
    recorded = tmp_path / "recorded.safetensors"
    pm.at(pm.open(model), "**/w").fill(1).save(recorded, record=True)
    for name in ("again.safetensors", "dir/", "again.npz", "again.pt", "again.orbax"):
        pm.open(recorded).save(f"{tmp_path}/{name}")
        assert pm.record(tmp_path / name) == pm.record(recorded)
        assert len(pm.verify_record(tmp_path / name)) == 3
        edit = pm.at(pm.at(pm.open(tmp_path / name), "layers[0]/w").fill(2), "layers[1]/w").cast("float16")
        out = f"{tmp_path}/edited-{name}"
        pm.at(pm.at(edit, "layers[2]/w").delete(), "layers[2]/b").zero().save(out)
        with pytest.raises(UnexpectedChange) as error:
            pm.verify_record(out)
        assert list(error.value.changes) == ["layers.0.w", "layers.1.w", "layers.2.w"]
        assert "float16[4,4]" in str(error.value) and "gone" in error.value.changes["layers.2.w"]
    # shards do not each hold what the directory's own file says
    assert not any(KEY in pm.open(path).metadata for path in (tmp_path / "dir").glob("*.safetensors"))


def test_a_new_file_never_stands_beside_the_record_of_the_old_one(model, tmp_path):
    out = tmp_path / "out.npz"
    pm.at(pm.open(model), "**/w").fill(1).save(out, record=True)
    pm.open(model).save(out, force=True)
    assert pm.record(out) is None and not out.with_name("out.npz.record.json").exists()


def test_a_patch_makes_it_stale_and_undo_true_again(model, folder, tmp_path):
    for source, out in ((model, tmp_path / "out.safetensors"), (folder, tmp_path / "out"), (model, tmp_path / "o.npz")):
        pm.at(pm.open(source), "**/w").fill(1).save(out, record=True)
        pm.patch(out, lambda t: pm.at(t, "layers[0]/{w,b}").fill(9))
        with pytest.raises(
            UnexpectedChange, match=r"1 of 3 recorded leaves is not.*\n.*layers.0.w.*\n.*fill\(9\)"
        ) as e:
            pm.verify_record(out)
        assert list(e.value.changes) == ["layers.0.w"] and e.value.hint == f"paramend undo {out}"
        run(*e.value.hint.split()[1:])
        assert len(pm.verify_record(out)) == 3


def test_a_graft_says_where_leaves_come_from(model, tmp_path):
    save_file({**tree(), "head": np.ones(2, "float32")}, tmp_path / "big.safetensors")
    done, _ = pm.graft(
        pm.open(tmp_path / "big.safetensors"),
        pm.open(model),
        rename={"layers[0]/w": "layers[1]/w", "layers[1]/w": None},
    )
    done.save(tmp_path / "out.safetensors", record=True)
    found = {leaf.path: leaf for leaf in pm.record(tmp_path / "out.safetensors").leaves}
    assert "head" not in found and "layers.0.w" not in found and len(found) == 5
    assert found["layers.1.w"].edit == "from model.safetensors: layers.0.w"
    assert found["layers.2.w"].edit == "from model.safetensors"
    assert len(pm.verify_record(tmp_path / "out.safetensors")) == 5


# ---- recipes ---------------------------------------------------------------------------------------------------


def test_a_recipe_is_in_the_record_and_makes_the_same_again(model, tmp_path):
    np.save(tmp_path / "w.npy", np.full((4, 4), 5, "float32"))
    steps = [{"zero": "layers[-1]/w"}, {"set": {"at": "layers[0]/w", "from": str(tmp_path / "w.npy")}}]
    recipe = pm.Recipe(steps)
    done = recipe.apply(pm.open(model))
    done.save(tmp_path / "out.safetensors", record=True)
    found = pm.record(tmp_path / "out.safetensors")
    assert 'from: "w.npy"' in found.recipe or "from: w.npy" in found.recipe
    (tmp_path / "again.yaml").write_text(found.recipe)
    pm.Recipe.load(tmp_path / "again.yaml").apply(pm.open(model)).save(tmp_path / "again.safetensors")
    assert not pm.diff(tmp_path / "out.safetensors", tmp_path / "again.safetensors")
    # with another edit the recipe is not what was done
    pm.at(done, "layers[1]/w").zero().save(tmp_path / "more.safetensors", record=True)
    assert pm.record(tmp_path / "more.safetensors").recipe == ""
    assert len(pm.record(tmp_path / "more.safetensors").leaves) == 3


@pytest.mark.parametrize(
    "command",
    [
        ["zero", "**/w"],
        ["fill", "**/w", "inf"],
        ["scale", "layers[0]/*", "-0.5"],
        ["noise", "**/w", "0.5", "--seed", "3"],
        ["cast", "**", "bfloat16"],
        ["delete", "**/b"],
        ["rename", "layers/<n>/w", "blocks/<n>/w"],
        ["set", "layers[0]/w", "other.safetensors:layers.1.w"],
    ],
    ids=lambda command: command[0],
)
def test_every_verb_of_the_command_line_records_what_was_typed(model, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    save_file(tree(), "other.safetensors")
    verb, *rest = command
    run(verb, "model.safetensors", *rest, "-o", "out.safetensors", "--record")
    run("verify", "out.safetensors")
    again = pm.Recipe.parse(pm.record("out.safetensors").recipe).apply(pm.open("model.safetensors"))
    again.save("again.safetensors")
    assert not pm.diff("out.safetensors", "again.safetensors")


# ---- the command line ------------------------------------------------------------------------------------------


def test_every_command_that_writes_takes_it():
    names = {row.name: {option.name for option in cli.get_command(None, row.name).params} for row in ROWS}
    assert {name for name, given in names.items() if "record" in given} == {
        name
        for name, given in names.items()
        if "out" in given and name not in ("demo", "extract", "delta")  # whose outcome is no model
    }
    assert "record" in names["apply"] & names["convert"] & names["graft"]


def test_the_commands(model, tmp_path):
    out = tmp_path / "out.safetensors"
    (tmp_path / "fix.yaml").write_text("version: 1\nsteps:\n  - zero: '**/b'\n")
    run("apply", tmp_path / "fix.yaml", model, "-o", out, "--record")
    run("convert", out, tmp_path / "out.npz", "--record")
    run("graft", model, "--into", out, "-o", tmp_path / "graft.safetensors", "--record")
    assert "zero" in run("history", out).stdout and "recipe:" in run("history", out).stdout
    rows = json.loads(run("history", tmp_path / "out.npz", "--json").stdout)
    assert [row["record"]["source"] for row in rows] == ["model.safetensors", "out.safetensors"]
    assert "3 recorded leaves are as written" in run("verify", out).stdout
    assert json.loads(run("verify", tmp_path / "out.npz", "--json").stdout)["holds"] is True
    run("zero", out, "**", "--in-place", "--record", code=2)
    run("fill", out, "layers[0]/b", "2", "--in-place")
    done = run("verify", out, code=1)
    assert "layers.0.b: its bytes differ" in done.stdout and f"hint: paramend undo {out}" in done.stderr
    assert list(json.loads(run("verify", out, "--json", code=1).stdout)["changes"]) == ["layers.0.b"]
    rows = json.loads(run("history", out, "--json").stdout)
    assert ["record" in row for row in rows] == [True, False]
    assert "carries no record" in run("verify", model, code=2).stderr
    run("verify", tmp_path / "nowhere", code=2)
    assert "(see paramend history)" in run("show", out).stdout


# ---- what may go wrong -----------------------------------------------------------------------------------------

GOOD = {"version": 1, "paramend": "0", "time": "2026-01-01T00:00:00+00:00", "source": "x", "leaves": [], "deleted": []}
LEAF = {"path": "layers.0.w", "dtype": "float32", "shape": [4, 4], "sha256": "0" * 64, "edit": "zero()"}
HOSTILE = {
    "no JSON": "{",
    "no object": "[1]",
    "empty": "",
    "deep": "[" * 100_000,
    "twice": '{"version": 1, "version": 1}',
    "missing": json.dumps({"version": 1}),
    "newer": json.dumps(GOOD | {"version": 2}),
    "a number for a name": json.dumps(GOOD | {"source": 1}),
    "time": json.dumps(GOOD | {"time": "yesterday"}),
    "early": json.dumps(GOOD | {"time": "0001-01-01T00:00:00+23:00"}),
    "leaves": json.dumps(GOOD | {"leaves": {}}),
    "leaf": json.dumps(GOOD | {"leaves": [1]}),
    "digest": json.dumps(GOOD | {"leaves": [LEAF | {"sha256": "xyz"}]}),
    "shape": json.dumps(GOOD | {"leaves": [LEAF | {"shape": [-1]}]}),
    "shape of text": json.dumps(GOOD | {"leaves": [LEAF | {"shape": ["4"]}]}),
    "deleted": json.dumps(GOOD | {"deleted": [1]}),
    "earlier": json.dumps(GOOD | {"earlier": [GOOD | {"time": 3}]}),
    "digits": '{"version": ' + "9" * 5000 + "}",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_a_damaged_record_is_said_to_be_one_and_keeps_nothing_from_being_opened(tmp_path, text):
    save_file(tree(), tmp_path / "a.safetensors", metadata={KEY: text})
    pm.save(tree(), tmp_path / "b.npz")
    (tmp_path / "b.npz.record.json").write_text(text)
    for path in (tmp_path / "a.safetensors", tmp_path / "b.npz"):
        with pm.open(path) as checkpoint:
            assert checkpoint["layers.1.w"].sum() == 32
            pm.at(checkpoint, "layers[0]/w").zero().save(tmp_path / "out", force=True)
            with pytest.raises(BadCheckpoint):
                checkpoint.save(tmp_path / "out2", record=True)
            assert not (tmp_path / "out2").exists()
        for function in (pm.record, pm.verify_record):
            with pytest.raises(BadCheckpoint, match="record"):
                function(path)
        run("show", path)
        run("verify", path, code=2)
        pm.patch(path, lambda t: pm.at(t, "layers[0]/w").fill(2))
        assert "fill(2)" in run("history", path, code=2).stdout  # what can be taken back is listed all the same


def test_a_record_that_is_too_long_or_no_file(tmp_path, monkeypatch):
    pm.save(tree(), tmp_path / "b.npz")
    place = tmp_path / "b.npz.record.json"
    with place.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BadCheckpoint, match="too many"):
        pm.record(tmp_path / "b.npz")
    report = pm.open(tmp_path / "b.npz").save(tmp_path / "c.safetensors")
    assert "record of edits" in report.left_out[-1] and pm.record(tmp_path / "c.safetensors") is None
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(BadCheckpoint):
        pm.verify_record(tmp_path / "b.npz")
    with pytest.raises(CannotRead):
        pm.verify_record(tmp_path / "nothing")


def test_a_folder_of_one_file_without_a_suffix_is_found_again(tmp_path):
    (tmp_path / "model").mkdir()
    save_file(tree(), tmp_path / "model" / "weights")
    pm.at(pm.open(tmp_path / "model"), "**/w").zero().save(tmp_path / "out", record=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"weights", FILE}
    assert len(pm.verify_record(tmp_path / "out")) == 3


def test_what_a_record_says_does_not_reach_the_terminal_raw(tmp_path):
    said = GOOD | {"source": "\x1b[2J", "leaves": [LEAF | {"path": "\x1b]0;"}]}
    save_file(tree(), tmp_path / "a.safetensors", metadata={KEY: json.dumps(said)})
    assert "\x1b" not in run("history", tmp_path / "a.safetensors").output
    assert "\x1b" not in run("verify", tmp_path / "a.safetensors", code=1).output


def test_leaves_of_another_file_are_named(model, tmp_path):
    claims = GOOD | {"leaves": [LEAF, LEAF | {"path": "gone"}, LEAF | {"path": "layers.1.w", "shape": [2, 8]}]}
    save_file(tree(), tmp_path / "a.safetensors", metadata={KEY: json.dumps(claims)})
    with pytest.raises(UnexpectedChange) as error:
        pm.verify_record(tmp_path / "a.safetensors")
    assert set(error.value.changes) == {"layers.0.w", "gone", "layers.1.w"} and not error.value.hint


def test_a_save_that_fails_leaves_nothing(model, tmp_path):
    def fail(x):
        raise ZeroDivisionError

    for name in ("out.safetensors", "out.npz", "out/"):
        with pytest.raises(ZeroDivisionError):
            pm.at(pm.open(model), "**/w").apply(fail).save(f"{tmp_path}/{name}", record=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


KILLED = """
import sys, paramend as pm
source, out = sys.argv[1:]
print(flush=True)
while True:
    pm.at(pm.open(source), "**").add(1).save(out, record=True, force=True)
"""


@pytest.mark.parametrize("name", ["out.safetensors", "out", "out.npz"])
def test_a_kill_leaves_the_old_or_the_new(tmp_path, name):
    source, out, draw = tmp_path / "in.safetensors", tmp_path / name, random.Random(name)
    save_file({f"layers.{i}.w": np.full((256, 256), i, "float32") for i in range(6)}, source)
    for _ in range(4):
        command = [sys.executable, "-c", KILLED, str(source), str(out) + ("/" if name == "out" else "")]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            child.stdout.readline()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.3 + draw.random() / 4)
            child.send_signal(signal.SIGKILL)
        if out.exists() and (name != "out.npz" or pm.record(out) is not None):
            assert len(pm.verify_record(out)) == 6
            assert (pm.open(out)["layers.5.w"] == 6).all()


# ---- real models -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_transformers_loads_what_carries_a_record(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    sizes = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    config = transformers.LlamaConfig(**sizes, intermediate_size=24, num_key_value_heads=1)
    with contextlib.redirect_stderr(io.StringIO()):
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model", max_shard_size="10KB")
        edit = pm.at(pm.open(tmp_path / "model"), "**/layers[-1]/mlp/down_proj/weight").zero()
        edit.save(tmp_path / "shards", record=True)
        edit.save(tmp_path / "file.safetensors", record=True)
        (tmp_path / "one").mkdir()
        (tmp_path / "one" / "config.json").write_bytes((tmp_path / "model" / "config.json").read_bytes())
        (tmp_path / "file.safetensors").rename(tmp_path / "one" / "model.safetensors")
        run("deepen", tmp_path / "shards", "--blocks", "1", "-o", tmp_path / "deep", "--record")
        assert transformers.LlamaForCausalLM.from_pretrained(tmp_path / "deep").config.num_hidden_layers == 3
        run("verify", tmp_path / "deep")
        for path in (tmp_path / "shards", tmp_path / "one"):
            loaded = transformers.LlamaForCausalLM.from_pretrained(path)
            weight = loaded.model.layers[-1].mlp.down_proj.weight.detach()
            assert not weight.any() and loaded.model.layers[0].mlp.down_proj.weight.any()
            (leaf,) = pm.record(path).leaves
            assert leaf.sha256 == digest(weight.numpy()) and pm.verify_record(path) == [leaf.path]
