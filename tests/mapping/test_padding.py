"""Padded vocabularies and tied leaves: what numpy makes by hand, and a way back that loses nothing unseen."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import paramend as pm
from paramend.cli.main import cli
from paramend.errors import BadArgument, SpecMismatch, Unsupported

PATHS = {"from": "embed", "to": "words"}
EMBED = np.arange(1, 31, dtype="float32").reshape(10, 3)


def layout(**args):
    return pm.Layout([PATHS | {"do": [{"pad": args}]}], rest="keep")


@pytest.mark.parametrize(
    ("args", "numbers", "length"),
    [
        ({"size": 10, "multiple": 8}, {}, 16),
        ({"size": 10, "to": 12}, {}, 12),
        ({"size": "vocab_size", "multiple": [4, "tp"]}, {"vocab_size": 10, "tp": 3}, 12),
        ({"size": "vocab_size", "to": "padded"}, {"vocab_size": 10, "padded": 11}, 11),
        ({"size": 10, "multiple": 5}, {}, 10),
        ({"size": 3, "multiple": 2, "axis": -1}, {}, 4),
    ],
)
@pytest.mark.parametrize("kind", [torch.tensor, lambda x: x.astype(ml_dtypes.bfloat16)])
def test_zeros_follow_and_are_cut_again(args, numbers, length, kind):
    axis = args.get("axis", 0)
    block = np.zeros((length - 10, 3) if axis == 0 else (10, length - 3), "float32")
    tree, _ = layout(**args).to({"embed": kind(EMBED), "b": np.ones(2)}, **numbers)
    assert np.array_equal(np.asarray(tree["words"]).astype("f4"), np.concatenate([EMBED, block], axis))
    again, _ = layout(**args).back(tree, **numbers)
    assert np.array_equal(np.asarray(again["embed"]).astype("f4"), EMBED) and "words" not in again
    assert type(tree["words"]) is type(kind(EMBED))


def test_arrays_of_jax_are_padded_too():
    tree, _ = layout(size=10, to=16).to({"embed": jnp.asarray(EMBED)})
    assert isinstance(tree["words"], jnp.ndarray) and not tree["words"][10:].any()
    assert np.array_equal(layout(size=10, to=16).back(tree)[0]["embed"], EMBED)


def test_on_disk_it_is_lazy_recorded_and_checked(tmp_path):
    save_file({"embed": EMBED.astype(ml_dtypes.bfloat16)}, tmp_path / "m.safetensors")
    with pm.open(tmp_path / "m.safetensors") as model:
        tree, report = layout(size=10, multiple=128).to(model)
        tree.save(tmp_path / "o.safetensors", record=True)
    assert report.rows[0].origin == "concat(embed, zeros([118, 3], bfloat16), axis=0)"
    found = load_file(tmp_path / "o.safetensors")["words"]
    assert found[:10].tolist() == EMBED.tolist() and found.shape == (128, 3) and not found[10:].any()
    assert pm.record(tmp_path / "o.safetensors").leaves[0].origin == report.rows[0].origin
    assert pm.verify_record(tmp_path / "o.safetensors", sources=[tmp_path / "m.safetensors"]) == ["words"]
    with pm.open(tmp_path / "o.safetensors") as model:
        layout(size=10, multiple=128).back(model)[0].save(tmp_path / "b.safetensors")
    assert load_file(tmp_path / "b.safetensors")["embed"].tolist() == EMBED.tolist()


@pytest.mark.parametrize("value", [1.0, -0.0, np.nan])
@pytest.mark.parametrize("disk", [True, False])
def test_what_pad_did_not_put_there_is_not_cut(tmp_path, disk, value):
    words = np.concatenate([EMBED, np.zeros((6, 3), "float32")])
    words[15, 2] = value
    save_file({"words": words}, tmp_path / "m.safetensors")
    tree = pm.open(tmp_path / "m.safetensors") if disk else {"words": words}
    with pytest.raises(BadArgument, match=r"words: what follows float32\[10,3\] is not zero") as error:
        layout(size=10, multiple=8).back(tree)
    assert "take(slice(0, 10), axis=0)" in error.value.hint
    cut = pm.at(tree, "words").take(slice(0, 10), axis=0)  # the way out
    again, _ = layout(size=10, multiple=8).back(cut)
    assert np.array_equal(again["embed"], EMBED)


@pytest.mark.parametrize(
    ("way", "length", "args", "says"),
    [
        ("to", 12, {"size": 10, "multiple": 8}, "cannot be padded from 10 to 16"),
        ("to", 10, {"size": 10, "to": 8}, "cannot be padded from 10 to 8"),
        ("back", 24, {"size": 10, "multiple": 8}, "is 24 long, and for 10 places `pad` makes 16"),
        ("back", 9, {"size": 10, "multiple": 8}, "is 9 long"),
        ("back", 16, {"size": "vocab_size", "multiple": 8}, "is 16 long, of which `size` are true"),
    ],
)
def test_another_length_is_refused(way, length, args, says):
    name = {"to": "embed", "back": "words"}[way]
    with pytest.raises(SpecMismatch, match=says):
        getattr(layout(**args), way)({name: np.zeros((length, 3))})


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"size": 3},
        {"size": 3, "to": 4, "multiple": 2},
        {"multiple": 2},
        {"size": [3], "to": 4},
        {"size": 3, "to": 0},
        {"size": 3, "multiple": [2, 0]},
        {"size": 3, "multiple": [2, "a b"]},
        {"size": 3, "multiple": 2.0},
    ],
)
def test_a_step_that_is_none(args):
    with pytest.raises(BadArgument, match="pad"):
        layout(**args)


def test_a_layout_with_them_is_data(tmp_path):
    made = pm.Layout(
        [
            PATHS | {"do": [{"pad": {"size": "vocab_size", "multiple": ["a", 8]}}]},
            {"from": "h", "to": ["x", "y"], "do": ["tie"]},
        ]
    )
    made.save(tmp_path / "l.yaml")
    assert pm.Layout.load(tmp_path / "l.yaml") == made


# ---- Megatron ------------------------------------------------------------------------------------------------------


def test_megatrons_vocabulary(tmp_path):
    """As `_vocab_size_with_padding` of Megatron-LM: up to a multiple of divisible-by times tensor-parallel."""
    full = {name: np.ones((2, 2), "float32") for name in ("q", "k", "v", "o")}
    block = {f"model.layers.0.self_attn.{name}_proj.weight": array for name, array in full.items()}
    block |= {f"model.layers.0.mlp.{name}_proj.weight": np.ones((2, 2), "float32") for name in ("gate", "up", "down")}
    norms = ("model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm")
    block |= {f"{name}.weight": np.ones(2, "float32") for name in norms}
    words = np.arange(1, 23, dtype="float32").reshape(11, 2)
    files = {**block, "model.embed_tokens.weight": words, "lm_head.weight": words + 100}
    (tmp_path / "hf").mkdir()
    save_file(files, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text(
        '{"model_type": "llama", "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 11}'
    )
    layout, parallel = pm.layout("hf_to_megatron_llama"), ["--set", "tensor_model_parallel_size=2"]
    command = ["layout", "hf_to_megatron_llama", "--set", "make_vocab_size_divisible_by=8", *parallel]
    done = CliRunner().invoke(cli, [*command, str(tmp_path / "hf"), "-o", str(tmp_path / "mcore")])
    assert done.exit_code == 0, done.output
    found = load_file(tmp_path / "mcore" / "model.safetensors")
    for name, right in (("embedding.word_embeddings.weight", words), ("output_layer.weight", words + 100)):
        assert found[name].shape == (16, 2) and np.array_equal(found[name][:11], right) and not found[name][11:].any()
    done = CliRunner().invoke(cli, [*command, str(tmp_path / "mcore"), "-o", str(tmp_path / "back"), "--back"])
    assert done.exit_code == 0, done.output
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert again.keys() == files.keys() and all(np.array_equal(again[name], files[name]) for name in files)
    # without the numbers nothing is padded, and what is padded is not taken for a larger vocabulary
    with pm.open(tmp_path / "hf") as model:
        assert layout.to(model)[0]["output_layer.weight"].shape == (11, 2)
    with pm.open(tmp_path / "mcore") as model, pytest.raises(SpecMismatch, match="is 16 long, and for 11 places"):
        layout.back(model)
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    tree, _ = layout.to(files, make_vocab_size_divisible_by=4, **heads)
    assert tree["output_layer.weight"].shape == (12, 2)


# ---- ties ----------------------------------------------------------------------------------------------------------

TIE = pm.Layout([{"from": "h.<n>.embed", "to": ["h.<n>.words", "h.<n>.out"], "do": ["tie"]}])


@pytest.mark.parametrize("suffix", ["", ".safetensors", ".npz", ".pt"])
def test_a_tie_is_two_names_of_one_leaf(tmp_path, suffix):
    tree = {f"h.{n}.embed": EMBED + n for n in range(2)}
    tree["h.0.embed"][0] = [np.nan, -0.0, np.inf]
    both = pm.save(tree, tmp_path / f"m{suffix}") and pm.open(tmp_path / f"m{suffix}") if suffix else tree
    new, report = TIE.to(both)
    assert len(report.rows) == 4
    if suffix:
        new.save(tmp_path / f"o{suffix}", record=True)
        new = pm.open(tmp_path / f"o{suffix}")
        assert len(pm.verify_record(tmp_path / f"o{suffix}")) == 4
    for n in range(2):
        for name in ("words", "out"):
            assert np.asarray(new[f"h.{n}.{name}"]).tobytes() == tree[f"h.{n}.embed"].tobytes()
    again, _ = TIE.back(new)
    assert {name: np.asarray(again[name]).tobytes() for name in tree} == {name: x.tobytes() for name, x in tree.items()}


@pytest.mark.parametrize("disk", [True, False])
def test_leaves_that_differ_in_a_bit_are_not_tied(tmp_path, disk):
    tree = {"h.0.words": EMBED, "h.0.out": EMBED.copy()}
    tree["h.0.out"].view(np.uint8)[-1, -1] ^= 1
    save_file(tree, tmp_path / "m.safetensors")
    with pytest.raises(BadArgument, match=r"h\.0\.words, h\.0\.out: they are not equal"):
        TIE.back(pm.open(tmp_path / "m.safetensors") if disk else tree)
    with pytest.raises(SpecMismatch):
        TIE.back({"h.0.words": EMBED, "h.0.out": EMBED[:5]})


def test_leaves_without_values_cannot_be_checked():
    import jax

    spec = jax.ShapeDtypeStruct((10, 3), np.float32)
    assert set(TIE.to({"h.0.embed": spec})[0]) == {"h.0.words", "h.0.out"}
    with pytest.raises(Unsupported, match="has no values that could be checked"):
        TIE.back({"h.0.words": spec, "h.0.out": jax.ShapeDtypeStruct((10, 3), np.float32)})
    with pytest.raises(Unsupported, match="has no values that could be checked"):
        jax.eval_shape(lambda tree: TIE.back(tree)[0], {"h.0.words": spec, "h.0.out": spec})
    made = jax.eval_shape(lambda tree: layout(size=10, to=16).to(tree)[0], {"embed": spec})
    assert made["words"].shape == (16, 3)
