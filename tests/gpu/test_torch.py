"""torch on CUDA: edits keep device and strides, in place they need no second model, and frozen leaves no moments."""

import re
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import paramend as pm
from paramend.edits.ops import OPS

SHAPE = (4, 6, 3, 3)
ARGS = {
    "fill": [0.5],
    "add": [0.5],
    "project_out": [[1.0, 0, 0, 2], 1.0, 0],
    "multiply": [0.5],
    "clip": [-0.1, 0.1],
    "apply": [lambda x: x + 1],
    "cast": ["float16"],
    "noise": [0.1],
    "reinit": ["lecun_normal"],
    "transpose": [(1, 0, 2, 3)],
    "reshape": [(4, -1)],
    "take": [[2, 0]],
    "permute": [[3, 1, 0, 2]],
}
STRIDES = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


def values(home):
    return torch.arange(216, device=home).reshape(SHAPE) / 216


def called(at, verb, value, suffix=""):
    return getattr(at, verb + suffix)(*(ARGS.get(verb, ()) if verb != "set" else [value]))


@pytest.mark.parametrize("verb", OPS)
def test_a_verb_leaves_tensors_on_their_device(verb, home):
    weight = nn.Parameter(values(home), requires_grad=False)
    tree = {"w": weight, "b": values("cpu")}
    made = called(pm.at(tree, "w"), verb, np.ones(SHAPE, "float32"))
    assert made["w"].device == home and made["b"] is tree["b"]
    assert isinstance(made["w"], nn.Parameter) and not made["w"].requires_grad
    host = called(pm.at({"w": values("cpu")}, "w"), verb, np.ones(SHAPE, "float32"))["w"]
    assert (made["w"].shape, made["w"].dtype) == (host.shape, host.dtype)
    if verb not in ("project_out", "noise"):  # which compute with another rounding
        assert torch.equal(made["w"].cpu(), host)


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("verb", [name for name in OPS if name not in ("transpose", "reshape", "take")])
def test_a_verb_keeps_strides(verb, strides, home):
    weight = STRIDES[strides](values(home))
    made = called(pm.at({"w": weight}, "w"), verb, torch.ones(SHAPE, device=home))["w"]
    assert made.stride() == weight.stride() and made.device == home


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("verb", [name for name, op in OPS.items() if op.keeps_spec])
def test_in_place_the_memory_is_the_same(verb, strides, home):
    weight = STRIDES[strides](values(home))
    before = weight.data_ptr(), weight.stride(), weight.device
    called(pm.at({"w": weight}, "w"), verb, torch.ones(SHAPE, device=home), "_")
    assert (weight.data_ptr(), weight.stride(), weight.device) == before


# ---- memory --------------------------------------------------------------------------------------------------

LEAF = 1 << 26  # bytes: the host allocates and frees as much by itself, so that its peak can be seen


@contextmanager
def peak(home):
    """The bytes that were needed at most, beyond those at the start, in a list."""
    found = []
    if home.type == "cuda":
        start = torch.cuda.memory_allocated(home)
        torch.cuda.reset_peak_memory_stats(home)
        yield found
        found.append(torch.cuda.max_memory_allocated(home) - start)
        return
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])
    yield found
    found.append(1024 * (int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) - start))


IN_PLACE = {
    "zero": lambda at: at.zero_(),
    "fill": lambda at: at.fill_(0.5),
    "multiply": lambda at: at.multiply_(0.5),
    "add": lambda at: at.add_(1.0),
    "clip": lambda at: at.clip_(-1, 1),
    "a slice": lambda at: at[:10].zero_(),
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize("name", IN_PLACE)
def test_an_edit_in_place_needs_one_leaf_more_at_most(name, home):
    tree = {key: torch.ones(LEAF // 4, device=home) for key in "abcd"}
    with peak(home) as found:
        IN_PLACE[name](pm.at(tree, "**"))
    print(found)
    assert found[0] <= 1.1 * LEAF


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.slow
def test_an_edit_of_one_leaf_leaves_the_others_where_they_are(home):
    tree = {key: torch.ones(LEAF // 4, device=home) for key in "abcd"}
    with peak(home) as found:
        made = pm.at(tree, "a").zero()
    assert LEAF <= found[0] <= 1.1 * LEAF
    assert all(made[key] is tree[key] for key in "bcd")


# ---- optimizers and models -----------------------------------------------------------------------------------


def test_a_frozen_parameter_has_no_moments_on_the_device(home):
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)).to(home)
    groups = [{"params": module[0].parameters()}, {"params": module[1].parameters(), "lr": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)

    def step():
        optimizer.zero_grad()
        module(torch.ones(1, 64, device=home)).sum().backward()
        optimizer.step()
        return {id(p): [x for x in state.values() if x.numel() > 1] for p, state in optimizer.state.items()}

    assert len(step()) == 4
    pm.freeze_(module, "0.**", optimizer=optimizer)
    before = [p.detach().clone() for p in module[0].parameters()]
    held = step()
    assert {*held} == {id(p) for p in module[1].parameters()}
    assert all(x.device == home for moments in held.values() for x in moments)
    assert all(map(torch.equal, module[0].parameters(), before))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8", "bool"])
def test_values_go_to_a_file_and_come_back_onto_the_device(dtype, home, tmp_path):
    tree = {"w": STRIDES["channels_last"](values(home) * 8).to(getattr(torch, dtype))}
    pm.save(tree, tmp_path / "m.safetensors")
    blank = {"w": torch.empty_like(tree["w"])}
    with pm.open(tmp_path / "m.safetensors") as source:
        made, _ = pm.graft(blank, source)
        assert made["w"].device == home and made["w"].stride() == tree["w"].stride()
        assert not pm.diff(made, source) and not pm.diff(tree, source)


def test_a_module_is_edited_beside_its_twin_on_the_host(home):
    def model():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 5))

    host, there = model(), model().to(home, memory_format=torch.channels_last)
    there.load_state_dict(host.state_dict())
    for module in (host, there):
        pm.at(module, "0.weight").multiply_(0.5)
        pm.at(module, "3.weight")[:2].zero_()
        pm.at(module, "1.running_mean").fill_(0.25)
    assert {p.device for p in there.state_dict().values()} == {home}
    assert there[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not pm.diff(host, there)
