"""What a graft does where shapes differ: overlaps at a place, resizes by a rule, or refuses with a way out."""

import copy
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings, strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import paramend as pm
from paramend.errors import BadArgument, GraftRefused, SelectorError, Unsupported
from support.numerics import assert_close


def a(*shape, value=1.0, dtype="float32"):
    return np.full(shape, value, dtype)


def draw(*shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def refused(call, *args, **kwargs):
    with pytest.raises(GraftRefused) as caught:
        call(*args, **kwargs)
    return caught.value


def run_hint(error, target, source):
    """Runs each line of a hint as the user would; what it gives."""
    space = {"pm": pm, "re": re, "source": source, "target": target, "module": target}
    return [eval(line.strip(), space) for line in error.hint.splitlines()]


class Vit(torch.nn.Module):
    def __init__(self, size, patch=8, width=8, colours=3):
        super().__init__()
        self.patch_embed = torch.nn.Conv2d(colours, width, patch, stride=patch)
        self.pos_embed = torch.nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, width))
        self.head = torch.nn.Linear(width, 3)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return self.head((x + self.pos_embed[:, 1:]).tanh().mean(1) + self.pos_embed[:, 0])


# ---- overlap ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "source", "target", "did"),
    [
        ((2,), (5,), slice(0, 2), slice(1, 3), "center [:] copied to [1:3]"),
        ((5,), (2,), slice(1, 3), slice(0, 2), "center [1:3] copied to [:]"),
        ((3,), (5,), slice(0, 3), slice(1, 4), "center [:] copied to [1:4]"),
        ((4,), (1,), slice(1, 2), slice(0, 1), "center [1:2] copied to [:]"),
    ],
)
def test_center(old, new, source, target, did):
    given, fresh = {"w": draw(*old)}, {"w": a(*new, value=9)}
    tree, report = pm.graft(fresh, given, mismatch="overlap", place="center")
    want = fresh["w"].copy()
    want[target] = given["w"][source]
    assert np.array_equal(tree["w"], want)
    assert (report.mismatched[0].did, report.mismatched[0].taken) == (did, min(old + new))


