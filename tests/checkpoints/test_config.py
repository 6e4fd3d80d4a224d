"""Edits of a configuration: the characters of what stays stay, a dry run shows them, a patch can be undone."""

import json
import random
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import paramend as pm
from paramend.cli.main import cli
from paramend.formats.jsontext import rewritten
from paramend.journal.exchange import NewFiles
from paramend.journal.records import PENDING
from paramend.journal.writer import Writer

# What json.dumps would not write so.
TEXT = (
    '{\n  "b": 1e-05,\t "é": "é \\u00e9",\n\n  "text_config": {"layers": 2, "eps": 1E-6,\n    "list": [1,  2,\n3]},\n'
    '  "z.w": {"k.x": 0},\n  "big": 1.0000000000000000001 , "none" :null\n }\n\n'
)


@pytest.fixture
def model(tmp_path):
    """A model in two shards beside a configuration."""
    folder = tmp_path / "hf"
    folder.mkdir()
    for n in (1, 2):
        save_file({f"layers.{n - 1}.w": np.full((2, 3), n, "f4")}, folder / f"model-{n:05}-of-00002.safetensors")
    table = {f"layers.{n - 1}.w": f"model-{n:05}-of-00002.safetensors" for n in (1, 2)}
    index = {"metadata": {"total_size": 48}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_bytes(TEXT.encode())
    return folder


def files(folder):
    found = sorted(file for file in folder.rglob("*") if file.is_file() and ".undo" not in file.parts)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}


def run(*words):
    done = CliRunner().invoke(cli, list(map(str, words)))
    return done.exit_code, done.output


# ---- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "old_text", "new_text"),
    [
        ({"text_config.layers": 4}, '"layers": 2', '"layers": 4'),
        ({"z.w.k.x": [1, "é"]}, '"k.x": 0', '"k.x": [\n    1,\n    "é"\n  ]'),
        ({"text_config.list": [1, 5, 3]}, "[1,  2,\n3]", "[1,  5,\n3]"),
        ({"é": "ü"}, '"é \\u00e9"', '"ü"'),
        ({"new": 0.5}, '"none" :null\n', '"none" :null,\t "new": 0.5\n'),
        ({"b": 1e-05, "none": None}, "", ""),
    ],
)
def test_only_the_characters_of_what_changes_change(model, new, old_text, new_text):
    made = pm.config(pm.open(model)).set(new)
    assert TEXT.count(old_text) == 1 or not old_text
    assert made.texts[0].text.decode() == TEXT.replace(old_text, new_text)


@pytest.mark.parametrize("indent", [None, 2, "\t"])
def test_a_text_that_json_wrote_is_as_json_would_write_it_changed(indent):
    chance = random.Random(0)

    def value(depth):
        kind = chance.randrange(8 if depth < 3 else 5)
        if kind < 5:
            return [None, True, 3, 2.5e-7, 'a"},:é'][kind]
        inner = [value(depth + 1) for _ in range(chance.randrange(1, 4))]
        return inner if kind == 5 else {f"k{n}": each for n, each in enumerate(inner)}

    for _ in range(300):
        old = {f"k{n}": value(0) for n in range(chance.randrange(2, 5))}
        new = {key: value(0) if chance.random() < 0.5 else each for key, each in old.items() if chance.random() < 0.8}
        new |= {"new": value(1)} if chance.random() < 0.5 and new else {}
        text = rewritten(json.dumps(old, indent=indent, ensure_ascii=False), new)
        assert json.loads(text) == new and list(json.loads(text)) == list(new)
        if new and not (isinstance(indent, int) and ("[]" in text or "{}" in text)):
            assert text == json.dumps(new, indent=indent, ensure_ascii=False)


def test_deleted_keys_take_their_comma_along():
    text = '{"a": 1,\n "b": 2,\n "c": 3}'
    assert rewritten(text, {"b": 2, "c": 3}) == '{"b": 2,\n "c": 3}'
    assert rewritten(text, {"a": 1, "c": 3}) == '{"a": 1,\n "c": 3}'
    assert rewritten(text, {"a": 1}) == '{"a": 1}'
    assert rewritten(text, {}) == "{}"
    assert rewritten("{}", {"a": {"b": 1}}) == '{"a": {"b": 1}}'
    assert rewritten('\ufeff{\r\n  "a": {}\r\n}\r\n', {"a": {"b": 1}}) == (
        '\ufeff{\r\n  "a": {\r\n    "b": 1\r\n  }\r\n}\r\n'
    )


