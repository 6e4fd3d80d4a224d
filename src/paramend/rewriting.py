"""The rewriting engine: a plan carried out into a new safetensors file, in one pass and in bounded memory.

The kernel copies the bytes that stay. Leaves that change are computed in chunks. The new file grows under a
temporary name beside its place, is made durable, and only then gets its name: whatever happens, there is the old
state or the new one, never a third.
"""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from paramend import _text
from paramend.arrays import numpy as numpy_backend
from paramend.errors import BadCheckpoint, CannotWrite, SpecMismatch, Unsupported
from paramend.formats.safetensors import Header, SafetensorsFile, shrunk
from paramend.initializers import Place, generator
from paramend.ops import Call
from paramend.plans import Plan, Row, call, plan
from paramend.progress import Meter, Progress
from paramend.specs import BITS, SAFETENSORS_CODES, Spec, numpy_dtype

Array = np.ndarray[Any, Any]

# Elements computed at once: they fit the processor's cache; whole tensors are two to three times slower.
CHUNK = 1 << 18
# Bytes that the kernel copies at once: between two windows the listener hears of it and Ctrl-C is served.
WINDOW = 1 << 25
_BUFFER = 1 << 20


@dataclass(frozen=True)
class RewriteReport:
    """What a rewrite has done.

    Attributes:
        source: the file that was read.
        path: the file that was written.
        plan: the rows; its text is the table that a dry run shows.
        bytes_copied: bytes that went over as they were, the header among them where no spec changes.
        bytes_computed: bytes of the leaves that were edited.
    """

    source: str
    path: str
    plan: Plan
    bytes_copied: int
    bytes_computed: int

    @property
    def summary(self) -> str:
        """What was written, in one line."""
        copied, computed = _text.size(self.bytes_copied), _text.size(self.bytes_computed)
        return f"wrote {self.path}: {computed} computed, {copied} copied"

    def __str__(self) -> str:
        return f"{self.plan}\n{self.summary}"

    def to_dict(self) -> dict[str, Any]:
        """The report as data that JSON can hold."""
        return {
            "source": self.source,
            "path": self.path,
            **self.plan.to_dict(),
            "bytes_copied": self.bytes_copied,
            "bytes_computed": self.bytes_computed,
        }