SHAPES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from(["corner", "center", "tile"]))
def test_every_place(sizes, place):
    old, new = map(tuple, zip(*sizes, strict=True))
    source, target = {"w": draw(*old, seed=1)}, {"w": draw(*new, seed=2)}
    tree, report = pm.graft(target, source, mismatch="overlap", place=place)
    got = tree["w"]
    if place == "tile":
        want = np.tile(source["w"], [-(-n // o) for o, n in sizes])[tuple(slice(n) for n in new)]
        taken = got.size
    else:
        want, taken = target["w"].copy(), int(np.prod(np.minimum(old, new)))
        starts = [((n - o) // 2, 0) if n > o else (0, (o - n) // 2) for o, n in sizes] if place == "center" else None
        into, out = zip(*(starts or [(0, 0)] * len(sizes)), strict=True)
        common = np.minimum(old, new)
        want[tuple(map(slice, into, into + common))] = source["w"][tuple(map(slice, out, out + common))]
    assert np.array_equal(got, want)
    (row,) = report.mismatched or report.copied
    assert row.taken == taken
    assert bool(report.mismatched) == (old != new)


def test_tile_says_so():
    tree, report = pm.graft({"w": a(5, 4, value=0)}, {"w": draw(2, 4)}, mismatch="overlap", place="tile")
    assert report.mismatched[0].did == "tiled 2 → 5 on axis 0"
    assert "tiled 2 → 5 on axis 0" in str(report)
    assert np.array_equal(tree["w"][4], tree["w"][0])
    error = refused(pm.graft, {"w": a(2), "v": a(1)}, {"w": a(0), "v": a(1)}, mismatch="overlap", place="tile")
    assert "there is nothing to repeat" in str(error)
    run_hint(error, {"w": a(2), "v": a(1)}, {"w": a(0), "v": a(1)})


@pytest.mark.parametrize("kind", ["numpy", "jax", "torch"])
@pytest.mark.parametrize("place", ["corner", "center", "tile"])
def test_places_in_every_library(kind, place):
    make = {"numpy": np.asarray, "jax": jnp.asarray, "torch": torch.from_numpy}[kind]
    source = {"w": torch.from_numpy(draw(3, 2))}
    want = pm.graft({"w": a(4, 4)}, {"w": draw(3, 2)}, mismatch="overlap", place=place)[0]["w"]
    tree, _ = pm.graft({"w": make(a(4, 4, dtype="float16"))}, source, mismatch="overlap", place=place)
    assert type(tree["w"]) is type(make(a(1)))
    assert np.array_equal(np.asarray(tree["w"]), want.astype("float16"))


def test_place_by_selector():
    source = {"a": draw(2), "b": draw(2), "c": draw(2), "d": draw(2)}
    target = {name: a(5, value=0) for name in source}
    tree, report = pm.graft(
        target, source, mismatch={"c": "overlap", "**": "keep"}, place={"a": "tile", re.compile("[ab]"): "center"}
    )
    assert [row.did for row in report.mismatched] == [
        "tiled 2 → 5 on axis 0",
        "center [:] copied to [1:3]",
        "corner [:2] copied",
        "kept",
    ]
    assert tree["d"] is target["d"]
    error = refused(pm.graft, target, source, place={"a": "tile", "e": "center"}, mismatch={"z/**": "keep"})
    text = str(error)
    assert "2 selectors select nothing" in text
    assert 'place: "e" matches none of 4 leaves' in text
    assert 'mismatch: "z/**" matches none' in text
    assert "3 shapes differ" in text, "every case is told at once"


def test_places_under_jit_and_in_a_sharding():
    @jax.jit
    def start(target, source):
        return pm.graft(target, source, mismatch="overlap", place={"t": "tile", "**": "center"})[0]

    out = start({"t": jnp.zeros(5), "w": jnp.zeros(4)}, {"t": jnp.arange(2.0), "w": jnp.ones(2)})
    assert out["t"].tolist() == [0, 1, 0, 1, 0]
    assert out["w"].tolist() == [0, 1, 1, 0]
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    target = {
        "w": jax.device_put(jnp.zeros((8, 2)), sharding),
        "pos_embed": jax.device_put(jnp.zeros((16, 2)), sharding),
    }
    source = {"w": a(3, 2), "pos_embed": draw(12, 2)}
    for mismatch, place in (("overlap", "center"), ("overlap", "tile"), ({"w": "keep", "**": "resize"}, "corner")):
        tree, _ = pm.graft(target, source, mismatch=mismatch, place=place)
        assert tree["w"].sharding == tree["pos_embed"].sharding == sharding


# ---- resize ----------------------------------------------------------------------------------------------------


def test_a_vision_transformer_for_larger_images():
    small, big = Vit(56), Vit(96, patch=16)
    tree, report = pm.graft(big, small, mismatch="resize")
    rows = {row.path: row for row in report.mismatched}
    assert rows["patch_embed.weight"].did == "resized 8×8 → 16×16 patches, pseudo-inverse, bicubic (detected: patches)"
    assert rows["pos_embed"].did == "resized 7×7 → 6×6, 1 prefix token, bicubic (detected: positions)"
    assert rows["pos_embed"].taken == 37 * 8
    assert "resized 7×7 → 6×6, 1 prefix token" in str(report)
    want = pm.resize.positions()(small.pos_embed.detach().numpy(), (1, 37, 8))
    assert np.array_equal(tree.pos_embed.detach().numpy(), want)
    assert isinstance(tree.pos_embed, torch.nn.Parameter)
    json.dumps(report.to_dict())


@pytest.mark.numeric
def test_larger_patches_of_larger_images_give_the_same_answers():
    """FlexiViT: as many patches, each twice as large, of an image twice as large."""
    small, big = Vit(32).double(), Vit(64, patch=16).double()
    pm.graft_(big, small, mismatch="resize")
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    patches = image.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 8, 8)
    larger = torch.nn.functional.interpolate(patches, size=(16, 16), mode="bicubic", antialias=True)
    larger = larger.reshape(2, 4, 4, 3, 16, 16).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 64, 64)
    # sums over 3 × 16 × 16 pixels, and a pseudo-inverse of a matrix whose condition is below 100
    assert_close(big(larger), small(image), terms=3 * 16 * 16, scale=100)


@pytest.mark.numeric
def test_gray_images_for_a_model_of_colour():
    small = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
    big = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
    weight = big[0].weight
    report = pm.graft_(big, small, mismatch="resize")
    assert [row.did for row in report.mismatched] == ["resized 3 → 1 input channels, gray kept (detected: channels)"]
    assert big[0].weight is weight
    image = torch.randn(2, 1, 9, 9)
    assert_close(big(image), small(image.expand(-1, 3, -1, -1)), terms=3 * 9 + 4 * 9, scale=4)


class Language(torch.nn.Module):
    def __init__(self, words, width=4, *, tied=True):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(words, width)
        self.lm_head = torch.nn.Linear(width, words)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight


@pytest.mark.numeric
def test_a_larger_vocabulary():
    small, big = Language(10), Language(13)
    report = pm.graft_(big, small, mismatch="resize")
    assert big.lm_head.weight is big.embed_tokens.weight
    assert [(row.path, row.did, row.taken) for row in report.mismatched] == [
        ("embed_tokens.weight", "resized 10 → 13 rows, 3 fresh: mean+cov (detected: vocabulary)", 40),
        ("lm_head.bias", "resized 10 → 13 rows, 3 fresh: mean+cov (detected: vocabulary)", 10),
    ]
    assert torch.equal(big.embed_tokens.weight[:10], small.embed_tokens.weight)
    assert torch.equal(big.lm_head.bias[:10], small.lm_head.bias)
    mean = small.embed_tokens.weight.mean(0)
    # drawn about the mean with a spread of 3e-5 of that of the rows
    assert (big.embed_tokens.weight[10:] - mean).abs().max() < 1e-3
    hidden = torch.randn(4)
    assert_close(big.lm_head(hidden)[:10], small.lm_head(hidden), terms=4 + 1, scale=4)


def test_fresh_rows_are_the_same_everywhere(tmp_path):
    rule = {"**/embed_tokens/weight": pm.resize.vocabulary(rows="random", seed=5)}
    source = {"model": {"embed_tokens": {"weight": draw(10, 4)}}}
    pm.save(source, tmp_path / "small.safetensors")
    want = pm.graft({"model": {"embed_tokens": {"weight": a(12, 4)}}}, source, resize=rule)[0]["model"]["embed_tokens"]
    flat = {"model.embed_tokens.weight": torch.zeros(12, 4)}
    assert np.array_equal(pm.graft(flat, source, resize=rule)[0]["model.embed_tokens.weight"], want["weight"])
    with pm.open(tmp_path / "small.safetensors") as file:
        tree, _ = pm.graft({"model": {"embed_tokens": {"weight": jnp.zeros((12, 4))}}}, file, resize=rule)
    assert np.array_equal(tree["model"]["embed_tokens"]["weight"], want["weight"])


def test_a_vocabulary_never_shrinks_in_silence():
    small, big = Language(10, tied=False), Language(13, tied=False)
    before = copy.deepcopy(small.state_dict())
    error = refused(pm.graft_, small, big, mismatch="resize")
    assert "3 leaves cannot be resized" in str(error)
    assert "13 → 10 rows would drop 3, which shrink=True allows" in str(error)
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())
    (report,) = run_hint(error, small, big)
    assert {row.did for row in report.mismatched} == {"resized 13 → 10 rows, the last 3 dropped"}
    assert torch.equal(small.lm_head.weight, big.lm_head.weight[:10])
    # what the user said of fresh rows stays in the hint
    error = refused(pm.graft, {"wte": a(3, 2)}, {"wte": a(4, 2)}, resize={"*": pm.resize.vocabulary(rows="mean")})
    assert 'pm.resize.vocabulary(rows="mean", shrink=True)' in error.hint
    run_hint(error, {"wte": a(3, 2)}, {"wte": a(4, 2)})


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "float8_e4m3fn"])
@pytest.mark.parametrize("kind", ["numpy", "jax", "torch"])
def test_dtypes(dtype, kind):
    if dtype == "float64" and kind == "jax":
        dtype = "float32"
    held = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    source = {"pos_embed": draw(1, 5, 4).astype(held)}
    make = {"numpy": np.asarray, "jax": jnp.asarray, "torch": lambda x: torch.from_numpy(x.astype("f4"))}[kind]
    target = {"pos_embed": make(np.zeros((1, 10, 4), held))}
    tree, report = pm.graft(target, source, mismatch="resize")
    want = pm.resize.positions()(source["pos_embed"].astype("f8"), (1, 10, 4))
    got = np.asarray(tree["pos_embed"])
    assert got.dtype == ("float32" if kind == "torch" else held)
    np.testing.assert_array_equal(got, want.astype(got.dtype))
    tree, report = pm.graft({"pos_embed": np.zeros((1, 10, 4), "f2")}, source, mismatch="resize", dtype="source")
    assert tree["pos_embed"].dtype == held
    assert report.mismatched[0].did.endswith(f", now {held.name}") or held.name == "float16"


