"""Merged models: what exact arithmetic and the formulas of the papers give, in memory and on disk, bit for bit."""

import itertools
import pickle
from fractions import Fraction

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tests.support.quantized import LAYOUTS, stored, write

import paramend as pm
from paramend.cli.main import cli
from paramend.errors import BadArgument, NoMatch, Quantized, SpecMismatch, Unsupported
from paramend.merging import rankings
from paramend.merging.averages import average, rounded
from paramend.merging.methods import METHODS
from paramend.merging.rankings import Member, Ranking

BF16 = np.dtype(ml_dtypes.bfloat16)
SHORT = [BF16, np.dtype("float16"), np.dtype("float32")]
# The changes of three models, of which the papers and libraries are known to make different things.
CHANGES = np.array([[3, -1, 0.2, 4, -0.1], [-1, -2, 0.3, 0.5, 2], [2, 4, -0.1, -5, 0.4]])


def model(seed, dtype=BF16, shape=(5, 48)):
    rng = np.random.default_rng(seed)
    return {
        "h": [{"w": rng.standard_normal(shape).astype(dtype)}, {"w": rng.standard_normal((7,)).astype(dtype)}],
        "odd": np.array([-0.0, 1e-30 * seed, 2, 0.25]).astype(dtype),
        "one": np.array(1.5 + seed).astype(dtype),
        "none": np.zeros((0, 3), dtype),
        "step": np.arange(3),
    }


def settings(how, density=0.5, **more):
    """What a method must be given, with a base if it needs one."""
    row = METHODS[how]
    given = {name: {"density": density, "t": 0.01}[name] for name, value in row.takes.items() if value is None}
    return given | ({"density": density} if "density" in row.takes else {}) | more


def inputs(how, make=model, base=9):
    row = METHODS[how]
    count = max(row.models[0], min(3, row.models[1]))
    return [make(seed) for seed in range(count)], {"base": make(base)} if row.base == "needed" else {}


def bits(tree):
    return {path.replace(".", "/"): np.asarray(leaf).tobytes() for path, leaf in pm.at(tree, "**").get().items()}


def raw_bits(tree):
    leaves = pm.at(tree, "**", raw=True).get().items()
    return {path.replace(".", "/"): np.asarray(leaf).tobytes() for path, leaf in leaves}


def nearest(exact, dtype):
    """The number of a dtype that is nearest to a fraction, of two the even one."""
    start = np.array([float(exact)]).astype(dtype).view(f"u{dtype.itemsize}").astype(np.int64)
    around = [(start + step).astype(f"u{dtype.itemsize}") for step in (-1, 0, 1)]
    found = [(x.view(dtype)[0], int(x[0])) for x in around if np.isfinite(x.view(dtype)[0].astype(float))]
    return min(found, key=lambda x: (abs(Fraction(float(x[0])) - exact), x[1] & 1))[0]


# ---- averages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 7, 8])
@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("spread", [0, 30])
def test_each_element_of_an_average_is_the_correctly_rounded_mean(dtype, count, spread):
    rng = np.random.default_rng(count)
    low = -12 if dtype == np.float16 else -4 * spread
    values = [
        (rng.integers(-255, 255, 60) * 2.0 ** rng.integers(low, 1, 60) * (1 + (spread > 0))).astype(dtype)
        for _ in range(count)
    ]
    found = pm.merge([{"w": value} for value in values])[0]["w"]
    for at, element in enumerate(found):
        exact = sum((Fraction(float(value[at])) for value in values), Fraction()) / count
        assert element == nearest(exact, dtype)


def test_a_sum_that_float64_rounds_to_the_middle_of_two_numbers_is_rounded_by_what_it_lacks():
    # 1, the next number, and one that is too small for a sum of float64: just above the middle of two numbers
    values = [np.array([x]).astype(BF16) for x in (1, 1 + 2**-7, 2.0**-100, 0)]
    exact = Fraction(1, 4) * (2 + Fraction(1, 128) + Fraction(1, 2**100))
    assert average(values, [1] * 4, 4, "bfloat16") == nearest(exact, BF16) == BF16.type(0.5 + 2**-8)
    middle = [np.array([x], np.float32) for x in (2, 2 + 2**-22, 0)]
    for little, right in ((0, 1), (2.0**-140, 1 + 2**-23), (-(2.0**-140), 1)):
        models = [{"w": x} for x in (*middle, np.array([little], np.float32))]
        assert pm.merge(models)[0]["w"].tolist() == [right]


