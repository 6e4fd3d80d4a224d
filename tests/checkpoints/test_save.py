"""What `pm.save` writes of a tree, read back by the library that defines the format."""

import copy
import json
import pickle
from collections import Counter, OrderedDict, defaultdict, namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import torch
from flax import linen, nnx, serialization
from flax.training.train_state import TrainState

import paramend as pm
from paramend.errors import BadArgument, RenameClash, Unsupported

Point = namedtuple("Point", "x y")


def same(found, expected):
    """Whether two trees are equal, types of containers included; arrays bit for bit."""
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected) and found.dtype == expected.dtype
    if isinstance(expected, np.ndarray):
        found = np.asarray(found)
        return (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
    if isinstance(expected, dict):
        return (
            type(found) is type(expected)
            and list(found) == list(expected)
            and same([*found.values()], [*expected.values()])
        )
    if isinstance(expected, list | tuple):
        return type(found) is type(expected) and len(found) == len(expected) and all(map(same, found, expected))
    return type(found) is type(expected) and found == expected


def restored(path, target=None):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.resolve(), target)


# ---- torch -------------------------------------------------------------------------------------------------------


def test_a_training_checkpoint_in_pt(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.5)
    net(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    tree = {
        "epoch": 3,
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "note": "ü",
        "best": None,
        "done": False,
        "loss": [0.5, float("inf"), 2**70, -(2**63)],
        "pair": (1, (2, "x")),
        "nested": [{"w": torch.ones(2)}, (torch.zeros(1), 5), []],
        7: {0: torch.ones(1), "0": torch.zeros(1), None: 1, 1.5: 2, (1, "a"): 3},
        "ordered": OrderedDict(b=1, a=torch.ones(1)),
        "kinds": {"dtype": torch.bfloat16, "device": torch.device("cpu"), "size": torch.Size([2, 3])},
        "odd": [1j, b"\xff", {1, "a"}, {}, (), OrderedDict()],
    }
    report = pm.save(tree, tmp_path / "x.pt")
    assert report.left_out == ()
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    expected = dict(tree, kinds=dict(tree["kinds"], size=(2, 3)))
    assert same(found, expected)
    assert found["model"]._metadata == net.state_dict()._metadata
    optimizer.load_state_dict(found["optimizer"])
    # and on by way of the file
    with pm.open(tmp_path / "x.pt") as checkpoint:
        assert pm.at(checkpoint, "**/0.weight").zero().save(tmp_path / "y.pt").left_out == ()
    again = torch.load(tmp_path / "y.pt", weights_only=True)
    assert not again["model"]["0.weight"].any()
    assert same(dict(again, model=0), dict(expected, model=0))


def test_modules_are_saved_as_their_state_dicts(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.BatchNorm1d(2)))
    pm.save(net, tmp_path / "x.pt")
    net.load_state_dict(torch.load(tmp_path / "x.pt", weights_only=True))
    pm.save({"ema": [net, net], "step": 5}, tmp_path / "y.pt")
    found = torch.load(tmp_path / "y.pt", weights_only=True)
    assert found["step"] == 5 and list(found["ema"][1]) == list(net.state_dict())
    assert found["ema"][0]["0.weight"] is found["ema"][1]["0.weight"]


