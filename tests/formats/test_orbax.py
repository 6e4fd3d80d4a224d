"""The reader of Orbax directories: what orbax writes, bit for bit, and damaged directories."""

import json
import random
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from paramend.errors import BadCheckpoint, CannotRead, MissingExtra, ParamendError, Unsupported
from paramend.formats.orbax import source as orbax
from paramend.formats.orbax.source import OrbaxCheckpoint
from paramend.leaves.outlines import Place
from paramend.leaves.specs import Spec, numpy_dtype

LAYOUTS = {
    "ocdbt": {},
    "zarr": {"use_ocdbt": False},
    "ocdbt-zarr3": {"use_zarr3": True},
    "zarr3": {"use_ocdbt": False, "use_zarr3": True},
}
DTYPES = ["bool", "bfloat16", "float16", "float32", "int4", "float8_e4m3fn", "float8_e5m2"]
DTYPES += [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32)]

pytestmark = pytest.mark.filterwarnings("ignore")  # of orbax, about itself


def array(dtype, shape, seed=0):
    """Random bits of a dtype."""
    raw = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    if dtype == "int4":
        return (raw % 8).astype(numpy_dtype(dtype))
    if dtype == "bool":
        return (raw & 1).astype(bool)
    width = numpy_dtype(dtype).itemsize
    return np.repeat(raw[..., None], width, -1).view(numpy_dtype(dtype))[..., 0]


