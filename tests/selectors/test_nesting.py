"""Renames keep nesting: each piece of a path stays in the container it was in, in memory and in files alike."""

import re
import tempfile
from collections import OrderedDict
from pathlib import Path

import flax.serialization
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import torch
from hypothesis import assume, given, settings, strategies as st

import paramend as pm
from paramend.errors import RenameClash


def values(tree):
    """The tree with numbers in place of its arrays."""
    if isinstance(tree, dict):
        return {key: values(child) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map(values, tree))
    return float(tree) if isinstance(tree, np.ndarray | torch.Tensor) else tree


def filled(tree, leaf):
    """The tree with arrays in place of its floats."""
    if isinstance(tree, dict):
        return type(tree)((key, filled(child, leaf)) for key, child in tree.items())
    if isinstance(tree, list):
        return [filled(child, leaf) for child in tree]
    return leaf(tree) if isinstance(tree, float) else tree


def tensor(value):
    return torch.tensor(value, dtype=torch.float32)


def array(value):
    return np.array(value, "float32")


def in_torch_file(tree, edit, folder):
    torch.save(tree, folder / "in.pt")
    edit(pm.open(folder / "in.pt")).save(folder / "out.pt")
    return torch.load(folder / "out.pt", weights_only=True)


def in_msgpack(tree, edit, folder):
    (folder / "in.msgpack").write_bytes(flax.serialization.to_bytes(tree))
    edit(pm.open(folder / "in.msgpack")).save(folder / "out.msgpack")
    return flax.serialization.msgpack_restore((folder / "out.msgpack").read_bytes())


def names_in(tree, path=()):
    """name → value: all pieces joined by "."."""
    if not isinstance(tree, dict):
        return {".".join(path).replace("/", "."): tree}
    return {name: leaf for key, child in tree.items() for name, leaf in names_in(child, (*path, str(key))).items()}


def in_safetensors(tree, edit, folder):
    safetensors.numpy.save_file(names_in(tree), folder / "in.safetensors")
    edit(pm.open(folder / "in.safetensors")).save(folder / "out.safetensors")
    return safetensors.numpy.load_file(folder / "out.safetensors")


def in_npz(tree, edit, folder):
    np.savez(folder / "in.npz", **{name.replace(".", "/"): leaf for name, leaf in names_in(tree).items()})
    edit(pm.open(folder / "in.npz")).save(folder / "out.npz")
    with np.load(folder / "out.npz") as found:
        return {name.replace("/", "."): found[name] for name in found.files}


LIGHTNING = {"state_dict": {"model.layers.0.w": 1.0, "model.layers.1.w": 2.0}, "epoch": 3}

