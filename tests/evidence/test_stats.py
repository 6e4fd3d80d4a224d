"""`stats`: the measures of leaves in memory and on disk, against definitions and numpy's own linear algebra."""

import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import paramend as pm
from paramend.errors import NoMatch
from paramend.evidence import measures
from paramend.evidence.measures import Tally
from support.numerics import assert_close


def normal(*shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(getattr(ml_dtypes, dtype, dtype))


@pytest.mark.numeric
@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(width=32), max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    dtype=st.sampled_from(["float32", "float64", "bfloat16"]),
)
def test_measures_are_those_of_the_definitions(values, cuts, dtype):
    with np.errstate(over="ignore", invalid="ignore"):
        array = np.array(values, "float32").astype(getattr(ml_dtypes, dtype, dtype))
        wide = array.astype("float64").tolist()
    tallies = [Tally() for _ in range(len(cuts) + 1)]
    for tally, part in zip(tallies, np.split(array, sorted(cuts)), strict=True):
        tally.add(part)
    for other in reversed(tallies[1:]):
        tallies[0].merge(other)
    found = tallies[0].measures()
    numbers = [value for value in wide if not math.isnan(value)]
    finite = [value for value in numbers if math.isfinite(value)]
    assert (found.min, found.max) == (min(numbers, default=None), max(numbers, default=None))
    assert (found.nans, found.infs) == (len(wide) - len(numbers), len(numbers) - len(finite))
    assert found.zeros == sum(value == 0 for value in wide)
    if not finite:
        assert found.mean is found.std is found.norm is None
        return
    mean = math.fsum(finite) / len(finite)
    terms, size = len(finite) + len(tallies), max(map(abs, finite))
    assert_close(found.mean, mean, terms=terms, scale=size)
    assert_close(found.norm, math.hypot(*finite), terms=terms)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in finite) / len(finite))
    assert_close(found.std, std, terms=terms, scale=size)


@pytest.mark.numeric
def test_sums_are_as_good_as_exact_ones():
    values = normal(2_000_000, dtype="float64") + 1e6  # a mean far above the spread
    row = pm.stats([values]).leaves[0]
    mean, pairwise = math.fsum(values) / values.size, math.log2(values.size)
    assert_close(row.mean, mean, terms=pairwise)
    assert_close(row.norm, math.sqrt(math.fsum(values * values)), terms=pairwise)
    # squares of gaps are added one after another, a run at a time
    assert_close(row.std, math.sqrt(math.fsum((values - mean) ** 2) / values.size), terms=measures._RUN)


def test_memory_and_files_agree(tmp_path):
    tree = {"fc": {"kernel": normal(300, 40), "bias": normal(40, dtype="bfloat16")}, "n": np.arange(5)}
    pm.save(tree, tmp_path / "m.safetensors")
    pm.save(tree, tmp_path / "shards/", max_shard_size=20_000)
    np.savez_compressed(tmp_path / "m.npz", **{"fc/kernel": tree["fc"]["kernel"].T.copy().T, "n": tree["n"]})
    expected = {row.path.replace("/", "."): row.to_dict() for row in pm.stats(tree).leaves}
    for path in (tmp_path / "m.safetensors", str(tmp_path / "shards"), tmp_path / "m.npz"):
        for row in pm.stats(path).leaves:
            wanted = expected[row.path.replace("/", ".")] | {"path": row.path}
            assert row.to_dict() == wanted
    as_torch = {"fc.kernel": torch.from_numpy(tree["fc"]["kernel"]), "n": torch.arange(5)}
    for row in pm.stats(as_torch).leaves:
        assert row.to_dict() | {"path": ""} == expected[row.path] | {"path": ""}
    as_jax = jax.tree.map(jnp.asarray, {"fc": tree["fc"]})
    assert [row.norm for row in pm.stats(as_jax).leaves] == [
        expected[row.path.replace("/", ".")]["norm"] for row in pm.stats(as_jax).leaves
    ]
    with pm.open(tmp_path / "m.safetensors") as opened:
        zeroed = pm.stats(pm.at(opened, "fc.kernel").zero(), "fc/**")
        assert [row.zeros for row in zeroed.leaves if "kernel" in row.path] == [12_000]


def test_what_cannot_be_measured_is_listed(tmp_path):
    text = b'{"e":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"u":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    (tmp_path / "m").write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    report = pm.stats(tmp_path / "m", spectral=True)
    assert [(row.path, bool(row.unread), row.zeros) for row in report.leaves] == [("e", False, 0), ("u", True, None)]
    assert "packed" in str(report)
    found = pm.stats({"k": jax.random.key(0), "s": jax.ShapeDtypeStruct((2,), jnp.float32), "w": np.ones(2)})
    assert [row.path for row in found.leaves if row.unread] == ["k", "s"]
    with pytest.raises(NoMatch):
        pm.stats({"w": np.ones(2)}, "b")


