"""`diff`: what differs is found, named and measured, against planted differences and a naive implementation."""

import json
import math
from dataclasses import asdict

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import nnx
from hypothesis import given, settings, strategies as st

import paramend as pm
from paramend.errors import BadArgument, CannotRead, NoMatch, Unsupported
from paramend.evidence import distances, streams
from paramend.evidence.distances import Gap, ulps
from support.numerics import assert_close

PARTS = ("changed", "respecified", "renamed", "removed", "added", "identical")


def lists(report):
    return {name: [row.path for row in getattr(report, name)] for name in PARTS if getattr(report, name)}


def normal(*shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(getattr(ml_dtypes, dtype, dtype))


# ---- which list ----------------------------------------------------------------------------------------------------


def test_each_leaf_is_in_one_list():
    a = {"same": normal(3), "moved": normal(4, seed=1), "was": normal(5, seed=2), "gone": normal(6), "cast": np.ones(2)}
    b = {"same": a["same"].copy(), "moved": a["moved"] + 1, "is": a["was"].copy(), "new": normal(7)}
    b["cast"] = np.ones(2, "float32")
    report = pm.diff(a, b)
    assert report
    assert lists(report) == {
        "changed": ["moved"],
        "respecified": ["cast"],
        "renamed": ["is"],
        "removed": ["gone"],
        "added": ["new"],
        "identical": ["same"],
    }
    assert report.renamed[0].was == "was"
    assert (report.respecified[0].dtype_before, report.respecified[0].dtype) == ("float64", "float32")
    assert report.respecified[0].differing == 0  # every value survived the cast
    assert sum(part["leaves"] for part in report.totals.values()) == 6
    assert "5 of 6 leaves differ" in str(report)


def test_no_difference_is_false_and_says_so():
    report = pm.diff({"w": normal(3)}, {"w": normal(3)})
    assert not report
    assert str(report) == "no difference: 1 leaf is identical, 12 B"


def test_bits_decide():
    nan = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert not pm.diff([nan], [nan.copy()])
    other = nan[::-1].copy()
    row = pm.diff([nan], [other]).changed[0]
    assert (row.differing, row.nonfinite, row.max_abs, row.max_ulp) == (2, 2, None, None)
    row = pm.diff([np.array([0.0, 1.0])], [np.array([-0.0, 1.0])]).changed[0]
    assert (row.differing, row.nonfinite, row.max_abs, row.relative_l2, row.max_ulp) == (1, 0, 0.0, 0.0, 0)


def test_a_transposed_kernel_is_said_to_be_one():
    kernel = normal(640, 1100)
    report = pm.diff({"k": kernel, "q": normal(30, 30)}, {"k": kernel.T.copy(), "q": normal(30, 30).T.copy()})
    assert report.respecified[0].transposed == (1, 0)
    assert report.changed[0].transposed == (1, 0)
    assert "transposed (1, 0)" in str(report)
    almost = kernel.T.copy()
    almost[900, 600] += 1
    assert pm.diff({"k": kernel}, {"k": almost}).respecified[0].transposed is None
    convolution = normal(8, 4, 3, 3)  # OIHW of torch, HWIO of Flax
    row = pm.diff([convolution], [convolution.transpose(2, 3, 1, 0)]).respecified[0]
    assert row.transposed == (2, 3, 1, 0)


def test_a_transposed_kernel_in_files(tmp_path):
    kernel = normal(700, 600)
    safetensors.numpy.save_file({"k": kernel}, tmp_path / "a.safetensors")
    np.savez_compressed(tmp_path / "b.npz", k=kernel.T)
    safetensors.numpy.save_file({"k": np.ascontiguousarray(kernel.T)}, tmp_path / "c.safetensors")
    for other in ("b.npz", "c.safetensors"):
        assert pm.diff(tmp_path / "a.safetensors", tmp_path / other).respecified[0].transposed == (1, 0)


# ---- renames -------------------------------------------------------------------------------------------------------


def test_renamed_layers_pair_off_by_name_where_bytes_are_many_times_there():
    make = {"ln.b": np.zeros, "ln.w": np.ones, "mlp.b": np.zeros}
    a = {f"h.{i}.{name}": fill(4) for i in range(3) for name, fill in make.items()}
    b = {name.replace("h.", "layers."): leaf.copy() for name, leaf in reversed(a.items())}
    report = pm.diff(a, b)
    assert {row.path: row.was for row in report.renamed} == {name.replace("h.", "layers."): name for name in a}
    assert not report.removed and not report.added


def test_a_leaf_is_renamed_once_and_only_by_its_own_bytes():
    one = normal(5000)
    other = one.copy()
    other[2600] = 0  # beside what is sampled
    report = pm.diff({"x": one}, {"y": other, "z": one.copy(), "zz": one.copy()})
    assert lists(report) == {"renamed": ["z"], "added": ["y", "zz"]}
    assert lists(pm.diff({"x": np.zeros(0)}, {"y": np.zeros(0)})) == {"removed": ["x"], "added": ["y"]}


def test_a_prefix_that_was_added(tmp_path):
    model = {f"layers.{i}.w": normal(30, 30, seed=i) for i in range(4)}
    safetensors.numpy.save_file(model, tmp_path / "a")
    safetensors.numpy.save_file({f"model.{name}": leaf for name, leaf in model.items()}, tmp_path / "b")
    report = pm.diff(tmp_path / "a", tmp_path / "b")
    assert [(row.was, row.path) for row in report.renamed] == [(name, f"model.{name}") for name in model]
    assert "model.layers.{0..3}.w ◄─ layers.{0..3}.w  4 × float32[30,30]" in str(report)


# ---- ties ----------------------------------------------------------------------------------------------------------


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 3)
        self.head = torch.nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_are_one_leaf(tmp_path):
    torch.manual_seed(0)
    a, b = Tied(), Tied()
    with torch.no_grad():
        b.embed.weight.copy_(a.embed.weight)
    report = pm.diff(a, b)
    assert not report
    assert [(row.path, row.also) for row in report.identical] == [("embed.weight", ("head.weight",))]
    one = {"embed.weight": a.embed.weight.detach().numpy()}
    safetensors.numpy.save_file(one, tmp_path / "m")  # as transformers saves it
    assert not pm.diff(a, tmp_path / "m") and not pm.diff(tmp_path / "m", a)
    both = one | {"head.weight": one["embed.weight"] + 1}
    assert lists(pm.diff(a, both)) == {"identical": ["embed.weight"], "changed": ["head.weight"]}
    assert pm.verify(a, tmp_path / "m") == []
    with torch.no_grad():
        b.embed.weight[0, 0] += 1
    assert len(pm.diff(a, b).changed) == 1
    assert pm.verify(a, b, only="head.weight") == ["embed.weight", "head.weight"]