def test_ties_are_one_storage(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(4, 2), torch.nn.Linear(2, 4, bias=False)
            self.head.weight = self.embed.weight

    big = torch.zeros(50_000)
    for tree, one, two in (
        (Net(), "embed.weight", "head.weight"),
        ({"a": big, "b": big, "c": big[:3], "d": big.clone()}, "a", "b"),
    ):
        pm.save(tree, tmp_path / "x.pt", force=True)
        found = torch.load(tmp_path / "x.pt", weights_only=True)
        assert found[one].untyped_storage().data_ptr() == found[two].untyped_storage().data_ptr()
    assert found["c"].untyped_storage().nbytes() == 12 and found["d"].data_ptr() != found["a"].data_ptr()
    assert 400_000 < (tmp_path / "x.pt").stat().st_size < 420_000
    with pm.open(tmp_path / "x.pt") as checkpoint:
        pm.at(checkpoint, "a").fill(2).save(tmp_path / "y.pt")
    found = torch.load(tmp_path / "y.pt", weights_only=True)
    assert found["a"].sum() == found["b"].sum() == 100_000 and not found["d"].any()


def test_tied_variables_are_one_storage(tmp_path):
    class Net(nnx.Module):
        def __init__(self):
            self.embed = nnx.Param(jnp.ones((3, 2)))
            self.head = self.embed

    pm.save(Net(), tmp_path / "x.pt")
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert found["embed"].data_ptr() == found["head"].data_ptr()
    # arrays of JAX and numpy are values: two places are two leaves
    for array in (jnp.ones(3), np.ones(3, "float32")):
        pm.save({"params": array, "ema": array}, tmp_path / "y.pt", force=True)
        found = torch.load(tmp_path / "y.pt", weights_only=True)
        assert found["params"].data_ptr() != found["ema"].data_ptr()


def test_what_no_pt_can_hold_is_named(tmp_path):
    class Thing:
        pass

    tree = {
        "w": torch.ones(2),
        "relu": torch.nn.functional.relu,
        "args": Thing(),
        "list": [torch.ones(1), Thing(), 3],
        "deep": {"a": {Thing}},
    }
    report = pm.save(tree, tmp_path / "x.pt")
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert same(found, {"w": tree["w"], "list": {"0": torch.ones(1), "2": 3}})
    assert [said.partition(" ")[0] for said in report.left_out] == ["relu", "args", "list.1", "deep.a"]
    assert "relu (function)" in report.left_out
    assert "not copied: relu (function)" in str(report)
    lazy = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.Linear(2, 2))
    report = pm.save(lazy, tmp_path / "y.pt")
    assert sorted(torch.load(tmp_path / "y.pt", weights_only=True)) == ["1.bias", "1.weight"]
    assert [said.partition(" ")[0] for said in report.left_out] == ["0.weight", "0.bias"]


def test_other_mappings_are_dicts_in_pt(tmp_path):
    tree = {
        "default": defaultdict(list, a=torch.ones(1), n=[1]),
        "counter": Counter("aab"),
        "point": Point(torch.ones(1), 2),
        "scalar": np.float32(1.5),
        np.int64(3): 4,
    }
    assert pm.save(tree, tmp_path / "x.pt").left_out == ()
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert same(found["default"], {"a": torch.ones(1), "n": [1]})
    assert found["counter"] == {"a": 2, "b": 1} and found[3] == 4
    assert same(found["point"], {"x": torch.ones(1), "y": 2})
    assert found["scalar"].item() == 1.5


def test_a_graft_keeps_the_rest_of_its_target(tmp_path):
    target = {"epoch": 3, "model": OrderedDict(w=torch.zeros(2)), "list": [torch.zeros(1), {"lr": 0.1}], "n": None}
    torch.save(target, tmp_path / "x.pt")
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "y.pt")
    with pm.open(tmp_path / "x.pt") as onto, pm.open(tmp_path / "y.pt") as source:
        made, _ = pm.graft(onto, source)
        assert made.save(tmp_path / "z.pt").left_out == ()
    found = torch.load(tmp_path / "z.pt", weights_only=True)
    assert same(found, target | {"model": OrderedDict(w=torch.ones(2))})


# ---- flax and Orbax ----------------------------------------------------------------------------------------------


def state_of(step=7):
    params = {"Dense_0": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}}
    tx = optax.chain(optax.clip(1.0), optax.adamw(0.1))
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    return state.replace(step=step)