# tree, selector, new path, outcome
CASES = [
    # a piece of a key is taken away: the container stays
    ({"state_dict": {"net.w": 1.0}}, "state_dict.net.**", "state_dict.**", {"state_dict": {"w": 1.0}}),
    ({"a": {"x.y.w": 1.0}}, "a.x.y.**", "a.x.**", {"a": {"x.w": 1.0}}),
    ({"a": {"x.y.w": 1.0}}, "a.x.y.**", "a.y.**", {"a": {"y.w": 1.0}}),
    ({"a": {"x.y.w": 1.0}}, "a.x.y.w", "a.x.w", {"a": {"x.w": 1.0}}),
    ({"a": {"x.y.w": 1.0}}, "a.x.y.w", "a.w", {"a": {"w": 1.0}}),
    ({"params": {"a/b": 1.0}}, "params/a/**", "params/**", {"params": {"b": 1.0}}),
    ({"params": {"a/b": 1.0}}, "params/a/b", "params/b", {"params": {"b": 1.0}}),
    # a container is taken away: what was in it stays as it was
    (LIGHTNING, "state_dict.**", "**", {"epoch": 3, "model.layers.0.w": 1.0, "model.layers.1.w": 2.0}),
    ({"x": {"sd": {"net.w": 1.0}}}, "x.sd.net.**", "x.**", {"x": {"w": 1.0}}),
    ({"x": {"sd": {"net.w": 1.0}}}, "x.sd.net.**", "sd.**", {"sd": {"w": 1.0}}),
    ({"x": {"sd": {"net.w": 1.0}}}, "x.sd.**", "sd.**", {"sd": {"net.w": 1.0}}),
    # also one of the same name
    ({"a": {"a": 1.0}}, "a.**", "**", {"a": 1.0}),
    ({"a": {"a": {"b": 1.0}, "c": 2.0}}, "a.**", "**", {"a": {"b": 1.0}, "c": 2.0}),
    # Lightning: a prefix within the state dict
    (
        LIGHTNING,
        "state_dict.model.**",
        "state_dict.**",
        {"state_dict": {"layers.0.w": 1.0, "layers.1.w": 2.0}, "epoch": 3},
    ),
    (
        LIGHTNING,
        "state_dict.**",
        "state_dict.net.**",
        {"state_dict": {"net.model.layers.0.w": 1.0, "net.model.layers.1.w": 2.0}, "epoch": 3},
    ),
    (
        LIGHTNING,
        "state_dict.model.layers.<n>.**",
        "state_dict.h.<n+1>.**",
        {"state_dict": {"h.1.w": 1.0, "h.2.w": 2.0}, "epoch": 3},
    ),
    (
        LIGHTNING,
        "state_dict.model.layers[-1].**",
        "state_dict.last.**",
        {"state_dict": {"model.layers.0.w": 1.0, "last.w": 2.0}, "epoch": 3},
    ),
    # other containers get other names, however many pieces they have
    ({"state_dict": {"net.w": 1.0}}, "state_dict.**", "ema.shadow.**", {"ema": {"shadow": {"net.w": 1.0}}}),
    ({"state_dict": {"net.w": 1.0}}, "state_dict.net.**", "ema.**", {"ema": {"w": 1.0}}),
    ({"x": {"sd": {"net.w": 1.0}}}, "x.sd.net.**", "sd.net.new.**", {"sd": {"net.new.w": 1.0}}),
    # a swap, and a swap around a number
    ({"a": {"b": {"w": 1.0}}}, "a.b.**", "b.a.**", {"b": {"a": {"w": 1.0}}}),
    ({"a": {"0": {"b": {"w": 1.0}}}}, "a.<n>.b.**", "b.<n+1>.a.**", {"b": {"1": {"a": {"w": 1.0}}}}),
    # a piece that is added joins a name of several pieces, also in the middle and at the end
    ({"net.w": 1.0}, "**", "model.**", {"model.net.w": 1.0}),
    ({"net.w": 1.0}, "net.**", "net.inner.**", {"net.inner.w": 1.0}),
    ({"net.w": 1.0}, "**", "**.value", {"net.w.value": 1.0}),
    ({"mlp/~/linear": {"w": 1.0}}, "mlp/~/*/*", "net/mlp/~/*/*", {"net/mlp/~/linear": {"w": 1.0}}),
    ({"mlp/~/linear": {"w": 1.0}}, "**", "net/**", {"net/mlp/~/linear": {"w": 1.0}}),
    ({"mlp/~/a": {"w": 1.0}, "b": {"w": 2.0}}, "b/**", "net/b/**", {"mlp/~/a": {"w": 1.0}, "net/b": {"w": 2.0}}),
    # and elsewhere it is a container of its own
    ({"a": {"b": {"w": 1.0}}}, "**", "params.**", {"params": {"a": {"b": {"w": 1.0}}}}),
    ({"a": {"b": {"w": 1.0}}}, "a.**", "a.x.**", {"a": {"x": {"b": {"w": 1.0}}}}),
    ({"h_0": {"w": 1.0}}, "h_<n>.**", "layers.<n>.**", {"layers": {"0": {"w": 1.0}}}),
    # what is quoted is a key, and the next piece another one
    ({"net.w": 1.0}, "**", '"state_dict".**', {"state_dict": {"net.w": 1.0}}),
    ({"net.w": 1.0}, "net.w", 'net."x.y".w', {"net": {"x.y": {"w": 1.0}}}),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "selector", "to", "outcome"), CASES)
