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
from paramend.leaves.schemes import SCHEMES
from support.quantized import LAYOUTS, stored, write

EETQ = LAYOUTS["eetq", "EETQ"]
WEIGHT, SCALE = "model.layers.0.mlp.fc.weight", "model.layers.0.mlp.fc.weight_scales"
# What is recognised and cannot be decoded.
REFUSED = [who for who in LAYOUTS if all(row.codec is None for row in SCHEMES if row.name == who[0])]
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
    "project_out": (np.ones(4),),
}


@pytest.fixture
def eetq(tmp_path):
    return write(tmp_path / "model.safetensors", stored(EETQ))


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
    "numpy": lambda tmp_path: stored(EETQ),
    "torch": lambda tmp_path: in_torch(stored(EETQ)),
    "jax": lambda tmp_path: {name: jnp.asarray(x) for name, x in stored(EETQ).items() if x.dtype != "float64"},
    "safetensors": lambda tmp_path: pm.open(write(tmp_path / "m.safetensors", stored(EETQ))),
    "pt": lambda tmp_path: pm.open(saved(tmp_path / "m.pt")),
    "npz": lambda tmp_path: pm.open(saved(tmp_path / "m.npz")),
    "msgpack": lambda tmp_path: pm.open(saved(tmp_path / "m.msgpack")),
}


def saved(path):
    pm.save(in_torch(stored(LAYOUTS["eetq", "EETQ"])), path)
    return path


@pytest.mark.parametrize("where", TREES)
@pytest.mark.parametrize("verb", OPS)
def test_every_edit_of_values_is_refused(verb, where, tmp_path):
    tree = TREES[where](tmp_path)
    for selector in ("**", "**.fc.weight", "**.fc.weight_*"):
        with pytest.raises(Quantized) as caught:
            getattr(pm.at(tree, selector), verb)(*ARGS.get(verb, ()))
        error = caught.value
        assert error.scheme == "eetq" and error.payload.endswith("weight") and len(error.companions) == 1
        assert all(name in str(error) for name in (error.scheme, error.payload, *error.companions, verb))
        assert "raw=True" in error.hint and ("--raw" in error.hint) == isinstance(tree, pm.Checkpoint)


@pytest.mark.parametrize("who", REFUSED, ids=" ".join)
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
    for tree in (stored(EETQ), in_torch(stored(EETQ))):
        before = {name: in_bytes(x) for name, x in tree.items()}
        with pytest.raises(Quantized):
            getattr(pm.at(tree, "**"), f"{verb}_")(*ARGS.get(verb, ()))
        assert {name: in_bytes(x) for name, x in tree.items()} == before


def test_a_new_row_of_the_table_is_refused():
    tree = editable(stored(EETQ))
    op = Op("flip", "the leaf is turned", (), lambda library, x, args, place: x[::-1])
    with pytest.raises(Quantized, match=r"cannot take flip\(\)"):
        tree.edited({tree.index.numbers[0]: Call(op)})


def test_nothing_is_read_before_a_refusal(eetq):
    opened = pm.open(eetq)
    opened.source.close()
    with pytest.raises(Quantized):
        pm.at(opened, "**").apply(lambda x: 1 / 0)


def test_the_hint_selects_the_rest(eetq):
    opened = pm.open(eetq)
    with pytest.raises(Quantized) as caught:
        pm.at(opened, "**").multiply(2)
    assert 'pm.sel(selector).where(dtype="float64") leaves quantised weights out' in caught.value.hint
    assert pm.at(opened, pm.sel("**").where(dtype="float64")).multiply(2).plan.changed[0].path == "model.norm.weight"


def test_a_traced_tree_is_refused_as_it_is_traced():
    layer = {"kernel": jnp.ones((4, 8), jnp.int8), "scale": jnp.ones(8)}
    with pytest.raises(Quantized, match="kernel cannot take multiply"):
        jax.make_jaxpr(lambda layer: pm.at(layer, "**").multiply(2))(layer)


def test_several_weights_are_counted(tmp_path):
    tree = stored(EETQ, "a") | stored(EETQ, "b") | stored(EETQ, "c")
    with pytest.raises(Quantized, match=r"\n\nso are b\.weight, c\.weight\n\nhint"):
        pm.at(tree, "**").zero()


# ---- raw ---------------------------------------------------------------------------------------------------------


def test_raw_takes_leaves_as_they_are_stored(eetq, tmp_path):
    zeros = np.zeros((4, 8), "int8")
    opened = pm.open(eetq, raw=True)
    assert pm.at(opened, WEIGHT).zero()[WEIGHT].tobytes() == zeros.tobytes()
    assert pm.at(pm.open(eetq), WEIGHT, raw=True).zero()[WEIGHT].tobytes() == zeros.tobytes()
    assert pm.at(stored(EETQ), WEIGHT, raw=True).zero()[WEIGHT].tobytes() == zeros.tobytes()
    tree = stored(EETQ)
    pm.at(tree, SCALE, raw=True)[0].fill_(2)
    assert tree[SCALE][0] == 2
    pm.at(opened, SCALE).multiply(2).save(tmp_path / "out.safetensors")
    written = load_file(tmp_path / "out.safetensors")
    assert written[SCALE].tolist() == (stored(EETQ)[SCALE] * 2).tolist()
    assert written[WEIGHT].view(torch.uint8).numpy().tobytes() == stored(EETQ)[WEIGHT].tobytes()