def test_tied_leaves_count_once():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    report = pm.stats(module)
    assert [(row.path, row.also) for row in report.leaves] == [("0.weight", ("1.weight",))]
    assert report.totals["parameters"] == 9


def test_the_table_is_folded_with_figures_of_all_together():
    tree = {"layers": [{"w": np.full((2, 2), float(i)), "b": np.zeros(2)} for i in range(4)]}
    report = pm.stats(tree)
    lines = {line.split()[0]: line.split() for line in str(report).splitlines() if line.startswith("  ")}
    assert lines["layers/{0..3}/w"][1:] == ["4", "×", "float64[2,2]", "0", "3", "1.5", "1.118", "7.483", "4", "0", "0"]
    assert lines["layers/{0..3}/b"][-3:] == ["8", "0", "0"]
    assert_close(report.totals["norm"], math.sqrt(56), terms=16)
    data = json.loads(json.dumps(report.to_dict()))
    assert (data["totals"]["leaves"] == 8 and data["leaves"][1]["path"] == "layers/0/b") or data["leaves"][0]["shape"]


# ---- matrices ------------------------------------------------------------------------------------------------------


@pytest.mark.numeric
@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (40, 30), (30, 40), (3, 3, 4, 8), (200, 150)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_the_spectral_norm_is_that_of_the_svd(shape, dtype):
    kernel = normal(*shape, dtype=dtype)
    row = pm.stats({"kernel": kernel}, spectral=True).leaves[0]
    wide = kernel.astype("complex128" if dtype == "complex64" else "float64").reshape(-1, shape[-1])
    exact = np.linalg.norm(wide, 2)
    assert row.spectral_norm == pytest.approx(exact, rel=1e-6)  # what is promised, far above rounding
    assert row.stable_rank == pytest.approx((np.linalg.norm(wide) / exact) ** 2, rel=3e-6)
    weight = torch.from_numpy(np.ascontiguousarray(wide.reshape(shape).T.real))
    row = pm.stats({"fc.weight": weight}, spectral="fc.weight").leaves[0]
    assert row.spectral_norm == pytest.approx(np.linalg.norm(wide.real, 2), rel=1e-6)
    assert row.units == shape[-1]


@pytest.mark.numeric
def test_special_matrices():
    rank_one = np.outer(np.arange(1, 50.0), np.arange(1, 60.0))
    row = pm.stats([rank_one], spectral=True).leaves[0]
    assert row.stable_rank == pytest.approx(1, rel=1e-6)
    row = pm.stats([np.eye(64)], spectral=True).leaves[0]
    assert row.spectral_norm == pytest.approx(1) and row.stable_rank == pytest.approx(64)
    row = pm.stats([np.zeros((4, 3))], spectral=True).leaves[0]
    assert (row.spectral_norm, row.stable_rank, row.dead, row.units) == (0.0, None, 3, 3)
    row = pm.stats([np.array([[1.0, np.nan], [0.0, 0.0]])], spectral=True).leaves[0]
    assert (row.spectral_norm, row.dead) == (None, 0)
    assert pm.stats([np.ones(3), np.ones((2, 2), int)], spectral=True).leaves[1].units is None
    close = np.diag([1.0, 1 - 1e-9, *np.linspace(0, 0.9, 300)])
    assert pm.stats([close], spectral=True).leaves[0].spectral_norm == pytest.approx(1, rel=1e-6)


@pytest.mark.numeric
def test_dead_units_and_matrices_that_are_not_held(tmp_path, monkeypatch):
    from paramend.evidence import spectra

    kernel = normal(300, 70)
    kernel[:, [3, 9]] = 0
    pm.save({"fc/kernel": kernel}, tmp_path / "flax.safetensors")
    pm.save({"fc.weight": torch.from_numpy(kernel.T.copy())}, tmp_path / "torch.safetensors")
    held = pm.stats({"kernel": kernel}, spectral=True).leaves[0]
    assert (held.dead, held.units) == (2, 70)
    monkeypatch.setattr(spectra, "_HELD", 0)
    monkeypatch.setattr(spectra, "CHUNK", 70 * 4 * 7)
    for name in ("flax", "torch"):
        row = pm.stats(tmp_path / f"{name}.safetensors", spectral=True).leaves[0]
        assert (row.dead, row.units) == (2, 70)
        assert row.spectral_norm == pytest.approx(held.spectral_norm, rel=1e-6)  # as good as is promised
    pm.save({"kernel": normal(300, 700, dtype="float64")}, tmp_path / "wide.safetensors")
    exact = np.linalg.norm(normal(300, 700, dtype="float64"), 2)
    for elements in (0, 1 << 20):
        monkeypatch.setattr(spectra, "_HELD", elements)
        row = pm.stats(tmp_path / "wide.safetensors", spectral=True).leaves[0]
        assert row.spectral_norm == pytest.approx(exact, rel=1e-6)
    assert "2 of 70" in str(pm.stats({"kernel": kernel}, spectral=True))
