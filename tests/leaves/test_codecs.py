"""Codecs: values bit for bit as the defining libraries decode them, any part of them, and the way back."""

import math
import pickle
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from tests.support.quantized import LAYOUTS, stored
from tests.support.quantized_reference import cases, row_of

from paramend.errors import Quantized, SpecMismatch, Unsupported
from paramend.leaves.codecs.codec import Stated
from paramend.leaves.codecs.codes import codes_of
from paramend.leaves.codecs.fresh import codec_for, layout_of
from paramend.leaves.groups import groups_of
from paramend.leaves.origins.boxes import select, whole
from paramend.leaves.origins.decoded import decoded
from paramend.leaves.origins.encoded import encoded
from paramend.leaves.origins.rescaled import rescaled
from paramend.leaves.origins.stored import Held
from paramend.leaves.specs import Spec
from paramend.leaves.weights import weight_of
from paramend.trees.tree import Tree

CASES = cases()
E4M3, E8M0, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16
GPTQ, AWQ, PACKED = "GPTQ", "AWQ", "integers packed by compressed-tensors"
BLOCK = "FP8, a scale for each block"
# One of each kind of codec for what is not about values.
FEW = [case for case in CASES if not case.name.startswith("int") or case.name.startswith(("int4", "int8"))]
FEW = [case for number, case in enumerate(FEW) if number == 0 or case.row is not FEW[number - 1].row]


def held(leaves):
    return {role: Held(array) for role, array in leaves.items()}


def codec_of(case):
    return case.row.codec(case.row.name, held(case.leaves), case.stated)


def weight_from(says, leaves, stated=None, dtype=""):
    row, parts = row_of(says), held(leaves)
    return decoded(row.codec(row.name, parts, stated or Stated()), parts, dtype).read()


def same(found, wanted):
    """Whether arrays are equal; NaN where NaN is, whatever its bits."""
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    nan = np.isnan(wanted)
    assert (np.isnan(found) == nan).all()
    return (np.where(nan, 0, found.astype(np.float64)) == np.where(nan, 0, wanted.astype(np.float64))).all()


def words(*codes, bits=4):
    """Codes in a word of 32 bits, from the lowest bits up."""
    return np.array(sum(code << bits * place for place, code in enumerate(codes)), np.uint32).view(np.int32)


# ---- decoding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_values_are_those_of_the_library(case):
    assert same(decoded(codec_of(case), held(case.leaves)).read(), case.weight)


@pytest.mark.parametrize("case", FEW, ids=[case.name for case in FEW])
def test_any_part_is_that_of_the_whole(case):
    rng = np.random.default_rng(0)
    origin = decoded(codec_of(case), held(case.leaves))
    origin = pickle.loads(pickle.dumps(origin))
    whole = origin.read()
    for _ in range(30):
        box = tuple(_places(rng, length) for length in whole.shape)
        assert same(origin.read_box(box), select(whole, box))
        start, stop = sorted(rng.integers(0, whole.size + 1, 2).tolist())
        assert same(origin.read_range(start, stop), whole.reshape(-1)[start:stop])
    pieces = [origin.read_range(*ends) for ends in origin.ranges()]
    assert same(np.concatenate(pieces), whole.reshape(-1))


def _places(rng, length):
    if rng.random() < 0.5:
        start, stop = sorted(rng.integers(0, length + 1, 2).tolist())
        return range(start, stop, int(rng.integers(1, 3)))[:: rng.choice([1, -1])]
    return rng.integers(0, length, rng.integers(0, 2 * length))


def test_the_text_is_the_expression():
    parts = held({"payload": np.zeros((2, 2), E4M3), "scale": np.ones((1, 1), np.float32)})
    origin = decoded(row_of(BLOCK).codec("fp8-block", parts, Stated()), parts)
    assert str(origin) == "decode(fp8-block, values in memory, values in memory)"
    assert [str(each) for each in origin.stored()] == ["values in memory"] * 2
    assert origin.extent is None


def test_a_number_and_nothing_at_all():
    for dtype in (E4M3, ml_dtypes.float8_e5m2):
        one = {"payload": np.array(1.5, dtype), "scale": np.array(2, np.float32)}
        assert weight_from("FP8, one scale", one).tolist() == 3.0
    for shape, grid in (((0, 128), (0, 1)), ((4, 0), (1,))):
        none = {"payload": np.zeros(shape, E4M3), "scale": np.ones(grid, np.float32)}
        assert weight_from(BLOCK, none).shape == shape