# ---- reading and writing -------------------------------------------------------------------------------------------


def test_it_is_read_like_a_dict(model):
    found = pm.config(pm.open(model))
    assert (found["text_config.layers"], found["z.w.k.x"], found["b"]) == (2, 0, 1e-5)
    assert (found.get("no"), found.get("text_config.no", 3), "b" in found, "text_config.no" in found) == (
        None,
        3,
        True,
        False,
    )
    assert list(found) == list(json.loads(TEXT)) and dict(found) == json.loads(TEXT)
    with pytest.raises(pm.errors.NoMatch, match=r'did you mean "text_config\.layers"') as error:
        found["layers"]
    assert error.value.near == ("text_config.layers",)


def test_a_save_writes_it_and_links_the_shards(model, tmp_path):
    before = files(model)
    with pm.open(model) as source:
        made = pm.config(pm.config(source).set({"text_config.layers": 4})).delete(["b", "text_config.list"])
        assert "text_config.layers: 2 -> 4" in str(made.plan) and "b: 1e-05 is deleted" in str(made.plan)
        report = made.save(tmp_path / "out", link=True, record=True)
    assert files(model) == before
    after = files(tmp_path / "out")
    config = json.loads(TEXT) | {"text_config": {"layers": 4, "eps": 1e-6}}
    del config["b"]
    assert json.loads(after.pop("config.json")) == config
    record = pm.record(tmp_path / "out")
    assert [str(change) for change in record.config] == [
        "b: 1e-05 is deleted",
        "text_config.layers: 2 -> 4",
        "text_config.list: [1, 2, 3] is deleted",
    ]
    assert "text_config.layers: 2 -> 4" in str(record)
    assert {name: after[name] for name in before if name != "config.json"} == {
        name: text for name, text in before.items() if name != "config.json"
    }
    assert report.bytes_linked == sum(len(text) for name, text in before.items() if name.endswith("safetensors"))


