"""GGUF files, edited: in codes and scales, by keys, in place, in several files, with layers and experts moved."""

import json

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Type, GGUFValueType as Kind, quants

import paramend as pm
from paramend.cli.main import cli
from paramend.errors import BadArgument, BadCheckpoint, NoMatch, Quantized, RenameClash, SpecMismatch, Unsupported
from support.gguf_files import model, read, values

LONG = "a name that is much longer than the one that was there " * 2


@pytest.fixture
def path(tmp_path):
    (tmp_path / "in").mkdir()
    return model(tmp_path / "in" / "m.gguf")


def run(*args):
    done = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert not done.exit_code, done.output
    return done


def floats(path):
    return {name: values(*each) for name, each in read(path)[0].items()}


def edited(path, out, edit):
    """What is in a file after an edit, by the package: name → (type, bytes)."""
    with pm.open(path) as checkpoint:
        edit(checkpoint).save(out)
    return read(out)[0]


# ---- codes and scales --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ffn_up", "ffn_down", "attn_q", "attn_k", "ffn_gate"])
def test_zero_and_factors_are_exact_in_every_code(path, tmp_path, name):
    leaf, before = f"blk.0.{name}.weight", floats(path)
    after = edited(path, tmp_path / "zero.gguf", lambda tree: pm.at(tree, leaf).zero())
    assert after[leaf][0] == read(path)[0][leaf][0] and not values(*after[leaf]).view(np.uint32).any()
    for factor in (0.5, -4.0):
        after = edited(path, tmp_path / f"{factor}.gguf", lambda tree, by=factor: pm.at(tree, leaf).multiply(by))
        assert np.array_equal(values(*after[leaf]), before[leaf] * np.float32(factor))
        assert all(np.array_equal(after[other][1], each[1]) for other, each in read(path)[0].items() if other != leaf)


def test_other_factors_round_each_scale_once(path, tmp_path):
    leaf, before = "blk.0.ffn_down.weight", floats(path)["blk.0.ffn_down.weight"]
    after = edited(path, tmp_path / "o.gguf", lambda tree: pm.at(tree, leaf).multiply(0.3))[leaf]
    assert np.allclose(values(*after), before * 0.3, rtol=2**-10)


@pytest.mark.parametrize(("name", "kind"), [("attn_q", Type.Q8_0), ("attn_k", Type.Q4_0)])
def test_new_values_are_encoded_as_the_package_encodes_them(path, tmp_path, name, kind):
    leaf = f"blk.1.{name}.weight"
    new = np.random.default_rng(5).standard_normal((4, 256)).astype(np.float32)
    after = edited(path, tmp_path / "set.gguf", lambda tree: pm.at(tree, leaf).set(new))
    assert np.array_equal(after[leaf][1], quants.quantize(new, kind))
    wanted = floats(path)[leaf] + np.float32(0.25)
    after = edited(path, tmp_path / "add.gguf", lambda tree: pm.at(tree, leaf).add(0.25))
    assert np.array_equal(after[leaf][1], quants.quantize(wanted, kind))


def test_blocks_whose_values_stay_keep_their_bytes(path, tmp_path):
    leaf = "blk.0.attn_q.weight"
    before = read(path)[0][leaf][1]
    after = edited(path, tmp_path / "o.gguf", lambda tree: pm.at(tree, leaf)[1, 40:50].add(1))[leaf][1]
    same = (after.reshape(4, 8, 34) == before.reshape(4, 8, 34)).all(-1)
    assert same.sum() == 31 and not same[1, 1]


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_floats_are_quantised_as_the_package_does(path, tmp_path, name):
    with pm.open(path) as checkpoint:
        tree, report = pm.quantize(checkpoint, "blk.*.attn_v.weight", scheme=name)
        assert [row.scheme for row in report.rows] == [name] * 2
        tree.save(tmp_path / "o.gguf")
    half = floats(path)["blk.0.attn_v.weight"].astype(np.float32)
    kind, data = read(tmp_path / "o.gguf")[0]["blk.0.attn_v.weight"]
    assert kind == Type[name.upper()] and np.array_equal(data, quants.quantize(half, kind))


