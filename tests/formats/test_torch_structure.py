"""Files of torch that change in structure or spec: what is not concerned stays as it was, types and sharing too."""

import json
import math
import random
import warnings
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch

import paramend as pm
from paramend.errors import BadCheckpoint, RenameClash, Unsupported
from paramend.formats import zips as headers
from paramend.formats.torch.pickles import Name
from paramend.formats.torch.writer import Rebuilt, pickled

# ---- comparing -----------------------------------------------------------------------------------------------------


def bits(tensor):
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same(a, b, path="tree"):
    """Asserts that two structures are alike to the last type, attribute, bit and key."""
    assert type(a) is type(b), (path, type(a), type(b))
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.requires_grad, a.layout) == (b.dtype, b.shape, b.requires_grad, b.layout), path
        if a.layout is torch.strided and not a.is_quantized:
            assert (a.stride(), a.is_conj(), a.is_neg()) == (b.stride(), b.is_conj(), b.is_neg()), path
            assert bits(a) == bits(b), path
        elif a.is_quantized:
            assert torch.equal(a.int_repr(), b.int_repr()) and a.q_scale() == b.q_scale(), path
        else:
            assert torch.equal(a.to_dense(), b.to_dense()), path
        same(vars(a), vars(b), f"{path}.__dict__")
    elif isinstance(a, dict):
        assert list(a) == list(b) and list(map(type, a)) == list(map(type, b)), path
        for key in a:
            same(a[key], b[key], f"{path}[{key!r}]")
        if getattr(a, "__dict__", {}) or getattr(b, "__dict__", {}):
            same(vars(a), vars(b), f"{path}.__dict__")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, f"{path}[{i}]")
    else:
        assert a == b or (a != a and b != b), (path, a, b)


def tensors(tree, path=()):
    if isinstance(tree, torch.Tensor):
        return {path: tree} if tree.layout is torch.strided else {}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return {name: leaf for key, child in items for name, leaf in tensors(child, (*path, key)).items()}


def sharing(tree):
    """Which tensors look at one storage."""
    groups = {}
    for path, leaf in tensors(tree).items():
        if leaf.numel():
            groups.setdefault(leaf.untyped_storage().data_ptr(), set()).add(path)
    return {frozenset(group) for group in groups.values() if len(group) > 1}


def load(path):
    assert zipfile.ZipFile(path).testzip() is None
    return torch.load(path, weights_only=True)


def everything():
    """A structure of about all that `torch.load(weights_only=True)` reads."""
    flat = torch.arange(12.0)
    tied = torch.randn(3, 2)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    adam = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    adam.step()
    parameter = torch.nn.Parameter(torch.randn(2, 2))
    noted = torch.nn.Parameter(torch.ones(2))
    noted.note = "kept"
    return {
        "model": model.state_dict(),
        "optimizer": adam.state_dict(),
        "tied": {"a": tied, "b": tied, "c": tied.T},
        "views": [flat[:4], flat[4:8], flat[2:6]],
        "parameter": parameter,
        "frozen": torch.nn.Parameter(torch.ones(3), requires_grad=False),
        "noted": noted,
        "grad": torch.ones(2, requires_grad=True),
        "ordered": OrderedDict([(3, torch.zeros(2, dtype=torch.int64)), ("x", OrderedDict())]),
        "empty": {"dict": {}, "list": [], "tuple": (), "tensor": torch.empty(0, 3), "none": None},
        "plain": [1, -1, 255, 256, 2**31, -(2**40), 2**70, 0.5, math.nan, -0.0, True, False, None, "ü", 1j],
        "bytes": (b"ab\xff", bytearray(b"xyz")),
        "sets": {1, 2, 3},
        "counted": Counter("abca"),
        "torch": (torch.float16, torch.Size([2, 3]), torch.device("cpu"), torch.strided),
        (1, "key"): 5,
        None: "none",
        2.5: [[[torch.ones(1)]]],
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 2, torch.qint8),
        "sparse": torch.eye(3).to_sparse(),
        "conj": torch.tensor([1 + 2j, 3j]).conj(),
        "f8": torch.ones(3).to(torch.float8_e4m3fn),
        "u16": torch.arange(3).to(torch.uint16),
        "scalar": torch.tensor(7),
    }


