"""Publishing into a remote store: objects appear when they are whole, and the last ones make a model of them.

What is written front to back is sent while it is made, in parts, and takes no room here. What is corrected afterwards,
and small files, are made in a temporary folder and sent in the end.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path, PosixPath
from typing import IO, Any

from paramend._optional import need
from paramend.disk.failures import reason
from paramend.disk.remote import Address, asked, look
from paramend.disk.urls import Url
from paramend.errors import CannotRead, CannotWrite, Unsupported

# Parts of an upload, in bytes and how many at once: a slow line must send each within `remote.SILENCE` seconds. A store
# takes 10,000 parts, and copies at most so many bytes of one object by itself.
_PART, _AT_ONCE, _MOST, _COPIED = 5 << 20, 4, 9_000, 5 << 30
# How the names of files end that are sent last: with them, the others are a model.
_LAST = (".index.json", "config.json")


class Staging(PosixPath):
    """A path in the temporary folder of an upload, from which files are sent."""

    upload: "Upload | None" = None

    def __truediv__(self, name: str | os.PathLike[str]) -> "Staging":
        child = super().__truediv__(name)
        child.upload = self.upload
        return child

    @contextlib.contextmanager
    def streamed(self, nbytes: int) -> Iterator[int]:
        """The descriptor of a pipe: what is written is sent to the store. The only file of an output is an object when
        that is published, one of several when the block ends."""
        assert self.upload is not None
        sending = self.upload.sending = _Sending(self.upload, self, nbytes)
        with contextlib.suppress(BrokenPipeError):  # it cannot be sent, and `finish` says why
            yield sending.target
        if self.upload.folder or sending.failed:
            sending.finish()


class _Sending:
    """An object that is being sent while it is written."""

    def __init__(self, upload: "Upload", path: Path, nbytes: int) -> None:
        source, self.target = os.pipe2(os.O_CLOEXEC)
        self._whole = False
        self._thread = ThreadPoolExecutor(1, "paramend-upload")
        self._sent = self._thread.submit(self._send, upload, path, source, nbytes)

    def _send(self, upload: "Upload", path: Path, source: int, nbytes: int) -> None:
        with open(source, "rb") as pipe:
            upload.send(path, self._pieces(pipe), nbytes)

    def _pieces(self, pipe: IO[bytes]) -> Iterator[bytes]:
        while data := pipe.read(1 << 20):
            yield data
        if not self._whole:
            raise _Stopped

    @property
    def failed(self) -> bool:
        return self._sent.done()

    def finish(self) -> None:
        self._whole = True
        self.stop()
        self._sent.result()

    def stop(self) -> None:
        """Leave no object, if it was not finished."""
        if self.target >= 0:
            os.close(self.target)
            self.target = -1
        self._thread.shutdown(wait=False)
        wait([self._sent])  # also after Ctrl-C, which makes `shutdown` take a thread for one that has ended


class _Stopped(Exception):
    """What is being sent will not be whole."""


class Upload:
    """An output in a remote store that is being written."""

    def __init__(self, out: Url, *, force: bool, folder: bool, home: Path) -> None:
        self._store = need("obstore", extra="remote", to="write to remote addresses")
        self.out, self.folder, self._force = out, folder, force
        self.root = Staging(home, out.name)
        self.root.upload = self
        # A folder that is there is replaced by what was sent beside it.
        self._old = self._names() if folder and force else []
        self._base = out / f".paramend-{os.urandom(6).hex()}" if self._old else out
        self.sending: _Sending | None = None
        self.sent: dict[str, int] = {}

    def send(self, path: Path, data: object, nbytes: int) -> None:
        """Send an object, in parts if it is long; if this fails, there is none."""
        name = path.relative_to(self.root).as_posix() if self.folder else ""
        at, part = self._at(name), max(_PART, -(-nbytes // _MOST))
        how = {"use_multipart": nbytes > part, "chunk_size": part, "max_concurrency": _AT_ONCE}
        self.sent[name] = nbytes
        try:
            self._ask("put", at.sink, at.path, data, **how)
        except CannotWrite as error:
            with contextlib.suppress(CannotRead):
                if self._is_sent(name):  # only the last answer got lost
                    return
            raise error from None

    def publish(self) -> None:
        """Send what was made in the temporary folder; then put all in place, the files that make a model of it last."""
        if not self.folder and self.sending is not None:
            self.sending.finish()
        elif not self.folder:
            self.send(self.root, Path(self.root), self.root.stat().st_size)
        else:
            here = (path for path in self.root.rglob("*") if path.is_file())
            for path in sorted(here, key=lambda path: path.name.endswith(_LAST)):
                self.send(path, Path(path), path.stat().st_size)
        if self._old:
            self._replace()

    def discard(self) -> None:
        """Delete what was sent, also if the answer to its last part got lost; a file that was replaced is whole."""
        if self.sending is not None:
            self.sending.stop()
        with contextlib.suppress(CannotRead, CannotWrite):  # the first failure is told
            self._delete(self._at(name) for name in self.sent if self._is_sent(name))

    def _replace(self) -> None:
        self._delete((self.out / name).at for name in self._old if name.endswith(_LAST))  # no mixture is a model
        for name in self.sent:
            here, there = self._at(name), (self.out / name).at
            if self._ask("head", here.store, here.path)["size"] < _COPIED:
                self._ask("copy", here.store, here.path, there.path)
            else:
                self._ask("put", there.sink, there.path, self._ask("get", here.store, here.path).stream())
        self._delete((self.out / name).at for name in self._old if name not in self.sent)
        self._delete(map(self._at, self.sent))

    def _is_sent(self, name: str) -> bool:
        """Whether there is an object where there was none, of the right length."""
        seen = look(self._at(name), self.out) if self.folder or not self._force else None
        return seen is not None and seen.size == self.sent[name]

    def _at(self, name: str) -> Address:
        return (self._base / name if name else self._base).at

    def _names(self) -> list[str]:
        at = self.out.at
        rows = self._ask("list", at.store, at.path)
        return [row["path"].removeprefix(f"{at.path}/") for row in rows]

    def _delete(self, objects: Iterable[Address]) -> None:
        for at in objects:
            self._ask("delete", at.store, at.path)

    def _ask(self, verb: str, *args: Any, **how: Any) -> Any:
        def call() -> Any:
            try:
                found = getattr(self._store, verb)(*args, **how)
            except _Stopped as stopped:
                return stopped
            return [row for rows in found for row in rows] if verb == "list" else found

        found = asked(self.out.at, self.out, call, CannotWrite)
        if isinstance(found, _Stopped):
            raise found
        return found


@contextlib.contextmanager
def uploaded(out: Url, *, force: bool, folder: bool) -> Iterator[Staging]:
    """A path on this machine, for the file or the folder that becomes an object, or several, if the block ends without
    an exception. Otherwise none of them stays. `CannotWrite` says so."""
    check_writable(out)
    with tempfile.TemporaryDirectory(prefix="paramend-") as home:
        upload = Upload(out, force=force, folder=folder, home=Path(home))
        upload.root.mkdir() if folder else upload.root.touch()
        try:
            yield upload.root
            upload.publish()
        except BaseException as error:
            upload.discard()
            if isinstance(error, OSError) and not isinstance(error, CannotWrite):
                raise CannotWrite(f"{out}: {reason(error)}; nothing was written") from error
            raise


def check_writable(out: Url) -> None:
    """Raise `Unsupported` for an address that is only read."""
    if out.at.scheme not in ("s3", "gs", "az"):
        what, hint = "a web server", "-o with a path, or s3://, gs:// or az://"
        if out.at.scheme == "hf":
            what, hint = "the Hub", "-o model/, then `hf upload`"
        raise Unsupported(f"{out}: what is on {what} is only read", hint=hint)