def test_sums_that_overflow_are_counted():
    source = {"conv": {"weight": a(2, 3, 3, 3, value=60000, dtype="float16")}}
    _, report = pm.graft({"conv": {"weight": a(2, 1, 3, 3, dtype="float16")}}, source, mismatch="resize")
    assert (report.mismatched[0].overflowed, report.mismatched[0].lost) == (18, 0)


def test_grids_that_hold_equally_many_positions():
    source, target = {"pos": draw(1, 17, 4)}, {"pos": a(1, 17, 4)}
    rule = pm.resize.positions(grid=(2, 8), new_grid=(4, 4))
    tree, report = pm.graft(target, source, resize={"pos": rule})
    assert report.mismatched[0].did == "resized 2×8 → 4×4, 1 prefix token, bicubic"
    assert np.array_equal(tree["pos"], rule(source["pos"], (1, 17, 4)))
    assert not np.array_equal(tree["pos"], source["pos"])
    tree, report = pm.graft(target, source, resize={"pos": pm.resize.positions()})
    assert report.copied[0].did == "copied"
    assert np.array_equal(tree["pos"], source["pos"])


def test_with_rename_only_and_several_options_at_once():
    source = {"old": {"pos_embed": draw(1, 5, 4), "head": draw(4, 3), "w": draw(4)}}
    target = {"new": {"pos_embed": a(1, 10, 4), "head": a(4, 2), "w": a(4)}, "more": a(2)}
    tree, report = pm.graft(
        target,
        source,
        rename={"old/**": "new/**"},
        mismatch={"**/head": "keep"},
        resize={"**/pos_*": pm.resize.positions()},
    )
    assert [(row.path, row.source, row.did) for row in report.mismatched] == [
        ("new/pos_embed", "old/pos_embed", "resized 2×2 → 3×3, 1 prefix token, bicubic"),
        ("new/head", "old/head", "kept"),
    ]
    assert tree["new"]["head"] is target["new"]["head"]
    _, report = pm.graft(target, source, rename={"old/**": "new/**"}, only="**/pos_embed", mismatch="resize")
    assert len(report.mismatched) == 1