def test_three_numbers_of_which_none_fits_beside_another():
    values = [np.array([x], np.float32) for x in (1, 2.0**-60, -(2.0**-130))]
    exact = (1 + Fraction(2) ** -60 - Fraction(2) ** -130) / 3
    assert average(values, [1] * 3, 3, "float32")[0] == nearest(exact, np.dtype("float32"))


def test_the_order_of_models_changes_no_bit():
    for dtype, weights in itertools.product((BF16, np.float32, np.float64), ([1, 1, 1], [0.2, 0.5, 0.3])):
        models = [model(seed, dtype) for seed in range(3)]
        right = bits(pm.merge(models, weights=weights)[0])
        for order in itertools.permutations(range(3)):
            tree = pm.merge([models[at] for at in order], weights=[weights[at] for at in order])[0]
            assert bits(tree) == right


@pytest.mark.parametrize("how", ["task_arithmetic", "ties", "breadcrumbs_ties", "model_stock", "karcher", "multislerp"])
def test_the_order_of_models_changes_no_bit_of_other_methods(how):
    models, base = [model(seed, np.float64) for seed in range(4)], {"base": model(9, np.float64)}
    given = settings(how) | (base if METHODS[how].base == "needed" else {})
    for weights in (None, [0.3, 1.1, -0.2, 0.7]) if "weights" in METHODS[how].takes else (None,):
        right = bits(pm.merge(models, how, weights=weights, **given)[0])
        for order in ([3, 1, 0, 2], [2, 3, 1, 0]):
            some = weights and [weights[at] for at in order]
            assert bits(pm.merge([models[at] for at in order], how, weights=some, **given)[0]) == right


@pytest.mark.parametrize("dtype", [*SHORT, np.dtype("float64")], ids=str)
@pytest.mark.parametrize("beside", [0.0, 2.0**-100])
def test_a_mean_of_negative_zeros_is_negative(dtype, beside):
    zero = np.array([-0.0, 1, beside]).astype(dtype)
    for count in (2, 3, 4, 7):
        assert np.signbit(pm.merge([{"w": zero}] * count)[0]["w"].astype(float))[0]
    assert not np.signbit(pm.merge([{"w": zero}, {"w": zero}, {"w": -zero}])[0]["w"].astype(float))[0]


def test_integers_are_the_same_in_any_size():
    models = [{"w": np.ones(2), "step": np.array([1, 2], dtype)} for dtype in ("int32", "int64", "uint8")]
    tree, _ = pm.merge(models)
    assert tree["step"].dtype == "int32" and tree["step"].tolist() == [1, 2]
    with pytest.raises(SpecMismatch, match="step"):
        pm.merge([*models, {"w": np.ones(2), "step": np.array([1, 3], "int16")}])


def test_weights_are_divided_by_their_sum():
    models = [{"w": np.array([1.0, 2.0, np.inf])}, {"w": np.array([3.0, -2.0, 0.0])}]
    assert pm.merge(models, weights=[1, 3])[0]["w"].tolist() == [2.5, -1.0, np.inf]
    assert pm.merge(models, weights=[0, 2])[0]["w"].tolist() == [3, -2, 0]  # what does not count is not read as 0 * inf
    with pytest.raises(BadArgument, match="sum 0"):
        pm.merge(models, weights=[1, -1])


def test_float64_becomes_a_short_float_in_one_step():
    x = np.array([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8 - 2.0**-40, 1 + 2.0**-8, 2.0**-134 + 2.0**-180, -(2.0**-134)])
    right = [nearest(Fraction(float(each)), BF16) for each in x]
    assert rounded(x, "bfloat16").tolist() == right
    assert rounded(x[:3], "float8_e5m2").astype(float).tolist() == [1, 1, 1]


# ---- every method ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", METHODS)
@pytest.mark.parametrize("dtype", [*SHORT, np.dtype("float64")], ids=str)
def test_models_that_are_the_same_give_back_their_bits(how, dtype):
    def same(_):
        tree = model(1, dtype)
        tree["odd"][1:3] = [np.inf, np.nan]
        return tree

    models, base = inputs(how, same)
    for convention in ("paper", "mergekit", "peft"):
        assert bits(pm.merge(models, how, **base, **settings(how), convention=convention)[0]) == bits(same(0))


