"""Claims: which undo records are this user's own, noted in the user's state directory while a patch is being made.

Records are beside the files that they describe, and anyone can put one there: it may come with a download, or from
another user of a shared folder. So a record is applied unasked only if a note outside that folder vouches for it: a
file in `$XDG_STATE_HOME/paramend/patches` (default: `~/.local/state`), named after the location of the records and
containing the digest of the one pending record. It exists from before the first byte changes until the patch is
complete or taken back, so a record cannot be reused later, elsewhere, or altered.

Without such a directory everything works, but nothing is taken back unasked.
"""

import contextlib
import hashlib
import os
import stat
from pathlib import Path

from paramend.disk.io import durable, put, reading
from paramend.disk.publishing import sync_folder

_LONGEST = 200


def begin(store: Path) -> None:
    """Note that this user is writing into a folder of records. An existing note stays."""
    with contextlib.suppress(OSError):  # without a note, a record is applied only on request
        path = _note(store)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))


def seal(store: Path, record: str) -> None:
    """Note, durably, which record is about to become pending, by the text that identifies it. `OSError` if the note can
    be created but not written, for example on a full disk: no byte has changed yet."""
    begin(store)
    with contextlib.ExitStack() as stack:
        try:
            path = _note(store)
            descriptor = stack.enter_context(durable(path, os.O_TRUNC))
        except OSError:
            return
        put(descriptor, record.encode())
    sync_folder(path.parent)


def read(store: Path) -> str | None:
    """The note about a folder of records; "" if no record is sealed yet, None if this user is not writing there."""
    with contextlib.suppress(OSError), reading(_note(store), os.O_NOFOLLOW | os.O_NONBLOCK) as descriptor:
        status = os.fstat(descriptor)
        mine = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
        return os.read(descriptor, _LONGEST).decode("ascii", "replace") if mine else None
    return None


def clear(store: Path) -> None:
    """Note that no record is sealed any more, if there is a note."""
    with contextlib.suppress(OSError):
        os.truncate(_note(store), 0)


def end(store: Path) -> None:
    """Remove the note: this user has nothing pending there."""
    with contextlib.suppress(OSError):
        _note(store).unlink()


def _note(store: Path) -> Path:
    said = Path(os.environ.get("XDG_STATE_HOME", ""))
    try:
        state = said if said.is_absolute() else Path.home() / ".local" / "state"
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from None
    return state / "paramend" / "patches" / hashlib.sha256(os.fsencode(os.path.realpath(store))).hexdigest()