def test_nnx_in_place():
    model = nnx.Dict(wte=nnx.Embed(6, 4, rngs=nnx.Rngs(0)))
    variable = model.wte.embedding
    pm.graft_(model, {"wte": {"embedding": draw(5, 4)}}, mismatch="resize")
    assert model.wte.embedding is variable
    assert np.array_equal(variable[:5], draw(5, 4))


# ---- detection -------------------------------------------------------------------------------------------------

DETECTED = [
    ("vit/embeddings/position_embeddings", (1, 197, 8), (1, 577, 8), "positions()"),
    ("vision_model/embeddings/position_embedding/weight", (50, 8), (197, 8), "positions()"),
    ("bert/embeddings/position_embeddings/weight", (512, 8), (1024, 8), 'positions(method="linear")'),
    ("transformer/wpe/weight", (1024, 8), (2048, 8), 'positions(method="linear")'),
    ("decoder/embed_positions/weight", (2050, 8), (514, 8), 'positions(method="linear")'),
    ("image_encoder/pos_embed", (1, 64, 64, 8), (1, 32, 32, 8), "positions()"),
    ("params/Transformer/posembed_input/pos_embedding", (1, 197, 8), (1, 50, 8), "positions()"),
    ("model/embed_tokens/weight", (32000, 8), (32064, 8), "vocabulary()"),
    ("params/Embed_0/embedding", (100, 8), (101, 8), "vocabulary()"),
    ("params/lm_head/kernel", (8, 100), (8, 101), "vocabulary()"),
    ("lm_head/bias", (100,), (101,), "vocabulary()"),
    ("patch_embed/proj/weight", (8, 3, 16, 16), (8, 3, 14, 14), "patches()"),
    ("patch_embed/proj/weight", (8, 3, 16, 16), (8, 1, 16, 16), "channels()"),
    ("params/embedding/kernel", (16, 16, 3, 8), (32, 32, 3, 8), "patches()"),
    ("conv1/weight", (64, 3, 7, 7), (64, 1, 7, 7), "channels()"),
    ("params/conv_init/kernel", (7, 7, 3, 64), (7, 7, 4, 64), "channels()"),
]
DOUBTFUL = [
    ("transformer/wpe/weight", (1024, 8), (4096, 8), "its name says positions", 2),
    ("pos_embed", (1, 196, 8), (1, 576, 8), "its name says positions", 2),
    ("pos_embed", (1, 113, 8), (1, 197, 8), "grid=(h, w) and new_grid=(h, w) give others", 1),
    ("pos_embed", (1, 5, 8), (1, 10, 9), "here axes 1 and 2 differ", 0),
    ("pos_embed", (1, 5, 8), (1, 5, 9), "the last axis is the width", 0),
    ("embed_tokens/weight", (100, 8), (100, 9), "its name says vocabulary", 0),
    ("embed_tokens/weight", (100, 8), (90, 8), "would drop 10", 1),
    ("patch_embed/proj/weight", (8, 768), (8, 3072), 'flat="chw" or flat="hwc"', 2),
    ("patch_embed/proj/weight", (8, 3, 4, 4), (9, 3, 4, 4), "differ only in h and w", 0),
    ("Dense_0/kernel", (8, 8), (8, 9), "its name does not say what it is", 0),
    ("conv/weight", (8, 1, 3, 3), (8, 2, 3, 3), "its name does not say what it is", 0),
    ("conv/weight", (8, 4, 3, 3), (8, 4, 5, 5), "its name does not say what it is", 0),
]


