"""Many short ranges at once are the ranges one by one, with a call of the system for each stretch of the file."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from paramend.disk import scattered
from paramend.disk.scattered import gather, scatter
from paramend.errors import BadCheckpoint
from paramend.journal.ranges import BUFFER, Ranges, checksums

NAME = Path("file")


def file_of(tmp_path, size, seed=0):
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(seed).integers(0, 256, size, "uint8").tobytes())
    return os.open(path, os.O_RDWR)


def ranges_of(rng, count, size, longest, *, shuffled):
    """Ranges that do not overlap, ascending or not, some of them empty."""
    cuts = np.sort(rng.choice(size, 2 * count, replace=False))
    found = np.stack([cuts[::2], np.minimum(cuts[1::2], cuts[::2] + rng.integers(0, longest + 1, count))], 1)
    return rng.permutation(found) if shuffled else found


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(0, 400),
    size=st.sampled_from([1000, 60_000, 5_000_000]),
    longest=st.sampled_from([0, 4, 300]),
    shuffled=st.booleans(),
    many=st.sampled_from([1, 50, 1000]),
)
def test_ranges_at_once_are_ranges_one_by_one(tmp_path_factory, seed, count, size, longest, shuffled, many):
    rng = np.random.default_rng(seed)
    ranges = ranges_of(rng, count, size, longest, shuffled=shuffled)
    descriptor = file_of(tmp_path_factory.mktemp("x"), size)
    before = os.pread(descriptor, size, 0)
    assert gather(descriptor, ranges, NAME) == b"".join(before[start:stop] for start, stop in ranges.tolist())
    new = rng.integers(0, 256, int((ranges[:, 1] - ranges[:, 0]).sum()), "uint8").tobytes()
    leaves = rng.integers(0, 2, len(ranges)) if seed % 2 else np.zeros(len(ranges), np.int64)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(scattered, "_MANY", many)
        scatter(descriptor, ranges, new, NAME, leaves)
    right, at = bytearray(before), 0
    for start, stop in ranges.tolist():
        right[start:stop] = new[at : at + stop - start]
        at += stop - start
    assert os.pread(descriptor, size, 0) == right
    os.close(descriptor)


def test_ranges_beyond_the_end(tmp_path):
    descriptor = file_of(tmp_path, 100)
    for ranges in ([[0, 4], [98, 102]], [[98, 102]], [[0, 4], [98, 102], [200, 204]]):
        with pytest.raises(BadCheckpoint, match="became shorter"):
            gather(descriptor, np.array(ranges), NAME)
    os.close(descriptor)


def calls(monkeypatch):
    found = []
    for name in ("pread", "preadv", "pwrite"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real, name=name: found.append(name) or real(*args))
    return found


def test_calls_of_the_system_are_counted_by_stretches(tmp_path, monkeypatch):
    size = 8 << 20
    descriptor = file_of(tmp_path, size)
    starts = np.arange(0, size - 4, 256)
    ranges = np.stack([starts, starts + 4], 1)
    found = calls(monkeypatch)
    data = gather(descriptor, ranges, NAME)
    assert found.count("preadv") == 8
    scatter(descriptor, ranges, data, NAME, np.zeros(len(ranges)))
    assert found.count("pwrite") == 8
    found.clear()
    scatter(descriptor, ranges, data, NAME)  # of other leaves: no byte between them is written
    assert found == ["pwrite"] * len(ranges)
    found.clear()
    scatter(descriptor, ranges[:900], data[:3600], NAME, np.zeros(900))  # few: exactly these bytes
    assert found == ["pwrite"] * 900
    os.close(descriptor)


@settings(max_examples=60)
@given(
    lines=st.lists(
        st.tuples(st.integers(-1, 5), st.integers(0, 2), st.integers(0, 10**12), st.integers(0, 3 * BUFFER)),
        max_size=40,
    )
)
def test_batches_are_the_lines_in_pieces(lines):
    table = np.array([(row, file, start, start + count) for row, file, start, count in lines], np.int64).reshape(-1, 4)
    ranges = Ranges(table)
    pieces = [
        (row, file, at, min(at + BUFFER, stop))
        for row, file, start, stop in ranges
        for at in range(start, stop, BUFFER)
    ]
    found = []
    for file, batch in ranges.batches():
        assert set(batch[:, 1].tolist()) == {file} and (batch[:, 3] - batch[:, 2]).sum() <= BUFFER
        found += map(tuple, batch.tolist())
    assert found == pieces


def test_checksums_of_a_batch():
    lines = np.array([[0, 0, 5, 8], [0, 0, 10, 11]])
    import zlib

    right = b"".join(zlib.crc32(data).to_bytes(4, "little") for data in (b"abc", b"d"))
    assert checksums(lines, b"abcd") == right