def test_where_each_piece_goes(tree, selector, to, outcome, tmp_path):
    def edit(found):
        return pm.at(found, selector).rename(to)

    tensors, arrays = filled(tree, tensor), filled(tree, array)
    assert values(edit(tensors)) == values(edit(arrays)) == outcome
    assert values(in_torch_file(tensors, edit, tmp_path)) == outcome
    if not any(type(leaf) is int for leaf in outcome.values()):  # flax keeps no ints
        assert values(in_msgpack(arrays, edit, tmp_path)) == outcome
        assert names_in(values(in_safetensors(arrays, edit, tmp_path))) == names_in(outcome)
        assert names_in(values(in_npz(arrays, edit, tmp_path))) == names_in(outcome)


def test_a_torch_dict_of_tensors_alone_is_a_state_dict(tmp_path):
    linear = torch.nn.Linear(1, 1, dtype=torch.float32).state_dict()
    wrapped = {"model": linear, "epoch": 3}

    def edit(found):
        return pm.at(found, "model.**").rename("model.fc.**")

    for found in edit(wrapped), in_torch_file(wrapped, edit, tmp_path):
        assert list(found) == ["model", "epoch"]
        assert type(found["model"]) is OrderedDict
        assert list(found["model"]) == ["fc.weight", "fc.bias"]
    assert edit(wrapped)["model"]["fc.weight"] is linear["weight"]
    # the module that it is for takes it
    torch.nn.ModuleDict({"fc": torch.nn.Linear(1, 1)}).load_state_dict(edit(wrapped)["model"])
    # in a tree of JAX or numpy nothing says so: modules are dicts there
    arrays = pm.at({"w": array(1.0), "b": array(2.0)}, "**").rename("model/**")
    assert values(arrays) == {"model": {"w": 1.0, "b": 2.0}}
    # a list of tensors is none, nor is a dict of other dicts
    many = {"many": [tensor(1.0), tensor(2.0)], "one": {"two": {"w": tensor(3.0)}}}
    assert values(pm.at(many, "many.**").rename("new.a.**"))["new"] == {"a": [1.0, 2.0]}
    assert values(pm.at(many, "one.**").rename("one.x.**"))["one"] == {"x": {"two": {"w": 3.0}}}


def test_containers_are_of_the_kinds_that_they_were(tmp_path):
    tree = {"a": OrderedDict(b=OrderedDict({"net.w": tensor(1.0)}), c=[{"v": tensor(2.0)}]), "keep": tensor(0.0)}

    def twice(found):
        return pm.at(pm.at(found, "a.**").rename("x.y.**"), "x.y.b.net.**").rename("z.b.**")

    wanted = {"x": {"y": {"c": [{"v": 2.0}]}}, "keep": 0.0, "z": {"b": {"w": 1.0}}}
    for found in twice(tree), in_torch_file(tree, twice, tmp_path):
        assert values(found) == wanted
        assert type(found["x"]["y"]) is OrderedDict
        assert type(found["z"]["b"]) is OrderedDict


def test_names_that_read_the_same_stay_apart(tmp_path):
    tree = filled({"a": {"b": 1.0}, "a.b": 2.0, "c": 3.0}, tensor)

    def edit(found):
        return pm.at(found, "c").rename("d")

    assert values(edit(tree)) == values(in_torch_file(tree, edit, tmp_path)) == {"a": {"b": 1.0}, "a.b": 2.0, "d": 3.0}


def test_a_leaf_has_nothing_below_it(tmp_path):
    tree = filled({"a": 1.0, "b": {"x": 2.0}, "c": {"y": {"z": 3.0}}}, tensor)
    torch.save(tree, tmp_path / "x.pt")
    checkpoint = pm.open(tmp_path / "x.pt")
    for found in tree, checkpoint:
        with pytest.raises(RenameClash, match=r"b.x would go to a[./]x \(a is a leaf\)"):
            pm.at(found, "b.x").rename("a.x")
        with pytest.raises(RenameClash, match=r"a would go to c \(which is taken\)"):
            pm.at(found, "a").rename("c")
    # in a flat table both names are names
    state = filled({"a": 1.0, "b.x": 2.0}, tensor)
    assert values(pm.at(state, "b.x").rename("a.x")) == {"a": 1.0, "a.x": 2.0}


