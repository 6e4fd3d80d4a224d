"""Origins against numpy: any composition, read in pieces of any size, and by the bytes that it says it is made of."""

import contextlib
import json
import math
import pickle
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest

from paramend.errors import BadArgument, SpecMismatch
from paramend.formats.registry import open_source
from paramend.leaves import mapped
from paramend.leaves.origins.boxes import Runs, boxes_of, contiguous, cut, select, whole
from paramend.leaves.origins.moved import join, permute_axes, reshape, take
from paramend.leaves.origins.reading import read_origin
from paramend.leaves.origins.stored import Held, Made, Stored, Zeros
from paramend.leaves.origins.texts import quoted
from paramend.leaves.specs import Spec

DTYPES = ("float32", "bfloat16", "int8", "float64", "bool", "uint16", "complex64")


@pytest.fixture(scope="module")
def leaves(tmp_path_factory):
    """Leaves of a file, as (origin, array)."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    shapes = [(), (1,), (7,), (0, 3), (4, 6), (6, 4), (2, 3, 5), (3, 1, 4), (2, 3, 2, 4), (5, 6), (1, 1)]
    arrays = {f"{n}": rng.integers(0, 200, shape).astype(np.float32) for n, shape in enumerate(shapes)}
    path = tmp_path_factory.mktemp("origins") / "m.safetensors"
    save_file(arrays, path)
    source = open_source(path)
    return [(Stored(source, number), arrays[source.index.path(number)]) for number in source.index.numbers]


def some(rng, length):
    """Places along an axis: a slice of any step, or an array with repetitions."""
    if rng.random() < 0.5:
        index = slice(*sorted(rng.integers(0, length + 1, 2).tolist()), int(rng.integers(1, 4)))
        places = range(*index.indices(length))
        return places[::-1] if rng.random() < 0.3 else places
    return rng.integers(0, length, rng.integers(0, 2 * length + 1)) if length else range(0)


def factors(rng, size):
    """A random shape of some size."""
    shape = []
    while size > 1:
        divisors = [n for n in range(1, size + 1) if size % n == 0]
        shape.append(int(rng.choice(divisors)))
        size //= shape[-1]
    shape += [1] * int(rng.integers(0, 2))
    rng.shuffle(shape)
    return tuple(shape)


def composed(rng, leaves, depth):
    """A random expression and what numpy makes of it."""
    origin, array = leaves[rng.integers(len(leaves))]
    for _ in range(depth):
        kind = rng.choice(["take", "permute", "reshape", "concat", "stack", "interleave"])
        if kind == "reshape":
            shape = factors(rng, array.size) if array.size else (0, *array.shape)
            origin, array = reshape(origin, shape), array.reshape(shape)
        elif kind == "stack":
            axis, count = int(rng.integers(array.ndim + 1)), int(rng.integers(1, 4))
            origin, array = join([origin] * count, axis, "stack"), np.stack([array] * count, axis)
        elif array.ndim:
            axis = int(rng.integers(array.ndim))
            if kind == "take":
                places = some(rng, array.shape[axis])
                origin, array = take(origin, places, axis), np.take(array, np.asarray(places, int), axis)
            elif kind == "permute":
                axes = rng.permutation(array.ndim).tolist()
                origin, array = permute_axes(origin, axes), array.transpose(axes)
            elif kind == "concat":
                places = some(rng, array.shape[axis])
                parts = [array, np.take(array, np.asarray(places, int), axis), array]
                origin = join([origin, take(origin, places, axis), origin], axis, "concat")
                array = np.concatenate(parts, axis)
            else:
                back = array.shape[axis]
                origin = join([origin, take(origin, range(back)[::-1], axis)], axis, "interleave")
                array = np.stack([array, np.flip(array, axis)], axis + 1).reshape(
                    *array.shape[:axis], 2 * back, *array.shape[axis + 1 :]
                )
        if array.size > 3000:
            break
    return origin, array.copy(order="C")


def test_any_composition_is_what_numpy_makes(leaves, monkeypatch):
    monkeypatch.setattr("paramend.leaves.origins.origin.CHUNK", 50)
    monkeypatch.setattr("paramend.leaves.origins.moved.TILE", 320)
    rng = np.random.default_rng(7)
    for _ in range(300):
        origin, array = composed(rng, leaves, int(rng.integers(1, 6)))
        what = f"{origin} of {[one.spec for one in origin.stored()]}"
        assert (origin.spec.shape, origin.spec.dtype, origin.nbytes) == (array.shape, "float32", array.nbytes), what
        assert origin.read().tobytes() == array.tobytes(), what
        start, stop = sorted(rng.integers(0, array.size + 1, 2).tolist())
        assert origin.read_range(start, stop).tobytes() == array.reshape(-1)[start:stop].tobytes(), what
        box = tuple(some(rng, length) for length in array.shape)
        found = origin.read_box(box)
        assert found.shape == tuple(map(len, box)), what
        assert found.tobytes() == np.ascontiguousarray(select(array, box)).tobytes(), what
        parts = [origin.read_range(*part) for part in origin.ranges()]
        assert b"".join(part.tobytes() for part in parts) == array.tobytes(), what


def test_extents_are_the_bytes(leaves):
    rng = np.random.default_rng(8)
    known = 0
    for _ in range(200):
        origin, array = composed(rng, leaves, int(rng.integers(1, 6)))
        extents = origin.extents
        if extents is None:
            assert not array.size or array.size > 1024
            continue
        known += 1
        found = b""
        for extent in extents:
            with extent.path.open("rb") as file:
                file.seek(extent.start)
                found += file.read(extent.nbytes)
        assert found == array.tobytes(), str(origin)
        follow = [(a.start + a.nbytes == b.start) for a, b in pairwise(extents)]
        assert not any(follow), "neighbours are one extent"
    assert known > 100


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_keeps_its_bits(dtype):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    raw = np.random.default_rng(1).integers(0, 2 if dtype == "bool" else 256, 24 * kind.itemsize, np.uint8)
    array = raw.view(kind).reshape(2, 3, 4)
    origin = permute_axes(join([Held(array), take(Held(array), range(2)[::-1], 0)], 1, "concat"), [2, 0, 1])
    right = np.concatenate([array, array[::-1]], 1).transpose(2, 0, 1)
    assert origin.read().tobytes() == np.ascontiguousarray(right).tobytes()
    assert origin.spec.dtype == dtype


def test_bits_of_half_a_byte_are_copied_where_runs_end_at_bytes(tmp_path):
    header = b'{"w":{"dtype":"F4","shape":[2,4],"data_offsets":[0,4]}}'
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x10\x32\x54\x76")
    leaf = Stored(open_source(path), 0)
    start = 8 + len(header)
    rows = take(leaf, range(2)[::-1], 0).extents
    assert rows is not None
    assert [(each.start - start, each.nbytes) for each in rows] == [(2, 2), (0, 2)]
    assert (join([leaf, leaf], 0, "concat").nbytes, permute_axes(leaf, [1, 0]).extents) == (8, None)
    assert permute_axes(leaf, [1, 0]).refusal == leaf.refusal != ""


def test_a_made_leaf_is_computed_once_and_freed():
    calls = []

    def make():
        calls.append(1)
        return np.arange(12, dtype="int8").reshape(3, 4)

    made = Made(Held(np.zeros((3, 4), "int8")).spec, make)
    both = join([made, made], 0, "concat")
    assert [part.tolist() for part in (both.read_range(0, 5), both.read_range(5, 12))] == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9, 10, 11],
    ]
    assert (len(calls), made._values, both.extents) == (1, None, None)


def test_the_text_is_the_expression(leaves):
    leaf = next(origin for origin, array in leaves if array.shape == (4, 6))
    name = str(leaf)
    assert str(take(leaf, range(1, 3), 0)) == f"{name}[1:3]"
    assert str(take(leaf, range(5, -1, -2), 1)) == f"{name}[:, 5::-2]"
    assert str(permute_axes(leaf, [1, 0])) == f"transpose({name}, [1, 0])"
    assert str(reshape(reshape(leaf, (2, 2, 6)), (2, 12))) == f"reshape({name}, [2, 12])"
    assert str(join([leaf, leaf], 1, "concat")) == f"concat({name}, {name}, axis=1)"
    assert str(take(leaf, np.array([3, 0, 1]), 0)) == f"{name}[[3, 0, 1]]"
    assert str(take(leaf, np.array([5, 0, 1, 2, 3]), 1)) == f"{name}[:, [5, 0:4]]"


def test_parts_that_count_up_are_written_as_one():
    names = [f"e.{n}.w" for n in (*range(8), 9, 10, 12)] + ["e.07.w", "e.8.v"]
    parts = [Held(np.zeros((2, 2))) for _ in names]
    said = {id(part): name for part, name in zip(parts, names, strict=True)}
    both = join([permute_axes(part, [1, 0]) for part in parts], 0, "stack")
    inner = ", ".join(f"transpose({name}, [1, 0])" for name in ("e.{0..7}.w", *names[8:]))
    assert both.text(lambda leaf: said[id(leaf)]) == f"stack({inner}, axis=0)"


# ---- texts that are read -----------------------------------------------------------------------------------------


def reader_of(leaves, names):
    """How a leaf is called in a text, and what finds it."""
    said = {id(origin): name for (origin, _), name in zip(leaves, names, strict=True)}
    found = {name: origin for (origin, _), name in zip(leaves, names, strict=True)}

    def name(leaf):
        return quoted(said[id(leaf)]) if id(leaf) in said else leaf.says

    return name, lambda file, text: found[f"{file}:{text}" if file else text]


@pytest.mark.parametrize("names", ["m.{}.w", 'a "{}", axis=0)[1:2]', "concat({}", "é {{0..3}} {}\\"])
def test_what_a_text_says_is_read_back(leaves, names):
    name, find = reader_of(leaves, [names.format(number) for number in range(len(leaves))])
    rng = np.random.default_rng(9)
    for _ in range(150):
        origin, array = composed(rng, leaves, int(rng.integers(0, 5)))
        if rng.random() < 0.3:
            pad = Zeros(Spec((3, *array.shape[1:]), "float32"))
            if array.ndim:
                origin, array = (
                    join([origin, pad], 0, "concat"),
                    np.concatenate([array, np.zeros(pad.spec.shape, "f4")]),
                )
        text = origin.text(name)
        again = read_origin(text, find)
        assert (again.text(name), again.spec, again.moves) == (text, origin.spec, True)
        assert again.read().tobytes() == array.tobytes(), text


def test_numbers_that_count_up_are_read_as_so_many_leaves():
    arrays = {f"m.safetensors:e.{n}.w": np.full(2, n, "int16") for n in range(300)}
    text = "stack(concat(m.safetensors:e.{0..9}.w, axis=0), concat(m.safetensors:e.{290..299}.w, axis=0), axis=1)"
    origin = read_origin(text, lambda file, name: Held(arrays[f"{file}:{name}"]))
    assert origin.read()[::2].tolist() == [[n, 290 + n] for n in range(10)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "w w",
        "w[",
        "w[9:12]",
        "w[-1:2]",
        "w[0:2:0]",
        "w[0:2:-00]",
        "w[:, :, 0:1]",
        "w[[0, 7]]",
        "w[[0:99999999999]]",
        "w[[3:2]]",
        "w.{0..3}",
        "concat(w.{3..0}, axis=0)",
        "stack(w.{0..999999999999}, axis=0)",
        "concat(w, axis=2)",
        "concat(w, w[:, 0:1], axis=0)",
        "concat(w, axis=-1)",
        "concat(, axis=0)",
        "concat(w, w)",
        "transpose(w, [0, 0])",
        "transpose(w, [1])",
        "reshape(w, [5, 5])",
        "reshape(w, [-24])",
        "reshape(w, [24" + ", 1" * 40 + "])",
        "zeros([1000000, 1000000, 1000000], int8)",
        "zeros([2], int7)",
        "values in memory",
        'w"',
        '"w',
        '"\\x"',
        "exec(w)",
        "transpose(" * 5000 + "w",
        "[" * 100_000,
        "w" + "[0:1]" * 5000 + "x",
        "concat(" * 101 + "w" + ", axis=0)" * 101,
    ],
    ids=range(35),
)
def test_a_text_that_is_none_is_refused(leaves, text):
    leaf = next(origin for origin, array in leaves if array.shape == (4, 6))
    with pytest.raises((BadArgument, SpecMismatch)):
        read_origin(text, lambda file, name: leaf)


def test_zeros_are_computed():
    zeros = Zeros(Spec((2, 3), "bfloat16"))
    both = join([Held(np.ones((1, 3), ml_dtypes.bfloat16)), zeros], 0, "concat")
    assert both.read().tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert (zeros.extents, str(zeros), zeros.nbytes) == (None, "zeros([2, 3], bfloat16)", 12)
    assert pickle.loads(pickle.dumps(zeros)).spec == zeros.spec


def test_what_does_nothing_is_nothing(leaves):
    leaf, array = next((origin, array) for origin, array in leaves if array.shape == (4, 6))
    assert take(leaf, range(4), 0) is take(leaf, np.arange(4), 0) is join([leaf], 0, "concat") is leaf
    assert permute_axes(permute_axes(leaf, [1, 0]), [1, 0]) is reshape(leaf, (4, 6)) is leaf
    assert contiguous(whole((4, 6)), (4, 6)) == (0, array.size)


def test_parts_that_do_not_fit_are_refused(leaves):
    a, b = (next(origin for origin, array in leaves if array.shape == shape) for shape in ((4, 6), (5, 6)))
    with pytest.raises(SpecMismatch, match=r"stack along axis 0: float32\[4,6\] and float32\[5,6\] do not fit"):
        join([a, b], 0, "stack")
    with pytest.raises(SpecMismatch, match="concat along axis 1"):
        join([a, b], 1, "concat")
    assert join([a, b], 0, "concat").spec.shape == (9, 6)
    with pytest.raises(SpecMismatch, match=r"has 24 elements, and \[5, 5\] has 25"):
        reshape(a, (5, 5))


def test_an_origin_can_be_pickled(leaves):
    leaf, array = next((origin, array) for origin, array in leaves if array.shape == (2, 3, 5))
    origin = pickle.loads(pickle.dumps(permute_axes(take(leaf, np.array([1, 0]), 0), [2, 0, 1])))
    assert origin.read().tobytes() == np.ascontiguousarray(array[::-1].transpose(2, 0, 1)).tobytes()


def test_ranges_are_few_boxes():
    for shape in ((), (3,), (2, 3), (2, 1, 3), (3, 2, 2, 2)):
        size = math.prod(shape)
        numbers = np.arange(size).reshape(shape)
        for start in range(size + 1):
            for stop in range(start, size + 1):
                boxes = list(boxes_of(shape, start, stop))
                assert len(boxes) <= max(2 * len(shape) - 1, 1)
                found = [number for box in boxes for number in select(numbers, box).reshape(-1).tolist()]
                assert found == list(range(start, stop))


def test_too_many_runs_are_not_traced():
    runs = Runs(np.array([0]), np.array([100]), np.array([0]))
    assert cut(runs, np.array([0, 1]), 99) is None
    assert cut(runs, np.array([0, 1]), 100) is not None


def test_no_text_raises_anything_else(leaves):
    leaf = next(origin for origin, array in leaves if array.shape == (4, 6))
    words = [
        "concat(",
        "stack(",
        "transpose(",
        "reshape(",
        "zeros(",
        "w",
        '"a b"',
        "f:",
        "[",
        "]",
        "[0:2]",
        "[:, 5::-2]",
    ]
    words += [
        "[[1, 2:4]]",
        ", ",
        "axis=0)",
        "[1, 0])",
        "[4, 6], float32)",
        "w.{0..3}",
        ")",
        "0",
        "-",
        ":",
        "\\",
        '"',
        "é",
    ]
    rng = np.random.default_rng(5)
    read = 0
    for _ in range(4000):
        text = "".join(rng.choice(words, rng.integers(1, 8)))
        with contextlib.suppress(BadArgument, SpecMismatch):
            read += read_origin(text, lambda file, name: leaf).spec.dtype == "float32"
    assert read > 50


def test_what_is_not_aligned_in_its_file_is_read_in_parts(tmp_path, monkeypatch):
    right = np.arange(6 << 20, dtype="f4").reshape(1 << 20, 6)
    text = json.dumps({"w": {"dtype": "F32", "shape": right.shape, "data_offsets": [0, right.nbytes]}}).encode()
    text += b" " * (-len(text) % 8 + 1)
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + right.tobytes())
    source = open_source(tmp_path / "m.safetensors")
    monkeypatch.setattr(type(source), "read", None)  # which copies all of it
    found = permute_axes(Stored(source, 0), (1, 0)).read_range(1 << 20, 2 << 20)
    source.close()
    assert np.array_equal(found, right[:, 1])


def test_a_little_of_each_row_maps_a_part_of_a_file_at_once(tmp_path, monkeypatch):
    path, shape = tmp_path / "tall.safetensors", (20_000, 512)
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * math.prod(shape)]}}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * math.prod(shape))
    given, give_back = [], mapped.give_back
    monkeypatch.setattr(mapped, "give_back", lambda *each: (given.append(each[1:]), give_back(*each)))
    source = open_source(path)
    Stored(source, 0).read_box((range(shape[0]), range(3, 5)))
    source.close()
    assert sum(nbytes for _, nbytes in given) == 4 * math.prod(shape)
    assert max(nbytes for _, nbytes in given) <= 16 << 20