def test_another_dtype_is_rounded_once():
    # 1.125 · 1.00390625 = 1.12939453125 in float32; between the two next values of bfloat16 it is nearer to 1.1328125
    leaves = {"payload": np.array([[1.125]], E4M3), "scale": np.array([[1.00390625]], np.float32)}
    assert weight_from(BLOCK, leaves).item() == 1.12939453125
    assert weight_from(BLOCK, leaves, dtype="bfloat16").astype(float).item() == 1.1328125


@pytest.mark.parametrize(("form", "first"), [("gptq", 1), ("gptq_v2", 0)])
def test_gptq_by_hand(form, first):
    # Eight inputs, eight outputs, codes 0 to 7 along the inputs; zero points 0 to 7, one for each output; scale 0.5.
    leaves = {
        "payload": np.full((1, 8), words(*range(8))),
        "zero": words(*range(8)).reshape(1, 1),
        "scale": np.full((1, 8), 0.5, np.float16),
        "group": np.zeros(8, np.int32),
    }
    found = weight_from(GPTQ, leaves, Stated("gptq", form=form))
    outputs, inputs = np.mgrid[:8, :8]
    assert found.dtype == np.float16
    assert (found == (inputs - (outputs + first)) * 0.5).all()


def test_groups_of_inputs_go_by_their_index():
    leaves = {
        "payload": np.full((1, 8), words(*[9] * 8)),
        "zero": np.full((2, 1), words(*[8] * 8)),
        "scale": np.array([[1] * 8, [2] * 8], np.float16),
        "group": np.array([0, 1, 1, 0, 0, 0, 1, 1], np.int32),
    }
    assert weight_from(GPTQ, leaves, Stated("gptq", form="gptq_v2"))[3].tolist() == [1, 2, 2, 1, 1, 1, 2, 2]
    leaves["payload"], leaves["scale"] = np.full((8, 1), leaves["payload"][0, 0]), leaves["scale"].T.astype(np.float32)
    packed = {role: leaves[role] for role in ("payload", "scale", "group")}
    assert weight_from(PACKED, packed)[5].tolist() == [1, 2, 2, 1, 1, 1, 2, 2]
    packed["group"] = np.full(8, -1, np.int32)  # what compressed-tensors writes where there is no order
    assert weight_from(PACKED, packed)[5].tolist() == [1, 1, 1, 1, 2, 2, 2, 2]


def test_awq_by_hand():
    # In a word of AWQ the outputs stand as 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits up.
    leaves = {
        "payload": np.full((3, 1), words(0, 2, 4, 6, 1, 3, 5, 7)),
        "zero": np.full((1, 1), words(1, 1, 1, 1, 2, 2, 2, 2)),
        "scale": np.arange(8, dtype=np.float16).reshape(1, 8),
    }
    found = weight_from(AWQ, leaves)
    assert found.tolist() == [[(out - (1 if out % 2 == 0 else 2)) * out] * 3 for out in range(8)]


def test_nvfp4_of_modelopt_multiplies_scales_first():
    # In float32 448 · 0.1 rounds to 44.80000305; times 3 that is 134.40000915, which rounds to 134.40001.
    leaves = {
        "payload": np.array([[0x25] * 8], np.uint8),
        "scale": np.array([[448]], E4M3),
        "global": np.array(0.1, np.float32),
    }
    found = weight_from("NVFP4 of modelopt", leaves)
    scale = np.float32(448) * np.float32(0.1)
    assert found.tolist() == [[np.float32(3) * scale, scale] * 8]


# ---- encoding ----------------------------------------------------------------------------------------------------


def finite(case):
    """A case whose scales are finite and not far from each other."""
    rng = np.random.default_rng(1)
    scale = case.leaves["scale"]
    bits = rng.integers(100, 120, scale.shape, np.uint8)
    near = bits.view(scale.dtype) if scale.itemsize == 1 and "nested scale" not in case.leaves else scale
    payload = case.leaves["payload"]
    codes = rng.integers(0, 120, payload.shape, np.uint8).view(payload.dtype) if payload.dtype == E4M3 else payload
    return case.leaves | {"scale": near, "payload": codes}


