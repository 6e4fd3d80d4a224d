"""Where a model has tokens: tables of all kinds of models, files beside them, and the ways to ask for a change."""

import json

import equinox as eqx
import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from click.testing import CliRunner
from flax import nnx

import paramend as pm
from paramend.cli.main import cli

WORDS = {"[UNK]": 0, "fox": 1, "dog": 2, "##es": 3, "[END]": 4}


def folder_of(path, leaves, config=None, words=WORDS):
    """A checkpoint of a few leaves, with a tokenizer."""
    path.mkdir()
    safetensors.numpy.save_file(leaves, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"vocab_size": 6, "eos_token_id": 4} if config is None else config))
    model = {"type": "WordPiece", "unk_token": "[UNK]", "vocab": words}
    (path / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}, indent=2))
    return path


def ramp(rows, width=2):
    return np.arange(rows * width, dtype="float32").reshape(rows, width)


LEAVES = {"model.embed_tokens.weight": ramp(6), "model.layers.0.w": ramp(6), "lm_head.bias": ramp(1, 6)[0]}


def run(*args):
    result = CliRunner().invoke(cli, ["vocabulary", *map(str, args)])
    assert result.exit_code == 0, result.output
    return result.output


# rows of tokens 0 1 4 and of padding 5: the kept one, the unknown one, the end of texts
KEPT = [0, 1, 4, 5]


def test_only_tables_change(tmp_path):
    tree, report = pm.vocabulary(pm.open(folder_of(tmp_path / "m", LEAVES))).keep([1])
    tree.save(tmp_path / "n")
    new = safetensors.numpy.load_file(tmp_path / "n" / "model.safetensors")
    assert {name: leaf.tolist() for name, leaf in new.items()} == {
        name: (leaf if ".w" in name[-2:] else leaf[KEPT]).tolist() for name, leaf in LEAVES.items()
    }
    assert report.ids == {old: new for new, old in enumerate(KEPT)}
    assert (report.unasked, report.size) == ((0, 4), (6, 4))
    assert json.loads((tmp_path / "n" / "config.json").read_text()) == {"vocab_size": 4, "eos_token_id": 2}
    assert str(pm.open(tmp_path / "m")["lm_head.bias"]) == str(LEAVES["lm_head.bias"])


def test_the_command_and_the_step_write_the_same_bytes(tmp_path):
    path = folder_of(tmp_path / "m", LEAVES)
    (tmp_path / "ids.json").write_text('{"1": 3, "2": 0}')
    donor = folder_of(tmp_path / "donor", {"wte.weight": ramp(3, 5)}, {"vocab_size": 3, "eos_token_id": 1}, {"fox": 2})
    ways = {
        "keep": (["--keep", tmp_path / "ids.json"], {"keep": [1]}),
        "pad": (["--pad", 4], {"pad": 4}),
        "extend": (
            ["--extend", "cat", "--extend", "hen", "--init", "zero"],
            {"extend": ["cat", "hen"], "init": "zero"},
        ),
        "transplant": (["--transplant", donor], {"transplant": "donor"}),
    }
    for name, (options, step) in ways.items():
        assert "vocabulary" in run(path, *options, "-o", tmp_path / name)
        recipe = tmp_path / f"{name}.json"
        recipe.write_text(json.dumps({"version": 1, "steps": [{"vocabulary": step}]}))
        pm.Recipe.load(recipe).apply(pm.open(path)).save(tmp_path / f"{name}-too")
        files = sorted(file.name for file in (tmp_path / name).iterdir())
        assert files == ["config.json", "model.safetensors", "tokenizer.json"]
        for file in files:
            assert (tmp_path / name / file).read_bytes() == (tmp_path / f"{name}-too" / file).read_bytes()
    run(path, "--keep", "1-1", "-o", tmp_path / "range")
    assert (tmp_path / "range" / "model.safetensors").read_bytes() == (
        tmp_path / "keep" / "model.safetensors"
    ).read_bytes()
    table = pm.open(tmp_path / "transplant")["model.embed_tokens.weight"]
    assert table[1:].tolist() == ramp(6)[[4, 1]].tolist()  # the end of texts, and the fox
    assert pm.open(tmp_path / "extend")["lm_head.bias"].tolist() == [0, 1, 2, 3, 4, 0, 0]
    assert pm.open(tmp_path / "pad")["lm_head.bias"].tolist() == [0, 1, 2, 3, 4, 5, 2.5, 2.5]


