"""Publishing: a new file or directory is written under a temporary name, and gets its own in one step when complete.

The temporary is beside its target and is locked while its writer lives. So the next writer can tell a temporary that is
still being written, which it leaves alone, from one that a killed writer left behind, which it removes.
"""

import contextlib
import ctypes
import errno
import os
import secrets
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path

from paramend.disk.failures import reason
from paramend.disk.locks import hold
from paramend.errors import Busy, CannotWrite

_FOLDER_MODE = 0o777
_ASIDE = ".old"
# How many temporaries may be swept by others before they are locked.
_TRIES = 100
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})


@contextlib.contextmanager
def published(out: Path, *, force: bool, mode: int | None) -> Iterator[Path]:
    """A temporary beside `out`, which becomes `out` if the block ends without an exception; otherwise it is removed.

    Args:
        out: the final name.
        force: whether something of that name is replaced, in one step.
        mode: the permissions of a file; None asks for a directory.

    Raises:
        CannotWrite: the name is taken, or the system refused.
        Busy: another program is writing it.
    """
    prefix = f".paramend-{zlib.crc32(os.fsencode(out.name)):08x}-"
    temporary, lock, tries = _fresh(out, prefix), None, 1
    try:
        _sweep(out, prefix)
        while (lock := _create(temporary, mode)) is None:
            if tries == _TRIES:
                raise _busy(out, "keeps removing what this one begins")  # noqa: TRY301
            temporary, tries = _fresh(out, prefix), tries + 1
        yield temporary
        if mode is None:
            _sync_tree(temporary)
            _publish_folder(temporary, out, force=force)
        else:
            _publish_file(temporary, out, force=force)
    except BaseException as error:
        _clear(temporary)
        if isinstance(error, OSError) and not isinstance(error, CannotWrite):
            raise CannotWrite(f"{out}: {reason(error)}; nothing was written") from error
        raise
    finally:
        if lock is not None:
            os.close(lock)
    try:
        sync_folder(out.parent)
    finally:
        _clear(temporary)  # the old state, after a swap


def exists(out: Path) -> CannotWrite:
    """The error for a name that is taken."""
    return CannotWrite(f"{out} already exists", hint="--force on the command line, force=True in Python, replaces it")


def create_file(path: Path, mode: int) -> int:
    """The descriptor of a new file, open for writing; its owner may always read and write it."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode & 0o777 | 0o600)


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}:  # not all file systems can
            raise
    finally:
        os.close(descriptor)


# ---- temporaries -------------------------------------------------------------------------------------------


def _fresh(out: Path, prefix: str) -> Path:
    return out.parent / f"{prefix}{secrets.token_hex(6)}.tmp"


def _create(temporary: Path, mode: int | None) -> int | None:
    """The lock on a new temporary, a descriptor; None if it is gone.

    Until it is locked, another writer may take it for a leftover of a killed one, lock it and remove it. Once it is
    locked and still has its name, it is safe: no other writer can lock it.
    """
    if mode is None:
        temporary.mkdir(_FOLDER_MODE)
        try:
            descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
    else:
        descriptor = create_file(temporary, mode)
    kept = False
    try:
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            hold(descriptor)
            kept = os.path.samestat(os.fstat(descriptor), temporary.lstat())
        return descriptor if kept else None
    finally:
        if not kept:
            os.close(descriptor)


def _sweep(out: Path, prefix: str) -> None:
    """Remove what killed writers of this output left behind.

    Raises:
        Busy: another program is writing it.
    """
    names = [entry.name for entry in os.scandir(out.parent) if entry.name.startswith(prefix)]
    # The writer that moved an old state aside holds the lock of the new one, so that comes first.
    for name in sorted(names, key=lambda name: name.endswith(_ASIDE)):
        path = out.parent / name
        if path.suffix == _ASIDE and not os.path.lexists(out):  # killed while nothing had the name
            path.rename(out)
            continue
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno == errno.ELOOP:  # a symbolic link that was replaced by a directory
                path.unlink()
            continue
        try:
            if hold(descriptor):
                with contextlib.suppress(OSError):
                    _remove(path)
        except BlockingIOError:
            raise _busy(out, f"holds the lock of {name}") from None
        finally:
            os.close(descriptor)


def _busy(out: Path, sign: str) -> Busy:
    return Busy(
        f"{out}: another program is writing it at this moment (it {sign}); nothing was written",
        hint="try again when it is done, or write to another name",
    )


def _clear(temporary: Path) -> None:
    """Remove a temporary as far as possible, even if Ctrl-C or SIGTERM comes meanwhile."""
    with contextlib.suppress(OSError):
        try:
            _remove(temporary)
        except (KeyboardInterrupt, SystemExit):
            _remove(temporary)
            raise


def _remove(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        import shutil  # slow to import, and rarely needed

        shutil.rmtree(path)
    else:
        path.unlink()


def _sync_tree(folder: Path) -> None:
    """Make the names in a folder and the folders below it durable. Files were synced when they were written."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            _sync_tree(folder / entry.name)
    sync_folder(folder)


# ---- names -------------------------------------------------------------------------------------------------


def _publish_file(temporary: Path, out: Path, *, force: bool) -> None:
    if force:
        temporary.replace(out)
        return
    try:
        out.hardlink_to(temporary)  # unlike a rename, never replaces a file that appeared meanwhile
    except FileExistsError:
        raise exists(out) from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(out):
            raise exists(out) from None
        temporary.rename(out)


_NOREPLACE, _EXCHANGE = 1, 2


def _publish_folder(temporary: Path, out: Path, *, force: bool) -> None:
    replaces = force and os.path.lexists(out)
    try:
        if _rename_at_once(temporary, out, _EXCHANGE if replaces else _NOREPLACE):
            return
    except FileExistsError:
        raise exists(out) from None
    if not replaces:
        if os.path.lexists(out):
            raise exists(out)
        temporary.rename(out)
        return
    # Without a swap there is a moment when neither has the name; if renaming fails, the old state is put back.
    aside = temporary.with_suffix(_ASIDE)
    out.rename(aside)
    try:
        temporary.rename(out)
    except BaseException:
        aside.rename(out)
        raise
    with contextlib.suppress(OSError):
        _remove(aside)


def _rename_at_once(one: Path, other: Path, flags: int) -> bool:
    """Rename by `renameat2`, without replacing or by swapping; False where the system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here = -100  # AT_FDCWD
    if not call(here, os.fsencode(one), here, os.fsencode(other), ctypes.c_uint(flags)):
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))
