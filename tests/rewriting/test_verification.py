"""A leaf made of several is made again from its sources: what differs is named, what is missing is said."""

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import paramend as pm
from paramend.cli.main import cli
from paramend.errors import BadCheckpoint, CannotRead, UnexpectedChange


def tree():
    rng = np.random.default_rng(3)
    shapes = {"q": (4, 6), "k": (2, 6), "gate": (3, 6), "up": (3, 6)}
    return {f"h.{i}.{name}": rng.standard_normal(shape) for i in range(5) for name, shape in shapes.items()}


FUSED = pm.Layout(
    [
        {
            "from": ["h.<n>.gate", "h.<n>.up"],
            "to": "h.gate_up",
            "do": [{"stack": {"axis": 0}}, {"interleave": {"axis": 1}}, {"transpose": [0, 2, 1]}],
        }
    ],
    rest="keep",
)
SPLIT = [f"h.<n>.{name}" for name in ("q0", "q1")]
# What is made, a leaf of it, and its expression.
VERBS = {
    "concat": (
        lambda t: pm.concat(t, ["h.<n>.q", "h.<n>.k"], into="h.<n>.qk"),
        "h.1.qk",
        "concat(h.1.q, h.1.k, axis=0)",
    ),
    "interleave": (
        lambda t: pm.interleave(t, ["h.0.up", "h.1.up"], into="ups"),
        "ups",
        "interleave(h.0.up, h.1.up, axis=0)",
    ),
    "split": (lambda t: pm.split(t, "h.<n>.q", into=SPLIT, axis=1), "h.2.q1", "h.2.q[:, 3:6]"),
    "stack": (lambda t: pm.stack_layers(t, "h[*]"), "h.up", "stack(h.{0..4}.up, axis=0)"),
    "transpose": (lambda t: pm.at(t, "h[3]/q").transpose((1, 0)), "h.3.q", "transpose(h.3.q, [1, 0])"),
    "reshape": (lambda t: pm.at(t, "h[3]/q").reshape((3, 8)), "h.3.q", "reshape(h.3.q, [3, 8])"),
    "take": (lambda t: pm.at(t, "h[3]/q").take([3, 0, 2], axis=0), "h.3.q", "h.3.q[[3, 0, 2]]"),
    "layout": (
        lambda t: FUSED.to(t)[0],
        "h.gate_up",
        "transpose(interleave(stack(h.{0..4}.gate, axis=0), stack(h.{0..4}.up, axis=0), axis=1), [0, 2, 1])",
    ),
    "two": (
        lambda t: pm.at(VERBS["concat"][0](t), "h[1]/qk").take(slice(5, 1, -1)),
        "h.1.qk",
        "concat(h.1.q, h.1.k, axis=0)[5:1:-1]",
    ),
}


def recorded(path):
    return {leaf.path.replace("/", "."): leaf for leaf in pm.record(path).leaves}


def run(*command, code=0):
    result = CliRunner().invoke(cli, list(map(str, command)))
    assert result.exit_code == code, result.output
    return result


def flip(path, start=-1):
    data = bytearray(path.read_bytes())
    data[start] ^= 1
    path.write_bytes(data)


