"""Publishing: a new file or directory is written under a temporary name, and gets its own in one step when complete.

The temporary is beside its target and is locked while its writer lives. So the next writer can tell a temporary that is
still being written, which it leaves alone, from one that a killed writer left behind, which it removes.
"""

import contextlib
import ctypes
import errno
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from paramend.disk.failures import UNSUPPORTED, reason
from paramend.disk.io import reading, release
from paramend.disk.locks import hold
from paramend.disk.permissions import PRIVATE, Access, create_file, settle
from paramend.disk.urls import Url
from paramend.errors import Busy, CannotRead, CannotWrite

_ASIDE, _MANIFEST = ".old", ".jsonl"
# How many temporaries may be swept by others before they are locked.
_TRIES = 100
_NO_LINKS = UNSUPPORTED | {errno.EPERM, errno.EMLINK}


@contextlib.contextmanager
def published(
    out: Path, *, force: bool, access: Access, folder: bool = False, resumes: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """A temporary beside `out`, which becomes `out` if the block ends without an exception; otherwise it is removed. If
    `force`, something of that name is replaced, in one step. Until it is complete, a directory is private, whatever its
    `access`. `CannotWrite` says so if nothing was written; `Busy`: another program is writing it.

    What a killed writer left is taken up again if `resumes` says so of its manifest, and stays if this one fails, too.
    """
    if isinstance(out, Url):
        from paramend.disk.uploads import uploaded  # as in `disk/urls.py`

        with uploaded(out, force=force, folder=folder) as staging:
            yield staging
        return
    temporary, made, tries = spare(out), None, 1
    try:
        if resumes is not None and (found := _taken_up(out, access, resumes, folder=folder)) is not None:
            temporary, made = found
        _sweep(out, but=temporary)
        while made is None and (made := _create(temporary, access, folder=folder)) is None:
            if tries == _TRIES:
                raise _busy(out, "keeps removing what this one begins")  # noqa: TRY301
            temporary, tries = spare(out), tries + 1
        yield temporary
        settle(*made)
        if folder:
            _sync_tree(temporary)
        _clear(manifest_of(temporary))
        _publish(temporary, out, force=force, folder=folder)
    except BaseException as error:
        stays = resumes is not None and manifest_of(temporary).exists()
        if not stays:
            _clear(temporary)
            _clear(manifest_of(temporary))
        if isinstance(error, OSError) and not isinstance(error, CannotWrite):
            hint = "--resume goes on from what was made" if stays else ""
            raise CannotWrite(f"{out}: {reason(error)}; nothing was written", hint=hint) from error
        raise
    finally:
        if made is not None:
            release(made[0])
    try:
        sync_folder(out.parent)
    except OSError as error:
        why = f"it is not certain to outlast a power failure: {reason(error)}"
        raise CannotWrite(f"{out} was written, but {why}") from error
    finally:
        _clear(temporary)  # the old state, after a swap


def look(path: Path) -> os.stat_result | None:
    """What has a name; None if nothing has."""
    try:
        return path.lstat()
    except CannotRead:  # a store that does not answer
        raise
    except OSError:
        return None


def there(path: Path) -> bool:
    """Whether something has a name, be it a link that leads nowhere."""
    return look(path) is not None


def is_other(path: Path, then: os.stat_result | None) -> bool:
    """Whether something else has a name than had it then."""
    now = look(path)
    return now is not None and (then is None or not os.path.samestat(then, now))


def spare(out: Path) -> Path:
    """A new name for what is kept beside an output while it is written: the next writer of it removes what is left."""
    return out.parent / f"{_prefix(out)}{os.urandom(6).hex()}.tmp"


def manifest_of(temporary: Path) -> Path:
    """The file beside a temporary that says what of it is done."""
    return temporary.with_suffix(_MANIFEST)


def unpublished(out: Path) -> list[Path]:
    """What killed writers of an output left, of which manifests of this user's say what is done."""

    def own(status: os.stat_result | None) -> bool:
        return status is not None and status.st_uid == os.geteuid() and not stat.S_ISLNK(status.st_mode)

    found = out.parent.glob(f"{_prefix(out)}*.tmp")
    return [path for path in found if own(look(path)) and own(look(manifest_of(path)))]


def drop_spare_names(file: Path) -> None:
    """Remove names that a killed writer of a file left it beside its own."""
    with contextlib.suppress(OSError):
        status = file.lstat()
        if status.st_nlink > 1:
            for other in file.parent.glob(f"{_prefix(file)}*"):
                if os.path.samestat(other.lstat(), status):
                    other.unlink()


def exists(out: Path) -> CannotWrite:
    """The error for a name that is taken."""
    return CannotWrite(f"{out} already exists", hint="--force on the command line, force=True in Python, replaces it")


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    with reading(path) as descriptor:
        os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    with reading(folder) as descriptor:
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in UNSUPPORTED | {errno.EINVAL}:  # not all file systems can
                raise


def _prefix(out: Path) -> str:
    return f".paramend-{zlib.crc32(os.fsencode(out.name)):08x}-"


def _create(temporary: Path, access: Access, *, folder: bool) -> tuple[int, Access] | None:
    """The lock on a new temporary, a descriptor, and its final access; None if it is gone. Until it is locked, another
    writer may take it for a leftover of a killed one, lock it and remove it. Once it is locked and still has its name,
    it is safe: no other writer can lock it."""
    if folder:
        temporary.mkdir(access.mode if access.asked else PRIVATE)
        try:
            descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        access = access.here(os.fstat(descriptor))
        settle(descriptor, Access(PRIVATE))
    else:
        descriptor = create_file(temporary, access)
        access = access.here(os.fstat(descriptor))
    kept = False
    try:
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            hold(descriptor)
            kept = os.path.samestat(os.fstat(descriptor), temporary.lstat())
        return (descriptor, access) if kept else None
    finally:
        if not kept:
            release(descriptor)


def _taken_up(
    out: Path, access: Access, resumes: Callable[[Path], bool], *, folder: bool
) -> tuple[Path, tuple[int, Access]] | None:
    """What a killed writer left, with the lock on it and its final access; None if there is nothing to go on with."""
    for path in unpublished(out):
        if path.is_dir() != folder:
            continue
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        kept = False
        try:
            kept = hold(descriptor) and os.path.samestat(os.fstat(descriptor), path.lstat()) and resumes(path)
            if not kept:
                continue
            if access.asked and folder:  # which bits the umask takes is seen of a new one
                trial = spare(out)
                trial.mkdir(access.mode)
                access = access.here(trial.lstat())
                trial.rmdir()
        except BlockingIOError:
            raise _busy(out, f"holds the lock of {path.name}") from None
        finally:
            if not kept:
                release(descriptor)
        return path, (descriptor, access if folder else access.here(os.fstat(descriptor)))
    return None


def _sweep(out: Path, *, but: Path) -> None:
    """Remove what killed writers of this output left behind; `Busy` if another program is writing it."""
    names = [entry.name for entry in os.scandir(out.parent) if entry.name.startswith(_prefix(out))]
    # The writer that moved an old state aside, or has a manifest, holds the lock of the new one, so that comes first.
    for name in sorted(names, key=lambda name: name.endswith((_ASIDE, _MANIFEST))):
        path = out.parent / name
        if name in (but.name, manifest_of(but).name):
            continue
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
            release(descriptor)


def _busy(out: Path, sign: str) -> Busy:
    hint = "try again when it is done, or write to another name"
    return Busy(f"{out}: another program is writing it at this moment (it {sign}); nothing was written", hint=hint)


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


_NOREPLACE, _EXCHANGE = 1, 2


def _publish(temporary: Path, out: Path, *, force: bool, folder: bool) -> None:
    if force and not folder:
        temporary.replace(out)
        return
    replaces = force and os.path.lexists(out)
    try:
        # Neither replaces a file that appeared meanwhile, as a plain rename would; the first leaves no second name.
        if _rename_at_once(temporary, out, _EXCHANGE if replaces else _NOREPLACE):
            return
        if not folder:
            out.hardlink_to(temporary)
            _clear(temporary)
            return
    except FileExistsError:
        raise exists(out) from None
    except OSError as error:
        if folder or error.errno not in _NO_LINKS:
            raise
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
    except BaseException as error:
        try:
            aside.rename(out)
        except OSError:
            told = f"{out}: {reason(error)}; what was there is now {aside}"
            raise CannotWrite(told, hint=f"mv {aside} {out}") from error
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
    if number in UNSUPPORTED | {errno.EINVAL}:
        return False
    raise OSError(number, os.strerror(number), str(other))
