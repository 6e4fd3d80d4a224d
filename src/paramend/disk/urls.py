"""`Url`: an address in a remote store, where a path is expected: S3, Google Cloud, Azure, the Hub, a web server."""

import errno
import io
import os
import re
import stat
from collections.abc import Generator, Iterator, Sequence
from functools import cached_property
from pathlib import Path, PosixPath, PurePath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from paramend.errors import BadArgument, CannotRead, Unsupported

if TYPE_CHECKING:
    from paramend.disk.remote import Address, Object, Seen

SCHEMES = ("s3", "gs", "az", "hf", "http", "https")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_COLLAPSED = re.compile(r"([a-z][a-z0-9]+):/+(.*)")  # what pathlib makes of an address
_SLASH = "\x1f"  # what stands for a slash in a query, which is no part of a path
# Names that are likely those of files: an object is looked for first, then a folder.
_FILE = re.compile(r".+\.[A-Za-z]\w*")


def _remote() -> Any:
    from paramend.disk import remote  # threads and digests, which files of this machine do not need

    return remote


class Url(PosixPath):
    """An address as a path: its members ask the store, and its text is the address, without credentials.

    What only the system can do with a path is refused: the address has no file name.

    >>> place = path_of("https://me:secret@example.org/models/a.safetensors?signature=1")
    >>> str(place), place.name, str(place.parent)
    ('https://***@example.org/models/a.safetensors', 'a.safetensors', 'https://***@example.org/models')
    """

    def __str__(self) -> str:
        scheme, *rest = self.parts or ("",)
        if not scheme.endswith(":"):  # a part of an address
            return super().__str__().partition("?")[0]
        if rest and "@" in rest[0] and scheme.startswith("http"):
            rest[0] = f"***@{rest[0].rpartition('@')[2]}"
        return "/".join([f"{scheme}/", *rest]).partition("?")[0]

    def __fspath__(self) -> str:
        hint = "copy it to this machine, and give the path of the copy"
        raise Unsupported(f"{self}: this needs a file on this machine, and it is in a remote store", hint=hint)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.parts  # with its credentials: workers need them

    @property
    def name(self) -> str:
        return super().name.partition("?")[0]

    @property
    def at(self) -> "Address":
        """Where it is in its store."""
        scheme, place, *keys = self.parts if len(self.parts) > 1 else (*self.parts, "")
        scheme = scheme[:-1]
        if scheme == "hf":
            name, _, revision = (keys.pop(0) if keys else "").partition("@")
            place = f"{place}/{name}/resolve/{quote(revision, safe='%') or 'main'}"
        key, _, query = "/".join(keys).partition("?") if scheme.startswith("http") else ("/".join(keys), "", "")
        found: Address = _remote().Address(scheme, place, key, query.replace(_SLASH, "/"))
        return found

    def opened(self) -> "Object":
        """The object, opened for reading: by the first call, so that all that is read from this path is one version."""
        return self._object

    @cached_property
    def _object(self) -> "Object":
        found: Object = _remote().Object(self.at, self)
        return found

    @cached_property
    def _inside(self) -> "dict[str, Seen | None]":
        found: dict[str, Seen | None] = _remote().listing(self.at, self)
        return found

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """What the store says now; `FileNotFoundError` if there is neither an object nor a folder."""
        if not _FILE.fullmatch(self.name) and self._inside:
            folder: os.stat_result = _remote().status(self.at, None)
            return folder
        seen = _remote().look(self.at, self)
        if seen is None and not self._inside:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", str(self))
        found: os.stat_result = _remote().status(self.at, seen)
        return found

    def lstat(self) -> os.stat_result:
        return self.stat()

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        return self._mode != 0

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return stat.S_ISDIR(self._mode)

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        return stat.S_ISREG(self._mode)

    def is_symlink(self) -> bool:
        return False

    @cached_property
    def _mode(self) -> int:
        try:
            return self.stat().st_mode
        except OSError as error:
            if unanswered(error):
                raise
            return 0  # stores may refuse to say that something is not there

    def __truediv__(self, name: str | os.PathLike[str]) -> "Url":
        child = super().__truediv__(name)
        inside = self.__dict__.get("_inside", {})
        if child.name in inside or (inside and not self.parts[0].startswith("http")):
            there = child.name in inside
            child.__dict__["_mode"] = _remote().status(self.at, inside[child.name]).st_mode if there else 0
        return child

    def iterdir(self) -> Generator["Url", None, None]:
        return (self / name for name in sorted(self._inside))

    def glob(self, pattern: str, **how: Any) -> Iterator["Url"]:  # type: ignore[override]  # of one folder
        return (each for each in self.iterdir() if PurePath(each.name).match(pattern))

    def read_bytes(self) -> bytes:
        found = self.opened()
        return found.read(0, found.seen.size)

    def open(self, mode: str = "r", *args: Any, **how: Any) -> Any:
        raw = io.BytesIO(self.read_bytes())
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding=how.get("encoding") or "utf-8")

    def unlink(self, missing_ok: bool = False) -> None:
        _remote().delete(self.at, self)

    def absolute(self) -> "Url":
        return self

    def resolve(self, strict: bool = False) -> "Url":
        return self

    def expanduser(self) -> "Url":
        return self


def path_of(given: str | os.PathLike[str]) -> Path:
    """The path that a user wrote: a `Url` for an address in a remote store, a path of this machine for anything else.

    Raises:
        BadArgument: it is an address of another kind of store.

    >>> path_of("s3://bucket/model/config.json").parent
    Url('s3://bucket/model')
    >>> path_of(Path("s3://bucket/model")) == path_of("s3://bucket/model/")
    True
    >>> path_of("model/")
    PosixPath('model')
    """
    if isinstance(given, Url):
        return given
    if not isinstance(given, str) and not isinstance(given, PurePath):
        given = os.fspath(given)
    form = _URL if isinstance(given, str) else _COLLAPSED
    found = form.fullmatch(str(given))
    if found is None or (form is _COLLAPSED and found[1] not in SCHEMES):
        return Path(given)
    scheme, rest = found[1].lower(), found[2]
    if scheme == "file":
        return Path(rest)
    if scheme not in SCHEMES:
        hint = f"one of {', '.join(f'{each}://' for each in SCHEMES)}, or a path"
        raise BadArgument(f"{scheme}:// is not the address of a store that can be opened", hint=hint)
    path, mark, query = rest.partition("?") if scheme.startswith("http") else (rest, "", "")
    return Url(f"{scheme}://{path}{mark}{query.replace('/', _SLASH)}")


def text_of(given: str | os.PathLike[str]) -> str:
    """What a user wrote of a path, with the slash at its end, if there is one."""
    return str(given) if isinstance(given, PurePath) else os.fspath(given)


def opened_together(paths: Sequence[Path]) -> Sequence[Path]:
    """The same paths; those in remote stores have been opened, several at a time: each answer is slow to come."""
    if calls := [path.opened for path in paths if isinstance(path, Url)]:
        _remote().together(calls)
    return paths


def unanswered(error: BaseException) -> bool:
    """Whether an error says that a store does not answer, not that something is not there, or is not shown."""
    return isinstance(error, CannotRead) and "number" not in error.__dict__