@pytest.fixture
def model(tmp_path):
    save_file(tree(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("verb", VERBS)
def test_the_record_says_what_a_leaf_is_made_of_and_it_is_made_again(model, tmp_path, verb):
    make, name, text = VERBS[verb]
    out = tmp_path / "out.safetensors"
    with pm.open(model) as opened:
        made = make(opened)
        made.save(out, record=True)
    assert recorded(out)[name].origin == text
    assert name in pm.verify_record(out, sources=[model])
    done = json.loads(run("verify", out, "--json").stdout)
    assert done["holds"] and name in done["remade"] and not done["lacking"]
    said = run("history", out).stdout
    assert text[:60] in said or verb in ("transpose", "reshape", "take", "two")

    # one byte of the source: every leaf that holds it is named, and no other
    before, arrays = load_file(out), load_file(model)
    arrays[re.search(r"h\.[\w.{}]+", text)[0].replace("{0..4}", "3")].reshape(-1).view(np.uint8)[-1] ^= 1
    save_file(arrays, model)
    after = make(arrays)
    wrong = {path for path in recorded(out) if (np.asarray(after[path]) != before[path]).any()}
    assert name in wrong
    with pytest.raises(UnexpectedChange) as error:
        pm.verify_record(out)
    assert set(error.value.changes) == wrong
    assert "what it is made of has changed since" in run("verify", out, code=1).stdout


def test_a_flipped_byte_of_the_output_names_the_leaf(model, tmp_path):
    out = tmp_path / "out.safetensors"
    with pm.open(model) as opened:
        VERBS["layout"][0](opened).save(out, record=True)
    flip(out, 8 + int.from_bytes(out.read_bytes()[:8], "little"))  # the first leaf of the file
    done = run("verify", out, code=1)
    assert "h.gate_up: its bytes differ" in done.stdout
    with pytest.raises(UnexpectedChange) as error:
        pm.verify_record(out)
    assert len(error.value.changes) == 1


def test_a_source_that_is_missing_is_said(model, tmp_path):
    out = tmp_path / "out.safetensors"
    with pm.open(model) as opened:
        VERBS["concat"][0](opened).save(out, record=True)
    elsewhere = tmp_path / "elsewhere" / "old.safetensors"
    elsewhere.parent.mkdir()
    model.rename(elsewhere)
    assert len(pm.verify_record(out)) == 5
    done = run("verify", out)
    assert "5 recorded leaves are as written" in done.stdout
    assert "not made again: model.safetensors, which 5 leaves are made of, is not there" in done.stdout
    assert list(json.loads(run("verify", out, "--json").stdout)["lacking"]) == ["model.safetensors"]
    with pytest.raises(CannotRead, match=r"model\.safetensors, which 5 leaves are made of"):
        pm.verify_record(out, sources=())
    named = {"model.safetensors": elsewhere}
    assert len(pm.verify_record(out, sources=named)) == 5
    assert (
        "5 leaves are what their sources give"
        in run("verify", out, "--source", f"model.safetensors={elsewhere}").stdout
    )
    with pytest.raises(CannotRead, match="which 5 leaves are made of"):
        pm.verify_record(out, sources=[elsewhere])
    run("verify", out, "--source", elsewhere, code=2)
    flip(elsewhere)
    with pytest.raises(UnexpectedChange):
        pm.at(pm.open(elsewhere), "**").zero().save(elsewhere.with_name("zero.safetensors"))
        pm.verify_record(out, sources={"model.safetensors": elsewhere.with_name("zero.safetensors")})
    # a file that has the name of the source by chance is none
    save_file({"other": np.ones(3)}, model)
    assert "not made again" in run("verify", out).stdout
    with pytest.raises(CannotRead, match="or is another model"):
        pm.verify_record(out, sources=[model])


def test_leaves_of_another_file_stand_after_its_name(model, tmp_path):
    heads = [tmp_path / place / "my head.safetensors" for place in ("a", "b")]
    for number, head in enumerate(heads):
        head.parent.mkdir()
        save_file({"mtp.w": np.full(3, number, "float32"), "x y": np.ones(2)}, head)
    with pm.open(model) as opened, pm.open(heads[0]) as first, pm.open(heads[1]) as second:
        both = pm.insert(opened, first, "mtp.**")[0]
        both = pm.insert(both, second, "**", rename={"mtp.w": "other.w"})[0]
        pm.concat(both, ["mtp.w", "other.w"], into="both").save(tmp_path / "out.safetensors", record=True)
    found = recorded(tmp_path / "out.safetensors")
    text = 'concat("my head.safetensors":mtp.w, "my head.safetensors#2":mtp.w, axis=0)'
    assert found["both"].origin == text and found["x y"].origin == '"my head.safetensors#2":"x y"'
    given = {"my head.safetensors": heads[0], "my head.safetensors#2": heads[1]}
    assert len(pm.verify_record(tmp_path / "out.safetensors", sources=given)) == 2
    with pytest.raises(UnexpectedChange) as error:
        pm.verify_record(tmp_path / "out.safetensors", sources=dict(zip(given, heads[::-1], strict=True)))
    assert list(error.value.changes) == ["both"]


@pytest.mark.parametrize("source", ["m/", "m.pt", "m.npz", "m.msgpack", "m.orbax"])
@pytest.mark.parametrize("out", ["o/", "o.npz", "o.orbax"])
def test_every_format_on_both_sides(tmp_path, source, out):
    pm.save(tree(), f"{tmp_path}/{source}", **({"max_shard_size": "300B"} if source == "m/" else {}))
    with pm.open(f"{tmp_path}/{source}") as opened:
        joined = pm.concat(opened, ["h.<n>.q", "h.<n>.k"], into="h.<n>.qk")
        pm.at(joined, "h[0]/qk").transpose((1, 0)).save(f"{tmp_path}/{out}", record=True)
    done = json.loads(run("verify", tmp_path / out.rstrip("/"), "--json").stdout)
    assert len(done["remade"]) == 5 and not done["lacking"]


def test_what_is_computed_is_checked_by_its_digest_alone(model, tmp_path):
    out = tmp_path / "out.safetensors"
    with pm.open(model) as opened:
        joined = pm.concat(pm.at(opened, "h[0]/q").multiply(2), ["h.<n>.q", "h.<n>.k"], into="h.<n>.qk")
        pm.at(joined, "h[1]/qk").cast("float32").save(out, record=True)
    found = recorded(out)
    assert [bool(found[f"h.{i}.qk"].origin) for i in range(3)] == [False, False, True]
    assert found["h.0.qk"].edit == "concat(h.0.q.multiply(2), h.0.k, axis=0)"
    assert found["h.1.qk"].edit == "concat(h.1.q, h.1.k, axis=0), cast('float32')"
    assert len(pm.verify_record(out, sources=[model])) == 5


def test_a_later_record_reads_the_sources_of_the_earlier_one(model, tmp_path):
    with pm.open(model) as opened:
        VERBS["concat"][0](opened).save(tmp_path / "b.safetensors", record=True)
    with pm.open(tmp_path / "b.safetensors") as opened:
        pm.at(opened, "h[0]/qk").transpose((1, 0)).save(tmp_path / "c.safetensors", record=True)
    done = json.loads(run("verify", tmp_path / "c.safetensors", "--json").stdout)
    assert sorted(done["remade"]) == [f"h.{i}.qk" for i in range(5)]
    (tmp_path / "b.safetensors").unlink()
    done = json.loads(run("verify", tmp_path / "c.safetensors", "--json").stdout)
    assert done["lacking"] == {"b.safetensors": ["h.0.qk"]} and len(done["remade"]) == 4


def test_the_output_is_not_its_own_source(model, tmp_path):
    out = tmp_path / "out" / model.name
    out.parent.mkdir()
    with pm.open(model) as opened:
        VERBS["concat"][0](opened).save(out, record=True)
    assert list(json.loads(run("verify", out, "--json").stdout)["lacking"]) == ["model.safetensors"]


@pytest.mark.parametrize("text", ["concat(", "h.0.q(", "h.0.q[0:99]", "../x:h.0.q", "..:h.0.q", f"{'x' * 999}:w"])
def test_an_expression_that_is_none_is_damage_and_a_name_never_leaves_the_folder(model, tmp_path, text):
    leaf = {"path": "h.0.q", "dtype": "float64", "shape": [4, 6], "edit": "", "origin": text}
    with pm.open(model) as opened:
        pm.at(opened, "h[0]/q").multiply(1).save(tmp_path / "o.npz", record=True)
    place = tmp_path / "o.npz.record.json"
    data = json.loads(place.read_text())
    data["leaves"] = [leaf | {"sha256": data["leaves"][0]["sha256"]}]
    place.write_text(json.dumps(data))
    if "(" not in text:
        assert json.loads(run("verify", tmp_path / "o.npz", "--json").stdout)["lacking"]
    else:
        with pytest.raises(BadCheckpoint, match=r"record, the origin of h\.0\.q"):
            pm.verify_record(tmp_path / "o.npz")


def test_packed_codes_and_half_bytes_are_made_again(tmp_path):
    header = (
        b'{"a":{"dtype":"F4","shape":[2,4],"data_offsets":[0,4]},"b":{"dtype":"F4","shape":[2,4],"data_offsets":[4,8]}}'
    )
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(range(8)))
    with pm.open(tmp_path / "m.safetensors", raw=True) as opened:
        pm.concat(opened, ["b", "a"], into="c").save(tmp_path / "o.safetensors", record=True)
    assert pm.verify_record(tmp_path / "o.safetensors", sources=[tmp_path / "m.safetensors"]) == ["c"]


def test_the_record_of_a_mixture_of_experts_is_small(tmp_path):
    layers, experts = 2, 100
    names = [
        f"model.layers.{n}.mlp.experts.{e}.{x}_proj.weight"
        for n in range(layers)
        for e in range(experts)
        for x in ("gate", "up", "down")
    ]
    save_file({name: np.zeros((2, 2), "float16") for name in names}, tmp_path / "m.safetensors")
    layout = pm.Layout(pm.layout("qwen3_moe_4_to_5").to_data()["rules"], rest="keep")
    with pm.open(tmp_path / "m.safetensors") as opened:
        layout.to(opened)[0].save(tmp_path / "fused.npz", record=True)
    text = (tmp_path / "fused.npz.record.json").read_text()
    assert len(text) < 2 * layers * 600 + 400 and len(names) == 600
    assert len(pm.verify_record(tmp_path / "fused.npz", sources=[tmp_path / "m.safetensors"])) == 2 * layers