@pytest.mark.parametrize("how", METHODS)
def test_a_checkpoint_gets_what_a_tree_in_memory_gets_in_bounded_pieces(how, tmp_path, monkeypatch):
    models, base = inputs(how, lambda seed: model(seed, BF16, (300, 480)))
    tree, _ = pm.merge(models, how, **base, **settings(how))
    for at, each in enumerate([*models, *base.values()]):
        pm.save(each, tmp_path / f"{at}.safetensors")
    opened = [pm.open(tmp_path / f"{at}.safetensors") for at in range(len(models) + len(base))]
    under = {"base": opened.pop()} if base else {}
    made, report = pm.merge(opened, how, **under, **settings(how))
    assert len(report.rows) == 5
    assert report.kept == ("step",)
    made = pickle.loads(pickle.dumps(made))
    turned = pm.at(made, "h/0/w").transpose([1, 0])["h/0/w"]  # elements in another order, box by box
    made.save(tmp_path / "out.safetensors")
    assert bits(pm.load(tmp_path / "out.safetensors")) == bits(tree)
    assert np.array_equal(turned.T.view("u2"), np.asarray(tree["h"][0]["w"]).view("u2"))


def test_trees_of_any_library_take_the_same_arithmetic():
    arrays = [np.random.default_rng(seed).standard_normal((6, 8)).astype("float32") for seed in range(3)]
    right = pm.merge([{"w": x} for x in arrays[:2]], "slerp", t=0.3)[0]["w"].tobytes()
    jax = pm.merge([{"w": jnp.asarray(x)} for x in arrays[:2]], "slerp", t=0.3)[0]["w"]
    assert type(jax) is type(jnp.zeros(1))
    assert np.asarray(jax).tobytes() == right
    linears = [torch.nn.Linear(8, 6) for _ in arrays]
    for linear, x in zip(linears, arrays, strict=True):
        linear.weight.data = torch.from_numpy(x)
    merged = pm.merge(linears[:2], "slerp", t=0.3)[0]
    assert merged.weight.detach().numpy().tobytes() == right
    assert linears[0].weight.detach().numpy().tobytes() == arrays[0].tobytes()
    states = [nnx.state(nnx.Linear(8, 6, rngs=nnx.Rngs(seed))) for seed in range(2)]
    mean = pm.merge(states)[0]
    assert np.array_equal(mean["kernel"][...], (states[0]["kernel"][...] + states[1]["kernel"][...]) / 2)


# ---- formulas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("convention", "weights", "right"),
    [
        ("paper", [1, 1, 1], [2.5, 4, 0, -5, 2]),
        ("mergekit", [1, 0.5, 0.5], [8 / 3, 4, 0, 4, 2]),
        ("peft", [1, 0.5, 0.5], [2, 2, 0, -2.5, 1]),
    ],
)
def test_ties_keeps_the_largest_changes_and_those_of_one_sign(convention, weights, right):
    base = np.arange(5.0)
    models = [{"w": base + change} for change in CHANGES]
    given = {"base": {"w": base}, "density": 0.6, "weights": weights, "convention": convention}
    np.testing.assert_allclose(pm.merge(models, "ties", **given)[0]["w"], base + right, rtol=0, atol=1e-15)


def test_the_paper_ranks_the_changes_of_a_whole_model_and_mergekit_those_of_a_leaf():
    tuned, base = {"a": np.array([1.0, 2, 3]), "b": np.array([10.0, 20, 30])}, {"a": np.zeros(3), "b": np.zeros(3)}
    paper = pm.merge([tuned], "ties", base=base, density=0.5)[0]
    leaf = pm.merge([tuned], "ties", base=base, density=0.4, convention="mergekit")[0]
    assert [paper["a"].tolist(), paper["b"].tolist()] == [[0, 0, 0], [10, 20, 30]]
    assert [leaf["a"].tolist(), leaf["b"].tolist()] == [[0, 0, 3], [0, 0, 30]]


def test_breadcrumbs_drops_the_largest_share_and_then_the_smallest():
    tuned, base = {"w": np.array([5.0, -9, 1, 7, 3, -2, 8, 4, 6, 10])}, {"w": np.zeros(10)}
    found = pm.merge([tuned], "breadcrumbs", base=base, density=0.4, gamma=0.2)[0]["w"]
    assert found.tolist() == [5, 0, 0, 7, 0, 0, 8, 0, 6, 0]
    most = pm.merge([tuned], "breadcrumbs", base=base, density=0.9, gamma=0.5)[0]["w"]
    assert most.tolist() == [*tuned["w"][:-1], 0]  # so many stay, whatever gamma says