@pytest.fixture(params=[2, 4, 5], ids=lambda protocol: f"protocol {protocol}")
def saved(tmp_path, request):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are on their way out
        torch.save(everything(), tmp_path / "x.pt", pickle_protocol=request.param)
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        yield tmp_path / "x.pt"


def reference(path):
    return torch.load(path, weights_only=False)


# ---- what stays ----------------------------------------------------------------------------------------------------


def test_a_deleted_leaf_is_gone_and_all_else_stays(saved, tmp_path):
    expected = reference(saved)
    report = pm.at(pm.open(saved), "optimizer.state.0.exp_avg").delete().save(tmp_path / "out.pt")
    assert report.left_out == ()
    assert report.bytes_computed == 0
    del expected["optimizer"]["state"][0]["exp_avg"]
    found = load(tmp_path / "out.pt")
    same(found, expected)
    assert sharing(found) == sharing(expected)
    same(torch.load(tmp_path / "out.pt", weights_only=True, mmap=True), expected)


def test_a_renamed_leaf_moves_and_all_else_stays(saved, tmp_path):
    expected = reference(saved)
    edited = pm.at(pm.open(saved), "model.{0,2}.weight").rename("model.{0,2}.kernel")
    edited = pm.at(edited, "optimizer.state.<n>.exp_avg_sq").rename("optimizer.state.<n>.v")
    report = edited.save(tmp_path / "out.pt")
    assert (report.left_out, report.bytes_computed) == ((), 0)
    model = expected["model"]
    new = OrderedDict((key.replace("weight", "kernel") if key[0] in "02" else key, x) for key, x in model.items())
    new._metadata = model._metadata
    expected["model"] = new
    for number, state in expected["optimizer"]["state"].items():
        expected["optimizer"]["state"][number] = {"v" if k == "exp_avg_sq" else k: x for k, x in state.items()}
    found = load(tmp_path / "out.pt")
    same(found, expected)
    assert sharing(found) == sharing(expected)


def test_a_cast_leaf_has_its_own_storage_and_all_else_stays(saved, tmp_path):
    expected = reference(saved)
    edited = pm.at(pm.open(saved), ["parameter", "noted", "tied.a", "views.1", "grad"]).cast("bfloat16")
    report = edited.save(tmp_path / "out.pt")
    assert report.left_out == ()
    found = load(tmp_path / "out.pt")
    for name in ("parameter", "noted", "grad"):
        assert type(found[name]) is type(expected[name]) and found[name].requires_grad
        assert torch.equal(found[name], expected[name].to(torch.bfloat16))
    assert found["noted"].note == "kept"
    assert torch.equal(found["views"][1], expected["views"][1].to(torch.bfloat16))
    assert found["tied"]["a"].dtype is found["tied"]["b"].dtype is torch.bfloat16
    groups = {frozenset({("tied", "a"), ("tied", "b")}), frozenset({("views", 0), ("views", 2)})}
    assert sharing(found) == groups  # tied leaves are one; a view that stays shares with what stays
    for tree in (found, expected):
        for name in ("parameter", "noted", "tied", "views", "grad"):
            del tree[name]
    same(found, expected)


def test_a_parameter_of_integers_takes_no_gradients(saved, tmp_path):
    pm.at(pm.open(saved), "{parameter,grad}").cast("int8").save(tmp_path / "out.pt")
    found = load(tmp_path / "out.pt")
    assert type(found["parameter"]) is torch.nn.Parameter
    assert found["parameter"].dtype is found["grad"].dtype is torch.int8
    assert not found["parameter"].requires_grad and not found["grad"].requires_grad


def test_views_that_stay_what_they_are_stay_in_their_storage(saved, tmp_path):
    expected = reference(saved)
    edited = pm.at(pm.open(saved), "views.2").delete()
    edited = pm.at(edited, "views.0").fill(9.0)
    pm.at(edited, "tied.a").multiply(2.0).save(tmp_path / "out.pt")
    found = load(tmp_path / "out.pt")
    assert [view.tolist() for view in found["views"]] == [[9.0] * 4, [4, 5, 6, 7]]
    assert found["views"][0].untyped_storage().data_ptr() == found["views"][1].untyped_storage().data_ptr()
    assert torch.equal(found["tied"]["b"], expected["tied"]["b"] * 2)
    assert found["tied"]["a"].data_ptr() == found["tied"]["b"].data_ptr() != found["tied"]["c"].data_ptr()
    assert torch.equal(found["tied"]["c"], expected["tied"]["c"])  # as in memory: only what was chosen changes