def test_keys_that_read_the_same_are_both_compared():
    a = {"x.w": np.ones(1), "x": {"w": np.ones(1)}}
    b = {"x.w": np.ones(1), "x": {"w": np.zeros(1)}}
    assert len(pm.diff(a, b).changed) == 1
    with pytest.raises(AssertionError):
        pm.verify(a, b)


# ---- kinds of trees and files --------------------------------------------------------------------------------------


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(5)(x)))


def test_jax_against_files_of_every_kind(tmp_path):
    import orbax.checkpoint as ocp
    from flax.serialization import to_bytes

    params = Net().init(jax.random.key(0), jnp.ones((1, 3)))
    pm.save(params, tmp_path / "m.safetensors")
    pm.save(params, tmp_path / "m.npz")
    (tmp_path / "m.msgpack").write_bytes(to_bytes(params))
    with ocp.StandardCheckpointer() as writer:
        writer.save(tmp_path / "orbax", params)
    flat = {"/".join(key.key for key in path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    np.savez_compressed(tmp_path / "packed.npz", **flat)
    edited = pm.at(params, "**/Dense_0/kernel").multiply(2.0)
    for name in ("m.safetensors", "m.npz", "packed.npz", "m.msgpack", "orbax"):
        assert not pm.diff(params, tmp_path / name), name
        assert not pm.diff(str(tmp_path / name), tmp_path / "m.safetensors"), name
        report = pm.diff(tmp_path / name, edited)
        assert lists(report)["changed"] == ["params/Dense_0/kernel"]
        assert report.changed[0].relative_l2 == pytest.approx(1)
        assert report.changed[0].cosine == pytest.approx(1)
        with pm.open(tmp_path / name) as opened:
            assert lists(pm.diff(opened, pm.at(opened, "**/Dense_0/kernel").multiply(2.0))) == lists(report)


def test_torch_against_its_files(tmp_path):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    half = module.state_dict() | {"b": torch.ones(3, dtype=torch.bfloat16), "f": torch.ones(3).to(torch.float8_e4m3fn)}
    torch.save(half, tmp_path / "m.pt")
    assert not pm.diff(half, tmp_path / "m.pt")
    torch.save({"w": torch.arange(6.0).reshape(2, 3).T}, tmp_path / "strided.pt")
    assert not pm.diff({"w": np.arange(6.0, dtype="float32").reshape(2, 3).T}, tmp_path / "strided.pt")
    module.requires_grad_(True)
    assert not pm.diff(module, module.state_dict())


def test_nnx_equinox_and_shards(tmp_path):
    import equinox as eqx

    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    assert not pm.diff(model, nnx.state(model))
    other = eqx.nn.MLP(2, 2, 4, 2, key=jax.random.key(0))
    assert not pm.diff(other, other)
    moved = pm.at(other, "layers[-1]/bias").add(1.0)
    assert lists(pm.diff(other, moved))["changed"] == ["layers/2/bias"]
    tree = {f"layers.{i}.w": normal(40, 40, seed=i) for i in range(6)}
    pm.save(tree, tmp_path / "one.safetensors")
    pm.save(tree, tmp_path / "many/", max_shard_size=15_000)
    pm.save({k: v for k, v in tree.items() if "5" not in k}, tmp_path / "fewer/", max_shard_size=9_000)
    assert not pm.diff(tmp_path / "one.safetensors", tmp_path / "many")
    assert lists(pm.diff(tmp_path / "many", tmp_path / "fewer"))["removed"] == ["layers.5.w"]
    assert lists(pm.diff(tmp_path / "fewer", tmp_path / "many"))["added"] == ["layers.5.w"]


def test_edits_that_are_not_saved_yet(tmp_path):
    pm.save({"a": normal(9, 9), "b": normal(5)}, tmp_path / "m.safetensors")
    with pm.open(tmp_path / "m.safetensors") as before:
        after = pm.at(pm.at(before, "a").zero(), "b").rename("c")
        report = pm.diff(before, after)
        assert lists(report) == {"changed": ["a"], "renamed": ["c"]}
        assert report.changed[0].relative_l2 == 1.0


def test_dtypes_without_arithmetic(tmp_path):
    def file(name, data):
        text = (
            b'{"p":{"dtype":"F4","shape":[4],"data_offsets":[0,2]},"s":{"dtype":"F6_E2M3","shape":[4],'
            b'"data_offsets":[2,5]},"u":{"dtype":"X9","shape":[2],"data_offsets":[5,7]}}'
        )
        (tmp_path / name).write_bytes(len(text).to_bytes(8, "little") + text + data)
        return tmp_path / name

    a = file("a", bytes([0x21, 0x43, 0, 0, 0, 1, 2]))
    b = file("b", bytes([0x20, 0x53, 0, 0x10, 0, 1, 3]))
    assert not pm.diff(a, file("c", a.read_bytes()[-7:]))
    report = pm.diff(a, b)
    assert {row.path: row.differing for row in report.changed} == {"p": 2, "s": 1, "u": 1}
    assert all(row.max_abs is None and row.max_ulp is None for row in report.changed)
    text = np.array(["ab", "cd"])
    assert pm.diff([text], [np.array(["ab", "ce"])]).changed[0].differing == 1
    key = jax.random.key(0)
    assert not pm.diff({"k": key}, {"k": jax.random.key(0)})
    assert pm.diff({"k": key}, {"k": jax.random.key(1)}).changed
    for values in (np.array([True, False]), np.array([1 + 2j, 3]), np.array([2**62, -(2**62)])):
        row = pm.diff([values], [values[::-1].copy()]).changed[0]
        assert row.differing == 2 and row.max_ulp is None
    assert pm.diff([np.array([2**63 - 1])], [np.array([-(2**63)])]).changed[0].max_abs == 2**64 - 1
    assert pm.diff([np.array([255, 0], np.uint8)], [np.array([0, 0], np.uint8)]).changed[0].max_abs == 255
    assert pm.diff([normal(3).astype("c8")], [1j * normal(3).astype("c8")]).changed[0].relative_l2 == pytest.approx(
        2**0.5
    )


def test_packed_elements_across_pieces(tmp_path, monkeypatch):
    from paramend.evidence import reading

    text = b'{"s":{"dtype":"F6_E2M3","shape":[64],"data_offsets":[0,48]}}'
    a, b = np.zeros(48, np.uint8), np.zeros(48, np.uint8)
    b[[2, 3, 47]] = 0x80, 0x01, 0xFF  # elements 3, 4, and the last two
    for name, data in (("a", a), ("b", b)):
        (tmp_path / name).write_bytes(len(text).to_bytes(8, "little") + text + data.tobytes())
    monkeypatch.setattr(reading, "CHUNK", 6)
    monkeypatch.setattr(reading, "_SPAN", 16)
    assert pm.diff(tmp_path / "a", tmp_path / "b").changed[0].differing == 4


def test_leaves_without_values_are_refused():
    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    with pytest.raises(Unsupported, match=r"2 leaves cannot be compared\n  a: it is abstract"):
        pm.diff({"a": shape, "b": shape}, {"a": np.ones(2, "float32"), "b": jnp.ones(2)})
    with pytest.raises(Unsupported, match="meta"):
        pm.diff({"a": torch.ones(2, device="meta")}, {"a": torch.ones(2)})
    with pytest.raises(Unsupported, match="not a number"):
        pm.diff({"a": np.array([None])}, {"a": np.array([None])})
    assert pm.diff({"a": shape}, {"a": jax.ShapeDtypeStruct((3,), jnp.float32)}).respecified


# ---- figures -------------------------------------------------------------------------------------------------------

FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz")


@pytest.mark.parametrize("dtype", [*FLOATS, "float8_e8m0fnu", "float4_e2m1fn"])
def test_ulps_count_the_steps_between_floats(dtype):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    width = 8 * kind.itemsize
    patterns = np.random.default_rng(0).integers(0, 2**width, 3000, dtype=f"u{kind.itemsize}")
    if width < 17:
        patterns = np.arange(16 if dtype == "float4_e2m1fn" else 2**width, dtype=patterns.dtype)
    floats = patterns.view(kind)
    with np.errstate(invalid="ignore"):
        numbers = floats.astype("float64")
    order = np.argsort(numbers, kind="stable")
    order = order[np.isfinite(numbers[order])]
    steps = np.concatenate([[0], np.cumsum(np.diff(numbers[order]) != 0)])
    if width > 16:  # not all patterns: only neighbours are known to be neighbours
        above = np.nextafter(floats[order], np.inf, dtype=kind)
        assert (ulps(floats[order], above)[np.isfinite(above)] == 1).all()
        return
    rng = np.random.default_rng(0)
    one, two = rng.integers(0, len(order), (2, 2000))
    expected = np.abs(steps[one] - steps[two])
    assert (ulps(floats[order[one]], floats[order[two]]) == expected).all()


def test_ulps_of_the_ends():
    ends = np.array([-np.finfo("float64").max, 0.0]), np.array([np.finfo("float64").max, 5e-324])
    assert ulps(*ends).tolist() == [2 * (0x7FEFFFFFFFFFFFFF), 1]


def naive(a, b):
    """The figures, straight from their definitions, by Python's exact sums."""
    width = a.dtype.itemsize
    differ = [x != y for x, y in zip(batched(a.tobytes(), width), batched(b.tobytes(), width), strict=True)]
    with np.errstate(invalid="ignore"):
        pairs = list(zip(a.astype("complex128").tolist(), b.astype("complex128").tolist(), differ, strict=True))
    finite = [(x, y, d) for x, y, d in pairs if all(map(math.isfinite, (x.real, x.imag, y.real, y.imag)))]
    moved = [abs(y - x) for x, y, d in finite if d]
    old = math.sqrt(math.fsum(abs(x) ** 2 for x, _, _ in finite))
    new = math.sqrt(math.fsum(abs(y) ** 2 for _, y, _ in finite))
    gap = math.sqrt(math.fsum(m * m for m in moved))
    dot = math.fsum((x * y.conjugate()).real for x, y, _ in finite)
    return {
        "differing": sum(differ),
        "nonfinite": sum(differ) - len(moved),
        "max_abs": max(moved, default=None),
        "relative_l2": None if not moved else gap / old if old else math.inf if gap else 0.0,
        "cosine": dot / old / new if moved and old and new else None,
    }


def batched(data, width):
    return [data[at : at + width] for at in range(0, len(data), width)]


@pytest.mark.numeric
@settings(max_examples=80, deadline=None)
@given(
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "float8_e5m2", "int8", "uint16", "bool", "complex64"]),
    size=st.integers(1, 40),
    data=st.data(),
)
def test_figures_are_those_of_the_definitions(dtype, size, data):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    drawn = data.draw(st.binary(min_size=2 * size * kind.itemsize, max_size=2 * size * kind.itemsize))
    if dtype == "bool":
        drawn = bytes(byte & 1 for byte in drawn)
    a, b = np.frombuffer(drawn, kind).reshape(2, size)
    same = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    b = np.where(same, a.view(f"V{kind.itemsize}"), b.view(f"V{kind.itemsize}")).view(kind)
    run = data.draw(st.sampled_from([1, 3, 64]))
    before, distances._RUN = distances._RUN, run
    try:
        gap = Gap()
        cut = data.draw(st.integers(0, size))
        gap.add(a[cut:], b[cut:])
        other = Gap()
        other.add(a[:cut], b[:cut])
        gap.merge(other)
    finally:
        distances._RUN = before
    found = asdict(gap.distance())
    for name, value in naive(a, b).items():
        if name in ("relative_l2", "cosine") and value not in (None, math.inf):
            assert_close(found[name], value, terms=3 * size, scale=max(1.0, value))
        elif name == "max_abs" and value is not None:
            assert_close(found[name], value, terms=4)  # a complex one is a hypotenuse
        else:
            assert found[name] == value, name


