"""Edits that would take codes for values are refused before anything is read; what moves bytes alone works."""

import copy
import pickle
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import paramend as pm
from paramend.edits.call import Call, Op
from paramend.edits.memory import editable
from paramend.edits.ops import OPS
from paramend.errors import Quantized
from support.quantized import LAYOUTS, stored, write

FP8 = LAYOUTS["fp8-block", "DeepSeek-V3"]
WEIGHT, SCALE = "model.layers.0.mlp.fc.weight", "model.layers.0.mlp.fc.weight_scale_inv"
ARGS = {
    "fill": (1,),
    "set": (np.ones(3),),
    "add": (1,),
    "multiply": (2,),
    "clip": (0, 1),
    "apply": (abs,),
    "cast": ("bfloat16",),
    "noise": (0.1,),
    "reinit": ("lecun_normal",),
    "transpose": ((1, 0),),
    "reshape": ((-1,),),
    "take": ([0],),
    "permute": ([0],),
}


@pytest.fixture
def fp8(tmp_path):
    return write(tmp_path / "model.safetensors", stored(FP8))


def in_torch(tree):
    return {
        name: torch.from_numpy(np.frombuffer(x.tobytes(), "uint8").copy())
        .view(getattr(torch, x.dtype.name))
        .reshape(x.shape)
        for name, x in tree.items()
    }


def in_bytes(x):
    return x.view(torch.uint8).numpy().tobytes() if isinstance(x, torch.Tensor) else x.tobytes()


TREES = {
    "numpy": lambda tmp_path: stored(FP8),
    "torch": lambda tmp_path: in_torch(stored(FP8)),
    "jax": lambda tmp_path: {name: jnp.asarray(x) for name, x in stored(FP8).items() if x.dtype != "float64"},
    "safetensors": lambda tmp_path: pm.open(write(tmp_path / "m.safetensors", stored(FP8))),
    "pt": lambda tmp_path: pm.open(saved(tmp_path / "m.pt")),
    "npz": lambda tmp_path: pm.open(saved(tmp_path / "m.npz", "eetq", "EETQ")),
    "msgpack": lambda tmp_path: pm.open(saved(tmp_path / "m.msgpack")),
}


def saved(path, *who):
    pm.save(in_torch(stored(LAYOUTS[who or ("fp8-block", "DeepSeek-V3")])), path)
    return path


@pytest.mark.parametrize("where", TREES)
@pytest.mark.parametrize("verb", OPS)
def test_every_edit_of_values_is_refused(verb, where, tmp_path):
    tree = TREES[where](tmp_path)
    for selector in ("**", "**.fc.weight", "**.fc.weight_*"):
        with pytest.raises(Quantized) as caught:
            getattr(pm.at(tree, selector), verb)(*ARGS.get(verb, ()))
        error = caught.value
        assert error.scheme in ("fp8-block", "eetq") and error.payload.endswith("weight") and len(error.companions) == 1
        assert all(name in str(error) for name in (error.scheme, error.payload, *error.companions, verb))
        assert "raw=True" in error.hint and ("--raw" in error.hint) == isinstance(tree, pm.Checkpoint)


@pytest.mark.parametrize("who", LAYOUTS, ids=" ".join)
def test_every_leaf_of_every_scheme_is_refused_alone(who, tmp_path):
    tree = stored(LAYOUTS[who])
    opened = pm.open(write(tmp_path / "m.safetensors", tree))
    for name in tree:
        if name != "model.norm.weight":
            with pytest.raises(Quantized, match=f"^{re.escape(name)} cannot take apply") as caught:
                pm.at(opened, name).apply(abs)
            assert caught.value.scheme == who[0]
    assert pm.at(opened, "model.norm.weight").multiply(2)["model.norm.weight"].tolist() == [2, 2, 2]


@pytest.mark.parametrize("verb", [name for name, op in OPS.items() if op.keeps_spec])
def test_in_place_nothing_changes(verb):
    for tree in (stored(FP8), in_torch(stored(FP8))):
        before = {name: in_bytes(x) for name, x in tree.items()}
        with pytest.raises(Quantized):
            getattr(pm.at(tree, "**"), f"{verb}_")(*ARGS.get(verb, ()))
        assert {name: in_bytes(x) for name, x in tree.items()} == before


def test_a_new_row_of_the_table_is_refused_unless_it_says_that_it_moves_bytes():
    tree = editable(stored(FP8))
    number = tree.index.numbers[0]
    for bytewise in (False, True):
        op = Op("flip", "the leaf is turned", (), lambda library, x, args, place: x[::-1], bytewise=bytewise)
        if bytewise:
            assert tree.edited({number: Call(op)})[WEIGHT].tobytes() == stored(FP8)[WEIGHT][::-1].tobytes()
        else:
            with pytest.raises(Quantized, match=r"cannot take flip\(\)"):
                tree.edited({number: Call(op)})


def test_nothing_is_read_before_a_refusal(fp8):
    opened = pm.open(fp8)
    opened.source.close()
    with pytest.raises(Quantized):
        pm.at(opened, "**").apply(lambda x: 1 / 0)