def test_task_arithmetic_adds_weighted_changes():
    base, models = {"w": np.array([1.0, 2.0])}, [{"w": np.array([2.0, 2.0])}, {"w": np.array([1.0, 5.0])}]
    assert pm.merge(models, "task_arithmetic", base=base, weights=[2, -1])[0]["w"].tolist() == [3, -1]
    assert pm.merge(models, "task_arithmetic", base=base, scale=0.5)[0]["w"].tolist() == [1.5, 3.5]


def test_slerp_leads_along_the_arc():
    ends = [{"w": np.array([1.0, 0.0])}, {"w": np.array([0.0, 1.0])}]
    for t in (0, 0.25, 0.5, 1):
        right = [np.cos(t * np.pi / 2), np.sin(t * np.pi / 2)]
        np.testing.assert_allclose(pm.merge(ends, "slerp", t=t)[0]["w"], right, atol=1e-15)
    near = [{"w": np.array([1.0, 0.0])}, {"w": np.array([2.0, 0.001])}]
    assert pm.merge(near, "slerp", t=0.25)[0]["w"].tolist() == [1.25, 0.00025]
    opposite = [{"w": np.array([1.0, 2.0])}, {"w": np.array([-1.0, -2.0])}]
    with pytest.raises(SpecMismatch, match=r"w: .*opposite"):
        pm.merge(opposite, "slerp")
    assert pm.merge(opposite, "slerp", convention="mergekit")[0]["w"].tolist() == [0, 0]


def test_model_stock_goes_as_far_as_the_angle_between_changes_says():
    base = {"w": np.zeros(2)}
    models = [{"w": np.array([1.0, 0])}, {"w": np.array([np.cos(1.0), np.sin(1.0)])}]
    share = 2 * np.cos(1) / (1 + np.cos(1))
    right = share * (models[0]["w"] + models[1]["w"]) / 2
    np.testing.assert_allclose(pm.merge(models, "model_stock", base=base)[0]["w"], right, atol=1e-15)


def test_the_mean_on_a_sphere_is_where_all_directions_cancel_out():
    axes = [{"w": length * row} for length, row in zip((1, 2, 6), np.eye(3), strict=True)]
    np.testing.assert_allclose(pm.merge(axes, "karcher")[0]["w"], [3**0.5] * 3, rtol=1e-12)
    models = [{"w": np.random.default_rng(seed).standard_normal(50)} for seed in range(3)]
    mean = pm.merge(models, "karcher", weights=[1, 2, 3])[0]["w"]
    unit, pull = mean / np.linalg.norm(mean), np.zeros(50)
    for weight, each in zip((1, 2, 3), models, strict=True):
        other = each["w"] / np.linalg.norm(each["w"])
        cosine = unit @ other
        pull += weight * np.arccos(cosine) / np.sqrt(1 - cosine**2) * (other - cosine * unit)
    assert np.linalg.norm(pull) < 1e-8


def test_multislerp_blends_on_the_sphere_around_the_base():
    base = {"w": np.array([0.0, 0, 1])}
    models = [{"w": base["w"] + change} for change in (np.array([1.0, 0, 0]), np.array([0, 3.0, 0]))]
    found = pm.merge(models, "multislerp", base=base)[0]["w"]  # half way, with the mean of the lengths
    np.testing.assert_allclose(found, [2**0.5, 2**0.5, 1], rtol=1e-7)
    opposite = [{"w": np.array(each)} for each in ([1.0, 0], [-0.5, 3**0.5 / 2], [-0.5, -(3**0.5) / 2])]
    with pytest.raises(SpecMismatch, match="cancel out"):
        pm.merge(opposite, "multislerp")


def test_nearswap_moves_elements_by_so_much_at_most():
    base, other = {"w": np.array([0.0, 1, 2, -0.0])}, {"w": np.array([0.05, 2, 1, -0.0])}
    found = pm.merge([other], "nearswap", base=base, t=0.1)[0]["w"]
    np.testing.assert_allclose(found, [0.05, 1.1, 1.9, 0], rtol=1e-15)
    assert np.signbit(found[3])


