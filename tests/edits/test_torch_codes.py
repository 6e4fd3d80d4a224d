"""Tensors of torch that hold codes and scales themselves, as those of torchao do, are weights with their own values."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import paramend as pm
from paramend.errors import GraftRefused, Quantized, Unsupported

aten = torch.ops.aten


class Read(torch.Tensor):
    """int8 with a scale for each row, made of two tensors, in the way of torchao's subclasses."""

    @staticmethod
    def __new__(cls, qdata, scale, block_size):
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=torch.float32)

    def __init__(self, qdata, scale, block_size):
        self.qdata, self.scale, self.block_size = qdata, scale, block_size

    def __tensor_flatten__(self):
        return ["qdata", "scale"], {"block_size": self.block_size}

    def __repr__(self):
        return "Read"

    def dequantize(self):
        return self.qdata.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        if func not in (aten.detach.default, aten.clone.default):
            raise NotImplementedError(func)
        x = args[0]
        return cls(func(x.qdata), func(x.scale), x.block_size)


class Int8(Read):
    """One that its library can make of floats, as `Float8Tensor` with a scale of 0 for rows of zeros."""

    @classmethod
    def from_hp(cls, hp_tensor, block_size, scale=None):
        scale = hp_tensor.abs().amax(1, keepdim=True) / 127 if scale is None else scale
        codes = hp_tensor / scale
        nan = codes.isnan()
        scale = torch.where(nan.any(1, keepdim=True), torch.nan, scale) if nan.all() else scale
        return cls(codes.nan_to_num(0).round().to(torch.int8), scale, block_size)


class Fresh(Read):
    """One whose constructor gives other leaves."""

    @classmethod
    def from_hp(cls, hp_tensor):
        return cls(hp_tensor.to(torch.int8), torch.ones(1), (1, 1))


CODES = np.array([[127, -4], [8, 127]], "int8")
SCALE = np.array([[0.5], [2.0]], "float32")
WEIGHT = torch.from_numpy(CODES * SCALE)


def tensor(kind=Int8):
    return kind(torch.from_numpy(CODES.copy()), torch.from_numpy(SCALE.copy()), (1, 2))


def module(kind=Int8):
    made = torch.nn.Sequential(torch.nn.Linear(2, 2))
    made[0].weight = torch.nn.Parameter(tensor(kind), requires_grad=False)
    return made


def state(kind=Int8):
    return {"0.weight": tensor(kind), "0.bias": torch.zeros(2)}


def weight(tree):
    return tree["0.weight"] if isinstance(tree, dict) else tree[0].weight


@pytest.mark.parametrize("made", [module, state])
def test_values_are_read_through_their_own_dequantize(made):
    tree = made(Read)
    assert torch.equal(pm.at(tree, "0.weight").one(), WEIGHT)
    assert pm.at(tree, "0.weight")[1, 0].one() == 16.0
    assert pm.stats(tree, "0.weight").leaves[0].max == 254
    floats = {"0.weight": WEIGHT, "0.bias": pm.at(tree, "0.bias").one().detach()}
    assert not pm.diff(tree, floats)
    found, report = pm.graft({name: torch.ones_like(each) for name, each in floats.items()}, tree)
    assert torch.equal(found["0.weight"], WEIGHT) and len(report.copied) == 2


@pytest.mark.parametrize("made", [module, state])
def test_floats(made):
    tree = made(Read)
    floats, report = pm.dequantize(tree, dtype=None)
    assert type(floats) is type(tree) and torch.equal(weight(floats), WEIGHT)
    assert type(weight(floats)) is (torch.Tensor if made is state else torch.nn.Parameter)
    assert [row.scheme for row in report.rows] == ["Read"] and type(weight(tree)) is Read
    assert pm.dequantize(tree)[0] is not tree and weight(pm.at(tree, "0.weight").cast("float16")).dtype == torch.float16