@pytest.mark.parametrize("options", [[], ["--pad", "2", "--extend", "a"], ["--keep", "1-x"], ["--keep", "99"]])
def test_the_command_says_what_it_needs(tmp_path, options):
    path = folder_of(tmp_path / "m", LEAVES)
    result = CliRunner().invoke(cli, ["vocabulary", str(path), *options, "-o", str(tmp_path / "n")])
    assert result.exit_code == 2
    assert not (tmp_path / "n").exists()


def test_other_files_of_the_tokens_go_when_these_change(tmp_path):
    path = folder_of(tmp_path / "m", LEAVES)
    for name in ("vocab.txt", "spiece.model", "tokenizer.model", "notes.txt"):
        (path / name).write_text("old")
    tree, report = pm.vocabulary(pm.open(path)).keep([1])
    assert sum(line.endswith(" goes") for line in report.files) == 3
    tree.save(tmp_path / "n")
    names = {file.name for file in (tmp_path / "n").iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json", "notes.txt"}
    pm.vocabulary(pm.open(path)).pad(8)[0].save(tmp_path / "p")
    assert (tmp_path / "p" / "spiece.model").read_text() == "old"
    (path / "tokenizer.json").unlink()
    with pytest.raises(
        pm.errors.Unsupported, match=r"spiece.model lists the tokens of .*, and there is no tokenizer.json"
    ):
        pm.vocabulary(pm.open(path)).keep([1])


def test_a_damaged_tokenizer_is_named(tmp_path):
    path = folder_of(tmp_path / "m", LEAVES)
    for text in ("{}", '{"model": {"vocab": 3}}', '{"model": {"vocab": {}, "merges": ["a"]}}', "[]"):
        (path / "tokenizer.json").write_text(text)
        with pytest.raises(pm.errors.BadCheckpoint, match=r"tokenizer\.json"):
            pm.vocabulary(pm.open(path)).keep([1])


# the leaves of a model, what its configuration says, and the tables in it: name → axis
PLACES = {
    "gemma 3n": (
        {
            "embed_tokens.weight": ramp(6),
            "embed_tokens_per_layer.weight": ramp(5, 3),
            "embed_vision.embedding.weight": ramp(2),
        },
        {"text_config": {"vocab_size": 6, "vocab_size_per_layer_input": 5}, "vision_config": {"vocab_offset": 4}},
        {"embed_tokens.weight": 0, "embed_tokens_per_layer.weight": 0},
    ),
    "blocks that predict": (
        {
            "m.embed_tokens.weight": ramp(6),
            "m.layers.1.embed_tokens.weight": ramp(6),
            "m.layers.1.shared_head.head.weight": ramp(6),
        },
        {"vocab_size": 6},
        {"m.embed_tokens.weight": 0, "m.layers.1.embed_tokens.weight": 0, "m.layers.1.shared_head.head.weight": 0},
    ),
    "as wide as long": (
        {
            "wte.weight": ramp(6, 6),
            "h.0.mlp.weight": ramp(6, 6),
            "wpe.weight": ramp(6, 6),
            "lm_head.weight": ramp(6, 6),
        },
        {"vocab_size": 6},
        {"wte.weight": 0, "lm_head.weight": 0},
    ),
    "flax": (
        {
            "params/Embed_0/embedding": ramp(6),
            "params/pos_embed/embedding": ramp(6),
            "params/lm_head/kernel": ramp(6, 6),
        },
        {},
        {"params/Embed_0/embedding": 0, "params/lm_head/kernel": 1},
    ),
    "by shape": (
        {
            "wte.weight": ramp(6),
            "h.0.w": ramp(2),
            "out.kernel": ramp(6).T.copy(),
            "out.scale": ramp(1, 6)[0],
            "norm.w": ramp(6),
        },
        {},
        {"wte.weight": 0, "out.kernel": 1, "out.scale": 0},
    ),
    "bart": (
        {"shared.weight": ramp(6), "final_logits_bias": ramp(1, 6), "encoder.layers.0.w": ramp(1, 6)},
        {"vocab_size": 6},
        {"shared.weight": 0, "final_logits_bias": 1},
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_tables_are_found_by_name_and_shape(tmp_path, name):
    leaves, config, tables = PLACES[name]
    made = folder_of(
        tmp_path / "m", leaves, config, {word: n for n, word in enumerate(["[UNK]", "a", "b", "c", "d", "e"])}
    )
    tree, _ = pm.vocabulary(pm.open(made)).keep([0, 3, 5])
    kept = [0, 3, 4, 5] if name == "gemma 3n" else [0, 3, 5]  # where the tokens of images begin
    for path, leaf in leaves.items():
        axis = tables.get(path)
        want = leaf if axis is None else np.take(leaf, [n for n in kept if n < leaf.shape[axis]], axis)
        assert tree[path].tolist() == want.tolist(), path
    if name == "gemma 3n":
        tree.save(tmp_path / "n")
        assert json.loads((tmp_path / "n" / "config.json").read_text()) == {
            "text_config": {"vocab_size": 4, "vocab_size_per_layer_input": 3},
            "vision_config": {"vocab_offset": 2},
        }


def test_tables_for_layers_that_lack_the_last_tokens_go_on_lacking_them(tmp_path):
    leaves, config, _ = PLACES["gemma 3n"]
    path = folder_of(tmp_path / "m", leaves, config, {"[UNK]": 0, "a": 1, "b": 2})
    tree, report = pm.vocabulary(pm.open(path)).pad(4)
    assert [len(tree[name]) for name in leaves] == [8, 5, 2]
    tree, report = pm.vocabulary(pm.open(path)).extend(["c", "d", "e", "f"])
    assert [len(tree[name]) for name in leaves] == [7, 7, 2]
    assert tree["embed_tokens_per_layer.weight"][3].tolist() == [3, 4, 5]
    (path / "tokenizer.json").write_text((path / "tokenizer.json").read_text().replace('"b": 2', '"b": 5'))
    tree, report = pm.vocabulary(pm.open(path)).extend(["c"])
    assert [len(tree[name]) for name in leaves] == [7, 5, 2]
    assert report.tokens == {"c": 6}


def test_parts_of_a_new_token_that_a_table_lacks(tmp_path):
    leaves = {"embed_tokens.weight": ramp(6), "embed_tokens_per_layer.weight": ramp(5, 3)}
    path = folder_of(tmp_path / "m", leaves, {"vocab_size": 6}, {"b": 0, "[UNK]": 2, "##ab": 5})
    donor = folder_of(tmp_path / "donor", {"wte.weight": ramp(3)}, {"vocab_size": 3}, {"b": 0, "bab": 1, "[UNK]": 2})
    for file in (path / "tokenizer.json", donor / "tokenizer.json"):
        data = json.loads(file.read_text())
        data["model"] |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
        file.write_text(json.dumps(data))
    tree, report = pm.vocabulary(pm.open(path)).transplant(pm.open(donor), init="subwords")
    assert report.tokens == {"bab": 1}
    assert tree["embed_tokens.weight"].tolist() == [[0, 1], [5, 6], [4, 5]]
    assert tree["embed_tokens_per_layer.weight"].tolist() == [[0, 1, 2], [6, 7, 8], [6, 7, 8]]


def test_what_is_no_plain_table_is_refused(tmp_path):
    with pytest.raises(pm.errors.BadArgument, match="no leaf is known to be a table of tokens"):
        pm.vocabulary({"w": ramp(3)})
    deep = {"wte": {"weight": ramp(6)}, "Dense_0": {"kernel": ramp(2, 6)}, "Dense_1": {"kernel": ramp(6)}}
    with pytest.raises(
        pm.errors.BadArgument, match=r"tables of 6 tokens cannot be told .*: Dense_0/kernel float32\[2,6\]"
    ):
        pm.vocabulary(deep)
    new = pm.vocabulary(deep, tables={"wte/weight": 0, "Dense_0/kernel": -1}).keep([1, 5])[0]
    assert [leaf.shape for leaf in jax.tree.leaves(new)] == [(2, 2), (6, 2), (2, 2)]
    with pytest.raises(pm.errors.BadArgument, match="several lengths"):
        pm.vocabulary({"a": {"wte": {"weight": ramp(3)}}, "b": {"wte": {"weight": ramp(4)}}})
    with pytest.raises(pm.errors.Unsupported, match="d2t numbers the tokens of a draft model"):
        pm.vocabulary({"embed_tokens": {"weight": ramp(3)}, "d2t": np.zeros(2, "int64")})
    coded = {
        "lm_head.weight": torch.zeros(256, 128, dtype=torch.float8_e4m3fn),
        "lm_head.weight_scale_inv": torch.ones(2, 1),
    }
    with pytest.raises(pm.errors.Quantized, match=r"pm\.dequantize"):
        pm.vocabulary(coded | {"embed_tokens.weight": torch.zeros(256, 2)})


def tied():
    module = torch.nn.ModuleDict({"wte": torch.nn.Embedding(6, 2), "lm_head": torch.nn.Linear(2, 6, bias=False)})
    module["lm_head"].weight = module["wte"].weight
    return module


class Words(eqx.Module):
    embedding: eqx.nn.Embedding


CONTAINERS = {
    "module": (tied, lambda tree: tree["wte"].weight),
    "state dict": (lambda: tied().state_dict(), lambda tree: tree["wte.weight"]),
    "nnx": (lambda: nnx.Dict(wte=nnx.Embed(6, 2, rngs=nnx.Rngs(0))), lambda tree: tree["wte"].embedding[...]),
    "equinox": (lambda: Words(eqx.nn.Embedding(6, 2, key=jax.random.key(0))), lambda tree: tree.embedding.weight),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_trees_in_memory_keep_their_type_and_their_ties(kind):
    make, leaf = CONTAINERS[kind]
    old = make()
    new, report = pm.vocabulary(old).keep([4, 1])
    assert type(new) is type(old)
    before, after = (
        np.asarray(leaf(tree).detach() if kind in ("module", "state dict") else leaf(tree)) for tree in (old, new)
    )
    assert after.tolist() == before[[1, 4]].tolist()
    assert report.size == (6, 2)
    if kind == "module":
        assert new["wte"].weight is new["lm_head"].weight
    larger = pm.vocabulary(old).extend(["a"])[0]
    assert np.allclose(
        np.asarray(leaf(larger).detach() if kind in ("module", "state dict") else leaf(larger))[6], before.mean(0)
    )


def test_tied_leaves_of_a_torch_file_stay_tied(tmp_path):
    torch.save(tied().state_dict(), tmp_path / "m.pt")
    for name, change in (("k", lambda words: words.keep([1, 2])), ("p", lambda words: words.pad(8))):
        change(pm.vocabulary(pm.open(tmp_path / "m.pt")))[0].save(tmp_path / f"{name}.pt")
        new = torch.load(tmp_path / f"{name}.pt")
        assert new["wte.weight"].data_ptr() == new["lm_head.weight"].data_ptr()
        assert len(new["wte.weight"]) == {"k": 2, "p": 8}[name]


def test_tokens_of_shards_and_of_what_was_edited_before(tmp_path):
    path = folder_of(tmp_path / "m", LEAVES)
    pm.open(path).save(tmp_path / "s", max_shard_size=60)
    assert (tmp_path / "s" / "model.safetensors.index.json").exists()
    edited = pm.at(pm.open(tmp_path / "s"), "lm_head.bias").multiply(2)
    tree, _ = pm.vocabulary(edited).keep([1])
    again, report = pm.vocabulary(tree).extend(["hen"])
    assert report.tokens == {"hen": 3}
    again.save(tmp_path / "n")
    assert pm.open(tmp_path / "n")["lm_head.bias"].tolist() == [0, 2, 8, np.float32(10 / 3)]
