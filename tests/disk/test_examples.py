"""Examples of what the functions of disk/ give."""

import errno
import tempfile
from pathlib import Path

import numpy as np
import pytest

from paramend.disk.copying import best_start
from paramend.disk.failures import reason
from paramend.disk.identity import unchanged
from paramend.disk.io import get, put
from paramend.disk.locks import locked
from paramend.disk.permissions import access_of
from paramend.disk.scattered import gather
from paramend.errors import Busy


def test_unchanged():
    path = Path(tempfile.mkdtemp(), "x")
    path.write_bytes(b"ab")
    then, _ = path.stat(), path.write_bytes(b"abc")
    assert (unchanged(then, then), unchanged(then, path.stat())) == (True, False)


def test_put():
    with tempfile.TemporaryFile() as file:
        assert (put(file.fileno(), b"abcd"), put(file.fileno(), b"XY", 1)) == (4, 2)
        assert get(file.fileno(), 0, 4, Path("file")) == b"aXYd"


def test_locked():
    lock = Path(tempfile.mkdtemp(), "lock")
    said = r"model\.st: another program is writing to it; nothing was changed"
    with locked(lock, name=Path("model.st")), pytest.raises(Busy, match=said), locked(lock, name=Path("model.st")):
        pass


def test_access_of():
    one, other = (Path(tempfile.mkdtemp(), "x") for _ in range(2))
    for path, mode in ((one, 0o664), (other, 0o640)):
        path.touch()
        path.chmod(mode)
    assert (oct(access_of([one.stat(), other.stat()]).mode), oct(access_of([]).mode)) == ("0o640", "0o666")


def test_gather():
    with tempfile.TemporaryFile() as file:
        file.write(b"abcdefghij")
        file.flush()
        assert gather(file.fileno(), np.array([[1, 3], [5, 6], [0, 2]]), Path("file")) == b"bcfab"


def test_best_start():
    assert best_start([(4104, 50_000, 0), (50_016, 90_000, 60_000)], 128, step=8) == 4104
    assert best_start([(4104, 5000, 0)], 128, step=8) == 128  # less than a few blocks


def test_reason():
    assert reason(OSError(errno.ENOSPC, "No space left on device")) == "the disk is full"
