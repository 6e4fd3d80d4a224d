"""Permissions: what is written is never more open than what it is made from, or than what it replaces."""

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from paramend.disk.identity import STORE
from paramend.disk.urls import Url

_ALL, _GROUP = 0o777, 0o070


@dataclass(frozen=True, slots=True)
class Access:
    """Who may do what with a file or directory that is written."""

    mode: int  # the permission bits
    # Whether the umask of the program takes bits away: from a new file that is made from no other.
    asked: bool = False
    uid: int = -1  # the owner to give it, if the system allows; -1 for the user of the program
    gid: int = -1  # the group to give it, if the system allows; -1 for that of a new file here
    # The groups whose bits `mode` is made from: another group gets no more than everybody.
    gids: frozenset[int] = frozenset()

    def within(self, mode: int) -> "Access":
        """The same with these permissions at most."""
        return replace(self, mode=self.mode & mode)

    def here(self, made: os.stat_result) -> "Access":
        """The same without the bits that the umask took from a file or folder that was made with it."""
        return replace(self, mode=self.mode & made.st_mode & _ALL, asked=False) if self.asked else self


NEW_FILE, NEW_FOLDER = Access(0o666, asked=True), Access(_ALL, asked=True)
# Of folders in which something is being made.
PRIVATE = 0o700


def access_of(
    made_from: Iterable[os.stat_result], replaced: os.stat_result | None = None, *, new: Access = NEW_FILE
) -> Access:
    """The access of what is made from files: what all of them allow; of what it replaces, it keeps owner and group."""
    found = [status for status in made_from if status.st_dev != STORE]
    gids = {status.st_gid for status in found}
    mode, asked = (_ALL, False) if found else (new.mode, new.asked)
    uid, gid = -1, gids.pop() if len(gids) == 1 else -1
    if replaced is not None:
        found.append(replaced)
        uid, gid = replaced.st_uid, replaced.st_gid
    for status in found:
        mode &= status.st_mode
    return Access(mode, asked, uid, gid, frozenset(status.st_gid for status in found))


def of_folder(files: Access) -> Access:
    """The access of a new folder that holds files: whoever may read them may look into it."""
    return replace(files, mode=files.mode & 0o666 | (files.mode & 0o444) >> 2 | PRIVATE, asked=True)


def reach(folder: os.stat_result) -> int:
    """The bits that the permissions of a folder leave to the files in it."""
    return sum(0o7 << shift for shift in (0, 3, 6) if folder.st_mode >> shift & 1)


def files_in(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The regular files of a checkpoint that is a folder, without its undo records; none of a remote store."""
    if isinstance(folder, Url):
        return
    for place, inside, names in os.walk(folder):
        inside[:] = [name for name in inside if name != ".undo"]
        for name in names:
            path = Path(place, name)
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                yield path, status


def access_of_paths(paths: Iterable[Path]) -> Access:
    """The access of what tells of checkpoints, files or folders: what all of them allow."""
    found: list[os.stat_result] = []
    mode = _ALL
    for path in paths:
        if path.is_dir():
            mode &= reach(path.stat())
            found += [status for _, status in files_in(path)]
        elif path.exists():
            found.append(path.stat())
    return access_of(found).within(mode & 0o666)


def create_file(path: Path, access: Access) -> int:
    """The descriptor of a new file, open for reading and writing; until it is settled, its owner may write it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, access.mode & _ALL | 0o600 if access.asked else 0o600)
    settle(descriptor, replace(access, mode=access.mode | 0o600))
    return descriptor


def settle(path: int | Path, access: Access) -> None:
    """Give a file or folder its owner, group and permissions, as far as the system allows. It was made with those of
    the program, or narrower ones: what the system refuses leaves it more private."""
    now = os.stat(path)  # noqa: PTH116 - of descriptors too
    mode = access.here(now).mode & _ALL
    for uid in dict.fromkeys((access.uid, -1)):
        if uid not in (-1, now.st_uid) or access.gid not in (-1, now.st_gid):
            with contextlib.suppress(OSError):
                os.chown(path, uid, access.gid)
                break
    now = os.stat(path)  # noqa: PTH116
    if access.gids - {now.st_gid}:
        mode = mode & ~_GROUP | mode & (mode & 0o007) << 3
    if stat.S_ISDIR(now.st_mode):  # what is made in a folder of a group goes to the group
        mode |= now.st_mode & stat.S_ISGID
    if mode != stat.S_IMODE(now.st_mode):
        with contextlib.suppress(OSError):  # of file systems without permissions
            os.chmod(path, mode)  # noqa: PTH101