def tree():
    params = {"Dense_0": {"kernel": array("float32", (3, 4)), "bias": array("bfloat16", (4,))}, "a.b/c": np.arange(3)}
    return {
        "params": jax.tree.map(jnp.asarray, params),
        "layers": [jnp.ones(2), jnp.full((1, 3), 2.0)],
        "step": 7,
        "lr": 0.5,
        "none": None,
        "empty": {},
        "list": [],
        "scalar": np.float32(2),
        "np": np.arange(5, dtype="int8"),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with one checkpoint of each layout."""
    folder = tmp_path_factory.mktemp("orbax")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, options in LAYOUTS.items():
            ocp.PyTreeCheckpointer(**options).save(folder / name, tree() | {"text": "hello"})
        with ocp.StandardCheckpointer() as saver:
            saver.save(folder / "standard", tree())
    return folder


def flat(node, path=()):
    if isinstance(node, jax.Array | np.ndarray | np.generic | int | float):
        return {"/".join(map(str, path)): np.asarray(node)}
    items = (
        sorted(node.items()) if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    )
    return {name: leaf for key, child in items for name, leaf in flat(child, (*path, key)).items()}


def check(path, expected):
    """Everything that was saved is found, bit for bit."""
    with OrbaxCheckpoint(path) as file:
        found = {file.index.name(number): number for number in file.index.numbers}
        assert sorted(found) == sorted(expected)
        for name, leaf in expected.items():
            number, bits = found[name], np.ascontiguousarray(leaf).tobytes()
            assert file.spec(number) == Spec(leaf.shape, leaf.dtype.name)
            assert file.nbytes(number) == file.spec(number).nbytes
            assert not file.refusal(number)
            assert file.extent(number) is None
            read = file.read(number)
            assert (read.dtype, read.shape, read.tobytes()) == (leaf.dtype, leaf.shape, bits)
            assert not read.flags.writeable
            width = leaf.dtype.itemsize
            for start, stop in [(0, leaf.size), (0, 0), (leaf.size // 3, leaf.size // 2), (leaf.size - 1, leaf.size)]:
                assert file.read_range(number, start, stop).tobytes() == bits[start * width : stop * width]


@pytest.mark.parametrize("name", [*LAYOUTS, "standard"])
def test_what_orbax_writes(saved, name):
    check(saved / name, flat(tree()))
    with OrbaxCheckpoint(saved / name) as file:
        text = {} if name == "standard" else {"text": "hello"}
        assert file.metadata == {"none": None, "empty": {}, "list": []} | text
        keys = [keys for keys, value in file.outline().entries if type(value) is Place]
        assert keys[0] == ("layers", 0) and ("params", "a.b/c") in keys
        assert file.index.separator == "/"
        assert file.steps == ()
        assert file.folder == saved / name
        assert repr(file) == f"<{saved / name}: 9 leaves>"
        assert file.children({"a": 1}) == [("a", 1)]


@pytest.mark.parametrize("name", ["ocdbt", "zarr3", "zarr"])
def test_every_dtype(tmp_path, name):
    arrays = {dtype: jnp.asarray(array(dtype, (5, 3))) for dtype in DTYPES}
    arrays |= {"float64": array("float64", (2, 2)), "int64": array("int64", (3,)), "complex64": np.ones(2, "complex64")}
    ocp.PyTreeCheckpointer(**LAYOUTS[name]).save(tmp_path / "x", arrays)
    check(tmp_path / "x", {key: np.asarray(value) for key, value in arrays.items()})


@pytest.mark.parametrize("name", LAYOUTS)
def test_arrays_in_many_chunks(tmp_path, monkeypatch, name):
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    whole = np.arange(8 * 6, dtype="float32").reshape(8, 6)
    cube = np.arange(4 * 2 * 3, dtype="int32").reshape(4, 2, 3)
    tree = {"w": jax.device_put(whole, sharding), "cube": jax.device_put(cube, sharding), "rest": jnp.arange(17)}
    ocp.PyTreeCheckpointer(**LAYOUTS[name]).save(tmp_path / "x", tree)
    check(tmp_path / "x", flat(tree))
    monkeypatch.setattr(orbax, "_BLOCK", 13)
    with OrbaxCheckpoint(tmp_path / "x") as file:
        numbers = {file.index.path(number): number for number in file.index.numbers}
        for path, leaf in {"w": whole, "cube": cube, "rest": np.arange(17)}.items():
            for start in range(0, leaf.size, 5):
                for stop in range(start, leaf.size + 1, 3):
                    assert file.read_range(numbers[path], start, stop).tolist() == leaf.flat[start:stop].tolist()


def test_a_train_state(tmp_path):
    params = {f"layers_{i}": {"kernel": jnp.full((2, 2), i)} for i in range(11)}
    state = {"params": params, "opt": optax.adamw(1e-3).init(params), "rng": jax.random.key(3)}
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "x", state)
    with OrbaxCheckpoint(tmp_path / "x") as file:
        paths = {file.index.path(number): number for number in file.index.numbers}
        assert file.read(paths["params/layers_10/kernel"]).tolist() == [[10, 10], [10, 10]]
        assert {"opt/0/count", "opt/0/mu/layers_3/kernel"} <= set(paths)
        assert file.spec(paths["rng"]) == Spec((2,), "uint32")


# ---- steps -------------------------------------------------------------------------------------------------------


def test_the_latest_step_of_a_manager(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (1, 2, 10):
            manager.save(step, args=ocp.args.StandardSave({"w": jnp.full(2, float(step))}))
    (tmp_path / "run" / "11.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "run" / "12").mkdir()  # a step that was never finished
    with OrbaxCheckpoint(tmp_path / "run") as file:
        assert file.read(0).tolist() == [10, 10]
        assert file.steps == (1, 2, 10)
        assert file.folder == tmp_path / "run" / "10" / "default"
        assert repr(file).endswith("run: 1 leaf, step 10 of 1, 2, 10>")
    for step in ("2", "2/default"):
        with OrbaxCheckpoint(tmp_path / "run" / step) as file:
            assert file.read(0).tolist() == [2, 2]
            assert file.steps == ()


def test_items_of_a_step(tmp_path):
    args = {
        "state": ocp.args.StandardSave({"w": jnp.ones(2)}),
        "extra": ocp.args.JsonSave({"a": 1}),
    }
    options = ocp.CheckpointManagerOptions(step_prefix="step")
    with ocp.CheckpointManager(tmp_path / "a", options=options) as manager:
        manager.save(5, args=ocp.args.Composite(**args))
    with OrbaxCheckpoint(tmp_path / "a") as file:
        assert file.folder == tmp_path / "a" / "step_5" / "state"
        assert file.steps == (5,)
    args["ema"] = ocp.args.StandardSave({"w": jnp.zeros(2)})
    with ocp.CheckpointManager(tmp_path / "b") as manager:
        manager.save(5, args=ocp.args.Composite(**args))
    with pytest.raises(BadCheckpoint, match=r"2 trees: ema, state|2 trees: ema and state") as caught:
        OrbaxCheckpoint(tmp_path / "b")
    assert caught.value.hint.endswith("ema")
    assert OrbaxCheckpoint(tmp_path / "b" / "5" / "ema").read(0).tolist() == [0, 0]


# ---- what is needed ----------------------------------------------------------------------------------------------


def test_opening_needs_no_framework(saved):
    code = """
import sys
from paramend.formats.orbax.source import OrbaxCheckpoint
with OrbaxCheckpoint(sys.argv[1]) as file:
    assert len(file.index.numbers) == 9
    if sys.argv[2]:
        file.spec(0)
    assert not {"jax", "orbax", "tensorstore"} & set(sys.modules)
    file.read(0)
    assert not {"jax", "orbax"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, saved / "ocdbt", ""], check=True)
    subprocess.run([sys.executable, "-c", code, saved / "zarr", "specs"], check=True)