def test_stacks_stay_where_their_layers_were(tmp_path):
    tree = {"state_dict": {f"layers.{i}.w": torch.full((2,), float(i)) for i in range(2)}, "epoch": 3}

    def stack(found):
        return pm.stack_layers(found, "state_dict.layers.<n>")

    def there_and_back(found):
        return pm.unstack_layers(stack(found), "state_dict.layers", into="state_dict.layers.<n>")

    stacked = stack(tree)
    assert list(stacked) == ["state_dict", "epoch"]
    assert list(stacked["state_dict"]) == ["layers.w"]
    assert torch.equal(stacked["state_dict"]["layers.w"], torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    back = there_and_back(tree)
    assert list(back["state_dict"]) == list(tree["state_dict"])
    found = in_torch_file(tree, stack, tmp_path)
    assert list(found["state_dict"]) == ["layers.w"]


# ---- properties ------------------------------------------------------------------------------------------------

KEYS = st.sampled_from(["a", "b", "c", "w", "a.b", "c/w", "net.a.w", "mlp/~/b", "0"])
TREES = st.recursive(
    st.just(0.0), lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=3), max_leaves=8
).filter(lambda tree: isinstance(tree, dict))


def leaves(tree, path=()):
    """[(keys, value)]."""
    if not isinstance(tree, dict):
        return [(path, tree)]
    return [leaf for key, child in tree.items() for leaf in leaves(child, (*path, key))]


def split(keys):
    """A path as [piece, separator before it, depth]."""
    out = []
    for depth, key in enumerate(keys):
        texts = re.split("([/.])", key)
        out += [[text, sep, depth] for text, sep in zip(texts[::2], ["", *texts[1::2]], strict=True)]
    return out


def is_table(tree, keys, depth, *, of_torch):
    for key in keys[:depth]:
        tree = tree[key]
    if any("." in key or "/" in key for key in tree):
        return True
    named = not depth or any(key != "0" for key in tree)
    return of_torch and named and all(not isinstance(child, dict) for child in tree.values())


def renamed(tree, prefix, verb, at, *, of_torch):
    """The new keys of each leaf whose path begins so: one piece goes, is another, or comes after `at` others."""
    out = []
    for keys, value in leaves(tree):
        path = split(keys)
        if [text for text, _, _ in path[: len(prefix)]] == prefix:
            if verb == "replace":
                path[at][0] = "new"
            elif verb == "remove":
                del path[at]
            else:
                beside = [*path[at : at + 1], *path[:at][-1:]]
                table = next((p for p in beside if is_table(tree, keys, p[2], of_torch=of_torch)), None)
                path.insert(at, ["new", "", None if table is None else table[2]])
        grouped = []
        for i, (text, _, depth) in enumerate(path):
            if i and depth is not None and depth == path[i - 1][2]:
                grouped[-1] += "." + text
            else:
                grouped.append(text)
        out.append((tuple(grouped), value))
    return out


def nested(flat):
    """The tree of these keys; None if two leaves stand in each other's way."""
    tree = {}
    for keys, value in flat:
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                return None
        if not keys or keys[-1] in node:
            return None
        node[keys[-1]] = value
    return tree


def dotted(tree):
    """The tree with "." for each separator within a key; None if two keys are then one."""
    if not isinstance(tree, dict):
        return tree
    children = {key.replace("/", "."): dotted(child) for key, child in tree.items()}
    return children if len(children) == len(tree) else None


def outcome(action):
    try:
        return dotted(values(action()))
    except RenameClash:
        return None


@settings(max_examples=80, deadline=None)
@given(TREES, st.sampled_from(["add", "remove", "replace"]), st.data())
def test_memory_and_files_agree_with_the_reference(tree, verb, data):
    flat = leaves(tree)
    for number, (keys, _) in enumerate(flat):
        nested_in = tree
        for key in keys[:-1]:
            nested_in = nested_in[key]
        nested_in[keys[-1]] = float(number)
    assume(dotted(tree) is not None)
    keys, _ = data.draw(st.sampled_from(leaves(tree)))
    pieces = [text for text, _, _ in split(keys)]
    prefix = pieces[: data.draw(st.integers(verb != "add", len(pieces)))]
    assume(len(set(prefix)) == len(prefix))
    at = data.draw(st.integers(0, len(prefix) - (verb != "add")))
    new = [*prefix[:at], *["new"] * (verb != "remove"), *prefix[at + (verb != "add") :]]

    def edit(found):
        return pm.at(found, "/".join([*prefix, "**"])).rename("/".join([*new, "**"]))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for leaf, of_torch, file in (tensor, True, in_torch_file), (array, False, in_msgpack):
            wanted = dotted(nested(renamed(tree, prefix, verb, at, of_torch=of_torch)))
            given_tree = filled(tree, leaf)
            assert outcome(lambda: edit(given_tree)) == wanted  # noqa: B023
            assert outcome(lambda: file(given_tree, edit, folder)) == wanted  # noqa: B023
        if len(names_in(tree)) == len(flat):
            flat_names = [(".".join(k), v) for k, v in renamed(tree, prefix, verb, at, of_torch=False)]
            wanted = dict(flat_names) if len(dict(flat_names)) == len(flat) and all(k for k, _ in flat_names) else None
            for file in in_safetensors, in_npz:
                assert outcome(lambda: file(filled(tree, array), edit, folder)) == wanted  # noqa: B023