def test_codes_become_floats(path, tmp_path):
    with pm.open(path) as checkpoint:
        pm.dequantize(checkpoint, dtype="float32")[0].save(tmp_path / "f.gguf")
        pm.at(checkpoint, "blk.0.ffn_up.weight").cast("float16").save(tmp_path / "h.gguf")
    for name, right in floats(path).items():
        if read(path)[0][name][0] not in (Type.F16, Type.BF16):
            assert np.array_equal(floats(tmp_path / "f.gguf")[name], right)
    assert read(tmp_path / "h.gguf")[0]["blk.0.ffn_up.weight"][0] == Type.F16


def test_floats_of_codes_move_in_any_order(path, tmp_path):
    leaf, right = "blk.0.ffn_down.weight", floats(path)["blk.0.ffn_down.weight"]
    places = [*range(511, -1, -1)]
    for name, some in (("a", places), ("b", places[::3]), ("c", [300, 2, 2, 511, 40]), ("d", [*range(5, 400)])):
        with pm.open(path) as checkpoint:
            pm.at(pm.at(checkpoint, leaf).cast("float32"), leaf).take(some, axis=1).save(tmp_path / f"{name}.gguf")
        assert np.array_equal(floats(tmp_path / f"{name}.gguf")[leaf], right[:, some])


def test_whole_rows_and_blocks_move_as_they_are(path, tmp_path):
    leaf, old = "blk.0.ffn_up.weight", read(path)[0]["blk.0.ffn_up.weight"][1]
    after = edited(path, tmp_path / "a.gguf", lambda tree: pm.at(tree, leaf).take([3, 1], axis=0))
    assert np.array_equal(after[leaf][1], old[[3, 1]])
    leaf, old = "blk.0.attn_q.weight", read(path)[0]["blk.0.attn_q.weight"][1].reshape(4, 8, 34)
    after = edited(path, tmp_path / "b.gguf", lambda tree: pm.at(tree, leaf).take([*range(32, 64)], axis=1))
    assert np.array_equal(after[leaf][1], old[:, 1])
    with pm.open(path) as checkpoint, pytest.raises(Quantized, match="codes in q8_0 move in whole blocks"):
        pm.at(checkpoint, leaf).take([1, 0], axis=1)


REFUSED = [
    (lambda tree: pm.at(tree, "blk.0.ffn_up.weight").add(1), Quantized, "q4_k is only decoded"),
    (lambda tree: pm.at(tree, "blk.0.ffn_up.weight").multiply(1e9), Quantized, "q4_k is only decoded"),
    (lambda tree: pm.at(tree, "blk.0.attn_q.weight").add(1, requantize="never"), Quantized, "'never'"),
    (lambda tree: pm.at(tree, "blk.0.attn_v.weight").cast("q8_0"), BadArgument, "q8_0 is a code, not a dtype"),
    (lambda tree: pm.at(tree, "output_norm.weight").rename("x" * 64), RenameClash, "names of 63 bytes"),
    (lambda tree: pm.at(tree, "output_norm.weight").reshape((1, 2, 2, 8, 8)), Unsupported, "no tensor of 5 axes"),
    (lambda tree: pm.at(tree, "output_norm.weight").cast("uint8"), Unsupported, "GGUF cannot hold uint8"),
    (lambda tree: pm.quantize(tree, "token_embd.weight", scheme="q4_k"), BadArgument, "'q4_k' is no scheme that"),
    (
        lambda tree: pm.at(tree.__class__(tree.source, raw=True), "blk.0.ffn_up.weight").add(1),
        SpecMismatch,
        "blocks of",
    ),
]


@pytest.mark.parametrize(("edit", "error", "message"), REFUSED)
def test_what_cannot_be_is_refused_with_a_way_out(path, tmp_path, edit, error, message):
    with pm.open(path) as checkpoint, pytest.raises(error) as caught:
        edit(checkpoint).save(tmp_path / "o.gguf")
    assert message in str(caught.value) and (caught.value.hint or error in (RenameClash,))
    assert not (tmp_path / "o.gguf").exists()