def test_without_tensorstore(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with OrbaxCheckpoint(saved / "ocdbt") as file, pytest.raises(MissingExtra, match=r"paramend\[orbax\]"):
        file.spec(0)
    with OrbaxCheckpoint(saved / "zarr") as file:
        assert file.spec(0) == Spec((2,), "float32")
        with pytest.raises(MissingExtra):
            file.read(0)


def test_after_closing(saved):
    file = OrbaxCheckpoint(saved / "ocdbt")
    array = file.read(0)
    file.close()
    assert array.tolist() == [1, 1]
    for read in (lambda: file.read(0), lambda: file.read_range(0, 0, 1)):
        with pytest.raises(ValueError, match="is closed"):
            read()


# ---- damaged directories -----------------------------------------------------------------------------------------


@pytest.fixture
def copy(saved, tmp_path):
    def make(name):
        shutil.copytree(saved / name, tmp_path / name)
        return tmp_path / name

    return make


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_store_without_its_table(copy):
    path = copy("ocdbt")
    (path / "_METADATA").unlink()
    with OrbaxCheckpoint(path) as file:
        paths = {file.index.path(number): number for number in file.index.numbers}
        assert file.read(paths["params/Dense_0/bias"]).dtype == ml_dtypes.bfloat16
    path = copy("ocdbt-zarr3")
    (path / "_METADATA").unlink()
    with OrbaxCheckpoint(path) as file:
        assert file.read(file.index.numbers[0]).tolist() == [1, 1]


def test_parts_that_are_missing(copy, tmp_path):
    path = copy("ocdbt")
    (path / "manifest.ocdbt").unlink()
    with pytest.raises(BadCheckpoint, match=r"manifest\.ocdbt is missing"):
        OrbaxCheckpoint(path)
    path = copy("zarr")
    (path / "np" / "0").unlink()
    (path / "scalar" / ".zarray").unlink()
    with OrbaxCheckpoint(path) as file, pytest.raises(BadCheckpoint, match=r"'scalar': its folder has no \.zarray"):
        file.spec(0)
    shutil.copy(path / "step" / ".zarray", path / "scalar")
    with OrbaxCheckpoint(path) as file:
        number = file.names.index("np")
        for read in (lambda: file.read(number), lambda: file.read_range(number, 0, 1)):
            with pytest.raises(BadCheckpoint, match="np: tensorstore cannot read it"):
                read()
        with pytest.raises(BadCheckpoint, match="scalar"):
            file.read(file.names.index("scalar"))
    path = copy("ocdbt-zarr3")
    shutil.rmtree(path / "d")
    with OrbaxCheckpoint(path) as file, pytest.raises(BadCheckpoint, match="tensorstore cannot read it"):
        file.spec(0)
    path = copy("zarr3")
    change(path / "_METADATA", use_zarr3=False)
    with OrbaxCheckpoint(path) as file, pytest.raises(BadCheckpoint, match=r"no \.zarray"):
        file.spec(0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadCheckpoint, match="it is empty"):
        OrbaxCheckpoint(tmp_path / "empty")
    with pytest.raises(BadCheckpoint, match="no Orbax tree"):
        OrbaxCheckpoint(tmp_path)
    with pytest.raises(BadCheckpoint, match="it is a file"):
        OrbaxCheckpoint(path / "_METADATA")
    with pytest.raises(CannotRead):
        OrbaxCheckpoint(tmp_path / "none")


def test_an_array_that_the_store_lacks(copy):
    path = copy("ocdbt")
    row = {"key_metadata": [{"key": "x", "key_type": 2}], "value_metadata": {"value_type": "jax.Array"}}
    change(path / "_METADATA", tree_metadata={"x": row})
    with OrbaxCheckpoint(path) as file, pytest.raises(BadCheckpoint, match="no such array"):
        file.spec(0)


def row(*keys, kind="jax.Array", key_type=2):
    return {
        "key_metadata": [{"key": key, "key_type": key_type} for key in keys],
        "value_metadata": {"value_type": kind},
    }


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        (None, "an object is expected"),
        ({"a": 5}, "key_metadata and value_metadata"),
        ({"a": {"key_metadata": []}}, "key_metadata and value_metadata"),
        ({"a": row("a", kind=3)}, "key_metadata and value_metadata"),
        ({"a": row(5)}, "a key of type 1"),
        ({"a": row("a", key_type=3)}, "a key of type 1"),
        ({"a": row("a", key_type=1)}, "not a position"),
        ({"a": row("-1", key_type=1)}, "not a position"),
        ({"a": row("a"), "b": row("a")}, "another leaf"),
        ({"a": row("a"), "b": row("a", "b")}, "another leaf"),
        ({"a": row("a", "b"), "b": row("a")}, "another leaf"),
        ({"a": row("a", "b", "c"), "b": row("a", "b"), "c": row("a", "b", "c", "d", "e")}, "another leaf"),
        ({"a": row(*["a"] * 201)}, "pieces"),
        ({"a": row("a/" * 201)}, "pieces"),
    ],
)
def test_damaged_tables(tmp_path, tree, reason):
    (tmp_path / "_METADATA").write_text(json.dumps({"tree_metadata": tree}))
    with pytest.raises(BadCheckpoint, match=reason):
        OrbaxCheckpoint(tmp_path)