def test_a_train_state_in_msgpack_is_what_flax_writes(tmp_path):
    state = state_of()
    report = pm.save(state, tmp_path / "x.msgpack")
    assert report.left_out == ()
    assert serialization.msgpack_restore((tmp_path / "x.msgpack").read_bytes()).keys() == {
        "step",
        "params",
        "opt_state",
    }
    back = serialization.from_bytes(state.replace(step=0), (tmp_path / "x.msgpack").read_bytes())
    assert back.step == 7 and jax.tree.structure(back) == jax.tree.structure(state)
    assert same([np.asarray(leaf) for leaf in jax.tree.leaves(back)], [np.asarray(x) for x in jax.tree.leaves(state)])


@pytest.mark.parametrize("step", [7, np.int32(7), jnp.asarray(7)])
def test_the_step_of_a_train_state_goes_everywhere(step, tmp_path):
    state = state_of(step)
    (tmp_path / "ts.msgpack").write_bytes(serialization.to_bytes(state))
    loaded = pm.load(tmp_path / "ts.msgpack")
    assert loaded["step"] == 7 and loaded["opt_state"]["0"] == {}
    with pm.open(tmp_path / "ts.msgpack") as checkpoint:
        for name in ("ts.orbax", "again.msgpack", "ts.pt"):
            assert checkpoint.save(tmp_path / name).left_out == ()
    found = restored(tmp_path / "ts.orbax")
    assert found["step"] == 7 and found["opt_state"]["0"] == {}
    assert np.asarray(found["params"]["Dense_0"]["kernel"]).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert torch.load(tmp_path / "ts.pt", weights_only=True)["step"] == 7
    again = serialization.from_bytes(state_of(0), (tmp_path / "again.msgpack").read_bytes())
    assert again.step == 7
    # and back from Orbax, where a number is a scalar
    with pm.open(tmp_path / "ts.orbax") as checkpoint:
        checkpoint.save(tmp_path / "back.msgpack")
    assert serialization.from_bytes(state_of(0), (tmp_path / "back.msgpack").read_bytes()).step == 7
    assert pm.load(tmp_path / "ts.orbax")["step"] == 7


def test_plain_values_in_msgpack_and_orbax(tmp_path):
    tree = {"w": np.ones(2, "float32"), "i": -3, "f": 0.5, "b": True, "n": None, "e": {}, "l": [1, (2, {})], "t": "ü"}
    for suffix in ("msgpack", "orbax"):
        report = pm.save(tree | {"big": 2**70, "f": 0.5, "fn": len}, tmp_path / f"x.{suffix}")
        assert report.left_out == ("big (int)", "fn (builtin_function_or_method)")
    found = serialization.from_bytes(tree | {"w": None}, (tmp_path / "x.msgpack").read_bytes())
    assert same({**found, "w": tree["w"]}, tree) and same(found["w"], tree["w"])
    found = ocp.PyTreeCheckpointer().restore(tmp_path / "x.orbax")
    assert {name: found[name] for name in "ifbnet"} == {name: tree[name] for name in "ifbnet"}
    assert found["l"] == [1, [2, {}]] and type(found["b"]) is bool


def test_formats_of_arrays_alone_name_what_they_leave(tmp_path):
    tree = {"w": np.ones(2), "step": 3, "opt": {"lr": 0.1, "none": None, "groups": [{"name": "a"}], "empty": {}}}
    for suffix in ("npz", "safetensors"):
        report = pm.save(tree, tmp_path / f"x.{suffix}")
        names = ["step", "opt/lr", "opt/none", "opt/groups/0/name", "opt/empty"]
        assert report.left_out == tuple(f"{name} (not a tensor)" for name in names)
        assert "step (not a tensor)" in str(report)
        for source in ("pt", "msgpack", "orbax"):
            pm.save(tree, tmp_path / f"x.{source}", force=True)
            with pm.open(tmp_path / f"x.{source}") as checkpoint:
                left = checkpoint.save(tmp_path / f"from_{source}.{suffix}").left_out
                wanted = set(names) if source != "orbax" else set(names) - {"step", "opt/lr"}  # scalars are leaves
                assert {each.partition(" ")[0].replace(".", "/") for each in left} == wanted
    assert list(safetensors.numpy.load_file(tmp_path / "x.safetensors")) == ["w"]