def test_other_formats_have_no_place_for_blocks(path, tmp_path):
    with pm.open(path) as checkpoint:
        for name in ("x.safetensors", "x.npz", "x.pt", "x.msgpack", "x/"):
            with pytest.raises(Unsupported, match="cannot be written"):
                checkpoint.save(f"{tmp_path}/{name}")
        pm.at(checkpoint, "**").cast("float32").save(tmp_path / "y.safetensors")
    found = pm.load(tmp_path / "y.safetensors", nested=False)
    assert all(
        np.array_equal(found[name], right.astype(np.float32))
        for name, right in floats(path).items()
        if "output." not in name
    )


def test_a_tree_holds_values_in_place_of_blocks(path):
    tree = pm.load(path, nested=False)
    assert tree["blk.0.ffn_up.weight"].dtype == np.float32
    assert np.array_equal(tree["blk.0.ffn_up.weight"], floats(path)["blk.0.ffn_up.weight"])


# ---- keys --------------------------------------------------------------------------------------------------------


def test_keys_are_the_configuration(path, tmp_path):
    before = read(path)[1]
    with pm.open(path) as checkpoint:
        config = pm.config(checkpoint)
        assert config["llama.block_count"] == 2 and config["llama.rope.freq_base"] == 1e-05
        assert config["llama.attention.head_count_kv"] == [2, 1]
        new = {"general.name": LONG, "llama.rope.freq_base": 5, "x.y.z": [1.5, 2], "general.tags": ["a"], "x.on": True}
        made = pm.config(config.set(new)).delete("llama.embedding_length")
        assert [change.key for change in made.plan.configured][:2] == ["general.name", "general.tags"]
        made.save(tmp_path / "o.gguf")
    after = read(tmp_path / "o.gguf")[1]
    gone = {"llama.embedding_length": before["llama.embedding_length"]}
    assert after | gone == before | new | {"llama.rope.freq_base": 5.0}
    types = gguf.GGUFReader(tmp_path / "o.gguf").fields
    assert types["llama.rope.freq_base"].types == [Kind.FLOAT32] and types["llama.block_count"].types == [Kind.UINT32]
    assert read(tmp_path / "o.gguf")[0].keys() == read(path)[0].keys()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"llama.block_count": "two"}, "llama.block_count: 'two' is str, and is uint32 there"),
        ({"llama.block_count": -1}, "is uint32 there"),
        ({"llama.block_count": 2.5}, "is uint32 there"),
        ({"general.name": 3}, "is a text there"),
        ({"x.y": None}, "can be no value of GGUF"),
        ({"x.y": [1, "a"]}, "can be no value of GGUF"),
        ({"llama.attention.head_count_kv": [1, 2.5]}, "is int32 there"),
        ({"x.y": 1 << 70}, "can be no value of GGUF"),
        ({"general.alignment": 48}, "no power of two"),
    ],
)
def test_values_that_gguf_lacks_are_refused(path, tmp_path, values, message):
    with pm.open(path) as checkpoint, pytest.raises(BadArgument) as caught:
        pm.config(checkpoint).set(values).save(tmp_path / "o.gguf")
    assert message in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["in"]


def test_keys_that_are_not_there_are_told_with_the_name_of_the_file(path):
    with pm.open(path) as checkpoint, pytest.raises(NoMatch, match=r"m.gguf has no 'general.nam'"):
        pm.config(checkpoint).delete("general.nam")


def test_long_arrays_stay_as_they_are(tmp_path):
    tokens = [f"t{n}" for n in range(5000)]
    path = model(tmp_path / "m.gguf", keys=[("tokenizer.ggml.merges", tokens, Kind.ARRAY)])
    with pm.open(path) as checkpoint:
        assert "tokenizer.ggml.merges" not in pm.config(checkpoint)
        pm.config(checkpoint).set({"general.name": "x"}).save(tmp_path / "o.gguf")
    assert read(tmp_path / "o.gguf")[1] == read(path)[1] | {"general.name": "x"}