def test_an_edit_of_bytes_that_others_share_is_as_in_memory(tmp_path):
    flat = torch.arange(6.0)
    torch.save({"a": flat[:4], "b": flat[2:], "t": flat.reshape(2, 3).T, "n": 1}, tmp_path / "x.pt")
    pm.at(pm.open(tmp_path / "x.pt"), ["a", "t"]).add(1.0).save(tmp_path / "out.pt")
    found = load(tmp_path / "out.pt")
    assert found["a"].tolist() == [1, 2, 3, 4] and found["b"].tolist() == [2, 3, 4, 5]
    assert torch.equal(found["t"], flat.reshape(2, 3).T + 1) and found["n"] == 1


def test_storages_that_nothing_looks_at_go(tmp_path):
    torch.save({"big": torch.ones(100_000), "small": torch.ones(2), "epoch": 3}, tmp_path / "x.pt")
    report = pm.at(pm.open(tmp_path / "x.pt"), "big").delete().save(tmp_path / "out.pt")
    assert (tmp_path / "out.pt").stat().st_size < 5000
    assert report.bytes_copied + report.bytes_computed < 5000
    assert load(tmp_path / "out.pt")["epoch"] == 3


def test_lists_and_tuples_close_up(tmp_path):
    tree = {
        "list": [torch.zeros(1), torch.ones(1), "x"],
        "tuple": (torch.zeros(1), torch.ones(1)),
        "n": 1,
        "w": torch.ones(1),
    }
    torch.save(tree, tmp_path / "x.pt")
    pm.at(pm.open(tmp_path / "x.pt"), "{list,tuple}.0").delete().save(tmp_path / "out.pt")
    same(
        load(tmp_path / "out.pt"), {"list": [torch.ones(1), "x"], "tuple": (torch.ones(1),), "n": 1, "w": torch.ones(1)}
    )
    moves = {"tuple.1": "which is taken", "tuple.3": "no entry 2", "list.x": "list is a list and has no 'x'"}
    for to, why in moves.items():
        with pytest.raises(RenameClash, match=why):
            pm.at(pm.open(tmp_path / "x.pt"), "w").rename(to).save(tmp_path / "no.pt")
    with pytest.raises(RenameClash, match="list is a list: it would have entries 1, 2 and no entry 0"):
        pm.at(pm.open(tmp_path / "x.pt"), "list.0").rename("v").save(tmp_path / "no.pt")
    assert not (tmp_path / "no.pt").exists()


def test_a_container_that_became_empty_goes_unless_it_holds_more(tmp_path):
    tree = {"a": {"b": {"w": torch.ones(1)}}, "c": {"w": torch.ones(1), "note": "x"}, "d": torch.ones(1)}
    torch.save(tree, tmp_path / "x.pt")
    pm.at(pm.open(tmp_path / "x.pt"), "{a,c}.**").delete().save(tmp_path / "out.pt")
    same(load(tmp_path / "out.pt"), {"c": {"note": "x"}, "d": torch.ones(1)})


def test_a_tensor_alone(tmp_path):
    torch.save(torch.nn.Parameter(torch.ones(3)), tmp_path / "x.pt")
    report = pm.at(pm.open(tmp_path / "x.pt"), "**").cast("float16").save(tmp_path / "out.pt")
    found = load(tmp_path / "out.pt")
    assert type(found) is torch.nn.Parameter and found.dtype is torch.float16 and found.requires_grad
    assert report.left_out == ()


@pytest.mark.parametrize("wide", [0xFFFFFFFF, 500, 0])
def test_long_files(tmp_path, monkeypatch, wide):
    monkeypatch.setattr(headers, "WIDE", wide)
    tree = {"a": torch.arange(300.0), "b": torch.arange(3), "n": {"epoch": 3, "d": torch.ones(1)}}
    torch.save(tree, tmp_path / "x.pt")
    pm.at(pm.at(pm.open(tmp_path / "x.pt"), "a").cast("float64"), "b").rename("n.c").save(tmp_path / "out.pt")
    same(load(tmp_path / "out.pt"), {"a": tree["a"].double(), "n": tree["n"] | {"c": tree["b"]}})
    with pm.open(tmp_path / "out.pt") as again:
        archive = again.source.archive
        assert {archive.offsets(name).start % 64 for name in archive.members} == {0}


