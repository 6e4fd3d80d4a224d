"""Layouts: a torch weight is a Flax kernel transposed, which a square matrix does not show."""

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch
from flax import nnx

import paramend as pm
from paramend.errors import GraftRefused

FIRST = {"**/weight": "**/kernel"}


def a(*shape):
    return np.arange(1.0, 1 + np.prod(shape), dtype="float32").reshape(shape)


def zeros(*shape):
    return np.zeros(shape, "float32")


def refused(target, source, verb=pm.graft, **options):
    with pytest.raises(GraftRefused) as caught:
        verb(target, source, **options)
    assert "overlap" not in caught.value.hint.split("transposition")[0]
    return caught.value


def by_the_hint(error, target, source):
    """The tree that the code of a hint makes."""
    names = {"pm": pm, "target": target, "source": source, "tree": target, "module": target}
    exec("\n".join(line.strip() for line in error.hint.splitlines()), names)
    return names["tree"]


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("rename", [None, FIRST])
@pytest.mark.parametrize("kind", ["module", "state dict", "safetensors", "numpy"])
def test_a_torch_layer_in_flax(kind, rename, square, tmp_path):
    layer = torch.nn.Linear(3, 3 if square else 2)
    source = torch.nn.Sequential()
    source.add_module("fc", layer)
    given = {"module": source, "state dict": source.state_dict()}.get(kind)
    if kind == "safetensors":
        pm.save(source.state_dict(), tmp_path / "torch.safetensors")
        given = pm.open(tmp_path / "torch.safetensors")
    if kind == "numpy":
        given = {name: value.numpy() for name, value in source.state_dict().items()}
    target = {"fc": {"kernel": zeros(3, layer.out_features), "bias": zeros(layer.out_features)}}
    error = refused(target, given, rename=rename)
    assert "fc/kernel ◄─ fc.weight" in str(error) and "transposed, a weight (out, in) for a kernel (in, out)" in str(
        error
    )
    assert ("without the transposition" in error.hint) == square
    tree = by_the_hint(error, target, given)
    assert np.array_equal(tree["fc"]["kernel"], layer.weight.detach().numpy().T)
    x = np.ones((1, 3), "float32")
    found = nn.Dense(layer.out_features).apply({"params": tree["fc"]}, x)
    assert np.allclose(found, layer(torch.from_numpy(x)).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("back", [False, True])
def test_convolutions(ndim, back):
    weight, kernel = a(*[3] * (ndim + 2)), zeros(*[3] * (ndim + 2))
    source, target = ("kernel", "weight") if back else ("weight", "kernel")
    for given in (weight, torch.from_numpy(weight)):
        error = refused({"c": {target: kernel}}, {"c": {source: given}}, rename={f"c/{source}": f"c/{target}"})
        assert "out, in, " in str(error) and " in, out)" in str(error)
        found = by_the_hint(error, {"c": {target: kernel}}, {"c": {source: given}})["c"][target]
        wanted = np.einsum("...io->oi..." if back else "oi...->...io", weight)
        assert np.array_equal(found, wanted)


def test_no_corner_of_a_wrong_matrix():
    target, source = {"fc": {"kernel": zeros(3, 4)}}, {"fc": {"weight": a(4, 3)}}
    for options in ({"mismatch": "overlap"}, {"mismatch": "resize"}, {"place": {"**": "center"}}):
        assert "transposed" in str(refused(target, source, rename=FIRST, **options))
    kept, report = pm.graft({**target, "b": zeros(1)}, {**source, "b": a(1)}, rename=FIRST, mismatch="keep")
    assert not kept["fc"]["kernel"].any() and [row.did for row in report.mismatched] == ["kept"]
    # under one name, too, a matrix whose shape is reversed is no larger or smaller matrix
    error = refused(target, {"fc": {"kernel": a(4, 3)}})
    assert "a leaf is transposed" in str(error)
    assert np.array_equal(by_the_hint(error, target, {"fc": {"kernel": a(4, 3)}})["fc"]["kernel"], a(4, 3).T)


def test_a_head_of_another_size_whose_weight_is_transposed():
    target = {"fc": {"kernel": zeros(3, 3)}, "head": {"kernel": zeros(3, 10)}}
    source = {"fc.weight": a(3, 3), "head.weight": a(7, 3)}
    tree = by_the_hint(refused(target, source, rename=FIRST), target, source)
    assert np.array_equal(tree["fc"]["kernel"], a(3, 3).T) and not tree["head"]["kernel"].any()


def test_a_stack_of_matrices():
    target, source = {"experts": {"kernel": zeros(2, 3, 4)}}, {"experts": {"weight": a(2, 4, 3)}}
    error = refused(target, source, rename=FIRST)
    assert "each matrix transposed" in str(error)
    tree = by_the_hint(error, target, source)
    assert np.array_equal(tree["experts"]["kernel"], a(2, 4, 3).swapaxes(1, 2))


def test_kernels_with_an_axis_of_heads():
    error = refused({"q": {"kernel": zeros(4, 2, 2)}}, {"q": {"weight": a(4, 4)}}, rename=FIRST)
    assert "transposed, and with another number of axes" in str(error)
    assert error.hint.startswith("pm.at(source, path).one() is the array")


def test_prefixes_and_many_layers_and_in_place():
    source = {f"model.layers.{n}.{name}": value for n in range(6) for name, value in _layer(n).items()}
    source["model.emb.weight"] = a(5, 3)
    shapes = {f"layers_{n}": {"kernel": zeros(3, 3), "bias": zeros(3)} for n in range(6)}
    target = {"params": {**shapes, "emb": {"weight": zeros(5, 3)}}}
    error = refused(target, source, rename={"model.layers.<n>.*": "params/layers_<n>/*", "model.**": "params/**"})
    assert "params/layers_{0..5}/kernel" in str(error) and error.hint.count("None") == 6  # not the embedding
    module = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    error = refused(module, {"weight": a(3, 3), "bias": a(3)}, verb=pm.graft_, rename={"weight": "kernel"})
    by_the_hint(error, module, {"weight": a(3, 3), "bias": a(3)})
    assert np.array_equal(module.kernel[...], a(3, 3).T) and np.array_equal(module.bias[...], a(3))


def _layer(n):
    return {"kernel" if n > 9 else "weight": a(3, 3) + n, "bias": a(3) + n}


def test_what_is_stored_alike_is_copied():
    # one pair that fits only as it is proves it for all
    target = {"a": {"kernel": zeros(3, 3)}, "b": {"kernel": zeros(3, 5)}}
    source = {"a": {"weight": a(3, 3)}, "b": {"weight": a(3, 5)}}
    tree, _ = pm.graft(target, source, rename=FIRST)
    assert np.array_equal(tree["a"]["kernel"], a(3, 3)) and np.array_equal(tree["b"]["kernel"], a(3, 5))
    # unless another pair proves the contrary: GPT-2 has layers of both kinds
    target["c"], source["c"] = {"kernel": zeros(3, 4)}, {"weight": a(4, 3)}
    error = refused(target, source, rename=FIRST)
    tree = by_the_hint(error, target, source)
    assert np.array_equal(tree["a"]["kernel"], a(3, 3).T) and np.array_equal(tree["b"]["kernel"], a(3, 5))
    # the other names that layers have in torch and Flax
    target = {"e": {"embedding": zeros(4, 4)}, "n": {"scale": zeros(4)}, "k": {"kernel": zeros(4, 4)}}
    source = {"e.weight": a(4, 4), "n.weight": a(4), "k.kernel": torch.from_numpy(a(4, 4))}
    tree, _ = pm.graft(target, source, rename={"e.weight": "e/embedding", "n.weight": "n/scale"})
    assert all(np.array_equal(leaf, a(*leaf.shape)) for leaf in jax.tree.leaves(tree))
    # Haiku and Flax agree
    tree, _ = pm.graft({"k": {"kernel": zeros(4, 4)}}, {"k": {"w": a(4, 4)}}, rename={"k/w": "k/kernel"})
    assert np.array_equal(tree["k"]["kernel"], a(4, 4))


@pytest.mark.parametrize(
    ("ours", "theirs", "first"),
    [
        ({"head": {"kernel": (3, 10), "bias": (10,)}}, {"head": {"kernel": (3, 7), "bias": (7,)}}, "keep"),
        ({"head.weight": (10, 3), "head.bias": (10,)}, {"head.weight": (7, 3), "head.bias": (7,)}, "keep"),
        ({"classifier.weight": (2, 3)}, {"classifier.weight": (1000, 3)}, "keep"),
        ({"fc": {"kernel": (5, 3)}}, {"fc": {"kernel": (4, 3)}}, "overlap"),  # other inputs
        (
            {"a": {"kernel": (3, 6)}, "b": {"kernel": (6, 2)}},
            {"a": {"kernel": (3, 5)}, "b": {"kernel": (5, 2)}},
            "overlap",
        ),
        ({"emb.weight": (9, 3)}, {"emb.weight": (7, 3)}, "overlap"),
        ({"embed_tokens.weight": (9, 3)}, {"embed_tokens.weight": (7, 3)}, "resize"),
    ],
)
def test_of_a_head_of_another_size_nothing_is_kept_unless_asked(ours, theirs, first):
    target, source = (
        jax.tree.map(lambda s: a(*s), tree, is_leaf=lambda s: isinstance(s, tuple)) for tree in (ours, theirs)
    )
    target, source = {**target, "body": zeros(2)}, {**source, "body": a(2)}
    with pytest.raises(GraftRefused) as caught:
        pm.graft(target, source)
    lines = [line.strip() for line in caught.value.hint.splitlines()]
    assert f'mismatch="{first}"' in lines[0]
    assert ('mismatch="overlap"' in lines[-1]) == (first != "resize")
    for line in lines:
        eval(line, {"pm": pm, "target": target, "source": source})