def test_the_hint_selects_the_rest(fp8):
    opened = pm.open(fp8)
    with pytest.raises(Quantized) as caught:
        pm.at(opened, "**").multiply(2)
    assert 'pm.sel(selector).where(dtype="float64") leaves quantised weights out' in caught.value.hint
    assert pm.at(opened, pm.sel("**").where(dtype="float64")).multiply(2).plan.changed[0].path == "model.norm.weight"


def test_a_traced_tree_is_refused_as_it_is_traced():
    layer = {"kernel": jnp.ones((4, 8), jnp.int8), "scale": jnp.ones(8)}
    with pytest.raises(Quantized, match="kernel cannot take multiply"):
        jax.make_jaxpr(lambda layer: pm.at(layer, "**").multiply(2))(layer)


def test_several_weights_are_counted(tmp_path):
    tree = stored(FP8, "a") | stored(FP8, "b") | stored(FP8, "c")
    with pytest.raises(Quantized, match=r"\n\nso are b\.weight, c\.weight\n\nhint"):
        pm.at(tree, "**").zero()


# ---- raw ---------------------------------------------------------------------------------------------------------


def test_raw_takes_leaves_as_they_are_stored(fp8, tmp_path):
    zeros = np.zeros((256, 200), ml_dtypes.float8_e4m3fn)
    opened = pm.open(fp8, raw=True)
    assert pm.at(opened, WEIGHT).zero()[WEIGHT].tobytes() == zeros.tobytes()
    assert pm.at(pm.open(fp8), WEIGHT, raw=True).zero()[WEIGHT].tobytes() == zeros.tobytes()
    assert pm.at(stored(FP8), WEIGHT, raw=True).zero()[WEIGHT].tobytes() == zeros.tobytes()
    tree = stored(FP8)
    pm.at(tree, SCALE, raw=True)[0].fill_(2)
    assert tree[SCALE][0].tolist() == [2, 2]
    pm.at(opened, SCALE).multiply(2).save(tmp_path / "out.safetensors")
    written = load_file(tmp_path / "out.safetensors")
    assert written[SCALE].tolist() == (stored(FP8)[SCALE] * 2).tolist()
    assert written[WEIGHT].view(torch.uint8).numpy().tobytes() == stored(FP8)[WEIGHT].tobytes()


def test_raw_stays_with_what_is_made_of_a_checkpoint(fp8):
    opened = pm.open(fp8, raw=True)
    made = [
        pm.at(opened, WEIGHT).zero(),
        pm.at(opened, "model.norm.weight").delete(),
        pm.at(opened, SCALE).rename("elsewhere"),
        pm.graft(opened, {"model.norm.weight": np.zeros(3)})[0],
        pm.deepen(opened, layers="model.layers[*]", order=[0, 0])[0],
        pm.Recipe([{"zero": WEIGHT}]).apply(opened),
        copy.copy(opened),
        copy.deepcopy(opened),
        pickle.loads(pickle.dumps(opened)),
    ]
    assert all(each.raw for each in made)
    assert not pm.at(pm.open(fp8), WEIGHT, raw=True).zero().raw
    assert not pm.open(fp8).raw


def test_a_patch_is_refused_and_raw_is_made_in_place_and_undone(fp8):
    before = fp8.read_bytes()
    with pytest.raises(Quantized):
        pm.patch(fp8, lambda tree: pm.at(tree, WEIGHT).zero())
    assert fp8.read_bytes() == before and not list(fp8.parent.glob("*.undo"))
    pm.patch(fp8, lambda tree: pm.at(tree, WEIGHT).zero(), raw=True)
    assert not load_file(fp8)[WEIGHT].view(torch.uint8).any()
    pm.undo(fp8)
    assert fp8.read_bytes() == before


# ---- what moves bytes alone --------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", LAYOUTS, ids=" ".join)
def test_groups_are_deleted_and_renamed_whole(who, tmp_path):
    tree = stored(LAYOUTS[who])
    opened = pm.open(write(tmp_path / "m.safetensors", tree))
    for leaves in (opened, tree):
        assert pm.at(pm.at(leaves, "**.fc.**").delete(), "**").paths == ["model.norm.weight"]
        renamed = pm.at(leaves, "model.layers.<n>.mlp.**").rename("h.<n+1>.ffn.**")
        with pytest.raises(Quantized):
            pm.at(renamed, "h.**").apply(abs)
    renamed = pm.at(opened, "model.layers.<n>.mlp.**").rename("h.<n+1>.ffn.**")
    renamed.save(tmp_path / "out.safetensors")
    written = load_file(tmp_path / "out.safetensors")
    for name, values in tree.items():
        found = written[name.replace("model.layers.0.mlp", "h.1.ffn")]
        assert found.reshape(-1).view(torch.uint8).numpy().tobytes() == values.tobytes()