def test_what_torch_lacks_is_refused(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "x.pt")
    with pytest.raises(Unsupported, match="w cannot be written: torch cannot hold float8_e3m4"):
        pm.at(pm.open(tmp_path / "x.pt"), "w").cast("float8_e3m4").save(tmp_path / "out.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_another_format_holds_tensors_only_and_says_so(tmp_path):
    torch.save({"w": torch.ones(3), "epoch": 3}, tmp_path / "x.pt")
    report = pm.open(tmp_path / "x.pt").save(tmp_path / "out.safetensors")
    assert report.left_out == ("epoch (not a tensor)",)


# ---- random structures ---------------------------------------------------------------------------------------------


def random_tree(rng, depth=0):
    kinds = [dict, OrderedDict, list] if depth < 3 else []
    made = rng.choice([*kinds, "tensor", "tensor", "view", "parameter", "plain"])
    if made in kinds:
        children = [random_tree(rng, depth + 1) for _ in range(rng.randrange(1, 4))]
        names = rng.sample(["a", "b", "a.b", 0, 7, "w"], len(children))
        return children if made is list else made(zip(names, children, strict=True))
    if made == "plain":
        return rng.choice([None, 3, 0.5, "text", (1, 2), True])
    tensor = torch.arange(6.0) + rng.randrange(9)
    shaped = rng.choice([tensor, tensor.reshape(2, 3), tensor.reshape(2, 3).T, tensor[::2], tensor[:0]])
    return torch.nn.Parameter(shaped) if made == "parameter" else shaped


def in_memory(tree, selector, edit):
    """The same edit of the tree, by the engine for trees."""
    return edit(pm.at(tree, selector))


@pytest.mark.parametrize("seed", range(120))
def test_random_edits_are_those_in_memory(tmp_path, seed):
    rng = random.Random(seed)
    tree = {"root": random_tree(rng), "w": torch.ones(2), "also": random_tree(rng), "epoch": 3}
    torch.save(tree, tmp_path / "x.pt")
    with torch.no_grad():
        edit = rng.choice(
            [
                lambda at: at.delete(),
                lambda at: at.cast("float16"),
                lambda at: at.add(1.0),
                lambda at: at.zero(),
            ]
        )
        selector = rng.choice(["root.**", "w", "also.**", "**.w", "**.{0,a}.**"])
        checkpoint = pm.open(tmp_path / "x.pt")
        try:
            expected = in_memory(tree, selector, edit)
        except pm.errors.NoMatch:
            with pytest.raises(pm.errors.NoMatch):
                pm.at(checkpoint, selector)
            return
        report = edit(pm.at(checkpoint, selector)).save(tmp_path / "out.pt")
    found = load(tmp_path / "out.pt")
    assert report.left_out == ()
    unstrided = lambda t: t.clone(memory_format=torch.contiguous_format) if isinstance(t, torch.Tensor) else t
    same(mapped(found, unstrided), mapped(expected, unstrided))


def mapped(tree, function):
    if isinstance(tree, dict):
        return type(tree)((key, mapped(child, function)) for key, child in tree.items())
    if isinstance(tree, list | tuple):
        return type(tree)(mapped(child, function) for child in tree)
    return function(tree).detach() if isinstance(tree, torch.Tensor) else function(tree)


# ---- shards --------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    weight_map = {}
    for i in range(3):
        name = f"pytorch_model-{i + 1:05}-of-00003.bin"
        state = OrderedDict([(f"h.{i}.w", torch.full((4,), float(i))), (f"h.{i}.b", torch.full((2,), float(-i)))])
        torch.save(state, folder / name)
        weight_map |= dict.fromkeys(state, name)
    index = {"metadata": {"total_size": 72}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text("{}")
    return folder


def index_of(folder):
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    found, total = {}, 0
    for shard in sorted(folder.glob("*.bin")):
        state = load(shard)
        assert type(state) is OrderedDict
        found |= dict.fromkeys(state, shard.name)
        total += sum(x.numel() * x.element_size() for x in state.values())
    assert index == {"metadata": {"total_size": total}, "weight_map": index["weight_map"]}
    assert index["weight_map"] == found
    return found


def test_shards_stay_shards_and_the_index_true(shards, tmp_path):
    edited = pm.at(pm.open(shards), "h.<n>.w").rename("layers.<n>.w")
    edited = pm.at(edited, "h[-1].b").delete()
    edited = pm.at(edited, "layers[0].w").cast("float64")
    report = edited.save(tmp_path / "out")
    assert report.left_out == ()
    names = {"layers.0.w", "h.0.b", "layers.1.w", "h.1.b", "layers.2.w"}
    assert set(index_of(tmp_path / "out")) == names
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in shards.iterdir()}
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
    with pm.open(tmp_path / "out") as again:
        assert again["layers.0.w"].dtype == np.float64 and again["layers.2.w"].tolist() == [2] * 4


def test_untouched_shards_are_copies_or_links(shards, tmp_path):
    pm.at(pm.open(shards), "h[1].*").rename("x.1.*").save(tmp_path / "out", link=True)
    for shard in sorted(shards.glob("*.bin")):
        assert (tmp_path / "out" / shard.name).samefile(shard) == ("00002" not in shard.name)
    assert set(index_of(tmp_path / "out")) == {"h.0.w", "h.0.b", "x.1.w", "x.1.b", "h.2.w", "h.2.b"}


def test_a_shard_without_leaves_goes(shards, tmp_path):
    pm.at(pm.open(shards), "h.1.*").delete().save(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.bin"))) == 2
    assert set(index_of(tmp_path / "out")) == {"h.0.w", "h.0.b", "h.2.w", "h.2.b"}


def test_shards_as_one_file_and_as_other_shards(shards, tmp_path):
    pm.open(shards).save(tmp_path / "one.bin")
    assert list(load(tmp_path / "one.bin")) == ["h.0.w", "h.0.b", "h.1.w", "h.1.b", "h.2.w", "h.2.b"]
    pm.open(shards).save(tmp_path / "small", max_shard_size=24)
    assert (
        sorted(path.name for path in (tmp_path / "small").glob("*.safetensors"))[0]
        == "model-00001-of-00003.safetensors"
    )
    with pm.open(tmp_path / "small") as again:
        assert again["h.2.w"].tolist() == [2] * 4


# ---- the pickle ----------------------------------------------------------------------------------------------------


def test_values_within_themselves_are_no_endless_pickle():
    inner = []
    inner.append((inner,))
    assert len(pickled(inner)) < 50  # a list may hold itself
    made = Rebuilt(Name("builtins.set"), ([],))
    made.arguments[0].append(made)
    deep = []
    for _ in range(5000):
        deep = [deep]
    loop = ([],)
    loop[0].append(loop)
    for root in (made, deep, loop):
        with pytest.raises(BadCheckpoint, match="contain themselves, or are nested too deeply"):
            pickled(root)


def test_what_is_shared_is_written_once():
    import pickle

    shared = {"x": 1}
    twice = pickle.loads(pickled({"a": shared, "b": [shared], "c": ("text", "text")}))
    assert twice["a"] is twice["b"][0]
    wide = ["x"]
    for _ in range(60):
        wide = [wide, wide]  # 2**60 places
    assert len(pickled(wide)) < 1000


# ---- ties ----------------------------------------------------------------------------------------------------------


def test_an_edit_of_one_name_of_a_tied_tensor_is_one_of_all(tmp_path):
    weight = torch.arange(4.0)
    torch.save({"embed": weight, "head": weight, "n": 1}, tmp_path / "x.pt")
    for name in ("embed", "head"):
        edited = pm.at(pm.open(tmp_path / "x.pt"), name).add(1.0)
        assert len(edited.plan.changed) == 2
        edited.save(tmp_path / f"{name}.safetensors")
        both = pm.load(tmp_path / f"{name}.safetensors")
        assert both["embed"].tolist() == both["head"].tolist() == [1, 2, 3, 4]
        pm.at(pm.open(tmp_path / "x.pt"), name).delete().save(tmp_path / f"{name}.pt")
        assert load(tmp_path / f"{name}.pt") == {"n": 1}