def nested(path, value):
    for key in reversed(path.split("/")):
        value = {key: value}
    return value


@pytest.mark.parametrize(("path", "old", "new", "rule"), DETECTED)
def test_what_names_and_shapes_say(path, old, new, rule):
    source, target = nested(path, draw(*old)), nested(path, a(*new))
    tree, report = pm.graft(target, source, mismatch="resize")
    rule = eval(f"pm.resize.{rule}", {"pm": pm})
    assert report.mismatched[0].did.endswith(f"(detected: {rule.kind})")
    want, _ = pm.graft(target, source, resize={"**": rule})
    assert np.array_equal(pm.at(tree, "**").one(), pm.at(want, "**").one())
    assert 'mismatch="resize"' in refused(pm.graft, target, source).hint


@pytest.mark.parametrize(("path", "old", "new", "said", "ways"), DOUBTFUL)
def test_doubt_is_refused_with_what_to_type(path, old, new, said, ways):
    source, target = nested(path, draw(*old)) | {"x": a(1)}, nested(path, a(*new)) | {"x": a(1)}
    error = refused(pm.graft, target, source, mismatch="resize")
    assert "a leaf cannot be resized" in str(error)
    assert said in str(error)
    assert error.hint.count("resize={") == ways
    for _, report in run_hint(error, target, source):
        assert len(report.mismatched) == 1
        assert ways or report.mismatched[0].did.startswith("corner")
    run_hint(refused(pm.graft, target, source), target, source)