@pytest.mark.parametrize("who", LAYOUTS, ids=" ".join)
def test_no_leaf_is_deleted_or_renamed_away_from_its_group(who, tmp_path):
    tree = stored(LAYOUTS[who])
    opened = pm.open(write(tmp_path / "m.safetensors", tree))
    for name in (name for name in tree if name != "model.norm.weight"):
        for leaves in (opened, tree):
            selection = pm.at(leaves, name)
            with pytest.raises(Quantized, match="would be deleted") as caught:
                selection.delete()
            whole = re.search('delete all of it: "(.*)"', caught.value.hint)[1]
            assert pm.at(pm.at(leaves, whole).delete(), "**").paths == ["model.norm.weight"]
            with pytest.raises(Quantized, match="would part a quantised weight"):
                selection.rename("elsewhere.x")
            assert len(pm.at(pm.at(leaves, name, raw=True).delete(), "**")) == len(tree) - 1
            assert "elsewhere.x" in pm.at(pm.at(leaves, name, raw=True).rename("elsewhere.x"), "**").paths


def test_a_rename_to_names_of_another_scheme_is_refused():
    tree = stored(LAYOUTS["gptq", "GPTQModel"])
    with pytest.raises(Quantized):
        pm.at(tree, "**.qweight").rename("**.weight")
    fp8 = stored(FP8)  # its scale under the other name that readers know
    assert pm.at(pm.at(fp8, SCALE).rename(SCALE.removesuffix("_inv")), "**").paths[1] == SCALE.removesuffix("_inv")


def test_a_rename_within_nested_dicts_keeps_groups():
    layer = {"weight": np.ones((4, 4), ml_dtypes.float8_e4m3fn), "weight_scale_inv": np.ones((1, 1), "float32")}
    tree = {"layers": [{"fc": layer}, {"fc": dict(layer)}]}
    assert list(pm.at(tree, "layers/<n>/**").rename("h_<n>/**")) == ["h_0", "h_1"]
    with pytest.raises(Quantized):
        pm.at(tree, "layers/<n>/fc/weight").rename("layers/<n>/fc/kernel_codes")


def test_layers_are_stacked_deepened_dropped_and_converted_as_bytes(tmp_path):
    tree = stored(FP8, "layers.0.fc") | stored(FP8, "layers.1.fc")
    opened = pm.open(write(tmp_path / "m.safetensors", tree))
    stacked = pm.stack_layers(opened, "layers[*]")
    assert stacked["layers.fc.weight"].shape == (2, 256, 200)
    with pytest.raises(Quantized):
        pm.at(stacked, "layers.**").zero()
    again = pm.unstack_layers(stacked, "layers", into="layers.<n>")
    assert again["layers.1.fc.weight"].tobytes() == tree["layers.1.fc.weight"].tobytes()
    deeper = pm.deepen(opened, layers="layers[*]", order=[0, 1, 1])[0]
    assert deeper["layers.2.fc.weight_scale_inv"].tolist() == tree["layers.1.fc.weight_scale_inv"].tolist()
    opened.save(tmp_path / "m.pt")
    assert not pm.diff(tmp_path / "m.safetensors", tmp_path / "m.pt")
    assert pm.at(opened, "**").get()["layers.0.fc.weight"].tobytes() == tree["layers.0.fc.weight"].tobytes()


# ---- modules -----------------------------------------------------------------------------------------------------


class FP8Linear(torch.nn.Module):
    """A module with the names of transformers' own."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale_inv = torch.nn.Parameter(torch.ones(1, 1), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.ones(4))


def test_a_torch_module_is_refused_and_stays_as_it_is():
    module = FP8Linear()
    for refused in (
        lambda: pm.at(module, "**").zero_(),
        lambda: pm.init_zero_(module),
        lambda: pm.init.zero_(torch.nn.Sequential(module)),
        lambda: pm.graft_(module, {"weight": torch.zeros(4, 4)}, missing="fresh"),
    ):
        with pytest.raises(Quantized):
            refused()
    assert module.weight.float().sum() == 16 and module.bias.sum() == 4
    pm.at(module, "bias").zero_()
    assert module.bias.sum() == 0
    assert list(pm.freeze_(module, "**")) == ["weight", "weight_scale_inv", "bias"]


def test_the_codes_of_bitsandbytes_are_refused_in_a_module_that_keeps_their_scales_aside():
    class Params4bit(torch.nn.Parameter):
        """As in bitsandbytes: packed codes, with the scales as an attribute."""

    weight = torch.Tensor._make_subclass(Params4bit, torch.ones(8, 1, dtype=torch.uint8), False)
    weight.quant_state = object()
    with pytest.raises(pm.errors.Unsupported, match="codes of bitsandbytes"):
        pm.at({"weight": weight}, "weight").zero()


def test_a_tied_weight_is_refused_under_every_path():
    codes, scale = torch.ones(4, 4).to(torch.float8_e4m3fn), torch.ones(1, 1)
    tree = {"embed": {"weight": codes, "weight_scale": scale}, "head": {"tied": codes}}
    for path in ("embed.weight", "head.tied"):
        with pytest.raises(Quantized) as caught:
            pm.at(tree, path).zero()
        assert caught.value.payload == "embed.weight"