def again(codec, leaves, weight, **how):
    """The leaves after an edit, whole and in ranges, and what they decode to."""
    parts = held(leaves)
    found = encoded(codec, Held(weight), {role: part.spec for role, part in parts.items()}, parts, **how)
    new = {role: leaf.read() for role, leaf in found.items()}
    for role, leaf in found.items():
        cuts = [0, leaf.spec.size // 3, leaf.spec.size // 2, leaf.spec.size]
        ranges = [leaf.read_range(*ends) for ends in pairwise(cuts)]
        assert np.concatenate(ranges).tobytes() == new[role].tobytes()
        assert (new[role].dtype, new[role].shape) == (leaves[role].dtype, leaves[role].shape)
    return new, decoded(codec, parts | held(new), "float32").read()


@pytest.mark.parametrize("case", FEW, ids=[case.name for case in FEW])
def test_blocks_without_a_change_keep_their_bytes(case):
    leaves, codec = finite(case), codec_of(case)
    weight = decoded(codec, held(leaves), "float32").read()
    new, after = again(codec, leaves, weight)
    assert {role: new[role].tobytes() for role in new} == {role: leaves[role].tobytes() for role in new}
    edited = weight.copy()
    edited.reshape(-1)[0] = wanted = np.abs(weight).max() / 2
    new, after = again(codec, leaves, edited)
    assert abs(after.reshape(-1)[0] - wanted) <= wanted / 4
    grid = codec.fields["scale"]
    number = np.arange(grid.spec.size, dtype=np.int64).reshape(grid.spec.shape)
    block = np.broadcast_to(grid.spread(number, whole(codec.spec.shape)), codec.spec.shape)
    block = codec.weight(Held(np.array(block))).read()
    others = block != block.reshape(-1)[0]
    assert (after[others] == weight[others]).all()
    assert (new["scale"].reshape(-1)[1:] == leaves["scale"].reshape(-1)[1:]).all()


@pytest.mark.parametrize("case", FEW, ids=[case.name for case in FEW])
def test_zero_is_exact_and_keeps_scales(case):
    leaves, codec = finite(case), codec_of(case)
    weight = decoded(codec, held(leaves), "float32").read()
    new, after = again(codec, leaves, np.zeros_like(weight), keep=True)
    assert list(new) == ["payload"]
    assert not after.any()
    assert not np.signbit(after).any()


def test_a_zero_point_without_a_code_is_refused():
    leaves = {"payload": np.zeros((1, 8), np.int32), "zero": np.full((1, 1), words(*[15] * 8))}
    leaves |= {"scale": np.ones((1, 8), np.float16), "group": np.zeros(8, np.int32)}
    row, parts = row_of(GPTQ), held(leaves)
    codec = row.codec("gptq", parts, Stated("gptq", symmetric=False))
    zeros = Held(np.zeros((8, 8), np.float32))
    specs = {role: part.spec for role, part in parts.items()}
    with pytest.raises(Unsupported, match="zero point is 16, and codes of gptq end at 15"):
        encoded(codec, zeros, specs, parts, keep=True)["payload"].read()
    refitted = {role: leaf.read() for role, leaf in encoded(codec, zeros, specs, parts).items()}
    assert not decoded(codec, held(leaves | refitted)).read().any()


# What a weight of normal numbers loses at most, as relative L2: what the step of the codes makes of it.
LOSS = {"fp8": 0.028, "int8": 0.009, "bnb-int8": 0.009, "int4": 0.12, "gptq": 0.12, "awq": 0.11, "nf4": 0.1}
LOSS |= {"mxfp4": 0.13, "nvfp4": 0.105, "fp4": 0.13}
SCHEMES = ["fp8-tensor", "fp8-channel", "fp8-block", *list(LOSS)[1:]]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(256, 128), (2, 128, 64), (40, 384)], ids=str)
def test_a_new_group_is_known_and_near(scheme, shape):
    if len(shape) > 2 and scheme in ("gptq", "awq", "bnb-int8"):
        with pytest.raises(SpecMismatch, match="is no matrix"):
            layout_of(scheme, Spec(shape, "bfloat16"))
        return
    weight = (np.random.default_rng(0).standard_normal(shape) * 0.02).astype(BF16)
    layout = layout_of(scheme, Spec(shape, "bfloat16"), 64 if scheme in ("int4", "gptq", "awq") else None)
    codec, known = codec_for(scheme, layout), held(layout.known)
    leaves = encoded(codec, Held(weight), layout.specs, known) | known
    assert {role: leaf.spec for role, leaf in leaves.items()} == dict(layout.specs)
    named = {layout.names[role].replace("*", "weight"): leaf.read() for role, leaf in leaves.items()}
    tree = Tree({"fc": named})
    (group,) = groups_of(tree)
    found = weight_of(tree, group, lambda number: Held(tree.read(number)), lambda module: layout.stated)
    assert (found.path, found.spec.shape) == ("fc/weight", shape)
    assert found.codec.scheme == scheme
    error = found.origin("float32").read() - weight.astype(np.float32)
    loss = np.linalg.norm(error) / np.linalg.norm(weight.astype(np.float32))
    assert 0.001 < loss < LOSS[scheme.partition("-")[0] if scheme.startswith("fp8") else scheme]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("factor", [0.75, 2.0, -1.0, -0.5, 1.0])