def test_raw_stays_with_what_is_made_of_a_checkpoint(eetq):
    opened = pm.open(eetq, raw=True)
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
    assert not pm.at(pm.open(eetq), WEIGHT, raw=True).zero().raw
    assert not pm.open(eetq).raw


def test_a_patch_is_refused_and_raw_is_made_in_place_and_undone(eetq):
    before = eetq.read_bytes()
    with pytest.raises(Quantized):
        pm.patch(eetq, lambda tree: pm.at(tree, WEIGHT).zero())
    assert eetq.read_bytes() == before and not list(eetq.parent.glob("*.undo"))
    pm.patch(eetq, lambda tree: pm.at(tree, WEIGHT).zero(), raw=True)
    assert not load_file(eetq)[WEIGHT].view(torch.uint8).any()
    pm.undo(eetq)
    assert eetq.read_bytes() == before


# ---- what moves bytes alone --------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", LAYOUTS, ids=" ".join)
def test_groups_are_deleted_and_renamed_whole(who, tmp_path):
    tree = stored(LAYOUTS[who])
    opened = pm.open(write(tmp_path / "m.safetensors", tree))
    for leaves in (opened, tree):
        assert pm.at(pm.at(leaves, "**.fc.**").delete(), "**").paths == ["model.norm.weight"]
    renamed = pm.at(opened, "model.layers.<n>.mlp.**").rename("h.<n+1>.ffn.**")
    renamed.save(tmp_path / "out.safetensors")
    written = load_file(tmp_path / "out.safetensors")
    for name, values in tree.items():
        found = written[name.replace("model.layers.0.mlp", "h.1.ffn")]
        assert found.reshape(-1).view(torch.uint8).numpy().tobytes() == values.tobytes()


@pytest.mark.parametrize("who", REFUSED, ids=" ".join)
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


def test_a_rename_within_nested_dicts_keeps_groups():
    layer = {"weight": np.ones((4, 4), ml_dtypes.float8_e4m3fn), "weight_scale_inv": np.ones((1, 1), "float32")}
    tree = {"layers": [{"fc": layer}, {"fc": dict(layer)}]}
    renamed = pm.at(tree, "layers/<n>/**").rename("h_<n>/**")
    assert list(renamed) == ["h_0", "h_1"] and list(renamed["h_1"]["fc"]) == ["weight", "weight_scale_inv"]
    renamed = pm.at(tree, "layers/<n>/fc/weight").rename("layers/<n>/fc/kernel")
    assert list(renamed["layers"][0]["fc"]) == ["kernel", "kernel_scale_inv"]
    qweight = stored(LAYOUTS["awq", "AutoAWQ"], "fc")
    assert "gate.qzeros" in pm.at(qweight, "fc.weight").rename("gate.weight")
    with pytest.raises(Quantized, match=r"fc\.weight cannot be called kernel"):
        pm.at(qweight, "fc.weight").rename("fc.kernel")


def test_layers_are_stacked_deepened_dropped_and_converted_as_bytes(tmp_path):
    layout = LAYOUTS["fp8-block", "DeepSeek-V3"]
    tree = stored(layout, "layers.0.fc") | stored(layout, "layers.1.fc")
    opened = pm.open(write(tmp_path / "m.safetensors", tree))
    stacked = pm.stack_layers(opened, "layers[*]")
    assert stacked["layers.fc.weight"].shape == (2, 256, 200)
    again = pm.unstack_layers(stacked, "layers", into="layers.<n>")
    again.save(tmp_path / "again.safetensors")
    deeper = pm.deepen(opened, layers="layers[*]", order=[0, 1, 1])[0]
    deeper.save(tmp_path / "deeper.safetensors")
    for name, of in (("again", "layers.1.fc"), ("deeper", "layers.2.fc")):
        raw = pm.open(tmp_path / f"{name}.safetensors", raw=True)
        for part in layout:
            assert raw[f"{of}.{part}"].tobytes() == tree[f"layers.1.fc.{part}"].tobytes()
    opened.save(tmp_path / "m.pt")
    assert not pm.diff(pm.open(tmp_path / "m.safetensors", raw=True), pm.open(tmp_path / "m.pt", raw=True))


# ---- modules -----------------------------------------------------------------------------------------------------


class EetqLinear(torch.nn.Module):
    """A module with the names of EETQ."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
        self.weight_scales = torch.nn.Parameter(torch.ones(4), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.ones(4))


def test_a_torch_module_is_refused_and_stays_as_it_is():
    module = EetqLinear()
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
    assert list(pm.freeze_(module, "**")) == ["weight", "weight_scales", "bias"]


def test_the_codes_of_bitsandbytes_are_refused_in_a_module_that_keeps_their_scales_aside():
    class Params4bit(torch.nn.Parameter):
        """As in bitsandbytes: packed codes, with the scales as an attribute."""

    weight = torch.Tensor._make_subclass(Params4bit, torch.ones(8, 1, dtype=torch.uint8), False)
    weight.quant_state = object()
    with pytest.raises(pm.errors.Unsupported, match="codes of bitsandbytes"):
        pm.at({"weight": weight}, "weight").zero()


def test_a_tied_weight_is_refused_under_every_path():
    codes, scale = torch.ones(4, 4, dtype=torch.int8), torch.ones(4)
    tree = {"embed": {"weight": codes, "weight_scales": scale}, "head": {"tied": codes}}
    for path in ("embed.weight", "head.tied"):
        with pytest.raises(Quantized) as caught:
            pm.at(tree, path).zero()
        assert caught.value.payload == "embed.weight"
