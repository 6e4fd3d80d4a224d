"""Grafts onto checkpoints: the outcome is that of the same graft in memory, and what is copied is never read."""

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from click.testing import CliRunner

import paramend as pm
from paramend.cli.main import cli
from paramend.errors import GraftRefused, Unsupported


def bits(tree):
    return {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in tree.items()}


def in_any_order(report):
    return {part: sorted(map(str, rows)) if isinstance(rows, list) else rows for part, rows in report.to_dict().items()}


def layers(count, width=4, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    tree = {f"layers.{i}.{n}": rng.normal(size=(width, 3)).astype(dtype) for i in range(count) for n in ("w", "v")}
    return tree | {"head": rng.normal(size=(3, 5)).astype(dtype)}


@pytest.fixture
def files(tmp_path):
    small, big = layers(2, seed=1), layers(4, seed=2)
    safetensors.numpy.save_file(small, tmp_path / "small.safetensors")
    folder = tmp_path / "big"
    folder.mkdir()
    names = list(big)
    for place, mine in enumerate((names[:5], names[5:]), 1):
        shard = {name: big[name] for name in mine}
        safetensors.numpy.save_file(shard, folder / f"model-{place:05}-of-00002.safetensors", {"format": "pt"})
    weight_map = {n: f"model-{1 if n in names[:5] else 2:05}-of-00002.safetensors" for n in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return tmp_path, small, big


RENAME = {"layers[-1]/**": "layers[-1]/**"}


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_checkpoint_as_the_target(files, in_memory):
    folder, small, big = files
    expected, told = pm.graft(big, small, rename=RENAME)
    with pm.open(folder / "big") as target, pm.open(folder / "small.safetensors") as source:
        tree, report = pm.graft(target, small if in_memory else source, rename=RENAME)
        assert in_any_order(report) == in_any_order(told)
        saved = tree.save(folder / "out")
    assert bits(pm.load(folder / "out", nested=False)) == bits(expected)
    assert (folder / "out" / "config.json").exists()
    assert in_memory or saved.bytes_computed == 0


@pytest.mark.parametrize("dtype", ["target", "source"])
@pytest.mark.parametrize("kinds", [("float32", "float16"), ("bfloat16", "float32"), ("int32", "float32")])
def test_dtypes(tmp_path, dtype, kinds):
    target = {"a": np.ones(4, kinds[0]), "b": np.ones((2, 2), kinds[0])}
    source = {"a": np.array([1.5, 2.0, 6e4, 1e-7]).astype(kinds[1]), "b": np.eye(2).astype(kinds[1])}
    safetensors.numpy.save_file(target, tmp_path / "t.safetensors")
    safetensors.numpy.save_file(source, tmp_path / "s.safetensors")
    expected, told = pm.graft(target, source, dtype=dtype)
    with pm.open(tmp_path / "t.safetensors") as one, pm.open(tmp_path / "s.safetensors") as other:
        tree, report = pm.graft(one, other, dtype=dtype)
        tree.save(tmp_path / "o.safetensors")
    assert bits(safetensors.numpy.load_file(tmp_path / "o.safetensors")) == bits(expected)
    assert report.to_dict() == told.to_dict()


def test_a_corner_and_what_it_costs(tmp_path):
    target = {"a": np.zeros((3, 4), "float16")}
    source = {"a": np.full((2, 5), 1e5, "float32")}
    safetensors.numpy.save_file(target, tmp_path / "t.safetensors")
    with pm.open(tmp_path / "t.safetensors") as one:
        tree, report = pm.graft(one, source, mismatch="overlap")
        tree.save(tmp_path / "o.safetensors")
    out = safetensors.numpy.load_file(tmp_path / "o.safetensors")["a"]
    assert np.isinf(out[:2]).all()
    assert not out[2:].any()
    assert report.mismatched[0].overflowed == 8


def test_a_refused_graft_says_the_same_as_in_memory(files):
    folder, small, big = files
    with pytest.raises(GraftRefused) as in_memory:
        pm.graft(small, big)
    with (
        pm.open(folder / "small.safetensors") as target,
        pm.open(folder / "big") as source,
        pytest.raises(GraftRefused) as on_disk,
    ):
        pm.graft(target, source)
    assert str(on_disk.value) == str(in_memory.value)


def test_edits_before_and_after_a_graft(files):
    folder, small, big = files
    with pm.open(folder / "big") as target, pm.open(folder / "small.safetensors") as source:
        halved = pm.at(source, "**/w").multiply(0.5)
        tree, _ = pm.graft(pm.at(target, "head").zero(), halved, only="layers[0]/**", unused="ok")
        pm.at(tree, "layers.1.w").fill(2).save(folder / "out.safetensors")
    out = safetensors.numpy.load_file(folder / "out.safetensors")
    assert (out["layers.0.w"] == small["layers.0.w"] * 0.5).all()
    assert (out["layers.0.v"] == small["layers.0.v"]).all()
    assert (out["layers.1.w"] == 2).all()
    assert not out["head"].any()
    assert (out["layers.3.w"] == big["layers.3.w"]).all()


def test_tied_leaves_of_a_torch_file_take_one_value(tmp_path):
    shared = torch.zeros(3)
    torch.save({"a": shared, "b": shared, "c": torch.zeros(2)}, tmp_path / "t.pt")
    with pm.open(tmp_path / "t.pt") as target:
        tree, _ = pm.graft(target, {"a": np.ones(3, "float32"), "b": np.ones(3, "float32")})
        edited = pm.at(tree, "a").multiply(3)
        assert edited["b"].tolist() == [3, 3, 3]
        edited.save(tmp_path / "o.pt")
    out = torch.load(tmp_path / "o.pt", weights_only=True)
    assert [out[name].tolist() for name in "abc"] == [[3, 3, 3], [3, 3, 3], [0, 0]]


def test_raw_dtypes_pass_through(tmp_path):
    def write(path, data):
        header = json.dumps({"q": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + data)

    write(tmp_path / "t.safetensors", b"\0\0")
    write(tmp_path / "s.safetensors", b"\x12\x34")
    with pm.open(tmp_path / "t.safetensors") as target, pm.open(tmp_path / "s.safetensors") as source:
        pm.graft(target, source)[0].save(tmp_path / "o.safetensors")
    assert (tmp_path / "o.safetensors").read_bytes().endswith(b"\x12\x34")


def test_no_graft_in_place_of_files(files):
    folder, small, _ = files
    with pm.open(folder / "big") as target, pytest.raises(Unsupported, match="not grafted in place") as error:
        pm.graft_(target, small)
    assert "pm.graft(target, source)" in str(error.value)


# ---- memory --------------------------------------------------------------------------------------------------

GRAFT = """
import sys
import paramend as pm
kind, target, source, out = sys.argv[1:]
with pm.open(source) as s:
    if kind == "disk":
        with pm.open(target) as t:
            pm.graft(t, s)[0].save(out)
    else:
        import numpy as np
        pm.graft_({f"layers.{i}.w": np.ones((1 << 23,), "float32") for i in range(8)}, s)
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def peak_mb(*args):
    done = subprocess.run([sys.executable, "-c", GRAFT, *map(str, args)], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


@pytest.mark.slow
def test_memory_is_bounded_on_disk_and_by_the_target_and_one_leaf_in_memory(tmp_path):
    leaf = 1 << 25  # bytes
    for name in ("target", "source"):
        header = {
            f"layers.{i}.w": {"dtype": "F32", "shape": [leaf // 4], "data_offsets": [i * leaf, (i + 1) * leaf]}
            for i in range(8)
        }
        text = json.dumps(header).encode()
        with (tmp_path / f"{name}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            os.ftruncate(file.fileno(), 8 + len(text) + 8 * leaf)
    files = [tmp_path / f"{name}.safetensors" for name in ("target", "source", "out")]
    idle = peak_mb("disk", *_tiny(tmp_path))
    assert peak_mb("disk", *files) - idle < 40
    # The target takes 256 MB, and so do the new values, all made before the first one is put in; a leaf 32 MB.
    assert peak_mb("memory", *files) - idle < 2 * 256 + 3 * 32


def _tiny(folder):
    for name in ("a", "b"):
        safetensors.numpy.save_file({"w": np.ones(1, "float32")}, folder / f"{name}.safetensors")
    return folder / "a.safetensors", folder / "b.safetensors", folder / "tiny.safetensors"


# ---- the command ---------------------------------------------------------------------------------------------


def run(*args):
    return CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="paramend")


def test_the_command(files):
    folder, small, big = files
    expected, told = pm.graft(big, small, rename=RENAME)
    base = ["graft", folder / "small.safetensors", "--into", folder / "big", "-o", folder / "out"]
    rename = ["--rename", "layers[-1]/**=layers[-1]/**"]
    dry = run(*base, *rename, "--dry-run", "--json")
    assert dry.exit_code == 0, dry.output
    shown = json.loads(dry.stdout)
    assert sorted(map(str, shown["copied"])) == sorted(map(str, told.to_dict()["copied"]))
    assert not (folder / "out").exists()
    done = run(*base, *rename)
    assert done.exit_code == 0, done.output
    assert sorted(str(told).split("\n")) == sorted(done.stdout.rstrip("\n").split("\n"))
    assert bits(pm.load(folder / "out", nested=False)) == bits(expected)
    assert run(*base, *rename).exit_code == 2  # it is there already
    assert run(*base, *rename, "--force").exit_code == 0


def test_the_command_refuses_as_python_does_in_its_own_words(files):
    folder, *_ = files
    refused = run("graft", folder / "big", "--into", folder / "small.safetensors", "-o", folder / "out.safetensors")
    assert refused.exit_code == 2
    assert "go nowhere" in refused.stderr
    assert "--unused ok" in refused.stderr
    assert "pm.graft" not in refused.stderr
    assert not (folder / "out.safetensors").exists()
    option = next(line for line in refused.stderr.split("\n") if "--unused ok" in line)
    words = [word.strip("\"'") for word in option.partition("--into")[2].partition("#")[0].split()[1:]]
    allowed = run(
        "graft", folder / "big", "--into", folder / "small.safetensors", *words, "-o", folder / "out.safetensors"
    )
    assert allowed.exit_code == 0, allowed.output


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--rename", "layers"), "OLD=NEW"),
        (("--mismatch", "overlop"), "overlop"),
        (("--only", "hed"), "hed"),
    ],
)
def test_wrong_options(files, args, said):
    folder, *_ = files
    refused = run("graft", folder / "small.safetensors", "--into", folder / "big", *args, "-o", folder / "out")
    assert refused.exit_code == 2
    assert said in refused.stderr
    assert not (folder / "out").exists()


def test_a_rule_that_leaves_behind(files):
    folder, *_ = files
    args = ("--rename", "head=", "--only", "layers/**", "--json")
    done = run("graft", folder / "small.safetensors", "--into", folder / "big", *args, "-o", folder / "out")
    assert done.exit_code == 0, done.output
    assert [row["path"] for row in json.loads(done.stdout)["unused"]] == ["head"]


def test_bfloat16_onto_float32_streams(tmp_path):
    source = {"w": np.arange(6, dtype=ml_dtypes.bfloat16)}
    safetensors.numpy.save_file({"w": np.zeros(6, "float32")}, tmp_path / "t.safetensors")
    safetensors.numpy.save_file(source, tmp_path / "s.safetensors")
    with pm.open(tmp_path / "t.safetensors") as target, pm.open(tmp_path / "s.safetensors") as other:
        tree, report = pm.graft(target, other)
        tree.save(tmp_path / "o.safetensors")
    assert report.copied[0].did == "copied, cast from bfloat16"
    assert safetensors.numpy.load_file(tmp_path / "o.safetensors")["w"].tolist() == [0, 1, 2, 3, 4, 5]


# ---- shapes that differ ----------------------------------------------------------------------------------------


def shaped(count, side, seed):
    rng = np.random.default_rng(seed)
    shapes = {"embed_tokens.weight": (count, 4), "pos_embed": (1, 1 + side**2, 4), "head": (side, side), "norm": (4,)}
    return {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("place", ["corner", "center", "tile"])
def test_shapes_differ_on_disk_as_in_memory(tmp_path, place, dtype):
    held = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    small, big = shaped(9, 2, 1), {name: value.astype(held) for name, value in shaped(12, 3, 2).items()}
    safetensors.numpy.save_file(small, tmp_path / "small.safetensors")
    safetensors.numpy.save_file(big, tmp_path / "big.safetensors")
    options = {
        "mismatch": {"head": "overlap", "**": "resize"},
        "place": place,
        "resize": {"embed_tokens/**": pm.resize.vocabulary(rows="random", seed=3)},
    }
    expected, told = pm.graft(big, small, **options)
    with pm.open(tmp_path / "big.safetensors") as target, pm.open(tmp_path / "small.safetensors") as source:
        tree, report = pm.graft(target, source, **options)
        assert in_any_order(report) == in_any_order(told)
        tree.save(tmp_path / "out.safetensors")
    assert bits(pm.load(tmp_path / "out.safetensors", nested=False)) == bits(expected)
    assert {row.path: row.did for row in report.mismatched}["pos_embed"].startswith("resized 2×2 → 3×3, 1 prefix token")


def test_shapes_at_the_command_line(tmp_path):
    small, big = shaped(9, 2, 1), shaped(12, 3, 2)
    safetensors.numpy.save_file(small, tmp_path / "small.safetensors")
    safetensors.numpy.save_file(big, tmp_path / "big.safetensors")
    graft = ("graft", tmp_path / "small.safetensors", "--into", tmp_path / "big.safetensors", "-o", tmp_path / "out.st")
    result = run(*graft)
    assert result.exit_code == 2
    assert "--mismatch head=overlap --mismatch '**=resize'" in result.output
    out = tmp_path / "out.safetensors"
    result = run(*graft[:-1], out, "--mismatch", "head=overlap", "--mismatch", "**=resize", "--place", "center")
    assert result.exit_code == 0, result.output
    expected, _ = pm.graft(big, small, mismatch={"head": "overlap", "**": "resize"}, place="center")
    assert bits(pm.load(out, nested=False)) == bits(expected)
    assert (
        "applies to all leaves; write '**=resize'" in run(*graft, "--mismatch", "resize", "--mismatch", "a=keep").output
    )
    assert "--mismatch resise is not one of" in run(*graft, "--mismatch", "resise").output
    # rules are written in Python: then the hint is too
    assert "pm.graft(" in run("graft", graft[3], "--into", graft[1], "--mismatch", "resize", "--dry-run").output


# ---- transformers --------------------------------------------------------------------------------------------


def saved_llama(folder, layers, vocabulary, seed):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=vocabulary, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


@pytest.mark.slow
def test_models_of_two_sizes_as_transformers_saves_them(tmp_path):
    small, big = (
        saved_llama(tmp_path / name, layers, vocabulary, seed=layers)
        for name, layers, vocabulary in (("small", 3, 64), ("big", 5, 80))
    )
    rename = {"model.layers[-1]/**": "model.layers[-1]/**"}
    with pm.open(tmp_path / "big") as target, pm.open(tmp_path / "small") as source:
        with pytest.raises(GraftRefused, match="2 shapes differ"):
            pm.graft(target, source, rename=rename)
        words = {"lm_head/weight": "overlap", "**/embed_tokens/weight": "overlap"}
        tree, report = pm.graft(target, source, rename=rename, mismatch=words)
        tree.save(tmp_path / "warm")
    warm, found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "warm", output_loading_info=True)
    assert not any(found.values())
    expected = {name: value.clone() for name, value in big.state_dict().items()}
    for name, value in small.state_dict().items():
        path = name.replace("layers.2.", "layers.4.")
        expected[path][tuple(map(slice, value.shape))] = value
    assert all(torch.equal(value, expected[name]) for name, value in warm.state_dict().items())
    assert len(report.fresh) == 2 * 9
    with (
        pm.open(tmp_path / "small") as target,
        pm.open(tmp_path / "big") as source,
        pytest.raises(GraftRefused, match="go nowhere"),
    ):
        pm.graft(target, source, mismatch="overlap")