@pytest.mark.parametrize("name", ["tinx", LONG])
def test_keys_change_in_place_and_back_with_values(path, name):
    before = path.read_bytes()
    (path.parent / "other").write_text("x")

    def edit(tree):
        return pm.config(pm.at(tree, "blk.0.ffn_up.weight").zero()).set({"general.name": name})

    assert pm.patch(path, edit, dry_run=True).bytes_written and path.read_bytes() == before
    report = pm.patch(path, edit)
    assert (report.bytes_written < len(before)) == (name == "tinx")  # nothing moves where the header is as long
    tensors, keys = read(path)
    assert keys["general.name"] == name and not values(*tensors["blk.0.ffn_up.weight"]).any()
    assert np.array_equal(tensors["blk.1.ffn_up.weight"][1], np.array(read(path)[0]["blk.1.ffn_up.weight"][1]))
    (path.parent / "other").write_text("changed since")
    assert pm.undo(path).left == 0 and path.read_bytes() == before
    assert sorted(each.name for each in path.parent.iterdir()) == ["m.gguf", "other"]


def test_tensors_out_of_order_keep_their_bytes(path):
    """llama.cpp wants them in order; a file that has them otherwise is made anew where its keys change."""
    raw, reader = path.read_bytes(), gguf.GGUFReader(path)
    one, two = (next(each for each in reader.tensors if each.name == f"blk.{n}.attn_q.weight") for n in (0, 1))
    places = {each.name: raw.index(each.name.encode()) + len(each.name) + 4 + 16 + 4 for each in (one, two)}
    swapped = bytearray(raw)
    for each, other in ((one, two), (two, one)):
        at = places[each.name]
        swapped[at : at + 8] = raw[places[other.name] : places[other.name] + 8]
    path.write_bytes(swapped)
    before = floats(path)
    assert np.array_equal(before[one.name], values(two.tensor_type, two.data))
    pm.patch(path, lambda tree: pm.config(tree).set({"general.name": "tinx"}))
    after = floats(path)
    assert all(np.array_equal(after[name], right) for name, right in before.items())
    assert pm.undo(path).left == 0 and path.read_bytes() == swapped


def test_a_graft_onto_codes_that_are_only_decoded_is_refused(path, tmp_path):
    shape = (4, 256)
    pm.save({"blk.0.ffn_up.weight": np.ones(shape, "float32")}, tmp_path / "one.safetensors")
    pm.save({"blk.0.attn_q.weight": np.full(shape, 0.5, "float32")}, tmp_path / "two.safetensors")
    with (
        pm.open(path) as onto,
        pm.open(tmp_path / "one.safetensors") as one,
        pm.open(tmp_path / "two.safetensors") as two,
    ):
        with pytest.raises(Quantized, match="q4_k would be encoded"):
            pm.graft(onto, one)
        pm.graft(onto, two)[0].save(tmp_path / "o.gguf")
    assert np.array_equal(
        floats(tmp_path / "o.gguf")["blk.0.attn_q.weight"],
        quants.dequantize(quants.quantize(np.full(shape, 0.5, "f4"), Type.Q8_0), Type.Q8_0),
    )


