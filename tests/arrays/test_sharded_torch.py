"""DTensors and FSDP2: two gloo processes on CPU, with the exact number of collectives of each verb."""

import json

import pytest
from tests.support.processes import run_two

PROGRAM = """
import json, sys, warnings
import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard
import paramend as pm

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
meshes = [init_device_mesh("cpu", shape) for shape in ((2, 1), (1, 2))]
full = torch.arange(1.0, 16.0).reshape(5, 3)  # neither axis is divided evenly
rows = np.arange(15, dtype=np.float32).reshape(5, 3)
two = np.array([[1, 2, 3], [4, 5, 6]], np.float32)

# verb: (edit, collectives and the cut axis of the result, for a leaf cut along rows, along columns)
EDITS = {
    "zero": (lambda s: s.zero(), (0, 0), (0, 1)),
    "fill": (lambda s: s.fill(2.5), (0, 0), (0, 1)),
    "set": (lambda s: s.set(rows), (0, 0), (0, 1)),
    "add": (lambda s: s.add(np.ones(3, np.float32)), (0, 0), (0, 1)),
    "add a column": (lambda s: s.add(torch.arange(5.0)[:, None]), (0, 0), (0, 1)),
    "add a product": (lambda s: s.add((np.ones((5, 2)), np.ones((2, 3)))), (0, 0), (0, 1)),
    "project_out": (lambda s: s.project_out([0, 0, 1]), (0, 0), (1, 1)),
    "multiply": (lambda s: s.multiply(2), (0, 0), (0, 1)),
    "clip": (lambda s: s.clip(2, 9), (0, 0), (0, 1)),
    "cast": (lambda s: s.cast("bfloat16"), (0, 0), (0, 1)),
    "apply": (lambda s: s.apply(lambda x: x * 2), (0, 0), (0, 1)),
    "noise": (lambda s: s.noise(0.1, seed=3), (0, 0), (0, 1)),
    "reinit": (lambda s: s.reinit("lecun_normal"), (0, 0), (0, 1)),
    "permute rows": (lambda s: s.permute([4, 3, 2, 1, 0], axis=0), (1, 0), (0, 1)),
    "permute columns": (lambda s: s.permute([2, 1, 0], axis=1), (0, 0), (1, 1)),
    "transpose": (lambda s: s.transpose([1, 0]), (0, 1), (0, 0)),
    "reshape": (lambda s: s.reshape((5, 1, 3)), (0, 0), (0, 2)),
    "flatten": (lambda s: s.reshape((15,)), (1, None), (1, None)),
    "rows": (lambda s: s[1:4].zero(), (0, 0), (0, 1)),
    "last row": (lambda s: s[-1].fill(7.0), (0, 0), (0, 1)),
    "a column": (lambda s: s[:, 1].multiply(3), (0, 0), (0, 1)),
    "backwards": (lambda s: s[::-2].add(two[:1]), (0, 0), (0, 1)),
    "listed rows": (lambda s: s[np.array([4, 0])].set(two), (0, 0), (0, 1)),
    "a mask": (lambda s: s[rows > 7].fill(0.0), (1, 0), (1, 1)),
}


def cut(*axes):
    return distribute_tensor(full.clone(), mesh, [Replicate() if axis is None else Shard(axis) for axis in axes])


def grids():
    # The leaf over two axes of a mesh, last as FSDP2 cuts what tensor parallelism has cut.
    found = [distribute_tensor(full.clone(), grid, [Shard(0), Shard(1)]) for grid in meshes]
    both = distribute_tensor(full.clone(), meshes[0], [Shard(0), Shard(0)])
    strided = _StridedShard(0, split_factor=1), Shard(0)
    local = both.to_local().clone()
    return [*found, DTensor.from_local(local, meshes[0], strided, shape=full.shape, stride=full.stride())]


def alike(result, wanted):
    assert isinstance(result, DTensor)
    whole = result.full_tensor()
    return torch.equal(whole, wanted) and whole.dtype == wanted.dtype and result.stride() == wanted.stride()


for name, (edit, *expected) in EDITS.items():
    wanted = edit(pm.at({"w": full.clone()}, "w"))["w"]
    for axis, (sent, after) in zip((0, 1, None), [*expected, (0, None)]):
        leaf = cut(axis)
        with CommDebugMode() as counted:
            result = edit(pm.at({"w": leaf}, "w"))["w"]
        assert counted.get_total_counts() == sent, (name, axis, counted.get_comm_counts())
        assert alike(result, wanted), (name, axis)
        assert result.placements == ((Replicate() if after is None else Shard(after)),), (name, axis, result)
        assert torch.equal(leaf.full_tensor(), full), name
    for leaf in grids():
        assert alike(edit(pm.at({"w": leaf}, "w"))["w"], wanted), (name, leaf.placements)


def tree(make, scale=1.0):
    layers = {f"layers.{i}.{n}": make(t * scale + i) for i in range(3) for n, t in (("w", full), ("b", full[:, 0]))}
    return layers | {"head": make(full * scale)}


def spread(tensor):
    return distribute_tensor(tensor.clone(), mesh, [Shard(0)])


def first(result):
    return result[0] if isinstance(result, tuple) else result


TREES = {
    "delete": lambda t, u: pm.at(t, "head").delete(),
    "rename": lambda t, u: pm.at(t, "head").rename("top"),
    "graft": lambda t, u: pm.graft(t, u),
    "graft doubles": lambda t, u: pm.graft(t, {k: v.double() for k, v in u.items()}),
    "graft numpy": lambda t, u: pm.graft(t, {k: np.full(v.shape, 3, np.float32) for k, v in u.items()}),
    "insert": lambda t, u: pm.insert(t, {"more": u["head"]}, "more"),
    "part": lambda t, u: pm.part(t, "layers.0.**"),
    "deepen": lambda t, u: pm.deepen(t, order=[0, 1, 1, 2]),
    "stack": lambda t, u: pm.stack_layers(t, "layers[*]"),
    "unstack": lambda t, u: pm.unstack_layers(pm.stack_layers(t, "layers[*]"), "layers", into="layers[*]"),
    "merge": lambda t, u: pm.merge([t, u]),
    "quantize": lambda t, u: pm.quantize(t, "layers.*.w", scheme="int8", simulate=True),
}
for name, verb in TREES.items():
    wanted = first(verb(tree(torch.clone), tree(torch.clone, 2.0)))
    result = first(verb(tree(spread), tree(spread, 2.0)))
    assert result.keys() == wanted.keys(), name
    for path, leaf in result.items():
        assert alike(leaf, wanted[path]), (name, path)
        assert leaf.placements == (Shard(1 if name == "stack" and path != "head" else 0),), (name, path, leaf)
assert str(pm.stats(tree(spread))) == str(pm.stats(tree(torch.clone)))
assert str(pm.diff(tree(spread), tree(spread, 2.0))) == str(pm.diff(tree(torch.clone), tree(torch.clone, 2.0)))
assert pm.verify(tree(spread), pm.at(tree(spread), "head").zero(), only="head") == ["head"]

# Verbs for which leaves are gathered, and elementwise merges, for which they are not.
pair = {"fc1.weight": full[:4].clone(), "fc1.bias": full[:4, 0].clone(), "fc2.weight": torch.cat([full, full], 1)}
pair["fc2.weight"] = pair["fc2.weight"][:, 1:5].contiguous()
terms = {"fc1.lora_A.weight": np.ones((1, 3), np.float32), "fc1.lora_B.weight": np.arange(4, dtype=np.float32)[:, None]}
MODELS = {
    "widen": (lambda t: pm.widen(t, features={"fc1": 6}), None),
    "fold": (lambda t: pm.fold(t, terms), None),
    "extract": (lambda t: pm.fold(pair, pm.extract(pm.at(t, "fc1.weight").multiply(2), t, rank=1)[0]), None),
    "overlap": (lambda t: pm.graft(t, {k: np.ones((2, *v.shape[1:])) for k, v in t.items()}, mismatch="overlap"), None),
    "linear": (lambda t: pm.merge([t, pm.at(t, "**").multiply(3)], weights=[1, 3]), 0),
    "arithmetic": (lambda t: pm.merge([pm.at(t, "**").multiply(3)], "task_arithmetic", base=t, scale=0.5), 0),
    "slerp": (lambda t: pm.merge([t, pm.at(t, "**").add(3)], "slerp", t=0.25), None),
}
for name, (verb, sent) in MODELS.items():
    wanted = first(verb(pair))
    for axis in (0, -1):
        given = {k: distribute_tensor(v.clone(), mesh, [Shard(axis % v.ndim)]) for k, v in pair.items()}
        with CommDebugMode() as counted:
            result = first(verb(given))
        assert sent is None or counted.get_total_counts() == sent, (name, counted.get_comm_counts())
        for path, leaf in result.items():
            if name != "extract":
                assert alike(leaf, wanted[path]) and leaf.placements == (Shard(axis % leaf.ndim),), (name, path, leaf)
assert {k: v for k, v in pm.at(given, "fc1.**").mask().items()} == {k: k.startswith("fc1") for k in pair}
rows_of = pm.ablate(given, "fc1.*", lambda t: float(t["fc1.weight"].full_tensor().sum()))
assert str(rows_of) == str(pm.ablate(pair, "fc1.*", lambda t: float(t["fc1.weight"].sum())))

# Each process counts what does not fit into its part: rows of 5 are in parts of 3 and 2.
half = torch.full((5, 3), 300.0, dtype=torch.float16)
LOSSES = {
    "all": (lambda s: s.multiply(300), [9, 6]),
    "an array": (lambda s: s.multiply(np.array([1, 1, 300])), [3, 2]),
    "a spread array": (lambda s: s.multiply(spread(half)), [9, 6]),
    "rows": (lambda s: s[2:].multiply(np.array([[1, 300, 300]])), [2, 4]),
    "a mask": (lambda s: s[np.arange(15).reshape(5, 3) > 6].add(np.full(8, 65500)), [2, 6]),
    "none here": (lambda s: s[4].multiply(300), [0, 3]),
    "cast": (lambda s: s.cast("int8"), [9, 6]),
}
for name, (edit, counts) in LOSSES.items():
    for leaf, count in ((spread(half), counts[rank]), (distribute_tensor(half, mesh, [Replicate()]), sum(counts))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            edit(pm.at({"w": leaf}, "w"))
        said = [str(each.message) for each in caught if each.category.__name__ == "ValuesLost"]
        assert len(said) == bool(count), (name, said)
        assert not count or f" {count} values overflow (w), of those in this process" in said[0], (name, said)

# Ties, and what happens in place: also one whose part here has no elements.
tied = distribute_tensor(torch.ones(1, 3), mesh, [Shard(0)])
both = {"a": tied.detach(), "b": tied.detach(), "c": distribute_tensor(torch.ones(1, 3), mesh, [Shard(0)])}
new = pm.at(both, "a").zero()
assert new["a"] is new["b"] and new["c"] is both["c"]
pm.at(both, "a").zero_()
assert both["b"].full_tensor().sum() == 0 and both["c"].full_tensor().sum() == 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))


plain, model = network(), network()
for layer in (*model, model):
    fully_shard(layer, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
before, parts = list(model.parameters()), [p.to_local().data_ptr() for p in model.parameters()]
for edit in (
    lambda m: pm.at(m, "0.weight").multiply_(2),
    lambda m: pm.at(m, "0.weight")[1:3].zero_(),
    lambda m: pm.at(m, "**.weight").noise_(0.1, seed=1),
    lambda m: pm.at(m, "0.bias").set_(np.arange(5, dtype=np.float32)),
):
    with CommDebugMode() as counted:
        edit(model)
    assert counted.get_total_counts() == 0, counted.get_comm_counts()
    edit(plain)
pm.freeze_(model, "0.*", optimizer=optimizer)
for old, now, part, wanted in zip(before, model.parameters(), parts, plain.parameters()):
    assert old is now and part == now.to_local().data_ptr() and torch.equal(now.full_tensor(), wanted)
assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
model(torch.ones(2, 3)).sum().backward()
optimizer.step()
assert torch.equal(model[0].weight.full_tensor(), plain[0].weight)
assert not torch.equal(model[1].weight.full_tensor(), plain[1].weight)


def refused(verb):
    try:
        verb()
    except TypeError as error:
        return str(error)
    raise AssertionError("it was not refused")


print(json.dumps([refused(lambda: pm.at(model, "0.weight").zero()),
                  refused(lambda: pm.save(tree(spread), f"{folder}/{rank}.safetensors"))]))

# Each process reads its rows from a file, and nothing else.
if not rank:
    save_file({"w": full.clone()}, f"{folder}/w.safetensors")
dist.barrier()
from paramend.leaves.origins.stored import Stored
read, boxes = Stored.read_box, []
Stored.read_box = lambda self, box: boxes.append(tuple(map(len, box))) or read(self, box)
with pm.open(f"{folder}/w.safetensors") as source, CommDebugMode() as counted:
    result, _ = pm.graft({"w": spread(torch.zeros(5, 3))}, source)
assert torch.equal(result["w"].full_tensor(), full) and boxes == [(3 - rank, 3)], boxes
boxes.clear()
with pm.open(f"{folder}/w.safetensors") as source:
    half = {"w": spread(torch.zeros(5, 3, dtype=torch.float16))}
    result, report = pm.graft(half, pm.at(source, "w").multiply(1e4))
    same = pm.graft(half, source, dtype="source")[0]["w"]
assert torch.equal(result["w"].full_tensor(), (full * 1e4).half()) and boxes == [(3 - rank, 3)] * 2, boxes
assert [row.overflowed for row in report.copied] == [6 if rank else 3], report.copied
assert torch.equal(same.full_tensor(), full) and same.dtype == torch.float32
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.far
@pytest.mark.slow
def test_two_processes(tmp_path):
    for printed in run_two(PROGRAM, tmp_path):
        copied, saved = json.loads(printed.splitlines()[-1])
        assert "module.state_dict()" in copied
        assert "full_tensor()" in saved
    assert not list(tmp_path.glob("[01].safetensors"))