@pytest.mark.parametrize("how", ["dare", "della_linear"])
@pytest.mark.parametrize("density", [0.3, 0.7])
def test_what_chance_leaves_makes_up_for_what_goes(how, density):
    base, tuned = {"w": np.zeros((400, 50))}, {"w": np.ones((400, 50)), "v": np.ones(3000)}
    base["v"] = np.zeros(3000)
    found = pm.merge([tuned], how, base=base, density=density)[0]
    share = np.count_nonzero(found["w"]) / found["w"].size
    assert abs(share - density) < 4 * (density * (1 - density) / found["w"].size) ** 0.5
    assert abs(found["w"].mean() - 1) < 0.1
    if how == "dare":
        assert {*np.unique(found["w"])} == {0, np.float64(1 / density)}
    other = pm.merge([tuned], how, base=base, density=density, seed=1)[0]
    assert (found["w"] != other["w"]).any()


def test_the_masks_of_dare_depend_on_the_path_and_the_model():
    base, tuned = {name: np.zeros(4000) for name in "ab"}, {name: np.ones(4000) for name in "ab"}
    one = pm.merge([tuned], "dare", base=base, density=0.5)[0]
    assert not np.array_equal(one["a"], one["b"])
    two = pm.merge([tuned, tuned], "dare", base=base, density=0.5)[0]
    assert {*np.unique(two["a"])} == {0, 2, 4}
    again = pm.merge([tuned], "dare", base=base, density=0.5)[0]
    assert np.array_equal(one["a"], again["a"])
    kept = pm.merge([tuned], "dare", base=base, density=0.5, convention="mergekit")[0]["a"]
    assert kept.sum() == pytest.approx(4000)  # mergekit keeps the sum of magnitudes


def test_della_keeps_the_large_changes_of_a_row_more_often():
    change = np.tile(np.arange(1.0, 101), (3000, 1))
    found = pm.merge([{"w": change}], "della_linear", base={"w": 0 * change}, density=0.5, epsilon=0.4)[0]["w"]
    chances = 0.1 + 0.8 * np.arange(100) / 99
    assert np.abs((found != 0).mean(0) - chances).max() < 5 * (0.25 / 3000) ** 0.5
    np.testing.assert_allclose(found.max(0), np.arange(1, 101) / chances, rtol=1e-12)