def test_scales_take_a_factor(scheme, factor):
    weight = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    layout = layout_of(scheme, Spec(weight.shape, "float32"))
    codec, known = codec_for(scheme, layout), held(layout.known)
    parts = (
        held({role: leaf.read() for role, leaf in encoded(codec, Held(weight), layout.specs, known).items()}) | known
    )
    new = rescaled(codec, parts, factor)
    signed = scheme.startswith(("fp8", "mxfp4", "nvfp4", "fp4"))
    if (factor < 0 and not signed) or (scheme == "mxfp4" and factor == 0.75):
        assert new is None
        return
    before, after = (decoded(codec, parts | more, "float32").read() for more in ({}, new))
    step = 2.0**-10 if scheme in ("gptq", "awq") else 2.0**-22  # scales of float16 are rounded
    assert (np.abs(after - before * np.float32(factor)) <= np.abs(before * factor) * step).all()
    assert set(new) <= {"scale", "global", "payload"}


def test_factors_that_scales_cannot_take():
    parts = held({"payload": np.ones((2, 2), E4M3), "scale": np.array([[0, 254]], np.uint8).view(E8M0)})
    codec = row_of(BLOCK).codec("fp8-block", parts, Stated())
    assert rescaled(codec, parts, 0.5) is None  # exponents end
    assert rescaled(codec, parts, 2.0) is None
    assert rescaled(codec, parts, 0.0) is None
    assert rescaled(codec, parts, math.inf) is None


def test_values_without_a_code():
    layout = layout_of("int8", Spec((2, 8), "float32"))
    codec, known = codec_for("int8", layout), held(layout.known)
    weight = np.ones((2, 8), np.float32)
    weight[1, 3] = np.nan
    with pytest.raises(Unsupported, match="not finite"):
        encoded(codec, Held(weight), layout.specs, known)["payload"].read()
    layout = layout_of("fp8-channel", Spec((2, 8), "float32"))
    codec = codec_for("fp8-channel", layout)
    leaves = {role: leaf.read() for role, leaf in encoded(codec, Held(weight), layout.specs).items()}
    found = decoded(codec, held(leaves)).read()
    assert np.isnan(found[1, 3])  # which FP8 has
    assert (np.delete(found.reshape(-1), 11) == 1).all()
    weight[1, 3] = -np.inf
    with pytest.raises(Unsupported, match="not finite"):
        encoded(codec, Held(weight), layout.specs)["payload"].read()


