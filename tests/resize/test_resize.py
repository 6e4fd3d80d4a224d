"""The arithmetic of resizing against torch and published formulas, and the rules of `pm.resize`."""

import copy
import math
import pickle

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

import paramend as pm
from paramend.errors import BadArgument, SpecMismatch
from paramend.resize import arithmetic
from paramend.resize.fits import grids
from support.numerics import assert_close, bound

pytestmark = pytest.mark.numeric

SIZES = st.integers(2, 17)  # of a width of 1 with antialias, torch 2.13 takes its first row for all


def values(*shape, seed=0, dtype="float64"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def by_torch(x, size, **kwargs):
    """(h, w, d) interpolated by torch."""
    cells = torch.from_numpy(x).permute(2, 0, 1)[None]
    return F.interpolate(cells, size=size, align_corners=False, **kwargs)[0].permute(1, 2, 0).numpy()


def assert_interpolated(found, wanted, size=17, scale=8):
    """Two axes with sums of at most twice as many terms as a side, whose weights are made in some 8 operations."""
    assert_close(found, wanted, terms=2 * (2 * size + 8), scale=scale)


# ---- interpolation ---------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(SIZES, SIZES, SIZES, SIZES, st.sampled_from(["bicubic", "bilinear"]), st.booleans())
def test_interpolation_is_that_of_torch(h, w, new_h, new_w, method, antialias):
    x = values(h, w, 3)
    got = arithmetic.interpolated(x, {0: new_h, 1: new_w}, cubic=method == "bicubic", antialias=antialias)
    assert_interpolated(got, by_torch(x, (new_h, new_w), mode=method, antialias=antialias))


@settings(max_examples=50, deadline=None)
@given(SIZES, SIZES)
def test_sequences_are_those_of_torch(old, new):
    x = values(old, 4)
    got = pm.resize.positions(method="linear", antialias=False)(x, (new, 4)) if old != new else x
    want = F.interpolate(torch.from_numpy(x.T)[None], size=new, mode="linear", align_corners=False)[0].T.numpy()
    assert_interpolated(got, want)


@pytest.mark.parametrize(("old", "new"), [(14, 24), (14, 7), (9, 4)])
def test_with_antialias_jax_agrees_and_without_it_does_not(old, new):
    x = values(old, old, 2, dtype="float32")
    by_jax = {on: np.asarray(jax.image.resize(x, (new, new, 2), "bicubic", antialias=on)) for on in (True, False)}
    ours = {
        on: arithmetic.interpolated(x, {0: new, 1: new}, cubic=True, antialias=on).astype("float32")
        for on in (True, False)
    }
    assert_interpolated(ours[True], by_jax[True])
    assert np.abs(ours[False] - by_jax[False]).max() > 1e-2


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.booleans(), st.booleans())
def test_constants_stay_and_equal_sizes_change_nothing(old, new, cubic, antialias):
    matrix = arithmetic.weights(old, new, cubic=cubic, antialias=antialias)
    assert_interpolated(matrix.sum(axis=1), np.ones(new))
    assert_interpolated(matrix, matrix[::-1, ::-1])
    assert np.array_equal(arithmetic.weights(old, old, cubic=cubic, antialias=antialias), np.eye(old))


