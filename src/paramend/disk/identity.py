"""Identity: whether files are unchanged since they were opened."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from paramend.errors import BadCheckpoint, CannotRead

# The device of what is in remote stores, whose objects have no permissions.
STORE = -1


def unchanged(then: os.stat_result, now: os.stat_result) -> bool:
    """Whether two looks at a file saw the same bytes, as far as the system can tell.

    Size and modification time are not enough: a program that overwrites a file can reset its mtime, but not its ctime.
    Changes of permissions, owner and names (hard links, as `--link` makes them) move the ctime too, so it counts only
    if these are the same and the file has one name. If a second name came and went in between, the file counts as
    changed.
    """
    if not os.path.samestat(then, now) or (then.st_size, then.st_mtime_ns) != (now.st_size, now.st_mtime_ns):
        return False
    return then.st_ctime_ns == now.st_ctime_ns or then.st_nlink > 1 or _access(then) != _access(now)


def _access(status: os.stat_result) -> tuple[int, ...]:
    return status.st_mode, status.st_uid, status.st_gid, status.st_nlink


def check_unchanged(path: Path, then: os.stat_result, now: os.stat_result) -> None:
    """Raise `BadCheckpoint` if two looks at a file differ: another program has changed it."""
    if not unchanged(then, now):
        raise changed(path)


def check_still(stats: Mapping[Path, os.stat_result]) -> None:
    """Raise `BadCheckpoint` if another program has changed, replaced or removed a file since it was opened."""
    for path, then in stats.items():
        check_unchanged(path, then, status_now(path))


def status_now(path: Path) -> os.stat_result:
    """What the system, or a store, says of a file now; `BadCheckpoint` if it is gone."""
    try:
        return path.stat()
    except CannotRead:  # the store does not answer
        raise
    except OSError:
        raise changed(path) from None


def check_not_overwritten(stats: Mapping[Path, os.stat_result]) -> None:
    """Raise `BadCheckpoint` if a program wrote into files while they were read: what it replaced was read as it was."""
    for path, then in stats.items():
        with contextlib.suppress(OSError):
            now = path.stat()
            if os.path.samestat(then, now):
                check_unchanged(path, then, now)


def changed(path: Path) -> BadCheckpoint:
    """The error for a file that another program changed."""
    return BadCheckpoint(
        f"{path}: another program changed it since it was opened; nothing was written", hint="open the checkpoint again"
    )
