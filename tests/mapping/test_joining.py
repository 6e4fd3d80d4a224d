"""Leaves joined and cut: what numpy makes of the arrays, in memory and on disk, bit for bit."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import paramend as pm
from paramend.cli.main import cli
from support.quantized import LAYOUTS, stored, write

RNG = np.random.default_rng(5)
Q, K, V = (RNG.normal(size=(rows, 6)).astype("float32") for rows in (4, 2, 2))
GATE, UP = (RNG.integers(-9, 9, (3, 5)).astype("int8") for _ in "ab")


def same(found, right):
    found = np.asarray(found)
    assert (found.shape, found.dtype, found.tobytes()) == (
        right.shape,
        right.dtype,
        np.ascontiguousarray(right).tobytes(),
    )


def layers():
    tree = {}
    for i in range(3):
        tree |= {f"layers.{i}.{name}.weight": array + i for name, array in zip("qkv", (Q, K, V), strict=True)}
        tree |= {f"layers.{i}.mlp.{name}": array for name, array in (("gate", GATE), ("up", UP))}
    return tree


def fused(tree):
    tree = pm.concat(tree, [f"layers.<n>.{name}.weight" for name in "qkv"], into="layers.<n>.qkv.weight")
    return pm.interleave(tree, ["layers.<n>.mlp.gate", "layers.<n>.mlp.up"], into="layers.<n>.mlp.gate_up", axis=1)


def check_fused(found):
    assert list(found) == [f"layers.{i}.{name}" for i in range(3) for name in ("qkv.weight", "mlp.gate_up")]
    for i in range(3):
        same(found[f"layers.{i}.qkv.weight"], np.concatenate([Q + i, K + i, V + i]))
        same(found[f"layers.{i}.mlp.gate_up"], np.stack([GATE, UP], 2).reshape(3, 10))


def test_in_memory():
    tree = layers()
    check_fused(fused(tree))
    assert list(tree) == list(layers())
    check_fused(fused({name: jnp.asarray(array) for name, array in tree.items()}))
    found = fused({name: torch.from_numpy(array) for name, array in tree.items()})
    check_fused({name: tensor.numpy() for name, tensor in found.items()})


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "npz"])
def test_on_disk(tmp_path, suffix):
    pm.save(layers(), tmp_path / f"m.{suffix}")
    with pm.open(tmp_path / f"m.{suffix}") as model:
        fused(model).save(tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    check_fused({name: found[name] for name in fused(layers())})
    assert len(found) == 6
    with pm.open(tmp_path / "out.safetensors") as model:
        parts = [f"layers.<n>.{name}.weight" for name in "qkv"]
        back = pm.split(model, "layers.<n>.qkv.weight", into=parts, sizes=[4, 2, 2])
        back.save(tmp_path / "back.safetensors")
    again = load_file(tmp_path / "back.safetensors")
    for i in range(3):
        for name, array in zip("qkv", (Q, K, V), strict=True):
            same(again[f"layers.{i}.{name}.weight"], array + i)


def test_bytes_are_copied_where_their_runs_are_long(tmp_path):
    rows = RNG.integers(0, 255, (2, 8, 4096)).astype("uint8")
    save_file({"a": rows[0], "b": rows[1]}, tmp_path / "m.safetensors")
    with pm.open(tmp_path / "m.safetensors") as model:
        report = pm.interleave(model, ["a", "b"], into="c").save(tmp_path / "out.safetensors")
    assert report.bytes_computed == 0
    same(load_file(tmp_path / "out.safetensors")["c"], rows.transpose(1, 0, 2).reshape(16, 4096))


def test_a_leaf_keeps_its_box_and_its_nest():
    boxed = {n: nn.Partitioned(jnp.ones((2, 3)) * i, names=("a", "b")) for i, n in enumerate("qk")}
    tree = {"params": {"attn": boxed, "rest": jnp.zeros(1)}}
    made = pm.concat(tree, ["params.attn.q", "params.attn.k"], into="params.attn.qk")
    assert list(made["params"]["attn"]) == ["qk"]
    assert made["params"]["attn"]["qk"].names == ("a", "b")
    assert made["params"]["rest"] is tree["params"]["rest"]
    cut = pm.split(made, "params.attn.qk", into=["params.attn.q", "params.attn.k"])
    assert [cut["params"]["attn"][n].value.tolist() for n in "qk"] == [boxed[n].value.tolist() for n in "qk"]


def test_edits_of_the_parts_come_along(tmp_path):
    save_file({"a": GATE, "b": UP, "c": np.ones(2)}, tmp_path / "m.safetensors")
    with pm.open(tmp_path / "m.safetensors") as model:
        edited = pm.at(pm.at(model, "a").multiply(2), "c").fill(5)
        made = pm.at(pm.concat(edited, ["a", "b"], into="ab"), "ab").add(1)
        made.save(tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    same(found["ab"], np.concatenate([GATE * 2, UP]) + np.int8(1))
    same(found["c"], np.full(2, 5.0))


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize(
    ("edit", "error", "says"),
    [
        (lambda t: pm.concat(t, ["q", "x"], into="y"), pm.errors.NoMatch, "x"),
        (
            lambda t: pm.concat(t, ["q", "g"], into="y"),
            pm.errors.SpecMismatch,
            r"q, g: concat along axis 0: float32\[4,6\] and int8",
        ),
        (
            lambda t: pm.interleave(t, ["q", "k"], into="y"),
            pm.errors.SpecMismatch,
            "interleave along axis 0",
        ),
        (lambda t: pm.concat(t, ["q", "k"], into="g"), pm.errors.RenameClash, "would collide"),
        (lambda t: pm.concat(t, ["q", "k"], into="y", axis=2), pm.errors.OutOfRange, "has no axis 2"),
        (lambda t: pm.concat(t, "q", into="y"), pm.errors.BadArgument, "is not a list of selectors"),
        (
            lambda t: pm.concat(t, ["h.<n>.a", "h.<n>.b"], into="h.<n>.c"),
            pm.errors.BadArgument,
            "there is no h.<n>.b beside h.1.a",
        ),
        (lambda t: pm.split(t, "q", into=["a", "b", "c"]), pm.errors.SpecMismatch, "cannot be cut into 3 equal parts"),
        (lambda t: pm.split(t, "q", into=["a", "b"], sizes=[1, 2]), pm.errors.SpecMismatch, "do not add up to 4"),
        (lambda t: pm.split(t, "q", into=["a", "b"], sizes=[4]), pm.errors.BadArgument, "2 new paths"),
        (lambda t: pm.split(t, "q", into=["a", "a"]), pm.errors.RenameClash, "would collide"),
        (lambda t: pm.split(t, "q", into="a"), pm.errors.BadArgument, "is not a list of paths"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, where, edit, error, says):
    tree = {"q": Q, "k": K, "g": GATE, "h.0.a": K, "h.0.b": K, "h.1.a": K}
    if where == "disk":
        save_file(tree, tmp_path / "m.safetensors")
        tree = pm.open(tmp_path / "m.safetensors")
    with pytest.raises(error, match=says):
        edit(tree)


def test_a_module_is_refused_with_the_way_out():
    with pytest.raises(pm.errors.Unsupported, match="state_dict"):
        pm.concat(torch.nn.LayerNorm(3), ["weight", "bias"], into="both")


def test_as_commands(tmp_path):
    path, out, back = (tmp_path / f"{name}.safetensors" for name in ("m", "out", "back"))
    save_file({"h.0.a": Q, "h.0.b": K, "h.1.a": Q + 1, "h.1.b": K + 1, "c": V}, path)

    def run(*words):
        done = CliRunner().invoke(cli, list(map(str, words)))
        assert done.exit_code == 0, done.output
        return done.output

    said = run("concat", path, "h.<n>.a", "h.<n>.b", "--into", "h.<n>.ab", "-o", out)
    assert "h.{0,1}.ab ◄─ concat(h.{0,1}.a, h.{0,1}.b, axis=0)  2 × float32[6,6]" in said
    same(load_file(out)["h.1.ab"], np.concatenate([Q, K]) + 1)
    run("split", out, "h.<n>.ab", "--into", "h.<n>.a", "--into", "h.<n>.b", "--sizes", "4,2", "-o", back)
    assert {name: array.tolist() for name, array in load_file(back).items()} == {
        name: array.tolist() for name, array in load_file(path).items()
    }
    run("interleave", path, "c", "c", "--into", "cc", "--axis", "1", "-o", tmp_path / "i.safetensors")
    same(load_file(tmp_path / "i.safetensors")["cc"], V.repeat(2, 1))
    done = CliRunner().invoke(cli, ["split", str(path), "h.0.a", "--into", "x", "--into", "y", "--into", "z"])
    assert done.output.endswith("hint: --sizes 2,1,1\n"), done.output
    done = CliRunner().invoke(cli, ["concat", str(path), "c", "x", "--into", "y", "-o", str(tmp_path / "no")])
    assert (done.exit_code, (tmp_path / "no").exists()) == (2, False)


def test_in_a_recipe(tmp_path):
    parts = [f"layers.<n>.{name}.weight" for name in "qkv"]
    gates = ["layers.<n>.mlp.gate", "layers.<n>.mlp.up"]
    recipe = pm.Recipe(
        [
            {"concat": {"at": parts, "into": "layers.<n>.qkv.weight"}},
            {"interleave": {"at": gates, "into": "layers.<n>.mlp.gate_up", "axis": 1}},
        ]
    )
    check_fused(recipe.apply(layers()))
    back = pm.Recipe([{"split": {"at": "layers.<n>.qkv.weight", "into": parts, "sizes": "4, 2, 2"}}])
    save_file(layers(), tmp_path / "m.safetensors")
    with pm.open(tmp_path / "m.safetensors") as model:
        back.apply(recipe.apply(model)).save(tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    same(found["layers.2.k.weight"], K + 2)
    same(found["layers.2.mlp.gate_up"], np.stack([GATE, UP], 2).reshape(3, 10))
    with pytest.raises(pm.errors.BadRecipe, match=r"steps\[0\].into.*cannot be cut into 3") as error:
        pm.Recipe([{"split": {"at": "layers.0.q.weight", "into": ["a", "b", "c"]}}]).apply(layers())
    assert error.value.problems[0].address == "$.steps[0].into"


def test_a_quantised_weight_is_not_parted(tmp_path):
    fp8 = write(tmp_path / "m.safetensors", stored(LAYOUTS["fp8-block", "DeepSeek-V3"]))
    with pm.open(fp8) as model:
        weight = next(path for path in model.paths if path.endswith("fc.weight"))
        with pytest.raises(pm.errors.Quantized, match=r"would be made part of other leaves, and .*weight_scale_inv"):
            pm.split(model, weight, into=["a", "b"])
        for selector in (weight, f"{weight}*"):
            made = pm.insert({"x": np.ones(1, "f4")}, model, selector)[0]
            assert len(pm.at(made, "**", raw=True).paths) == 3 and len(pm.at(made, "**").paths) == 2
    with pm.open(fp8, raw=True) as model:
        assert {"a", "b"} < set(pm.split(model, weight, into=["a", "b"]).paths)