def test_metadata_of_a_safetensors_file_is_left_by_name(tmp_path):
    safetensors.numpy.save_file({"w": np.ones(2)}, tmp_path / "x.safetensors", metadata={"format": "pt", "epoch": "3"})
    with pm.open(tmp_path / "x.safetensors") as checkpoint:
        assert checkpoint.save(tmp_path / "x.npz").left_out == ("epoch (not a tensor)",)
        assert checkpoint.save(tmp_path / "y.safetensors").left_out == ()


def test_lists_of_a_file_stay_lists(tmp_path):
    tree = {"layers": [np.ones(2), {"w": np.zeros(2)}], "n": [1, 2]}
    (tmp_path / "x.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    with pm.open(tmp_path / "x.msgpack") as checkpoint:
        pm.at(checkpoint, "layers/0").cast("float16").save(tmp_path / "y.msgpack")
        checkpoint.save(tmp_path / "y.pt")
    found = serialization.msgpack_restore((tmp_path / "y.msgpack").read_bytes())
    assert same(found, {"layers": [np.ones(2, "float16"), {"w": np.zeros(2)}], "n": [1, 2]})
    assert same(pm.load(tmp_path / "y.msgpack"), found)
    found = torch.load(tmp_path / "y.pt", weights_only=True)
    assert type(found["layers"]) is list and found["n"] == [1, 2]


def test_load_gives_what_a_pt_holds(tmp_path):
    tree = {"model": {"a.b": torch.ones(2)}, "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}], 5: {0: torch.ones(1)}}
    torch.save(tree, tmp_path / "x.pt")
    expected = {"model": {"a.b": np.ones(2, "float32")}, "groups": tree["groups"], 5: {0: np.ones(1, "float32")}}
    assert same(pm.load(tmp_path / "x.pt"), expected)
    assert same(pm.load(tmp_path / "x.pt", "torch"), tree)
    flat = pm.load(tmp_path / "x.pt", nested=False)
    assert list(flat) == ["model.a.b", "5.0"]


def test_single_arrays(tmp_path):
    for suffix in ("orbax", "npz"):
        with pytest.raises(Unsupported, match="under names, and this is a single one"):
            pm.save(jnp.ones((2, 2)), tmp_path / f"x.{suffix}")
        assert not (tmp_path / f"x.{suffix}").exists()
    pm.save(jnp.ones((2, 2)), tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", weights_only=True).tolist() == [[1, 1], [1, 1]]
    pm.save(jnp.ones((2, 2)), tmp_path / "x.msgpack")
    assert serialization.msgpack_restore((tmp_path / "x.msgpack").read_bytes()).tolist() == [[1, 1], [1, 1]]
    for suffix in ("pt", "msgpack"):
        assert pm.load(tmp_path / f"x.{suffix}").tolist() == [[1, 1], [1, 1]]
        assert pm.load(tmp_path / f"x.{suffix}", nested=False)[""].tolist() == [[1, 1], [1, 1]]


# ---- paths that read the same ------------------------------------------------------------------------------------

TWINS = {
    "pt": {"a.b": np.ones(1), "a": {"b": np.zeros(1)}},
    "msgpack": {"a/b": np.ones(1), "a": {"b": np.zeros(1)}},
    "orbax": {"a/b": np.ones(1), "a": {"b": np.zeros(1)}},
}


@pytest.mark.parametrize("suffix", TWINS)
def test_two_paths_that_read_the_same_are_both_kept(suffix, tmp_path):
    tree, path = TWINS[suffix], tmp_path / f"x.{suffix}"
    pm.save(tree, path)
    match suffix:
        case "pt":
            found = torch.load(path, weights_only=True)
        case "msgpack":
            found = serialization.msgpack_restore(path.read_bytes())
        case "orbax":
            found = restored(path)
    for loaded in (found, pm.load(path)):
        first, second = tree
        assert loaded[first].tolist() == [1] and loaded[second]["b"].tolist() == [0]
    with pytest.raises(Unsupported, match=f"two leaves are called {next(iter(tree))}: they have different keys"):
        pm.load(path, nested=False)
    for other in ("npz", "safetensors"):
        with pm.open(path) as checkpoint, pytest.raises(RenameClash, match="same name"):
            checkpoint.save(tmp_path / f"y.{other}")


def test_two_paths_that_read_the_same_in_a_table_of_names(tmp_path):
    tree = {"a/b": np.ones(1), "a": {"b": np.zeros(1)}}
    pm.save(tree, tmp_path / "x.safetensors")
    assert same(pm.load(tmp_path / "x.safetensors"), tree)
    with pytest.raises(RenameClash, match="read the same"):
        pm.save(tree, tmp_path / "x.npz")
    for twins in ({0: np.ones(1), "0": np.zeros(1)}, {1: {"w": np.ones(1)}, "1": {"w": np.zeros(1)}}):
        for suffix in ("safetensors", "npz", "msgpack", "orbax"):
            with pytest.raises(RenameClash):
                pm.save(twins, tmp_path / f"y.{suffix}")
        pm.save(twins, tmp_path / "y.pt", force=True)
        assert same(pm.load(tmp_path / "y.pt"), twins)


# ---- names survive -----------------------------------------------------------------------------------------------

NAMES = {
    "torch": ["lm_head.weight", "model.layers.0.w", "model.layers.10.w", "a.b"],
    "flax": ["params/Dense_0/kernel", "params/Dense_0/bias", "x/y"],
    "both": ["params/a.b", "params/c", "d.e/f"],
    "flat": ["weight", "b"],
    "odd": ["a..b", "c.d"],
}
EDITS = {
    "none": lambda tree: tree,
    "zero": lambda tree: pm.at(tree, "**").multiply(2),
    "cast": lambda tree: pm.at(tree, "**").cast("float16"),
    "jax": lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree),
    "spread": lambda tree: {**tree},
}


@pytest.mark.parametrize("kind", ["numpy", "jax", "torch"])
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_names_survive_load_and_save(names, kind, tmp_path):
    safetensors.numpy.save_file({n: np.ones(1, "float32") for n in names}, tmp_path / "x.safetensors")
    np.savez(tmp_path / "x.npz", **{name: np.ones(1, "float32") for name in names})
    for suffix in ("safetensors", "npz"):
        for what, edit in EDITS.items():
            tree = edit(pm.load(tmp_path / f"x.{suffix}", kind)) if (kind, what) != ("torch", "jax") else None
            for out in ("safetensors", "npz") if tree is not None and not (what == "cast" and kind == "torch") else ():
                pm.save(tree, tmp_path / f"y.{out}", force=True)
                assert sorted(pm.load(tmp_path / f"y.{out}", nested=False)) == sorted(names)
    assert sorted(safetensors.numpy.load_file(tmp_path / "y.safetensors")) == sorted(names)


def test_names_of_a_state_dict_survive_in_pt(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    flat = {name: leaf.numpy() for name, leaf in net.state_dict().items()}
    safetensors.numpy.save_file(flat, tmp_path / "x.safetensors")
    torch.save(net.state_dict(), tmp_path / "x.pt")
    for name in ("x.safetensors", "x.pt"):
        for kind in ("numpy", "jax"):
            tree = pm.load(tmp_path / name, kind) if kind == "numpy" else pm.at(pm.load(tmp_path / name), "0.*").zero()
            pm.save(tree, tmp_path / "y.pt", force=True)
            net.load_state_dict(torch.load(tmp_path / "y.pt", weights_only=True))
            pm.save({"state_dict": tree, "epoch": 3}, tmp_path / "z.pt", force=True)
            found = torch.load(tmp_path / "z.pt", weights_only=True)
            assert found["epoch"] == 3 and sorted(found["state_dict"]) == sorted(flat)
    assert "weight" in pm.load(tmp_path / "x.pt")["0"]
    # flax has nested dicts
    pm.save(pm.load(tmp_path / "x.pt"), tmp_path / "x.msgpack")
    found = serialization.msgpack_restore((tmp_path / "x.msgpack").read_bytes())
    assert found["1"]["running_var"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "thing", [5, "x.pt", None, object(), torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1)]
)
def test_what_is_no_tree_is_refused(thing, tmp_path):
    for suffix in ("pt", "safetensors", "npz", "msgpack", "orbax"):
        with pytest.raises(BadArgument, match="is not a tree of arrays") as caught:
            pm.save(thing, tmp_path / f"x.{suffix}")
        assert ("state_dict" in caught.value.hint) == isinstance(thing, torch.optim.Optimizer)
    with pytest.raises(Unsupported, match="at least one array"):
        pm.save({"a": {}}, tmp_path / "x.orbax")
    assert list(tmp_path.iterdir()) == []


def test_new_keys_are_named_like_those_around_them(tmp_path):
    safetensors.numpy.save_file({"a.w": np.ones(1), "b.c.w": np.ones(1)}, tmp_path / "x.safetensors")
    tree = pm.load(tmp_path / "x.safetensors")
    tree["a"]["new"] = np.zeros(1)
    tree["d"] = {"w": np.zeros(1)}
    del tree["b"]["c"]["w"]
    tree["b"]["c"]["v"] = np.zeros(1)
    pm.save(tree, tmp_path / "y.safetensors")
    assert sorted(safetensors.numpy.load_file(tmp_path / "y.safetensors")) == ["a.new", "a.w", "b.c.v", "d.w"]

    assert pickle.loads(pickle.dumps(tree)).keys() == tree.keys()
    pm.save(copy.deepcopy(tree), tmp_path / "z.safetensors")
    assert sorted(safetensors.numpy.load_file(tmp_path / "z.safetensors")) == ["a.new", "a.w", "b.c.v", "d.w"]


def test_boxes_of_flax_metadata_are_restored(tmp_path):
    box = linen.Partitioned(jnp.ones((2, 2)), names=("a", "b"))
    params = {"params": {"Dense_0": {"kernel": box, "bias": jnp.zeros(2)}}}
    pm.save(params, tmp_path / "x.msgpack")
    back = serialization.from_bytes(params, (tmp_path / "x.msgpack").read_bytes())
    assert type(back["params"]["Dense_0"]["kernel"]) is linen.Partitioned
    pm.save(params, tmp_path / "x.orbax")
    found = restored(tmp_path / "x.orbax", jax.eval_shape(lambda: params))
    assert np.asarray(found["params"]["Dense_0"]["kernel"].value).tolist() == [[1, 1], [1, 1]]


def test_a_directory_of_torch_files_names_what_is_left(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    torch.save({"model": {"w": torch.ones(2)}, "epoch": 3}, tmp_path / "one" / "pytorch_model.bin")
    for place in (1, 2):
        torch.save(
            {f"w{place}": torch.ones(2), "n": place}, tmp_path / "two" / f"pytorch_model-0000{place}-of-00002.bin"
        )
    files = {f"w{place}": f"pytorch_model-0000{place}-of-00002.bin" for place in (1, 2)}
    index = json.dumps({"metadata": {}, "weight_map": files})
    (tmp_path / "two" / "pytorch_model.bin.index.json").write_text(index)
    with pm.open(tmp_path / "one") as checkpoint:
        assert checkpoint.save(tmp_path / "one.safetensors").left_out == ("epoch (not a tensor)",)
        assert checkpoint.save(tmp_path / "one.pt").left_out == ()
    found = torch.load(tmp_path / "one.pt", weights_only=True)
    assert same(found, {"model": {"w": torch.ones(2)}, "epoch": 3}) and same(pm.load(tmp_path / "one", "torch"), found)
    with pm.open(tmp_path / "two") as checkpoint:
        assert checkpoint.save(tmp_path / "two.safetensors").left_out == ("n (not a tensor)",)
        checkpoint.save(tmp_path / "two.pt")
    assert sorted(torch.load(tmp_path / "two.pt", weights_only=True)) == ["n", "w1", "w2"]