@pytest.mark.parametrize("held", [1 << 20, 8])
@pytest.mark.parametrize("spread", [0, 9])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_ranking_counts_equal_magnitudes_by_their_places(dtype, spread, held, monkeypatch):
    monkeypatch.setattr(rankings, "_HELD", held)  # more keys are looked for between closer bounds
    rng = np.random.default_rng(3)
    leaves = [(rng.integers(0, 9, size) * rng.random(size) ** spread).astype(dtype) for size in (700, 1, 350)]
    leaves[0].sort()  # the parts of a leaf that a guess is made from tell nothing of the others
    whole = np.concatenate(leaves)
    order = np.argsort(-whole, kind="stable")
    for first, last in ((0, 0), (0, 1), (0, 400), (200, 617), (0, whole.size), (5, whole.size)):

        def member(leaf):
            def pieces(numbers):
                return ([leaf[at * 100 : at * 100 + 100]] for at in numbers)

            return Member(pieces, leaf.size, -(-leaf.size // 100))

        ranking = Ranking(list(map(member, leaves)), [(first, last)])
        found = [
            ranking.kept(number, at, [leaf[at * 100 : at * 100 + 100]])[0]
            for number, leaf in enumerate(leaves)
            for at in range(-(-leaf.size // 100))
        ]
        assert np.flatnonzero(np.concatenate(found)).tolist() == sorted(order[first:last].tolist())


# ---- settings ----------------------------------------------------------------------------------------------------


def test_settings_differ_by_leaf():
    models = [{"a": np.zeros(2), "b": np.zeros(2), "c": np.zeros(2)}, {name: np.ones(2) for name in "abc"}]
    tree, report = pm.merge(models, weights=[1, 1], at={"a": {"weights": [3, 1]}, "{a,b}": {"how": "slerp", "t": 0}})
    assert [tree[name].tolist() for name in "abc"] == [[0.25] * 2, [0] * 2, [0.5] * 2]
    assert [row.origin for row in report.rows][1] == "slerp(model 1, model 2, t=0)"
    with pytest.raises(NoMatch):
        pm.merge(models, at={"d": {"weights": [1, 2]}})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"how": "sleerp"}, "not a merge method"),
        ({"density": 0.5}, "density means nothing to linear"),
        ({"how": "ties"}, "needs the model"),
        ({"base": {"w": np.zeros(2)}}, "no use for a base"),
        ({"how": "dare", "base": {"w": np.zeros(2)}}, "dare needs density="),
        ({"how": "nearswap", "base": {"w": np.zeros(2)}, "t": 1}, "takes 1 model"),
        ({"weights": [1]}, "1 numbers for 2 models"),
        ({"weights": [1, "a"]}, "neither a number"),
        ({"how": "ties", "density": 1.5, "base": {"w": np.zeros(2)}}, "not a share"),
        ({"how": "della", "density": 0.9, "base": {"w": np.zeros(2)}}, "chances from"),
        ({"convention": "own"}, "not a convention"),
        ({"how": "slerp", "t": "a"}, "not a number"),
        ({"how": "slerp", "weights": [1, 2]}, "weights means nothing to slerp"),
        ({"at": {"w": 3}}, "not a map"),
        ({"missing": "drop"}, "missing='drop' is not known"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_read(given, says):
    with pytest.raises(BadArgument, match=says):
        pm.merge([{"w": np.zeros(2)}, {"w": np.ones(2)}], **given)


def test_models_need_values():
    with pytest.raises(BadArgument, match="is a path") as error:
        pm.merge([{"w": np.ones(2)}, "b.safetensors"])
    assert error.value.hint == "pm.open('b.safetensors')"
    for call in (
        lambda tree: pm.merge([tree]),
        lambda tree: pm.extract(tree, tree, rank=1),
        lambda tree: pm.fold(tree, tree),
    ):
        with pytest.raises(Unsupported, match="w: there are no values"):
            call({"w": jax.ShapeDtypeStruct((2, 2), "float32")})
        with pytest.raises(Unsupported, match="w: there are no values"):
            jax.make_jaxpr(lambda x, call=call: call({"w": x})[1])(np.ones((2, 2)))


def test_a_list_of_models_is_needed():
    for models in ({"w": np.zeros(2)}, "model.safetensors"):
        with pytest.raises(BadArgument, match="a list of them"):
            pm.merge(models)
    with pytest.raises(BadArgument, match="takes 1 model or more"):
        pm.merge([])


# ---- models that do not fit --------------------------------------------------------------------------------------


def test_one_error_names_all_leaves_that_do_not_fit():
    a = {
        "w": np.zeros((2, 3)),
        "n": np.arange(3),
        "k": np.arange(2),
        "own": np.ones(1),
        "z": np.ones(1),
        "b": np.ones(2),
    }
    b = {
        "w": np.zeros((3, 2)),
        "n": np.ones(3, int),
        "k": np.ones(2, int),
        "z": np.ones(1, complex),
        "b": np.array([1, 0]),
    }
    with pytest.raises(SpecMismatch) as error:
        pm.merge([a, b])
    for said in (
        "6 leaves",
        "w has different",
        "n holds int64",
        "k holds int64",
        "own is not in model 2",
        "z has",
        "b has",
    ):
        assert said in str(error.value)
    assert 'missing="keep"' in error.value.hint


def test_leaves_that_are_in_some_models_only_may_stay_as_they_are(tmp_path):
    a, b = {"w": np.zeros(2), "a": np.ones(1)}, {"w": np.ones(2), "b": np.full(1, 7.0)}
    tree, report = pm.merge([a, b], missing="keep")
    assert {name: leaf.tolist() for name, leaf in tree.items()} == {"w": [0.5, 0.5], "a": [1], "b": [7]}
    assert [row.path for row in report.rows] == ["w"]
    for name, each in (("a", a), ("b", b)):
        pm.save(each, tmp_path / f"{name}.safetensors")
    made, _ = pm.merge([pm.open(tmp_path / "a.safetensors"), pm.open(tmp_path / "b.safetensors")], missing="keep")
    made.save(tmp_path / "out.safetensors")
    assert bits(pm.load(tmp_path / "out.safetensors")) == bits(tree)


def test_vocabularies_of_different_sizes_are_called_so():
    models = [{"model": {"embed_tokens": {"weight": np.zeros((rows, 4))}}} for rows in (32000, 32016)]
    with pytest.raises(SpecMismatch, match=r"model/embed_tokens/weight is of vocabularies .*32,000.*32,016") as error:
        pm.merge(models)
    assert "pm.vocabulary(" in error.value.hint


def test_statistics_of_batches_are_averaged_only_with_a_word():
    norms = [torch.nn.BatchNorm1d(2) for _ in range(2)]
    norms[1].running_mean += 2
    norms[1].num_batches_tracked += 5
    with pytest.raises(SpecMismatch, match="running_mean is moved by the model") as error:
        pm.merge(norms)
    assert 'stats="first"' in error.value.hint
    assert pm.merge(norms, stats="first")[0].running_mean.tolist() == [0, 0]
    mean = pm.merge(norms, "slerp", stats="mean")[0]
    assert mean.running_mean.tolist() == [1, 1]
    assert mean.num_batches_tracked == 0
    flax = [{"params": {"k": np.full(2, x)}, "batch_stats": {"mean": np.full(2, x)}} for x in (1.0, 2.0)]
    with pytest.raises(SpecMismatch, match="batch_stats/mean"):
        pm.merge(flax)
    assert pm.merge(flax, stats="first")[0]["batch_stats"]["mean"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "layout",
    [
        ("fp8-block", "Qwen3-FP8, BF16 scales"),
        ("fp8-channel", "compressed-tensors"),
        ("fp8-tensor", "Mistral"),
        ("mxfp4", "compressed-tensors"),
        ("int8", "compressed-tensors"),
        ("awq", "AutoAWQ"),
        ("nvfp4", "modelopt"),
        ("nvfp4", "compressed-tensors"),
    ],
    ids=" ".join,
)
def test_quantised_weights_whose_values_are_short_floats_are_merged(layout, tmp_path):
    model = pm.open(write(tmp_path / "model.safetensors", stored(LAYOUTS[layout])) or tmp_path / "model.safetensors")
    for models, how in (([model] * 3, "linear"), ([model, model], "ties")):
        given = {} if how == "linear" else {"base": model}
        assert raw_bits(pm.merge(models, how, **given)[0]) == raw_bits(model)
    tree = pm.load(tmp_path / "model.safetensors")
    assert raw_bits(pm.merge([tree] * 3)[0]) == raw_bits(tree)
    path = "model.layers.0.mlp.fc.weight"
    floats = pm.dequantize(model, dtype="float32")[0]
    twice = pm.at(floats, path).multiply(3)
    merged = pm.merge([model, twice])[0]
    right = 2 * np.asarray(floats[path])
    assert np.abs(np.asarray(pm.dequantize(merged, dtype="float32")[0][path]) - right).max() < 0.1 * np.abs(right).max()


@pytest.mark.parametrize("scheme", ["fp8-block", "int4"])
def test_quantised_weights_are_merged_by_their_values(scheme, tmp_path):
    floats = [{"fc": {"weight": np.random.default_rng(at).standard_normal((16, 128)).astype("f4")}} for at in range(2)]
    models = [pm.quantize(each, "fc/weight", scheme=scheme)[0] for each in floats]
    tree, report = pm.merge(models, "slerp", t=0.4)
    assert [row.path for row in report.rows] == ["fc/weight"]
    decoded = [pm.dequantize(each, dtype="float32")[0] for each in models]
    right = pm.merge(decoded, "slerp", t=0.4)[0]["fc"]["weight"]
    off = pm.dequantize(tree, dtype="float32")[0]["fc"]["weight"] - right
    assert np.linalg.norm(off) < 0.2 * np.linalg.norm(right)
    paths = [tmp_path / f"{at}.safetensors" for at in range(2)]
    for path, each in zip(paths, models, strict=True):
        pm.save(each, path)
    pm.merge(list(map(pm.open, paths)), "slerp", t=0.4)[0].save(tmp_path / "out.safetensors")
    assert raw_bits(pm.open(tmp_path / "out.safetensors")) == raw_bits(tree)
    assert raw_bits(pm.merge([models[0]] * 3, "ties", base=models[0])[0]) == raw_bits(models[0])
    mixed = pm.merge([decoded[0], models[1]])[0]["fc"]["weight"]  # floats stay floats
    assert np.array_equal(mixed, pm.merge(decoded)[0]["fc"]["weight"])


def test_quantised_weights_that_cannot_be_decoded_are_refused():
    lacking = {"fc": {"weight_packed": np.ones((2, 1), "int32"), "weight_shape": np.array([2, 8])}}
    models = [lacking, {"fc": {**lacking["fc"], "weight_packed": np.zeros((2, 1), "int32")}}]
    with pytest.raises((Quantized, SpecMismatch)):
        pm.merge(models)


def test_tied_leaves_stay_tied_and_must_be_so_in_all_models():
    def tied(seed, apart=False):
        torch.manual_seed(seed)
        net = torch.nn.ModuleDict({"embed": torch.nn.Embedding(4, 3), "head": torch.nn.Linear(3, 4, bias=False)})
        if not apart:
            net["head"].weight = net["embed"].weight
        return net

    merged = pm.merge([tied(0), tied(1)], "ties", base=tied(2), density=0.5)[0]
    assert merged["head"].weight is merged["embed"].weight
    with pytest.raises(SpecMismatch, match=r"head.weight is tied to .*in model 2 it is a leaf of its own"):
        pm.merge([tied(0), tied(1, apart=True)])


# ---- the command and recipes -------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path):
    for seed, name in enumerate("abc"):
        pm.save(model(seed), tmp_path / f"{name}.safetensors")
    return tmp_path


def test_the_command_writes_what_python_does(three, monkeypatch):
    monkeypatch.chdir(three)
    models = ["merge", "a.safetensors", "b.safetensors"]
    given = "--how ties --base c.safetensors --density 0.5 --density 0.25 --weight 2 --weight 1 -o out.safetensors"
    result = CliRunner().invoke(cli, [*models, *given.split(), "--record"])
    assert result.exit_code == 0, result.output
    a, b, c = (pm.open(f"{name}.safetensors") for name in "abc")
    tree, _ = pm.merge([a, b], "ties", base=c, density=[0.5, 0.25], weights=[2, 1])
    assert bits(tree) == bits(pm.open("out.safetensors"))
    edits = {leaf.path: leaf.edit for leaf in pm.record("out.safetensors").leaves}
    assert edits["h/0/w"].startswith("set(ties(a.safetensors, b.safetensors, base=c.safetensors")
    dry = CliRunner().invoke(cli, [*models, "--how", "slerp", "--t", "0.3", "--dry-run"])
    assert "slerp(a.safetensors, b.safetensors, t=0.3)" in dry.output
    wrong = CliRunner().invoke(cli, [*models, "--how", "ties", "-o", "no.safetensors"])
    assert wrong.exit_code == 2
    assert "needs the model" in wrong.output
    assert "hint: --base MODEL" in wrong.output
    once = CliRunner().invoke(cli, [*models, "--weight", "2", "-o", "same.safetensors"])
    assert once.exit_code == 0, once.output
    assert bits(pm.open("same.safetensors")) == bits(pm.merge([a, b])[0])


def test_a_recipe_merges_and_its_record_replays_on_the_first_model(three, monkeypatch):
    recipe = three / "soup.yaml"
    recipe.write_text(
        "version: 1\nsteps:\n"
        f"  - merge: {{source: ['{three}/b.safetensors'], how: dare_ties, base: c.safetensors, density: 0.5, seed: 3,\n"
        "            at: {'**/1/w': {density: 0.9}}}\n"
        "  - zero: step\n"
    )
    pm.Recipe.load(recipe).apply(pm.open(three / "a.safetensors")).save(three / "out.safetensors", record=True)
    record = pm.record(three / "out.safetensors")
    assert str(three) not in str(record.to_dict())
    assert pm.verify_record(three / "out.safetensors")
    again = pm.Recipe.parse(record.recipe).apply(pm.open(three / "a.safetensors"))
    assert bits(again) == bits(pm.open(three / "out.safetensors"))
    tree = pm.Recipe.load(recipe).apply(pm.load(three / "a.safetensors"))
    assert bits(tree) == bits(pm.load(three / "out.safetensors"))
    before = (three / "a.safetensors").read_bytes()
    pm.patch(three / "a.safetensors", pm.Recipe.load(recipe).apply)
    assert bits(pm.open(three / "a.safetensors")) == bits(pm.open(three / "out.safetensors"))
    pm.undo(three / "a.safetensors")
    assert (three / "a.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("body", "address"),
    [
        ("{}", "$.steps[0]"),
        ("{source: []}", "$.steps[0].source"),
        ("{source: [x], weights: a}", "$.steps[0].weights"),
        ("{source: [none.safetensors]}", "$.steps[0]"),
        ("{source: [b.safetensors], how: tie}", "$.steps[0]"),
    ],
)
def test_what_is_wrong_with_a_step_has_its_address(three, body, address):
    (three / "r.yaml").write_text(f"version: 1\nsteps:\n  - merge: {body}\n")
    with pytest.raises(pm.errors.BadRecipe) as error:
        pm.Recipe.load(three / "r.yaml").apply(pm.open(three / "a.safetensors"))
    assert error.value.problems[0].address == address