@pytest.mark.parametrize("key", ["../other", "..", "/etc", "a//b", "", "a\0b"])
def test_names_that_leave_the_folder(copy, key):
    path = copy("zarr")
    change(path / "_METADATA", tree_metadata={"a": row(key)})
    shutil.copytree(path / "np", path.parent / "other")
    with OrbaxCheckpoint(path) as file, pytest.raises(BadCheckpoint, match="not the name of an array"):
        file.spec(0)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"shape": [-1]}, "whole numbers"),
        ({"shape": [2.0]}, "whole numbers"),
        ({"shape": 5}, "whole numbers"),
        ({"shape": [2**63, 8]}, "overflow"),
        ({"chunks": [1, 1]}, "do not make"),
        ({"chunks": [0]}, "do not make"),
        ({"chunks": None}, "whole numbers"),
    ],
)
def test_damaged_arrays(copy, fields, reason):
    path = copy("zarr")
    change(path / "np" / ".zarray", **fields)
    with OrbaxCheckpoint(path) as file, pytest.raises(BadCheckpoint, match=reason):
        file.spec(0)


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": [10**15]},
        {"chunks": [10**15]},
        {"shape": [10**15], "chunks": [10**15]},
        {"dtype": "<f8"},
        {"shape": [9]},
        {"compressor": {"id": "none such"}},
    ],
)
def test_arrays_that_are_not_what_they_say(copy, fields):
    path = copy("zarr")
    change(path / "np" / ".zarray", **fields)
    with OrbaxCheckpoint(path) as file:
        number = file.names.index("np")
        with pytest.raises(BadCheckpoint, match="np"):
            file.read(number)
        with pytest.raises(BadCheckpoint, match="np"):
            file.read_range(number, 0, file.spec(number).size)


@pytest.mark.parametrize("dtype", ["<U3", [["a", "<f4"]], "int2", "=f4"])
def test_dtypes_that_are_unknown(copy, dtype):
    path = copy("zarr")
    change(path / "np" / ".zarray", dtype=dtype)
    with OrbaxCheckpoint(path) as file:
        number = file.names.index("np")
        assert file.spec(number).dtype.startswith("raw<")
        assert "unknown" in file.refusal(number)
        with pytest.raises(Unsupported):
            file.read(number)


def test_damage_is_found_or_harmless(copy):
    """Bytes of the JSON and of chunks changed at random: an error of ours, or a checkpoint that reads."""
    path = copy("zarr")
    files = [path / "_METADATA", path / "np" / ".zarray", path / "np" / "0", path / "layers.1" / ".zarray"]
    goods = {file: file.read_bytes() for file in files}
    rng = random.Random(0)
    for _ in range(800):
        file = rng.choice(files)
        raw = bytearray(goods[file])
        for _ in range(rng.choice([1, 1, 3])):
            at = rng.randrange(len(raw))
            match rng.randrange(3):
                case 0:
                    raw[at] = rng.choice([rng.randrange(256), *b'0123456789"[]{},:'])
                case 1:
                    raw[at : at + rng.randrange(1, 5)] = b""
                case 2:
                    raw[at:at] = rng.choice([b"9" * 8, b",", b"[", b"0", b"-"])
        file.write_bytes(raw)
        try:
            with OrbaxCheckpoint(path) as source:
                for number in source.index.numbers:
                    if source.names[number] in ("np", "layers.1") and not source.refusal(number):
                        source.read(number)
                        source.read_range(number, 0, source.spec(number).size)
        except ParamendError as error:
            assert isinstance(error, BadCheckpoint | Unsupported)
        file.write_bytes(goods[file])