# ---- Orbax, and what else builds paths -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of orbax, about itself
@pytest.mark.parametrize(
    ("selector", "to", "changed"),
    [
        ("params/a/**", "params/**", {"params": {"b": 1.0, "c": 2.0}}),
        ("params/**", "params/x/**", {"params": {"x.a.b": 1.0, "x.a.c": 2.0}}),
        ("mlp/**", "net/mlp/**", {"net/mlp/~/l": {"w": 3.0}}),
        ("mlp/~/**", "mlp/**", {"mlp/l": {"w": 3.0}}),
        ("deep/**", "deep/x/**", {"deep/x": {"er": {"w": 4.0}}}),
        ("deep/er/**", "deep/er/x/**", {"deep": {"er": {"x": {"w": 4.0}}}}),
    ],
)
def test_orbax(selector, to, changed, tmp_path):
    tree = {"params": {"a.b": 1.0, "a.c": 2.0}, "mlp/~/l": {"w": 3.0}, "deep": {"er": {"w": 4.0}}}
    wanted = {key: child for key, child in tree.items() if not selector.startswith(key[:3])} | changed
    ocp.PyTreeCheckpointer().save(tmp_path / "in", filled(tree, array))
    assert values(pm.at(filled(tree, array), selector).rename(to)) == wanted
    pm.at(pm.open(tmp_path / "in"), selector).rename(to).save(tmp_path / "out")
    assert values(ocp.PyTreeCheckpointer().restore(tmp_path / "out")) == wanted


def test_delete_deepen_graft_recipes_and_convert_hold_nesting(tmp_path):
    tree = filled(LIGHTNING, tensor)
    source = filled({"state_dict": {"m.layers.1.w": 5.0}}, tensor)
    recipe = pm.Recipe([{"rename": {"at": "state_dict.model.**", "to": "state_dict.**"}}])
    edits = {
        "delete": (
            lambda found: pm.at(found, "state_dict.model.layers.0.**").delete(),
            {"state_dict": {"model.layers.1.w": 2.0}},
        ),
        "deepen": (
            lambda found: pm.deepen(found, layers="state_dict.model.layers[*]", order=[0, 0, 1], identity=None)[0],
            {"state_dict": {f"model.layers.{i}.w": value for i, value in enumerate((1.0, 1.0, 2.0))}},
        ),
        "graft": (
            lambda found: pm.graft(found, source, rename={"state_dict.m.**": "state_dict.model.**"})[0],
            {"state_dict": {"model.layers.0.w": 1.0, "model.layers.1.w": 5.0}},
        ),
        "recipe": (recipe.apply, {"state_dict": {"layers.0.w": 1.0, "layers.1.w": 2.0}}),
    }
    for name, (edit, wanted) in edits.items():
        (tmp_path / name).mkdir()
        for found in edit(tree), in_torch_file(tree, edit, tmp_path / name):
            assert values(found)["state_dict"] == wanted["state_dict"], name
            assert set(found) <= set(LIGHTNING), name
    assert pm.at(tree, "state_dict.**").delete() == {"epoch": 3}
    pm.open(tmp_path / "graft" / "in.pt").save(tmp_path / "x.msgpack")
    back = flax.serialization.msgpack_restore((tmp_path / "x.msgpack").read_bytes())
    assert values(back) == LIGHTNING