def rewrite(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    selector: Any,
    op: str,
    args: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> RewriteReport:
    """A report of what was written: a safetensors file with one edit made, all other bytes as they were.

    Args:
        source: the file to read. It is not touched.
        out: the file to write.
        selector: text, or anything that `pm.sel` takes.
        op: a verb, such as "zero" or "fill".
        args: its arguments by name.
        force: whether `out` may exist already; it is then replaced in one step.
        progress: called with an `Event` as bytes are written.

    Raises:
        BadCheckpoint: the source is damaged.
        NoMatch: the selector chooses nothing.
        SpecMismatch: the edit does not fit a chosen leaf.
        CannotWrite: the output exists, the folder is read-only, the disk is full. Nothing was written.

    >>> import tempfile
    >>> from paramend.formats.safetensors import write_header
    >>> folder = Path(tempfile.mkdtemp())
    >>> header = write_header({"fc.weight": Spec((2,), "float32"), "fc.bias": Spec((1,), "float32")})
    >>> _ = (folder / "model.st").write_bytes(header.to_bytes() + np.ones(3, "float32").tobytes())
    >>> report = rewrite(folder / "model.st", folder / "edited.st", "**/weight", "fill", {"value": 0.5})
    >>> print(report.plan)
    path       spec        edit
    fc.weight  float32[2]  fill(0.5)
    <BLANKLINE>
    1 of 2 leaves changes
    >>> report.bytes_computed, np.fromfile(folder / "edited.st", "float32")[-3:].tolist()
    (8, [0.5, 0.5, 1.0])
    """
    with SafetensorsFile(source) as file:
        return write(file, plan_rewrite(file, selector, call(op, args or {})), out, force=force, progress=progress)


def plan_rewrite(file: SafetensorsFile, selector: Any, edit: Call) -> Plan:
    """The plan of one edit of a file, checked against what the format can hold.

    Raises:
        Unsupported: a chosen leaf cannot be read, or the format has no such dtype.
    """
    made = plan(file, selector, edit)
    for row in made.changed:
        why = file.refusal(row.source)
        if why:
            raise Unsupported(f"{row.path} cannot take {row.edit}: {why}", hint="leave it out of the selection")
        if row.spec.dtype not in SAFETENSORS_CODES or BITS[row.spec.dtype] % 8:
            raise Unsupported(f"{row.path}: {row.spec.dtype} cannot be written into a safetensors file")
    return made


def check_output(file: SafetensorsFile, made: Plan, out: str | os.PathLike[str], *, force: bool = False) -> None:
    """Refuses what could not be written, as far as that is known before writing.

    Raises:
        CannotWrite: the output exists, is the source, or has no place to go to.
    """
    out = Path(out)
    found = _look(out)
    if found is not None and os.path.samestat(found, file.stat):
        raise CannotWrite(f"{out} is the file that is being read", hint="write to another name, then rename it")
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise CannotWrite(f"{out} is a directory", hint=f"{out / file.path.name}")
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise CannotWrite(f"{out} is no regular file (a pipe, a device or a socket)")
    if os.path.lexists(out) and not force:
        raise _exists(out)
    folder = out.parent
    if not folder.is_dir():
        what = "is no directory" if os.path.lexists(folder) else "does not exist"
        raise CannotWrite(f"{out}: {folder} {what}", hint="" if os.path.lexists(folder) else f"mkdir -p {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CannotWrite(f"{out}: no permission to write into {folder}", hint=f"ls -ld {folder}")
    header = _header(file, made)
    needed = header.nbytes + header.data_nbytes
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and free < needed:  # some network file systems count no blocks at all
        raise CannotWrite(f"{out}: {_text.size(needed)} are needed, and {_text.size(free)} are free in {folder}")


def write(
    file: SafetensorsFile,
    made: Plan,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> RewriteReport:
    """A report of what was written: the plan of `plan_rewrite`, carried out.

    Raises:
        CannotWrite: nothing was written; the message says why.
        BadCheckpoint: the source changed while it was being read. Nothing was written.
    """
    out = Path(out)
    check_output(file, made, out, force=force)
    header = _header(file, made)
    meter = Meter(progress, header.nbytes + header.data_nbytes)
    copied = computed = 0
    copy = _Copier(file)
    temporary = out.parent / f".paramend-{secrets.token_hex(8)}.tmp"
    try:
        with _created(temporary, file.stat) as target:
            if header is not file.header:
                _put(target, header.to_bytes())
                meter.advance(header.nbytes)
            for piece in _pieces(file, made, header):
                if isinstance(piece, Row):
                    for nbytes in _compute(file, piece, target):
                        computed += nbytes
                        meter.advance(nbytes, piece.path)
                else:
                    for nbytes in copy(target, *piece):
                        copied += nbytes
                        meter.advance(nbytes)
            os.fsync(target)
        _check_unchanged(file)
        _publish(temporary, out, force=force)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and not isinstance(error, CannotWrite):
            raise CannotWrite(f"{out}: {_reason(error)}; nothing was written") from error
        raise
    _sync_folder(out.parent)
    return RewriteReport(str(file.path), str(out), made, copied, computed)


def _header(file: SafetensorsFile, made: Plan) -> Header:
    return file.header.with_specs({row.source: row.spec for row in made.changed})


def _pieces(file: SafetensorsFile, made: Plan, header: Header) -> Iterator[tuple[int, int] | Row]:
    """The new file after its header, first byte to last: rows to compute, and ranges (start, stop) to copy.

    Neighbours that stay are one range. A header that stays belongs to the first.
    """
    begin = file.header.nbytes
    start = 0 if header is file.header else begin
    for row, entry in zip(made.rows, file.header.entries, strict=True):
        if row.calls:
            if start < begin + entry.start:
                yield start, begin + entry.start
            yield row
            start = begin + entry.stop
    if start < begin + file.header.data_nbytes:
        yield start, begin + file.header.data_nbytes


# ---- computing ---------------------------------------------------------------------------------------------


def _compute(file: SafetensorsFile, row: Row, target: int) -> Iterator[int]:
    """Writes a leaf and yields the number of bytes of each step."""
    place = Place(file.index.pieces(row.source), out_first=file.index.separator == ".")
    size, dtype = row.before.size, numpy_dtype(row.before.dtype)
    reads = row.calls[0].op.reads or row.calls[0].index is not None
    steps = [_chunk_step(edit, row.before, place) for edit in row.calls]
    with np.errstate(all="ignore"):  # an overflow to inf is part of the arithmetic that was asked for
        if None in steps:
            x = file.read_range(row.source, 0, size) if reads else np.empty(size, dtype)
            x = x.reshape(row.before.shape)
            for edit in row.calls:
                x = edit.run(x, place)
            yield _put(target, _bytes(x, row.spec, row))
            return
        for start in range(0, size, CHUNK):
            stop = min(start + CHUNK, size)
            x = file.read_range(row.source, start, stop) if reads else np.empty(stop - start, dtype)
            for step in steps:
                assert step is not None
                x = step(x, start)
            yield _put(target, _bytes(x, Spec((stop - start,), row.spec.dtype), row))


_Step = Callable[[Array, int], Array]


def _chunk_step(edit: Call, spec: Spec, place: Place) -> _Step | None:
    """The edit of a flat piece of a leaf that begins at an element, or None: then it needs the leaf whole.

    Pieces must come in order.
    """
    if edit.index is not None or not edit.op.chunks:
        return None
    value: Any = edit.args.get("value")
    if np.ndim(value) == 0:
        # One stream of numbers runs through the leaf, as when they are drawn at once.
        random = "seed" in edit.op.parameters
        here = replace(place, stream=generator(int(edit.args.get("seed", 0)), place)) if random else place
        return lambda x, start: edit.run(x, here)
    spread = np.broadcast_to(np.asarray(value), spec.shape).flat

    def step(x: Array, start: int) -> Array:
        part = {**edit.args, "value": spread[start : start + x.size]}
        return edit.op.run(numpy_backend, x, part, place)  # type: ignore[no-any-return]

    return step


def _bytes(x: Any, spec: Spec, row: Row) -> memoryview:
    array = np.ascontiguousarray(x)
    found = Spec(np.shape(x), array.dtype.name)
    if found != spec:
        raise SpecMismatch(f"{row.path}: {row.edit} gave {found} where {spec} was planned")
    return array.astype(numpy_dtype(spec.dtype), copy=False).reshape(-1).view(np.uint8).data


# ---- bytes -------------------------------------------------------------------------------------------------


def _put(target: int, data: bytes | memoryview) -> int:
    view, at = memoryview(data), 0
    while at < len(view):
        at += os.write(target, view[at:])
    return at


class _Copier:
    """Copies ranges of a file by the best way that works here; a way that fails once is not tried again."""

    def __init__(self, file: SafetensorsFile) -> None:
        self.file = file
        self.ways: list[Callable[[int, int, int, int], int]] = [_copy_by_hand]
        if hasattr(os, "sendfile"):
            self.ways.insert(0, _send)
        if hasattr(os, "copy_file_range"):
            self.ways.insert(0, _copy_in_kernel)

    def __call__(self, target: int, start: int, stop: int) -> Iterator[int]:
        """Appends the bytes to the target and yields the number of bytes of each step."""
        while start < stop:
            count = self.step(target, start, min(stop - start, WINDOW))
            start += count
            yield count

    def step(self, target: int, start: int, count: int) -> int:
        while True:
            try:
                copied = self.ways[0](self.file.fileno(), target, start, count)
            except OSError as error:
                if len(self.ways) == 1 or error.errno not in _NOT_THIS_WAY:
                    raise
            else:
                if copied:
                    return copied
                if len(self.ways) == 1:
                    raise shrunk(self.file)
            # Some file systems refuse, and some say "0 bytes" where there are bytes: the next way knows.
            del self.ways[0]


# Across file systems, on old kernels and on special file systems.
_NOT_THIS_WAY = frozenset(
    {
        errno.EXDEV,
        errno.ENOSYS,
        errno.EINVAL,
        errno.EOPNOTSUPP,
        errno.ENOTSUP,
        errno.EPERM,
        errno.EBADF,
        errno.ENOTSOCK,
        errno.EOVERFLOW,
    }
)


def _copy_in_kernel(source: int, target: int, start: int, count: int) -> int:
    return os.copy_file_range(source, target, count, offset_src=start)


def _send(source: int, target: int, start: int, count: int) -> int:
    return os.sendfile(target, source, start, count)


def _copy_by_hand(source: int, target: int, start: int, count: int) -> int:
    return _put(target, os.pread(source, min(count, _BUFFER), start))


# ---- files -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _created(path: Path, like: os.stat_result) -> Iterator[int]:
    """A new file, open for writing, with the permissions of another, as cp makes it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, stat.S_IMODE(like.st_mode) & 0o777)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _look(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CannotWrite(f"{path}: {_reason(error)}") from None


def _exists(out: Path) -> CannotWrite:
    return CannotWrite(f"{out} exists already", hint="--force on the command line, force=True in Python, replaces it")


def _check_unchanged(file: SafetensorsFile) -> None:
    now = os.fstat(file.fileno())
    if (now.st_size, now.st_mtime_ns) != (file.stat.st_size, file.stat.st_mtime_ns):
        raise BadCheckpoint(f"{file.path}: another program changed it while it was being read; nothing was written")


def _publish(temporary: Path, out: Path, *, force: bool) -> None:
    """Gives the finished file its name, in one step."""
    if force:
        temporary.replace(out)
        return
    try:
        out.hardlink_to(temporary)  # unlike a rename, this never replaces a file that came in the meantime
    except FileExistsError:
        raise _exists(out) from None
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}:
            raise
        if os.path.lexists(out):
            raise _exists(out) from None
        temporary.rename(out)
    else:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}:  # not every file system can
            raise
    finally:
        os.close(descriptor)


def _reason(error: OSError) -> str:
    words = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
    return words.get(error.errno or 0) or error.strerror or str(error)