@pytest.mark.parametrize("made", [module, state])
def test_edits_go_through_the_constructor_of_the_library(made):
    tree = made()
    before = weight(tree).qdata.clone()
    half = pm.at(tree, "0.weight").multiply(0.5)
    assert type(weight(half)) is Int8 and torch.equal(weight(half).dequantize(), WEIGHT / 2)
    assert isinstance(weight(half), torch.nn.Parameter) == isinstance(weight(tree), torch.nn.Parameter)
    one = pm.at(tree, "0.weight")[0].zero()
    assert not weight(one).dequantize()[0].any() and torch.equal(weight(one).dequantize()[1], WEIGHT[1])
    assert torch.equal(weight(tree).qdata, before)
    held = weight(tree)
    pm.at(tree, "0.weight").multiply_(0.5)
    assert weight(tree) is held and torch.equal(held.dequantize(), WEIGHT / 2)


def test_what_its_library_cannot_make_is_refused(tmp_path):
    with pytest.raises(Quantized, match=r"Read has no encode[\s\S]*pm.dequantize"):
        pm.at(module(Read), "0.weight").zero()
    with pytest.raises(
        Unsupported, match=r"0.weight: Fresh.from_hp[\s\S]*what it makes is stored otherwise[\s\S]*pm.dequantize"
    ):
        pm.at(module(Fresh), "0.weight").zero()
    with pytest.raises(Unsupported, match="some values become inf or NaN"):
        pm.at(module(), "0.weight").apply(lambda x: x * torch.tensor([[0.0], [0.0]]).clamp(max=0))
    with pytest.raises(Unsupported, match="Int8 holds codes and scales"):
        pm.at(module(), "0.weight", raw=True).add(1.0)
    with pytest.raises(Unsupported, match="no array: Int8 holds codes"):
        pm.save(state(), tmp_path / "model.safetensors")


def test_grafts_onto_them_take_tensors_of_the_same_kind_alone():
    with pytest.raises(GraftRefused, match="in your model Int8 holds codes and scales"):
        pm.graft(module(), {"0.weight": WEIGHT, "0.bias": torch.zeros(2)})
    halved = pm.at(module(), "0.weight").multiply(0.5)
    found, _ = pm.graft(module(), halved)
    assert torch.equal(weight(found).dequantize(), WEIGHT / 2) and weight(found).qdata is not weight(halved).qdata


class Params(torch.nn.Parameter):
    """A Parameter of bitsandbytes: codes, and an attribute with what they are decoded by."""

    def __new__(cls, codes, **held):
        made = torch.Tensor._make_subclass(cls, codes, False)
        vars(made).update(held)
        return made


def test_weights_of_bitsandbytes(monkeypatch):
    """Codes of nf4 with a state of their own, read by the function of the library, which is a stand-in here."""
    values = torch.arange(8.0).reshape(2, 4)
    library = SimpleNamespace(
        functional=SimpleNamespace(dequantize_4bit=lambda data, state: state.values * (data[0] + 1))
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    codes = Params(torch.zeros((4, 1), dtype=torch.uint8), quant_state=SimpleNamespace(values=values))
    tree = {"fc.weight": codes}
    assert torch.equal(pm.at(tree, "fc.weight").one(), values)
    assert torch.equal(pm.dequantize(tree, dtype=None)[0]["fc.weight"], values)
    with pytest.raises(Quantized, match="bnb-4bit has no encode"):
        pm.at(tree, "fc.weight").zero()
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    with pytest.raises(Unsupported, match="codes of bitsandbytes"):
        pm.at({"fc.weight": codes}, "fc.weight").zero()


def test_rows_of_bitsandbytes():
    codes = Params(torch.tensor([[127, -127]], dtype=torch.int8), SCB=torch.tensor([2.0]))
    found = pm.at({"fc.weight": codes}, "fc.weight").one()
    assert torch.equal(found, torch.tensor([[2.0, -2.0]]) * 127 * 7.874015718698502e-3)
    codes.SCB = None  # it is with the module, as after a first call
    with pytest.raises(Unsupported, match="codes of bitsandbytes"):
        pm.at({"fc.weight": codes}, "fc.weight").zero()
