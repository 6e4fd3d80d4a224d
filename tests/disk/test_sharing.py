"""Shared extents: which bytes of a copy can be shared, and what happens where the system refuses."""

import errno
import fcntl
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from paramend.disk.copying import BLOCK, Copier, best_start, shareable
from support.sharing import Kernel

PLACES = st.integers(0, 40 * BLOCK)


@given(PLACES, PLACES, PLACES, st.booleans())
def test_whole_blocks_are_shared_where_the_copy_keeps_its_place(start, nbytes, at, alike):
    at = at - at % BLOCK + start % BLOCK if alike else at
    low, high = shareable(start, start + nbytes, at)
    blocks = range(start // BLOCK, (start + nbytes) // BLOCK + 1)
    whole = [n for n in blocks if start <= n * BLOCK and (n + 1) * BLOCK <= start + nbytes]
    if (start - at) % BLOCK or len(whole) < 4:
        assert (low, high) == (start + nbytes, start + nbytes)
    else:
        assert (low, high) == (whole[0] * BLOCK, (whole[-1] + 1) * BLOCK)
        assert (at + low - start) % BLOCK == 0


@given(st.lists(st.tuples(PLACES, PLACES, PLACES), max_size=5), st.integers(1, 2000), st.sampled_from([8, 64]))
def test_the_best_start_is_the_first_of_those_that_share_most(ranges, least, step):
    ranges = [(start, start + nbytes, at) for start, nbytes, at in ranges]

    def gain(place):
        return sum(high - low for start, stop, at in ranges for low, high in [shareable(start, stop, place + at)])

    places = range(least * step, least * step + BLOCK, step)
    assert best_start(ranges, least * step, step) == max(places, key=lambda place: (gain(place), -place))


def copy(source: Path, target: Path, *ranges, before=b""):
    """The copier that appended ranges to a file, and the bytes of that file."""
    copier = Copier()
    with source.open("rb") as read, target.open("wb", buffering=0) as write:
        write.write(before)
        for start, stop in ranges:
            assert sum(copier.copy(read.fileno(), write.fileno(), start, stop, path=source)) == stop - start
    return copier, target.read_bytes()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(os.urandom(100 * BLOCK + 77))
    return path


def test_head_and_tail_are_copied_and_the_rest_is_shared(source, tmp_path, monkeypatch):
    kernel = Kernel(monkeypatch)
    data, size = source.read_bytes(), source.stat().st_size
    copier, found = copy(
        source, tmp_path / "out", (100, 50 * BLOCK + 5), (60 * BLOCK, size), before=data[: BLOCK + 100]
    )
    assert found == data[: BLOCK + 100] + data[100 : 50 * BLOCK + 5] + data[60 * BLOCK :]
    # The second range begins in the middle of a block of the copy, so nothing of it is shared.
    assert kernel.shared == [(BLOCK, 49 * BLOCK, 2 * BLOCK)] and copier.shared == 49 * BLOCK


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSPC])
def test_a_source_that_cannot_share_is_not_tried_again(source, tmp_path, monkeypatch, number):
    kernel = Kernel(monkeypatch, refuses=number)
    data, other = source.read_bytes(), tmp_path / "other"
    copier, found = copy(source, tmp_path / "out", (0, 20 * BLOCK), (20 * BLOCK, 40 * BLOCK + 1))
    assert found == data[: 40 * BLOCK + 1]
    assert (kernel.asked, copier.shared) == (1, 0)
    other.write_bytes(data)
    with other.open("rb") as read, (tmp_path / "out").open("ab", buffering=0) as write:
        write.seek(0, os.SEEK_END)
        write.write(bytes(-write.tell() % BLOCK))
        assert sum(copier.copy(read.fileno(), write.fileno(), 0, 8 * BLOCK, path=other)) == 8 * BLOCK
    assert kernel.asked == 2


def test_a_refusal_half_way_is_made_up_for(source, tmp_path, monkeypatch):
    monkeypatch.setattr("paramend.disk.copying.WINDOW", 16 * BLOCK)
    kernel = Kernel(monkeypatch, after=2)
    copier, found = copy(source, tmp_path / "out", (0, source.stat().st_size))
    assert found == source.read_bytes()
    assert (copier.shared, kernel.asked) == (32 * BLOCK, 3)


def test_the_request_is_the_one_of_the_kernel(source, tmp_path, monkeypatch):
    requests = []
    monkeypatch.setattr(fcntl, "ioctl", lambda target, number, data: requests.append((target, number, data)))
    with source.open("rb") as read, (tmp_path / "out").open("wb", buffering=0) as write:
        write.seek(2 * BLOCK)
        assert sum(Copier().copy(read.fileno(), write.fileno(), BLOCK, 9 * BLOCK, path=source)) == 8 * BLOCK
        # linux/fs.h: _IOW(0x94, 13, struct file_clone_range), of a signed and three unsigned numbers of 64 bits
        number = 1 << 30 | 32 << 16 | 0x94 << 8 | 13
        said = struct.pack("<qQQQ", read.fileno(), BLOCK, 8 * BLOCK, 2 * BLOCK)
        assert requests == [(write.fileno(), number, said)]
        assert os.lseek(write.fileno(), 0, os.SEEK_CUR) == 10 * BLOCK