def test_a_record_is_verified(path, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text('version: 1\nsteps:\n  - zero: "blk.0.attn_q.weight"\n')
    run("apply", recipe, path, "-o", tmp_path / "o.gguf", "--record")
    run("verify", tmp_path / "o.gguf")
    raw = bytearray((tmp_path / "o.gguf").read_bytes())
    with pm.open(tmp_path / "o.gguf") as checkpoint:
        raw[checkpoint.source.extent(2).start] ^= 1
    (tmp_path / "o.gguf").write_bytes(raw)
    assert CliRunner().invoke(cli, ["verify", str(tmp_path / "o.gguf")]).exit_code == 1


def test_layers_are_left_out_in_place_and_come_back(path):
    before = path.read_bytes()
    pm.patch(path, lambda tree: pm.deepen(tree, order=[1], identity=None)[0])
    assert read(path)[1]["llama.block_count"] == 1 and not [name for name in read(path)[0] if "blk.1" in name]
    assert pm.undo(path).left == 0 and path.read_bytes() == before


def test_only_values_and_keys_change_in_place(path):
    before = path.read_bytes()
    for edit in (
        lambda tree: pm.config(pm.at(tree, "blk.0.**").delete()).set({"general.name": LONG}),
        lambda tree: pm.at(tree, "blk.0.attn_v.weight").cast("float32"),
    ):
        with pytest.raises(Unsupported):
            pm.patch(path, edit)
    assert path.read_bytes() == before


def test_the_command_and_a_recipe_set_keys(path, tmp_path):
    run("config", path, "--set", "general.name=ours", "--in-place")
    assert read(path)[1]["general.name"] == "ours"
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        'version: 1\nsteps:\n  - config: {set: {general.name: theirs}}\n  - zero: "blk.0.attn_q.weight"\n'
    )
    for more in (["-o", str(tmp_path / "o.gguf")], ["--in-place"]):
        run("apply", recipe, path, *more)
    for file in (path, tmp_path / "o.gguf"):
        tensors, keys = read(file)
        assert keys["general.name"] == "theirs" and not values(*tensors["blk.0.attn_q.weight"]).any()
    shown = json.loads(run("show", path, "--json").stdout)
    assert shown["metadata"]["llama.block_count"] == 2 and shown["metadata"]["llama.rope.freq_base"] == 1e-05
    leaf = next(each for each in shown["leaves"] if each["path"] == "blk.0.ffn_up.weight")
    assert (leaf["scheme"], leaf["dtype"], leaf["shape"]) == ("q4_k", "float32", [4, 256])


# ---- several files -----------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path):
    (tmp_path / "in").mkdir()
    model(tmp_path / "in" / "m.gguf", split_max_tensors=7)
    return [tmp_path / "in" / f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]


def test_whichever_file_is_named_all_are_opened(parts, path_of_whole):
    whole, keys = read(path_of_whole)
    for named in (*parts, parts[0].parent):
        with pm.open(named) as checkpoint:
            assert checkpoint.paths == [*whole] and pm.config(checkpoint)["llama.block_count"] == 2
            assert np.array_equal(checkpoint["blk.1.ffn_down.weight"], values(*whole["blk.1.ffn_down.weight"]))
            checkpoint.save(parts[0].parent.parent / "one.gguf", force=True)
        assert (parts[0].parent.parent / "one.gguf").read_bytes() == path_of_whole.read_bytes()
    assert keys["general.name"] == "tiny"


@pytest.fixture
def path_of_whole(tmp_path):
    return model(tmp_path / "whole.gguf")


@pytest.mark.parametrize("name", ["tinx", LONG])
def test_several_files_change_in_place_and_back(parts, name):
    before = [part.read_bytes() for part in parts]
    for named in (parts[1], parts[0].parent):
        pm.patch(named, lambda tree: pm.config(pm.at(tree, "blk.*.attn_q.weight").zero()).set({"general.name": name}))
        with pm.open(parts[0]) as checkpoint:
            assert not checkpoint["blk.1.attn_q.weight"].any() and checkpoint.metadata["general.name"] == name
        assert pm.undo(named).left == 0 and [part.read_bytes() for part in parts] == before


def test_a_copy_keeps_the_parts_and_what_they_count(parts, tmp_path):
    with pm.open(parts[0]) as checkpoint:
        made = pm.config(pm.at(checkpoint, "blk.0.**").delete()).set({"general.name": LONG})
        made = pm.config(made).set({"llama.attention.head_count_kv": [2]})
        assert made.save(tmp_path / "out").said[0].endswith("llama.block_count: 2, and blk has 1, without 0")
        with pytest.raises(Unsupported, match="cannot be laid out"):
            pm.deepen(checkpoint, order=[1, 0], identity=None)[0].save(tmp_path / "other")
    found = [read(tmp_path / "out" / part.name) for part in parts]
    assert [(keys["split.no"], keys["split.count"], keys["split.tensors.count"]) for _, keys in found] == [
        (n, 3, sum(len(tensors) for tensors, _ in found)) for n in range(3)
    ]
    assert found[0][1]["general.name"] == LONG and "general.name" not in found[1][1]
    with pm.open(tmp_path / "out") as checkpoint:
        assert not [name for name in checkpoint.paths if name.startswith("blk.0.")]