@pytest.mark.numeric
def test_figures_of_a_cast():
    a = normal(3000, dtype="float64")
    row = pm.diff([a], [a.astype("float32")]).respecified[0]
    assert row.differing == 3000 and row.max_ulp is None
    assert row.max_abs == np.abs(a.astype("float32") - a).max()
    assert_close(row.relative_l2, np.linalg.norm(a.astype("float32") - a) / np.linalg.norm(a), terms=2 * 3000)
    nan = np.array([np.nan, 1.0], "float32")
    assert pm.diff([nan], [nan.astype(ml_dtypes.bfloat16)]).respecified[0].differing == 0


# ---- files larger than what is read at once ------------------------------------------------------------------------


def sparse(path, nbytes):
    """A safetensors file of zeros that takes no room: one leaf of float32, and a small one."""
    size = nbytes // 4
    text = json.dumps(
        {
            "big": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]},
            "small": {"dtype": "F32", "shape": [3], "data_offsets": [4 * size, 4 * size + 12]},
        }
    ).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 4 * size + 12)
    return 8 + len(text)


def test_one_ulp_in_one_element_of_a_large_leaf(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    nbytes = 200 << 20
    start = sparse(a, nbytes)
    sparse(b, nbytes)
    with b.open("r+b") as file:
        file.seek(start + nbytes - 8)
        file.write(np.array([1e-45], "float32").tobytes())
    row = pm.diff(a, b).changed[0]
    assert (row.path, row.differing, row.max_ulp, row.max_abs) == ("big", 1, 1, float(np.float32(1e-45)))
    assert row.relative_l2 == math.inf and row.cosine is None
    assert pm.verify(a, b, only="big") == ["big"]


@pytest.mark.numeric
def test_spans_do_not_matter(tmp_path, monkeypatch):
    from paramend.evidence import reading

    tree = {"x": normal(1000, 3), "y": normal(77, dtype="bfloat16"), "z": normal(5, dtype="float64")}
    edited = pm.at(tree, "x")[500:].add(1.0)
    pm.save(tree, tmp_path / "a.safetensors")
    pm.save(edited, tmp_path / "b.safetensors")
    whole = pm.diff(tree, edited).to_dict()
    monkeypatch.setattr(reading, "_SPAN", 640)
    monkeypatch.setattr(reading, "CHUNK", 48)
    found = pm.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors").to_dict()
    for figure in ("relative_l2", "cosine"):
        assert_close(found["changed"][0].pop(figure), whole["changed"][0].pop(figure), terms=3000)
    assert found == whole


def test_a_file_that_changes_meanwhile_is_an_error(tmp_path):
    pm.save({"w": normal(300)}, tmp_path / "a.safetensors")
    with pm.open(tmp_path / "a.safetensors") as opened:
        with (tmp_path / "a.safetensors").open("r+b") as file:
            file.truncate(500)
        with pytest.raises(ValueError, match="another program changed it"):
            pm.diff(opened, {"w": normal(300)})


def test_the_same_file_is_not_read(tmp_path, monkeypatch):
    pm.save({"w": normal(300)}, tmp_path / "a.safetensors")
    (tmp_path / "b").symlink_to(tmp_path / "a.safetensors")
    monkeypatch.setattr(streams.Desk, "read", lambda *args: pytest.fail("it was read"))
    assert not pm.diff(tmp_path / "a.safetensors", tmp_path / "b")


# ---- asking --------------------------------------------------------------------------------------------------------


def test_selectors_choose_on_either_side():
    a, b = {"x": normal(3), "y": normal(3)}, {"x": normal(3, seed=1), "z": normal(4)}
    assert lists(pm.diff(a, b, "x")) == {"changed": ["x"]}
    assert lists(pm.diff(a, b, "z")) == {"added": ["z"]}
    assert lists(pm.diff(a, b, ["y", "x"])) == {"changed": ["x"], "removed": ["y"]}
    with pytest.raises(NoMatch, match="none of 2 leaves"):
        pm.diff(a, b, "nope")


def test_only_parts_what_may_differ_from_what_may_not():
    a = {"head": {"w": normal(3)}, "body": {"w": normal(3)}}
    b = {"head": {"w": normal(3, seed=1), "lora": normal(2)}, "body": {"w": normal(3, seed=2)}}
    report = pm.diff(a, b, only="head/**")
    assert [row.path for row in report.unexpected] == ["body/w"]
    assert {row.path for row in report.expected} == {"head/w", "head/lora"}
    assert "1 outside head/**" in str(report) and "changed outside head/**: 1 leaf" in str(report)
    assert not pm.diff(a, b, only="**").unexpected
    moved = {"head": {"w": a["head"]["w"]}, "elsewhere": {"w": a["body"]["w"]}}
    assert pm.diff(a, moved, only="body/**").unexpected  # it left the body, and something came elsewhere
    with pytest.raises(NoMatch):
        pm.diff(a, b, only="nope")


def test_order_and_rows_as_data():
    a = {f"layers.{i}": np.ones(2) for i in (0, 2, 10)}
    b = {f"layers.{i}": np.array([1, 1 + i + 0.5]) for i in (0, 2, 10)}
    assert [row.path for row in pm.diff(a, b).changed] == ["layers.10", "layers.2", "layers.0"]
    assert [row.path for row in pm.diff(a, b, sort="path").changed] == ["layers.0", "layers.2", "layers.10"]
    with pytest.raises(BadArgument):
        pm.diff(a, b, sort="size")
    data = json.loads(json.dumps(pm.diff(a, b).to_dict()))
    assert data["different"] is True and data["totals"]["changed"] == {"leaves": 3, "parameters": 6, "nbytes": 48}
    assert data["changed"][0]["max_abs"] == 10.5
    text = str(pm.diff(a, b))
    assert "layers.{0,2,10}  3 × float64[2]  3 of 6  10.5" in text


def test_progress_is_told_and_ends_with_all(tmp_path):
    pm.save({"w": normal(3000), "v": normal(10)}, tmp_path / "a.safetensors")
    pm.save({"w": normal(3000, seed=1), "v": normal(10)}, tmp_path / "b.safetensors")
    heard = []
    pm.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", progress=heard.append)
    assert heard[-1].done == heard[-1].total == 2 * (12_000 + 40) + 2 * 12_000


def test_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(CannotRead):
        pm.diff(tmp_path / "nothing", {})
    (tmp_path / "bad").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="bad"):
        pm.diff({}, tmp_path / "bad")
    assert not pm.diff({}, {})
