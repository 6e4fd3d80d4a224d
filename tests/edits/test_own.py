"""Leaves that are one weight by a rule of the user's."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import paramend as pm
from paramend.errors import BadArgument, NoMatch, Quantized, SpecMismatch, Unsupported

KERNEL = np.array([[3, -4], [8, 127]], "int8")
SCALE = np.array([0.5, 2.0], "float32")
WEIGHT = KERNEL * SCALE


def decode(codes, step):
    return codes * step


def encode(weight, codes, step):
    """Codes to the nearest, with the steps that are there, or powers of two that hold the greatest value."""
    lib = jnp if isinstance(weight, jax.Array) else np
    if step is None:
        step = 2.0 ** lib.ceil(lib.log2(abs(weight).max(0) / 127)).astype("float32")
    return {"codes": lib.round(weight / step).astype("int8"), "step": step}


STEPS = pm.Codec("steps", ("codes", "step"), decode, encode)
READ = pm.Codec("steps", ("codes", "step"), decode)


def tree(library=np):
    fc = {"codes": library.array(KERNEL), "step": library.array(SCALE), "bias": library.ones(2, "float32")}
    return {"fc": fc, "norm": {"step": library.ones(3, "float32")}}


@pytest.mark.parametrize("library", [np, jnp])
def test_leaves_with_its_names_are_one(library):
    params = tree(library)
    at = pm.at(params, "**", codec=STEPS)
    assert at.paths == ["fc/codes", "fc/bias", "norm/step"]
    found = at.get()
    assert type(found["fc/codes"]) is type(params["fc"]["codes"])
    assert np.array_equal(found["fc/codes"], WEIGHT) and found["norm/step"] is params["norm"]["step"]
    assert pm.at(params, "fc/codes", codec=STEPS)[1, 0].one() == 4.0
    assert pm.at(params, "fc/step", codec=STEPS).paths == ["fc/codes"]


@pytest.mark.parametrize("library", [np, jnp])
@pytest.mark.parametrize(
    ("edit", "wanted"),
    [
        (lambda at: at.zero(), WEIGHT * 0),
        (lambda at: at.multiply(0.5), np.round(KERNEL * 0.5) * SCALE),
        (lambda at: at[0].fill(2.0), [[2.0, 2.0], [4.0, 254.0]]),
        (lambda at: at.set(np.float32([[1, 2], [3, 4]])), [[1, 2], [3, 4]]),
        (lambda at: at.apply(abs), abs(WEIGHT)),
    ],
)
def test_edits_go_through_encode(library, edit, wanted):
    params = tree(library)
    new = edit(pm.at(params, "fc/codes", codec=STEPS))
    assert np.array_equal(decode(new["fc"]["codes"], new["fc"]["step"]), wanted)
    assert new["fc"]["codes"].dtype == np.int8 and type(new["fc"]["codes"]) is type(params["fc"]["codes"])
    assert new["fc"]["bias"] is params["fc"]["bias"] and np.array_equal(params["fc"]["codes"], KERNEL)


def test_inside_jit():
    params = tree(jnp)

    @jax.jit
    def halved(params):
        return pm.at(params, "**/codes", codec=STEPS).multiply(0.5), pm.dequantize(params, codec=STEPS, dtype=None)[0]

    new, floats = halved(params)
    assert np.array_equal(new["fc"]["codes"], np.round(KERNEL * 0.5))
    assert np.array_equal(floats["fc"]["codes"], WEIGHT) and "step" not in floats["fc"] and "step" in floats["norm"]


def test_in_place_and_leaves_that_encode_leaves_out():
    params = tree()
    codes = params["fc"]["codes"]
    rule = pm.Codec("steps", ("codes", "step"), decode, lambda w, c, s: {"codes": np.round(w / s).astype("int8")})
    pm.at(params, "fc/codes", codec=rule).multiply_(0.5)
    assert params["fc"]["codes"] is codes and np.array_equal(codes, np.round(KERNEL * 0.5))
    assert np.array_equal(params["fc"]["step"], SCALE)


def test_modules_keep_their_class():
    class Dense(eqx.Module):
        codes: jax.Array
        step: jax.Array

    class Layer(nnx.Module):
        def __init__(self):
            self.codes, self.step = nnx.Param(jnp.asarray(KERNEL)), nnx.Param(jnp.asarray(SCALE))

    new = pm.at(Dense(jnp.asarray(KERNEL), jnp.asarray(SCALE)), "codes", codec=STEPS).zero()
    assert type(new) is Dense and not new.codes.any() and np.array_equal(new.step, SCALE)
    layer = Layer()
    new = pm.at(layer, "codes", codec=STEPS).zero()
    assert type(new) is Layer and not new.codes[...].any() and layer.codes[...].any()
    pm.at(layer, "codes", codec=STEPS).zero_()
    assert not layer.codes[...].any() and np.array_equal(layer.step[...], SCALE)
    with pytest.raises(Unsupported, match="fixed by its class"):
        pm.dequantize(layer, codec=STEPS)


def test_torch():
    def encode(weight, codes, step):
        return {"codes": torch.round(weight / step).to(torch.int8)}

    rule = pm.Codec("steps", ("codes", "step"), decode, encode)
    state = {"fc.codes": torch.from_numpy(KERNEL.copy()), "fc.step": torch.from_numpy(SCALE.copy())}
    assert torch.equal(pm.at(state, "fc.codes", codec=rule).one(), torch.from_numpy(WEIGHT))
    new = pm.at(state, "fc.codes", codec=rule).multiply(0.5)
    assert np.array_equal(new["fc.codes"], np.round(KERNEL * 0.5)) and new["fc.step"] is state["fc.step"]


def test_a_star_is_the_name_of_the_weight():
    rule = pm.Codec("steps", ("*_q", "*_s"), decode, lambda w, q, s: {"*_q": np.round(w / s).astype("int8")})
    params = {"up_q": KERNEL, "up_s": SCALE, "down_q": KERNEL, "down_s": SCALE}
    at = pm.at(params, "up", codec=rule)
    assert at.paths == ["up"] and np.array_equal(at.one(), WEIGHT)
    assert not at.zero()["up_q"].any() and at.zero()["down_q"] is KERNEL
    assert sorted(at.rename("side")) == ["down_q", "down_s", "side_q", "side_s"]
    assert sorted(at.delete()) == ["down_q", "down_s"]
    made, _ = pm.quantize({"up": WEIGHT}, "up", codec=pm.Codec("steps", rule.leaves, decode, starred))
    assert list(made) == ["up_q", "up_s"] and np.array_equal(decode(*made.values()), WEIGHT)


def starred(weight, codes, step):
    return {f"*_{name[0] if name == 'step' else 'q'}": each for name, each in encode(weight, codes, step).items()}


def test_what_is_refused_is_named():
    params = tree()
    with pytest.raises(Quantized, match=r"fc/codes cannot take zero\(\): steps has no encode") as caught:
        pm.at(params, "fc/codes", codec=READ).zero()
    assert caught.value.scheme == "steps" and caught.value.companions == ("fc/step",)
    with pytest.raises(Quantized, match="encodes in its own way"):
        pm.at(params, "fc/codes", codec=STEPS).add(1.0, requantize="never")
    with pytest.raises(Quantized, match="dequantize"):
        pm.at(params, "fc/codes", codec=STEPS).transpose((1, 0))
    with pytest.raises(NoMatch, match="codes and steps stand beside"):
        pm.at(params, "**", codec=pm.Codec("typo", ("codes", "steps"), decode))
    wide = pm.Codec("wide", ("codes", "step"), decode, lambda w, c, s: {"codes": w})
    with pytest.raises(SpecMismatch, match=r"float32\[2,2\] for fc/codes, which is int8\[2,2\]"):
        pm.at(params, "fc/codes", codec=wide).zero()
    for wrong, said in ((lambda *_: {"code": KERNEL}, "gives code"), (lambda *_: KERNEL, "no dict")):
        with pytest.raises(BadArgument, match=said):
            pm.at(params, "fc/codes", codec=pm.Codec("odd", ("codes", "step"), decode, wrong)).zero()
    with pytest.raises(BadArgument, match="no array"):
        pm.at(params, "fc/codes", codec=pm.Codec("odd", ("codes", "step"), lambda c, s: "x")).one()
    with pytest.raises(TypeError) as failed:
        pm.at(params, "fc/codes", codec=pm.Codec("few", ("codes", "step"), lambda c: c)).one()
    assert failed.value.__notes__ == ["decode of few, for fc/codes"]
    for leaves in ("codes", (), ("a", "a")):
        with pytest.raises(BadArgument, match="are not names"):
            pm.Codec("x", leaves, decode)


def test_it_goes_before_what_is_known():
    """int8 beside a scale is known as one weight, of which the rule has its own view; others stay what they are."""
    params = {"fc": {"kernel": KERNEL, "scale": SCALE}, "out": {"qvalue": KERNEL, "scale": SCALE}}
    shifted = pm.Codec("shifted", ("kernel", "scale"), lambda k, s: (k + 1.0) * s)
    found = pm.at(params, "**", codec=shifted).get()
    assert list(found) == ["fc/kernel", "out/qvalue", "out/scale"]
    assert np.array_equal(found["fc/kernel"], (KERNEL + 1.0) * SCALE)
    with pytest.raises(Quantized, match="aqt"):
        pm.at(params, "out/qvalue", codec=shifted).zero()


def test_floats_and_back():
    params = tree(jnp)
    floats, report = pm.dequantize(params, "fc/codes", dtype="bfloat16", codec=STEPS)
    assert floats["fc"]["codes"].dtype == jnp.bfloat16 and list(floats["fc"]) == ["codes", "bias"]
    assert [(row.path, row.scheme, row.leaves) for row in report.rows] == [
        ("fc/codes", "steps", ("fc/codes", "fc/step"))
    ]
    assert np.array_equal(pm.at(params, "fc/codes", codec=STEPS).cast("float32")["fc"]["codes"], WEIGHT)
    coded, report = pm.quantize({"fc": {"codes": jnp.asarray(WEIGHT)}}, "**", codec=STEPS)
    assert np.array_equal(coded["fc"]["codes"] * coded["fc"]["step"], WEIGHT) and coded["fc"]["codes"].dtype == np.int8
    assert report.rows[0].max_abs == 0 and report.rows[0].leaves == ("fc/codes", "fc/step")
    odd = {"fc": {"codes": jnp.asarray(WEIGHT + 0.25), "bias": jnp.ones(2)}}
    simulated, report = pm.quantize(odd, "**", codec=STEPS, simulate=True)
    assert simulated["fc"]["codes"].dtype == np.float32 and simulated["fc"]["bias"] is odd["fc"]["bias"]
    gap = abs(np.asarray(simulated["fc"]["codes"]) - odd["fc"]["codes"])
    assert report.rows[0].max_abs == gap.max() > 0
    for wrong in ({"codec": READ}, {"codec": STEPS, "scheme": "int4"}, {}):
        with pytest.raises(BadArgument):
            pm.quantize(odd, "**", **wrong)
    with pytest.raises(SpecMismatch, match="is not called codes"):
        pm.quantize({"fc": {"kernel": WEIGHT}}, "**", codec=STEPS)


def test_evidence():
    params, floats = tree(), {"fc": {"codes": WEIGHT, "bias": np.ones(2, "float32")}, "norm": tree()["norm"]}
    assert pm.stats(params, "fc/codes", codec=STEPS).leaves[0].max == 254
    assert not pm.diff(floats, params, codec=STEPS)
    table = pm.ablate(params, "fc/codes", lambda p: (p["fc"]["codes"] * p["fc"]["step"]).sum(), codec=STEPS)
    assert table.rows[0].delta == -WEIGHT.sum()


@pytest.mark.parametrize("name", ["model.safetensors", "model.npz", "model.msgpack"])
def test_on_disk(tmp_path, name):
    path, out = tmp_path / name, tmp_path / f"out-{name}"
    pm.save(tree(), path)
    with pm.open(path) as checkpoint:
        (weight,) = [each for each in pm.at(checkpoint, "**", codec=STEPS).paths if each.endswith("codes")]
        assert np.array_equal(pm.at(checkpoint, weight, codec=STEPS).one(), WEIGHT)
        edited = pm.at(checkpoint, weight, codec=STEPS).multiply(0.5)
        edited = pm.at(edited, weight, codec=STEPS)[0, 0].add(1.0)
        row = edited.save(out).to_dict()["changed"][0]
        wanted = np.round(KERNEL * 0.5) * SCALE + [[1, 0], [0, 0]]
        assert row["path"] == weight and row["scheme"] == "steps" and row["relative_l2"] == 0 == row["max_abs"]
        floats, _ = pm.dequantize(checkpoint, "**", dtype="float32", codec=STEPS)
        floats.save(tmp_path / f"floats-{name}")
        coded, report = pm.quantize(floats, "**", codec=STEPS)
        coded.save(tmp_path / f"coded-{name}")
    with pm.open(out) as checkpoint:
        assert np.array_equal(pm.at(checkpoint, weight, codec=STEPS).one(), wanted)
        assert checkpoint[weight].dtype == np.int8
    with pm.open(tmp_path / f"floats-{name}") as checkpoint:
        assert np.array_equal(checkpoint[weight], WEIGHT) and len(checkpoint) == 3
    with pm.open(tmp_path / f"coded-{name}") as checkpoint:
        assert np.array_equal(pm.at(checkpoint, weight, codec=STEPS).one(), WEIGHT) and report.rows[0].max_abs == 0
    before = path.read_bytes()
    pm.patch(path, lambda tree: pm.at(tree, weight, codec=STEPS).zero())
    with pm.open(path, raw=True) as checkpoint:
        assert not pm.at(checkpoint, weight, codec=STEPS).one().any() and "step" in "".join(checkpoint.paths)
    pm.undo(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("scale", [SCALE, SCALE[None], np.float32(0.5).reshape(())])
def test_kernels_of_int8_beside_a_scale_need_no_rule(scale):
    params = {"Dense_0": {"kernel": jnp.asarray(KERNEL), "scale": jnp.asarray(scale), "bias": jnp.ones(2)}}
    at, weight = pm.at(params, "**/kernel"), np.asarray(KERNEL * scale)
    assert np.array_equal(at.one(), weight) and isinstance(at.one(), jax.Array)

    def value(tree):
        return np.asarray(tree["Dense_0"]["kernel"] * tree["Dense_0"]["scale"])

    assert not value(at.zero()).any() and np.array_equal(value(at.multiply(0.5)), weight / 2)
    assert abs(value(at.add(0.5)) - weight - 0.5).max() <= np.max(scale) / 2 * 1.05
    assert at.zero()["Dense_0"]["kernel"].dtype == jnp.int8
    floats = pm.dequantize(params, dtype="float32")[0]
    off = pm.quantize(floats, "**/kernel", scheme="int8", simulate=True)[1].rows[0].max_abs
    assert 0 < off <= abs(weight).max() / 127


def test_modules_of_int8_kernels_keep_their_class():
    class Dense(eqx.Module):
        kernel: jax.Array
        scale: jax.Array

    class Layer(nnx.Module):
        def __init__(self):
            self.kernel, self.scale = nnx.Param(jnp.asarray(KERNEL)), nnx.Param(jnp.asarray(SCALE))

    new = pm.at(Dense(jnp.asarray(KERNEL), jnp.asarray(SCALE)), "kernel").multiply(0.5)
    assert type(new) is Dense and np.array_equal(new.kernel * new.scale, WEIGHT / 2)
    layer = Layer()
    assert type(pm.at(layer, "kernel").zero()) is Layer and layer.kernel[...].any()
    pm.at(layer, "kernel").multiply_(0.5)
    assert np.array_equal(layer.kernel[...] * layer.scale[...], WEIGHT / 2)
    assert np.array_equal(pm.dequantize(nnx.state(layer), dtype="float32")[0]["kernel"][...], WEIGHT / 2)