def test_edits_of_leaves_and_structure_keep_it(model, tmp_path):
    with pm.open(model) as source:
        made = pm.config(source).set({"text_config.layers": 1})
        made = pm.concat(made, ["layers.0.w", "layers.1.w"], into="w", axis=0)
        assert pm.config(made)["text_config.layers"] == 1
        pm.config(pm.at(made, "w").zero()).set({"b": 0}).save(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == TEXT.replace('"layers": 2', '"layers": 1').replace(
        "1e-05", "0"
    )
    assert not pm.load(tmp_path / "out")["w"].any()


@pytest.mark.parametrize(
    ("edit", "error", "says"),
    [
        (lambda c: c.delete("layer"), LookupError, "text_config.layers"),
        (lambda c: c.delete(["b", "b"]), LookupError, "has no 'b'"),
        (lambda c: c.set({"text_confg.layers": 1}), LookupError, "has no 'text_confg.layers'"),
        (lambda c: c.set({"b": float("nan")}), ValueError, "is not a value of JSON"),
        (lambda c: c.set({"b": np.ones(2)}), ValueError, "is not a value of JSON"),
        (lambda c: c.set({"b\ud800": 1}), ValueError, "is not a value of JSON"),
    ],
)
def test_what_cannot_be_is_said(model, edit, error, says):
    with pytest.raises(error, match=says):
        edit(pm.config(pm.open(model)))


def test_an_empty_one_gets_its_first_key(model):
    (model / "config.json").write_text("{}\n")
    report = pm.patch(model, lambda tree: pm.config(tree).set({"a": [1]}))
    assert "a: [1] (new)" in str(report) and (model / "config.json").read_text() == '{"a": [1]}\n'
    assert pm.undo(model).left == 0 and (model / "config.json").read_text() == "{}\n"


def test_where_there_is_none_or_it_is_another_file(model, tmp_path):
    one = pm.open(model / "model-00001-of-00002.safetensors")
    assert pm.config(one)["b"] == 1e-5
    with pytest.raises(pm.errors.Unsupported, match="is no part of") as error:
        pm.config(one).set({"b": 1})
    assert str(model) in error.value.hint
    with pytest.raises(pm.errors.Unsupported, match="weights alone"):
        pm.config(pm.open(model)).set({"b": 1}).save(tmp_path / "one.safetensors")
    (model / "config.json").unlink()
    with pytest.raises(pm.errors.CannotRead, match=r"no config\.json"):
        pm.config(pm.open(model))
    with pytest.raises(pm.errors.BadArgument):
        pm.config({"w": np.ones(1)})
    assert not (tmp_path / "one.safetensors").exists()


def test_a_dtype_that_is_asked_for_does_not_follow_the_weights(model, tmp_path):
    (model / "config.json").write_text('{"dtype": "float32"}')
    recipe = pm.Recipe([{"cast": {"at": "**", "dtype": "bf16"}}, {"config": {"set": {"dtype": "float16"}}}])
    recipe.apply(pm.open(model)).save(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == '{"dtype": "float16"}'


# ---- in place ------------------------------------------------------------------------------------------------------

STEPS = [{"zero": "layers.0.w"}, {"config": {"set": {"text_config.layers": 1}, "delete": ["b"]}}]


@pytest.mark.parametrize("steps", [STEPS, STEPS[1:]], ids=["with leaves", "alone"])
def test_a_patch_is_undone(model, steps):
    before = files(model)
    recipe = pm.Recipe(steps)
    report = pm.patch(model, recipe.apply, dry_run=True)
    assert "text_config.layers: 2 -> 1" in str(report) and files(model) == before
    report = pm.patch(model, recipe.apply)
    after = files(model)
    config = json.loads(after["config.json"])
    assert (config["text_config"]["layers"], "b" in config) == (1, False)
    assert load_file(model / "model-00001-of-00002.safetensors")["layers.0.w"].any() == (len(steps) == 1)
    assert report.bytes_written == len(after["config.json"]) + (24 if len(steps) == 2 else 0)
    (row,) = pm.history(model)
    assert "text_config.layers: 2 -> 1 at config.json" in row.edit
    assert row.files[-1] == "config.json"
    pm.patch(model, lambda tree: pm.at(tree, "layers.1.w").zero())
    pm.undo(model)
    assert files(model) == after
    assert pm.undo(model).left == 0
    assert files(model) == before and not (model / ".undo").exists()


@pytest.mark.parametrize("place", ["config.json", "model-00001-of-00002.safetensors"])
def test_an_undo_over_other_changes_is_refused(model, place):
    pm.patch(model, pm.Recipe(STEPS).apply)
    data = bytearray((model / place).read_bytes())
    data[-10] ^= 1
    (model / place).write_bytes(data)
    now = files(model)
    with pytest.raises(pm.errors.CannotWrite, match="changed since"):
        pm.undo(model)
    assert files(model) == now
    pm.undo(model, force=True)
    assert files(model)["config.json"] == TEXT.encode()


@pytest.mark.parametrize("steps", [STEPS, STEPS[1:]], ids=["with leaves", "alone"])
@pytest.mark.parametrize("how", ["error", "kill"])
def test_a_patch_that_is_cut_short_leaves_the_old_state_or_the_new_one(model, steps, how, monkeypatch):
    """Stopped after each step that makes something durable; a kill leaves what is there to the next program."""
    before = files(model)
    moments = 0

    class Stop(BaseException):
        pass

    for stop in range(12):
        count = [0]

        def once(function, count=count, stop=stop):
            def wrapped(*args, **options):
                if count[0] == stop:
                    count[0] += 1
                    raise Stop
                found = function(*args, **options)
                count[0] += 1
                return found

            return wrapped

        with monkeypatch.context() as patch:
            patch.setattr(Writer, "frame", once(Writer.frame))
            patch.setattr(Writer, "become", once(Writer.become))
            patch.setattr("paramend.journal.exchange.NewFiles._replace", once(NewFiles._replace))
            if how == "kill":
                patch.setattr("paramend.journal.store.UndoStore.take_back", lambda *args: None)
                patch.setattr("paramend.journal.store.UndoStore.close", lambda *args: None)
            try:
                pm.patch(model, pm.Recipe(steps).apply)
                done = True
            except Stop:
                done = False
        pending = list((model / ".undo").glob(f"*.{PENDING}")) if (model / ".undo").exists() else []
        pm.open(model).close()
        if done:
            break
        assert files(model) == before, (stop, pending)
        moments += bool(pending)
        shutil.rmtree(model / ".undo", ignore_errors=True)
    assert done and stop > 5
    assert moments >= (2 if how == "kill" else 0)
    pm.undo(model)
    assert files(model) == before


def test_links_and_planted_records_are_refused(model, tmp_path):
    (model / "config.json").rename(tmp_path / "blob")
    (model / "config.json").symlink_to(tmp_path / "blob")
    with pytest.raises(pm.errors.CannotWrite, match="symbolic link"):
        pm.patch(model, pm.Recipe(STEPS).apply, dry_run=True)
    with pytest.raises(pm.errors.CannotWrite, match="symbolic link"):
        pm.patch(model, pm.Recipe(STEPS).apply)
    assert (tmp_path / "blob").read_text() == TEXT and pm.open(model)["layers.0.w"].all()


# ---- recipes and commands ------------------------------------------------------------------------------------------


def test_problems_of_a_step_have_addresses(model):
    recipe = pm.Recipe([{"config": {"set": {"no.x": 1, "new": 2}, "delete": ["b", "c"]}}])
    with pytest.raises(pm.errors.BadRecipe) as error:
        recipe.apply(pm.open(model))
    assert [problem.address for problem in error.value.problems] == ['$.steps[0].set["no.x"]', "$.steps[0].delete[1]"]
    for tree in ({"w": np.ones(1)}, pm.open(model / "model-00001-of-00002.safetensors")):
        with pytest.raises(pm.errors.BadRecipe, match=r"configuration|is no part of"):
            pm.Recipe([{"config": {"set": {"b": 2}}}]).apply(tree)
    with pytest.raises(pm.errors.BadRecipe, match="configuration"):
        pm.Recipe([{"config": {"set": {"b": 2}}}]).apply_({"w": np.ones(1)})
    for body in ({}, {"set": {}}, {"set": [1]}, {"delete": [1]}, {"sett": {"a": 1}}, {"set": {"a": float("inf")}}):
        with pytest.raises(pm.errors.BadRecipe):
            pm.Recipe([{"config": body}])


def test_as_commands(model, tmp_path):
    assert run("config", model) == (0, TEXT.rstrip("\n") + "\n")
    assert run("config", model, "text_config.layers") == (0, "2\n")
    status, said = run("config", model, "layers")
    assert status == 2 and "text_config.layers" in said
    words = ["--set", "text_config.layers=4", "--set", "name=x y", "--delete", "b"]
    status, said = run("config", model, *words, "--dry-run")
    assert status == 0 and "text_config.layers: 2 -> 4" in said and 'name: "x y" (new)' in said
    assert run("config", model, *words, "-o", tmp_path / "out", "--record")[0] == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["name"] == "x y"
    assert "config: {set: {text_config.layers: 4" in pm.record(tmp_path / "out").recipe.replace('"', "")
    before = files(model)
    assert run("config", model, *words, "--in-place")[0] == 0
    assert files(model)["config.json"] == (tmp_path / "out" / "config.json").read_bytes()
    assert run("undo", model)[0] == 0 and files(model) == before
    (tmp_path / "fix.yaml").write_text(f"version: 1\nsteps: {json.dumps(STEPS)}\n")
    assert run("apply", tmp_path / "fix.yaml", model, "--in-place")[0] == 0
    status, said = run("apply", tmp_path / "fix.yaml", model, "-o", tmp_path / "two")
    assert status == 2 and "$.steps[1].delete[0]" in said
    assert run("config", model, "b", "--set", "b=1", "-o", tmp_path / "no")[0] == 2