def test_large_arrays_are_computed_in_float32():
    x = np.zeros((1, 5, arithmetic._SMALL // 4), "float32")
    assert pm.resize.positions().planned(x.shape, (1, 10, x.shape[2])).make(x).dtype == "float32"
    assert pm.resize.positions().planned((1, 5, 4), (1, 10, 4)).make(x[:, :, :4]).dtype == "float64"


# ---- positions -------------------------------------------------------------------------------------------------


def by_timm(table, prefix, old, new):
    """The rule of timm's `resample_abs_pos_embed`, written down anew."""
    cells = by_torch(table[0, prefix:].reshape(*old, -1), new, mode="bicubic", antialias=True)
    return np.concatenate([table[:, :prefix], cells.reshape(1, -1, table.shape[-1])], axis=1)


@pytest.mark.parametrize(
    ("prefix", "old", "new", "options"),
    [
        (1, (14, 14), (24, 24), {}),
        (0, (14, 14), (16, 16), {"prefix": 0}),
        (2, (14, 14), (7, 7), {"prefix": 2}),
        (5, (16, 16), (37, 37), {"prefix": 5}),
        (1, (8, 14), (12, 12), {"grid": (8, 14)}),
        (2, (12, 101), (12, 50), {"grid": (12, 101), "new_grid": (12, 50)}),
        (1, (14, 14), (6, 20), {"new_grid": (6, 20)}),
        (0, (2, 8), (4, 4), {"grid": (2, 8), "new_grid": (4, 4)}),
    ],
)
def test_positions_over_a_grid(prefix, old, new, options):
    table = values(1, prefix + math.prod(old), 32)
    rule = pm.resize.positions(**options)
    got = rule(table, (1, prefix + math.prod(new), 32))
    assert_interpolated(got, by_timm(table, prefix, old, new), size=101)
    assert np.array_equal(got[:, :prefix], table[:, :prefix])
    assert_interpolated(rule(table[0], got.shape[1:]), got[0], size=101)


@pytest.mark.slow
def test_positions_as_transformers_interpolates_them():
    import transformers
    from transformers.models.vit.modeling_vit import ViTEmbeddings

    config = transformers.ViTConfig(hidden_size=16, num_attention_heads=2, image_size=56, patch_size=8)
    model = ViTEmbeddings(config)
    torch.nn.init.normal_(model.position_embeddings)
    want = model.interpolate_pos_encoding(torch.zeros(1, 1 + 12 * 9, 16), 96, 72).detach().numpy()
    table = model.position_embeddings.detach().numpy()
    got = pm.resize.positions(new_grid=(12, 9), antialias=False)(table, (1, 1 + 12 * 9, 16))
    assert_interpolated(got, want)
    assert np.abs(pm.resize.positions(new_grid=(12, 9))(table, got.shape) - want).max() > 1e-2


@pytest.mark.parametrize(
    ("old", "new"), [((1, 7, 9, 4), (1, 10, 9, 4)), ((7, 9, 4), (8, 8, 4)), ((1, 4, 7, 9), (1, 4, 3, 20))]
)
def test_rows_and_columns_with_an_axis_each(old, new):
    x = values(*old)
    got = pm.resize.positions()(x, new)
    axes = (2, 3) if old[1] == new[1] == 4 else (0, 1) if len(old) == 3 else (1, 2)
    plane = np.moveaxis(x, axes, (0, 1))
    want = by_torch(plane.reshape(*plane.shape[:2], -1), [new[a] for a in axes], mode="bicubic", antialias=True)
    assert_interpolated(np.moveaxis(got, axes, (0, 1)).reshape(want.shape), want)


def test_grids():
    assert grids(197, 577) == (1, (14, 14), (24, 24))
    assert grids(50, 197) == (1, (7, 7), (14, 14))
    assert grids(198, 578) == (2, (14, 14), (24, 24))
    assert grids(113, 197, grid=(8, 14)) == (1, (8, 14), (14, 14))
    assert grids(12, 7) == (3, (3, 3), (2, 2))
    for numbers, options, said in [
        ((1024, 2048), {}, "not two square grids after 0 to 8 prefix tokens"),
        ((197, 577), {"prefix": 0}, "not two square grids after 0 prefix tokens"),
        ((197, 577), {"grid": (7, 14)}, "are not 7×14 and a square"),
        ((197, 577), {"grid": (14, 14), "prefix": 2}, "are not 14×14 and a square"),
        ((20, 12), {"new_grid": (4, 5)}, "are not a square and 4×5"),
    ]:
        with pytest.raises(SpecMismatch, match=said):
            grids(*numbers, **options)


# ---- vocabulary ------------------------------------------------------------------------------------------------


def test_fresh_rows_have_the_moments_of_the_old():
    mix = values(6, 6, seed=1)
    x = (values(400, 6) @ mix + 3).astype("float32")
    big = pm.resize.vocabulary(seed=3)(x, (400 + 60_000, 6))
    assert np.array_equal(big[:400], x)
    fresh = (big[400:].astype("f8") - x.astype("f8").mean(0)) / math.sqrt(1e-9)
    # float32 at a mean of 3 holds steps of 2e-7, against a spread of 3e-5
    assert np.abs(fresh.mean(0)).max() < 0.05
    want = np.cov(x.T.astype("f8"), bias=True)
    assert np.abs(np.cov(fresh.T) - want).max() < 0.05 * np.abs(want).max()


@pytest.mark.slow
def test_the_same_moments_as_transformers():
    import transformers

    config = transformers.GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=1, n_positions=4)
    model = transformers.GPT2LMHeadModel(config)
    old = model.transformer.wte.weight.detach().numpy().copy()
    torch.manual_seed(0)
    model.resize_token_embeddings(300 + 4000, mean_resizing=True)
    theirs = model.transformer.wte.weight.detach().numpy()[300:].astype("f8")
    ours = pm.resize.vocabulary()(old, (4300, 8))[300:].astype("f8")
    spread = np.sqrt(1e-9) * old.std(0)
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.2 * spread.max()
    assert np.abs(ours.std(0) / theirs.std(0) - 1).max() < 0.15


def test_covariance_without_an_inverse():
    x = values(5, 64)  # fewer rows than columns
    fresh = pm.resize.vocabulary()(x, (25, 64))[5:]
    centred = fresh - x.mean(0)
    basis = np.linalg.svd(x - x.mean(0))[2][:4]
    assert np.linalg.matrix_rank(centred * 1e4, tol=1e-3) == 4
    # Eigenvalues of the covariance that should be zero are of the size of rounding; rows are drawn with their roots.
    eigenvalue = bound("float64", terms=64, scale=np.linalg.norm(x, 2) ** 2 / 5)
    assert np.abs(centred - centred @ basis.T @ basis).max() <= 4 * math.sqrt(1e-9 * eigenvalue)


@pytest.mark.parametrize("rows", ["mean+cov", "mean", "random", "zeros"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_old_rows_stay_bit_for_bit(rows, dtype):
    x = values(20, 3).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    rule = pm.resize.vocabulary(rows=rows, seed=1)
    got = rule(x, (23, 3), path=("wte",))
    assert got.dtype == x.dtype
    assert got[:20].tobytes() == x.tobytes()
    assert got[20:].tobytes() == rule(x, (23, 3), path=("wte",))[20:].tobytes()
    other = rule(x, (23, 3), path=("lm_head",))[20:]
    assert (other.tobytes() == got[20:].tobytes()) == (rows in ("mean", "zeros"))
    turned = rule(x.T, (3, 23), path=("wte",)).T
    assert np.array_equal(turned[:20], x)
    terms = 1 if x.itemsize == 2 else 20  # a mean in float64 or float32, rounded once to fewer bits
    assert_close(turned[20:], got[20:], terms=terms, scale=4)
    bias = rule(x[:, 0], (23,))
    assert bias[:20].tobytes() == np.ascontiguousarray(x[:, 0]).tobytes()
    if rows == "zeros":
        assert not got[20:].any()
    if rows == "mean":
        assert_close(got[20:], np.tile(x.astype("f8").mean(0), (3, 1)), terms=terms, scale=1)


def test_random_rows_have_the_spread_of_the_old():
    x = 0.02 * values(500, 30, dtype="float32") + 1
    fresh = pm.resize.vocabulary(rows="random")(x, (1000, 30))[500:]
    assert abs(fresh.std() / x.std() - 1) < 0.03
    assert abs(fresh.mean()) < 1e-3


def test_new_tokens_take_little_probability():
    # Hewitt: the mean of the old rows gives each new token at most 1 / (V + n) where logits are far below zero
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal(16)
    head = rng.standard_normal((100, 16)) * 0.1 - hidden
    for rows, share in (("mean+cov", 8 / 108), ("zeros", 1.0)):
        logits = pm.resize.vocabulary(rows=rows)(head, (108, 16)) @ hidden
        odds = np.exp(logits - logits.max())
        assert (odds[100:].sum() / odds.sum() <= share * 1.001) == (rows == "mean+cov") or rows == "zeros"
        if rows == "zeros":
            assert odds[100:].sum() / odds.sum() > 0.99


def test_many_rows_are_read_in_pieces(monkeypatch):
    x = values(300, 4)
    whole = pm.resize.vocabulary(rows="mean")(x, (310, 4))
    monkeypatch.setattr(arithmetic, "_SMALL", 70)
    assert_close(pm.resize.vocabulary(rows="mean")(x, (310, 4)), whole, terms=300)
    assert np.abs(pm.resize.vocabulary()(x, (310, 4))[300:] - whole[300:]).max() < 3e-4


# ---- patches and channels --------------------------------------------------------------------------------------


def tokens(kernel, images, size):
    return F.conv2d(images, torch.from_numpy(kernel), stride=size).numpy()


@pytest.mark.parametrize("new", [(32, 32), (20, 20), (16, 24)])
@pytest.mark.parametrize(("method", "antialias"), [("bicubic", True), ("bilinear", False)])
def test_larger_patches_give_the_same_tokens(new, method, antialias):
    kernel, patch = values(6, 3, 16, 16), torch.from_numpy(values(5, 3, 16, 16, seed=1))
    wider = F.interpolate(patch, size=new, mode=method, antialias=antialias, align_corners=False)
    rule = pm.resize.patches(method=method, antialias=antialias)
    resized = rule(kernel, (6, 3, *new))
    # sums over 3 × 32 × 32 pixels and a pseudo-inverse with sums of 32; outputs reach 100
    assert_close(tokens(resized, wider, 1), tokens(kernel, patch, 1), terms=3 * 32 * 32 + 2 * 32, scale=100)
    flax = rule(kernel.transpose(2, 3, 1, 0), (*new, 3, 6))
    assert_close(flax.transpose(3, 2, 0, 1), resized, terms=16 * 32)


def test_the_pseudo_inverse_of_flexivit():
    """As in section 3.4: B row by row from resized unit patches, w' = pinv(B.T) w."""
    kernel, new = values(4, 3, 8, 8), (6, 5)
    units = torch.eye(64, dtype=torch.float64).reshape(64, 1, 8, 8)
    b = F.interpolate(units, size=new, mode="bicubic", antialias=True).reshape(64, 30).T.numpy()
    want = (np.linalg.pinv(b.T) @ kernel.reshape(12, 64).T).T.reshape(4, 3, *new)
    # a pseudo-inverse of 64 columns, whose condition is below 100
    assert_close(pm.resize.patches()(kernel, want.shape), want, terms=64, scale=100)


@pytest.mark.parametrize("flat", ["chw", "hwc"])
def test_flattened_patches(flat):
    kernel = values(6, 3, 4, 4)
    want = pm.resize.patches()(kernel, (6, 3, 8, 8))
    order = (0, 2, 3, 1) if flat == "hwc" else (0, 1, 2, 3)
    flattened, wanted = (x.transpose(order).reshape(6, -1) for x in (kernel, want))
    rule = pm.resize.patches(flat=flat)
    assert_close(rule(flattened, (6, 192)), wanted, terms=4 * 8, scale=8)
    assert_close(rule(flattened.T, (192, 6)), wanted.T, terms=4 * 8, scale=8)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 7, 12])
@pytest.mark.parametrize("old", [1, 3, 4])
def test_gray_images_give_the_same_answer(old, count):
    kernel, gray = values(6, old, 5, 5), torch.from_numpy(values(2, 1, 9, 9, seed=1))
    if old == count:
        return
    got = pm.resize.channels()(kernel, (6, count, 5, 5))
    before, after = (tokens(k, gray.expand(-1, k.shape[1], -1, -1), 1) for k in (kernel, got))
    assert_close(after, before, terms=(old + count) * 25, scale=16)
    flax = pm.resize.channels()(kernel.transpose(2, 3, 1, 0), (5, 5, count, 6))
    assert_close(flax.transpose(3, 2, 0, 1), got, terms=old + count)


@pytest.mark.parametrize("count", [1, 3, 6, 9])
def test_channels_as_timm_where_timm_keeps_gray(count):
    """The formulas of `adapt_input_conv`: the sum, or copies side by side times 3 / count."""
    kernel = values(6, 3, 5, 5)
    want = kernel.sum(1, keepdims=True)
    if count > 1:
        want = np.tile(kernel, (1, math.ceil(count / 3), 1, 1))[:, :count] * 3 / count
    got = kernel if count == 3 else pm.resize.channels()(kernel, want.shape)
    assert_close(got, want, terms=3 + count)


def test_colour_images_give_the_same_answer():
    kernel = values(6, 3, 5, 5)
    got = pm.resize.channels(keep="rgb")(kernel, (6, 5, 5, 5))
    assert np.array_equal(got[:, :3], kernel)
    assert not got[:, 3:].any()


# ---- refusals --------------------------------------------------------------------------------------------------

REFUSALS = [
    (pm.resize.positions(), (5, 8), (1, 10, 8), "cannot gain or lose axes"),
    (pm.resize.positions(), (1, 197, 8), (1, 197, 8), "here axes none differ"),
    (pm.resize.positions(), (1, 5, 8), (1, 10, 9), "here axes 1 and 2 differ"),
    (pm.resize.positions(), (1, 113, 8), (1, 197, 8), "not two square grids"),
    (pm.resize.positions(), (1, 197, 25), (1, 197, 36), "the last axis is the width"),
    (pm.resize.positions(prefix=1), (1, 7, 7, 8), (1, 9, 9, 8), "have separate axes"),
    (pm.resize.positions(), (7, 3, 7, 8), (9, 3, 9, 8), "axes 0 and 2 are not rows and columns"),
    (pm.resize.positions(method="linear"), (1, 5, 5, 8), (1, 6, 6, 8), "are along one axis"),
    (pm.resize.positions(method="linear", prefix=9), (9, 8), (12, 8), "nothing is left after 9"),
    (pm.resize.positions(), (1, 0, 8), (1, 10, 8), "there are no values"),
    (pm.resize.vocabulary(), (9, 8), (8, 8), "would drop 1, which shrink=True allows"),
    (pm.resize.vocabulary(), (9, 8), (10, 9), "is counted along one axis, but here axes 0 and 1 differ"),
    (pm.resize.vocabulary(axis=1), (9, 8), (10, 8), "axis 1 must be the only one"),
    (pm.resize.patches(), (8, 3, 16, 16), (9, 3, 32, 32), "differ only in h and w"),
    (pm.resize.patches(), (8, 3, 4, 16, 16), (8, 3, 4, 32, 32), "has 4 axes"),
    (pm.resize.patches(), (8, 768), (8, 3072), 'flat="chw" or flat="hwc"'),
    (pm.resize.patches(flat="chw"), (8, 3, 16, 16), (8, 3, 32, 32), "has 2 axes"),
    (pm.resize.patches(flat="chw"), (8, 769), (8, 3072), "not square patches of 3 channels"),
    (
        pm.resize.channels(),
        (8, 3, 7, 7),
        (9, 3, 7, 7),
        "does not count input channels as (out, in, ...) or (..., in, out)",
    ),
    (pm.resize.channels(), (8, 3, 7, 7), (8, 1, 9, 7), "here axes 1 and 2 differ"),
    (pm.resize.channels(keep="rgb"), (8, 3, 7, 7), (8, 1, 7, 7), "cannot all be kept"),
]


@pytest.mark.parametrize(("rule", "old", "new", "said"), REFUSALS, ids=lambda x: str(x).replace("\n", " "))
def test_the_wrong_kind_is_refused(rule, old, new, said):
    with pytest.raises(SpecMismatch) as caught:
        rule(np.zeros(old), new)
    assert said in str(caught.value)
    if caught.value.hint.startswith("pm."):
        eval(caught.value.hint, {"pm": pm})


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: pm.resize.positions(method="bicubik"), "method='bicubik' is not one of"),
        (lambda: pm.resize.positions(grid=(3,)), "is not (height, width)"),
        (lambda: pm.resize.positions(grid=(3, 3), method="linear"), "which has no grid"),
        (lambda: pm.resize.positions(prefix=-1), "prefix=-1 is negative"),
        (lambda: pm.resize.vocabulary(rows="mean_cov"), "rows='mean_cov' is not one of"),
        (lambda: pm.resize.vocabulary(seed=-1), "seed=-1 is negative"),
        (lambda: pm.resize.patches(method="linear"), "method='linear' is not one of"),
        (lambda: pm.resize.patches(flat="wch"), "flat='wch' is not one of"),
        (lambda: pm.resize.patches(channels=0), "channels=0"),
        (lambda: pm.resize.channels(keep="grey"), "keep='grey' is not one of"),
    ],
)
def test_bad_arguments(call, said):
    with pytest.raises(BadArgument) as caught:
        call()
    assert said in str(caught.value)
    assert caught.value.hint


def test_a_rule_prints_as_what_makes_it_and_travels():
    for rule in (rule for rule, *_ in REFUSALS):
        assert eval(repr(rule), {"pm": pm}) == rule
        assert pickle.loads(pickle.dumps(rule)) == copy.deepcopy(rule) == rule
    assert repr(pm.resize.positions(prefix=1, grid=[7, 7])) == "pm.resize.positions(prefix=1, grid=(7, 7))"
    fit = pm.resize.vocabulary().planned((4, 2), (5, 2), ("wte",))
    assert np.array_equal(pickle.loads(pickle.dumps(fit)).make(values(4, 2)), fit.make(values(4, 2)))


def test_shrinking_when_asked():
    x = values(9, 4)
    assert np.array_equal(pm.resize.vocabulary(shrink=True)(x, (7, 4)), x[:7])
    assert pm.resize.vocabulary(shrink=True).planned((9, 4), (7, 4)).did == "resized 9 → 7 rows, the last 2 dropped"