def test_all_cases_at_once_and_the_way_out_of_them():
    source = {"pos_embed": draw(1, 5, 4), "embed_tokens": draw(9, 4), "head": draw(4, 9), "i": a(3, dtype=int)}
    target = {"pos_embed": a(1, 10, 4), "embed_tokens": a(8, 4), "head": a(4, 8), "i": a(4, dtype=int)}
    error = refused(pm.graft, target, source, mismatch="resize")
    assert "3 leaves cannot be resized" in str(error)
    assert "only floating point values can be resized" in str(error)
    assert error.hint == (
        'pm.graft(target, source, mismatch={"head": "overlap", "i": "overlap", "**": "resize"}, '
        'resize={"embed_tokens": pm.resize.vocabulary(shrink=True)})  # copies 4 leaves'
    )
    run_hint(error, target, source)
    # nothing is resized by what was not said: the plain hint keeps corners out of position tables
    assert "overlap" not in refused(pm.graft, {"pos_embed": a(1, 10, 4)}, {"pos_embed": draw(1, 5, 4)}).hint


def test_many_leaves_without_a_rule():
    source = {f"h_{i}": draw(4, 4) for i in range(9)} | {"pos_embed": draw(1, 5, 4)}
    target = {f"h_{i}": a(6, 6) for i in range(9)} | {"pos_embed": a(1, 10, 4)}
    error = refused(pm.graft, target, source, mismatch="resize")
    assert "h_{0..8}  9 ×" in str(error) or "9 leaves cannot be resized" in str(error)
    assert error.hint == 'pm.graft(target, source, mismatch="overlap")  # copies 10 leaves'
    run_hint(error, target, source)


def test_a_rule_that_does_not_fit():
    target, source = {"w": a(4, 4), "x": a(1)}, {"w": a(5, 5), "x": a(1)}
    error = refused(pm.graft, target, source, resize={"w": pm.resize.channels(), "x": pm.resize.channels()})
    assert "input channels are one axis, but here axes 0 and 1 differ" in str(error)
    assert "without a rule in `resize`" in error.hint
    error = refused(pm.graft, {"w": a(4), "x": a(1)}, source, resize={"w": pm.resize.channels()})
    assert "a kernel cannot gain or lose axes" in str(error)


def test_options_that_make_no_sense():
    tree = {"w": a(1)}
    for options, said, hint in [
        ({"mismatch": "resise"}, "not one of 'error', 'keep', 'overlap', 'resize'", 'mismatch="resize"'),
        ({"mismatch": {"w": "kep"}}, "mismatch='kep' is not one of", 'mismatch="keep"'),
        ({"place": "centre"}, "place='centre' is not one of 'corner', 'center', 'tile'", 'place="center"'),
        ({"place": {"w": "top"}}, "place='top' is not one of", 'place="corner"'),
        ({"place": "center"}, "mismatch= does not allow overlap", 'mismatch="overlap", place="center"'),
        ({"resize": pm.resize.channels()}, "not a mapping of selectors to rules", "pm.resize.positions()"),
        ({"resize": {"w": "channels"}}, "not a mapping of selectors to rules", "pm.resize.positions()"),
        ({"resize": {pm.sel("w")[0]: pm.resize.channels()}}, "whole leaves", ""),
    ]:
        with pytest.raises(BadArgument, match=re.escape(said)) as caught:
            pm.graft(tree, tree, **options)
        assert hint in caught.value.hint
    with pytest.raises(SelectorError):
        pm.graft(tree, tree, resize={"w[": pm.resize.channels()})


def test_a_traced_leaf_cannot_be_resized():
    with pytest.raises(Unsupported, match="traced"):
        jax.jit(lambda t, s: pm.graft(t, s, mismatch="resize")[0])(
            {"pos_embed": jnp.zeros((1, 10, 4))}, {"pos_embed": jnp.zeros((1, 5, 4))}
        )