def test_zero_is_exact_where_a_scale_is_not_finite():
    leaves = {"payload": np.full((2, 2), 2, E4M3), "scale": np.array([[255, 127]], np.uint8).view(E8M0)}
    row, parts = row_of(BLOCK), held(leaves)
    codec, specs = row.codec("fp8-block", parts, Stated()), {role: part.spec for role, part in parts.items()}
    new = {
        role: leaf.read()
        for role, leaf in encoded(codec, Held(np.zeros((2, 2), np.float32)), specs, parts, keep=True).items()
    }
    assert decoded(codec, held(leaves | new)).read().tolist() == [[0, 0], [0, 0]]
    assert new["scale"].view(np.uint8).tolist() == [[127, 127]]


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "e2m1", "nf4", "fp4", "int8", "-8..7"])
def test_nearest_codes(name):
    codes = codes_of(name)
    numbers = np.arange(len(codes.values), dtype=np.uint8)
    some = np.isfinite(codes.values)
    assert (codes.decode(codes.nearest(codes.values[some])) == codes.values[some]).all()
    values = np.random.default_rng(0).uniform(codes.low, codes.high, 500).astype(np.float32)
    best = np.abs(values[:, None] - codes.values[some][None]).min(1)
    assert np.allclose(np.abs(codes.decode(codes.nearest(values)) - values), best, atol=1e-6)
    assert codes.decode(codes.nearest(np.array([1e9, -1e9]))).tolist() == [codes.high, codes.low]
    assert numbers.size in (16, 256)


# ---- what disagrees ----------------------------------------------------------------------------------------------


def f8(*shape):
    return np.zeros(shape, E4M3)


def zeros(number, rows=1):
    return np.full((rows, 1), words(*[number] * 8))


def gptq(zero, **more):
    leaves = {"payload": np.zeros((1, 8), np.int32), "scale": np.ones((1, 8), np.float16), "zero": zero}
    return leaves | more


INT4 = {"payload": np.zeros((4, 2), np.int32), "scale": np.ones((4, 2), np.float32)}
SYMMETRIC = {"symmetric": True, "bits": 4}


@pytest.mark.parametrize(
    ("says", "leaves", "stated", "both"),
    [
        (
            BLOCK,
            {"payload": f8(256, 256), "scale": np.ones((4, 2), "f4")},
            {"block": (128, 128)},
            ("4 scales", "makes 2"),
        ),
        (BLOCK, {"payload": f8(300, 256), "scale": np.ones((7, 2), "f4")}, {}, ("300 places", "7 scales")),
        (
            PACKED,
            INT4 | {"shape": np.array([4, 16])},
            {"bits": 4, "group": 4},
            ("16 inputs have 2 groups", "groups of 4, which makes 4"),
        ),
        (PACKED, INT4 | {"shape": np.array([4, 32])}, {"bits": 4}, ("2 words", "[4, 32] in codes of 4 bits")),
        (BLOCK, {"payload": f8(9, 9), "scale": np.ones((), "f4")}, {"block": (8, 8)}, ("one scale", "block of (8, 8)")),
        (PACKED, INT4, {"bits": 4, "symmetric": False}, ("no zero points", "not symmetric")),
        (PACKED, INT4 | {"shape": np.array([4, 16])}, {"bits": 8}, ("2 words", "codes of 8 bits")),
        (GPTQ, gptq(zeros(7)), {"bits": 8}, ("1 rows of words", "zero points: 4; the configuration: 8")),
        (GPTQ, gptq(zeros(7), group=np.zeros(16, "i4")), {}, ("zero points: 4", "groups of inputs: 2")),
        (GPTQ, gptq(zeros(8)), {"form": "gptq", **SYMMETRIC}, ("are 8, that is the second version", "says gptq")),
        (GPTQ, gptq(zeros(7)), {"form": "gptq_v2", **SYMMETRIC}, ("are 7, that is the first version", "gptq_v2")),
        (GPTQ, gptq(zeros(3)), {"form": "gptq", **SYMMETRIC}, ("zero points are 3", "symmetric")),
        (GPTQ, gptq(zeros(3)), None, ("zero points are 3", "no configuration")),
        (AWQ, gptq(zeros(7)) | {"payload": np.zeros((8, 1), "i4")}, {"bits": 8}, ("8 codes in a word", "8 bits")),
        ("MXFP4, packed", {"payload": np.zeros((4, 32), "u1"), "scale": np.zeros((4, 3), "u1")}, {}, ("64", "[4, 3]")),
        (
            "int8 of bitsandbytes",
            {"payload": np.zeros((3, 4), "i1"), "scale": np.ones(4, "f4")},
            {},
            ("3 rows", "4 scal"),
        ),
    ],
)
def test_a_disagreement_says_both_sides(says, leaves, stated, both):
    with pytest.raises(SpecMismatch) as error:
        weight_from(says, leaves, Stated() if stated is None else Stated("gptq" if says == GPTQ else "", **stated))
    for side in both:
        assert side in str(error.value)
    assert "hint: " in str(error.value)