def test_a_missing_or_foreign_part_is_told(parts, tmp_path):
    parts[2].rename(tmp_path / "away")
    with pytest.raises(BadCheckpoint, match=r"1 file is missing: m-00003-of-00003\.gguf"):
        pm.open(parts[0])
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(BadCheckpoint, match=r"split.no and split.count are 1 and 3, and its name says otherwise"):
        pm.open(parts[0])
    parts[0].rename(tmp_path / "in" / "x.gguf")
    with pytest.raises(BadCheckpoint, match="its name does not say which"):
        pm.open(tmp_path / "in" / "x.gguf")


# ---- layers and experts ------------------------------------------------------------------------------------------


@pytest.fixture
def mixture(tmp_path):
    keys = [
        ("llama.attention.sliding_window_pattern", [True, False, True, False], Kind.ARRAY),
        ("llama.leading_dense_block_count", 0, Kind.UINT32),
        ("llama.nextn_predict_layers", 1, Kind.UINT32),
    ]
    return model(tmp_path / "m.gguf", layers=4, experts=6, keys=keys)


def test_layers_are_left_out_as_blocks_and_lists_follow(mixture, tmp_path):
    with pm.open(mixture) as checkpoint:
        made, report = pm.deepen(checkpoint, order=[0, 2, 3], identity=None)
        assert report.order.dropped == (1,) and made.save(tmp_path / "o.gguf").bytes_computed == 0
    (old, before), (new, keys) = read(mixture), read(tmp_path / "o.gguf")
    for name, (kind, data) in new.items():
        layer = name.split(".")[1] if name.startswith("blk.") else ""
        source = name.replace(f"blk.{layer}.", f"blk.{[0, 2, 3][int(layer)]}.") if layer else name
        assert kind == old[source][0] and np.array_equal(data, old[source][1])
    changed = {
        "llama.block_count": 3,
        "llama.feed_forward_length": [512] * 3,
        "llama.attention.head_count_kv": [2, 2, 1],
        "llama.attention.sliding_window_pattern": [True, True, False],
    }
    assert keys == before | changed
    types = [
        gguf.GGUFReader(file).fields["llama.attention.head_count_kv"].types for file in (mixture, tmp_path / "o.gguf")
    ]
    assert types[0] == types[1]


def test_the_blocks_that_predict_are_counted_from_the_end(mixture, tmp_path):
    with pm.open(mixture) as checkpoint:
        pm.deepen(checkpoint, order=[0, 1, 2], identity=None)[0].save(tmp_path / "o.gguf")
    keys = read(tmp_path / "o.gguf")[1]
    assert keys["llama.block_count"] == 3 and keys["llama.nextn_predict_layers"] == 0


def test_experts_are_kept_as_blocks(mixture, tmp_path):
    with pm.open(mixture) as checkpoint:
        found = pm.anatomy(checkpoint)
        assert (found.layers["count"], found.experts["count"], found.experts["top_k"]) == (4, 6, 2)
        assert (found.hidden, found.heads["query"]) == (256, 4)
        made, _ = pm.experts(checkpoint).keep([5, 0, 2])
        assert made.save(tmp_path / "o.gguf").bytes_computed == 0
    (old, before), (new, keys) = read(mixture), read(tmp_path / "o.gguf")
    for name, (kind, data) in new.items():
        right = old[name][1][[5, 0, 2]] if "_exps" in name or "gate_inp" in name else old[name][1]
        assert kind == old[name][0] and np.array_equal(data, right)
    assert keys == before | {"llama.expert_count": 3}


def test_a_layer_that_is_deleted_alone_is_told(path, tmp_path):
    with pm.open(path) as checkpoint:
        report = pm.at(checkpoint, "blk.1.**").delete().save(tmp_path / "o.gguf")
    assert report.said == ("its configuration still says llama.block_count: 2, and blk has 1",)