def tree_of(**leaves):
    tree = Tree({"fc": leaves})
    (group,) = groups_of(tree)
    return tree, group, lambda number: Held(tree.read(number))


def test_an_ignored_module_with_scales():
    tree, group, leaf_of = tree_of(weight=f8(2, 2), weight_scale=np.ones(1, "f4"))
    with pytest.raises(SpecMismatch, match=r"fc/weight_scale are .*\(fp8-tensor\), and 'fc' of the ignore list"):
        weight_of(tree, group, leaf_of, lambda module: Stated(ignored=module))


def test_a_payload_without_its_scale():
    tree, group, leaf_of = tree_of(weight_packed=np.zeros((2, 1), "i4"))
    with pytest.raises(SpecMismatch, match="fc/weight_packed is here, and the scale of it is not"):
        weight_of(tree, group, leaf_of)


def test_a_scheme_without_a_codec_is_named():
    tree, group, leaf_of = tree_of(W_q=np.zeros((4, 8), "u1"), scale=np.ones((8, 1), "f2"), zero=np.ones((8, 1), "f2"))
    with pytest.raises(Quantized, match=r"is a weight in hqq \(HQQ\), which cannot be decoded"):
        weight_of(tree, group, leaf_of)


def test_an_old_order_of_tiles_is_refused():
    leaves = {"payload": np.zeros((3, 4), "i1"), "scale": np.ones(3, "f4"), "format": np.array(1, "u1")}
    with pytest.raises(Unsupported, match="order of tiles"):
        weight_from("int8 of bitsandbytes", leaves)


# ---- under the names of checkpoints --------------------------------------------------------------------------------

# What the weight of a layout is called, and its spec, where tests.support.quantized writes values that can be decoded.
WEIGHTS = {
    ("fp8-block", "DeepSeek-V3"): ("weight", "float32[256,200]"),
    ("fp8-block", "MXFP8"): ("weight", "bfloat16[4,64]"),
    ("fp8-block", "fused experts"): ("gate_up_proj", "float32[2,256,128]"),
    ("fp8-channel", "fbgemm"): ("gate_up_proj", "float32[2,4,8]"),
    ("fp8-tensor", "Mistral"): ("weight", "bfloat16[8,4]"),
    ("awq", "AutoAWQ"): ("weight", "float16[16,32]"),
    ("mxfp4", "gpt-oss"): ("gate_up_proj", "bfloat16[2,96,8]"),
    ("mxfp4", "DeepSeek-V4"): ("weight", "bfloat16[4,64]"),
    ("nvfp4", "modelopt"): ("weight", "float32[4,32]"),
    ("nvfp4", "compressed-tensors"): ("weight", "bfloat16[4,32]"),
    ("int8", "compressed-tensors"): ("weight", "bfloat16[8,4]"),
    ("int8", "Flax"): ("kernel", "float32[4,8]"),
}


@pytest.mark.parametrize("layout", WEIGHTS, ids=" ".join)
def test_a_group_is_called_as_its_weight(layout):
    tree = Tree(stored(LAYOUTS[layout]))
    (group,) = groups_of(tree)
    weight = weight_of(tree, group, lambda number: Held(tree.read(number)))
    name, spec = WEIGHTS[layout]
    assert (weight.path, str(weight.spec)) == (f"model.layers.0.mlp.fc.{name}", spec)
    assert weight.origin().read().shape == weight.spec.shape


@pytest.mark.parametrize(("name", "wanted"), [("kernel", [[1, 20], [3, 40]]), ("weight", [[1, 2], [30, 40]])])
def test_scales_of_a_square_matrix_are_those_of_its_outputs(name, wanted):
    leaves = {name: np.array([[1, 2], [3, 4]], np.int8), f"{name}_scale": np.array([1, 10], np.float32)}
    tree, group, leaf_of = tree_of(**leaves)
    assert weight_of(tree, group, leaf_of).origin().read().tolist() == wanted
