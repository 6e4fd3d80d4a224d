"""Objects in remote stores: where they are, what they are now, and ranges of their bytes, through obstore.

Credentials and endpoints come from the environment variables that obstore reads, and for the Hub from those of
huggingface_hub. No message repeats what obstore says: it would show signed addresses.
"""

import json
import math
import os
import re
import threading
import time
import zlib
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from errno import EACCES, ENOENT
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

from paramend._optional import need
from paramend.disk.identity import STORE
from paramend.errors import CannotRead, CannotWrite, ParamendError

# Bytes of one request of a long read, how many such requests are under way at once, and what is read of a new file.
PART, _AT_ONCE, _HEAD = 8 << 20, 8, 1 << 17
# A short read fetches this much; reads that follow one another fetch ahead once they have come this far.
_NEAR, _RUN = 1 << 14, 1 << 20
# Seconds: without an answer, of all tries of one request. A server that stops is reported within twice their sum.
SILENCE, PATIENCE = 15, 15
# What a folder on a plain web server may hold, which has no listings.
_USUAL = (
    *("model.safetensors.index.json", "model.safetensors", "config.json", "generation_config.json"),
    *("adapter_model.safetensors", "adapter_config.json", "tokenizer_config.json", "pytorch_model.bin.index.json"),
)


# How the names of the environment variables begin that stores are made from.
_OWN = ("AWS_", "GOOGLE_", "AZURE_", "HF_")
T = TypeVar("T")


class Seen(NamedTuple):
    """What a store says of an object."""

    size: int
    tag: str  # the ETag, or ""
    time: datetime

    @property
    def solid(self) -> bool:
        """Whether the tag names bytes: a weak one says only that two versions mean the same."""
        return self.tag.startswith('"')

    def same(self, other: "Seen") -> bool:
        mine, others = (self.tag, other.tag) if self.tag and other.tag else (self.time, other.time)
        return (self.size, mine) == (other.size, others)


_UNKNOWN = Seen(0, "", datetime.fromtimestamp(0, UTC))


@dataclass(frozen=True)
class Address:
    """Where an object is, or a folder of objects: the name of its bucket, host or repository, then its key."""

    scheme: str
    place: str
    key: str
    query: str = ""  # of a signed address

    def inside(self, name: str) -> "Address":
        return replace(self, key=f"{self.key}/{name}" if self.key else name, query="")

    @property
    def store(self) -> Any:
        """Its store: connections are shared by all that is read from it. None survives a fork."""
        return self._store(SILENCE)

    @property
    def sink(self) -> Any:
        """The same for writing: an answer comes when all was sent, and a line may be slow."""
        return self._store(SILENCE + 3)

    def _store(self, silence: int) -> Any:
        return _store(*self.home, (silence, PATIENCE), os.getpid())

    @property
    def home(self) -> tuple["Address", tuple[tuple[str, str], ...]]:
        """What tells its store from others: an address, and the settings of the environment."""
        return replace(self, key=""), tuple(item for item in os.environ.items() if item[0].startswith(_OWN))

    @property
    def path(self) -> str:
        return unquote(self.key) if self.scheme.startswith("http") else self.key


@cache
def _store(at: Address, settings: tuple[tuple[str, str], ...], seconds: tuple[int, int], process: int) -> Any:
    scheme, place, query, (silence, patience) = at.scheme, at.place, at.query, seconds
    stores = need("obstore.store", extra="remote", to=f"open {scheme}:// addresses")
    options: dict[str, Any] = {"connect_timeout": "5s", "read_timeout": f"{silence}s", "timeout": "1h"}
    tries = {
        "max_retries": 100,
        "retry_timeout": timedelta(seconds=patience),
        "backoff": {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=2), "base": 2},
    }
    own = {"s3": "S3Store", "gs": "GCSStore", "az": "AzureStore"}.get(scheme)
    if own is not None:
        # An endpoint that is named in plain HTTP is meant.
        plain = any("ENDPOINT" in name and value.startswith("http://") for name, value in settings)
        options |= {"allow_http": True} if plain or "AZURE_STORAGE_USE_EMULATOR" in os.environ else {}
        return getattr(stores, own)(place, client_options=options, retry_config=tries)
    login, _, host = place.rpartition("@")
    base, said = f"{scheme}://{host}/", f"Basic {b64encode(unquote(login).encode()).decode()}" if login else ""
    if scheme == "hf":
        base, token = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{place}", _token()
        said = f"Bearer {token}" if token else ""
    options |= {"default_headers": {"authorization": said}} if said else {}
    options |= {"allow_http": base.startswith("http://")}
    return stores.HTTPStore(f"{base}?{query}" if query else base, client_options=options, retry_config=tries)


def _token() -> str:
    """The token for the Hub, where huggingface_hub looks for it."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    file = Path(os.environ.get("HF_TOKEN_PATH") or Path(home, "token")).expanduser()
    said = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    with suppress(OSError):
        said = said or file.read_text(encoding="utf-8")
    return (said or "").strip()


# ---- what is there --------------------------------------------------------------------------------------------


def look(at: Address, name: Path) -> Seen | None:
    """What a store says of an object; None if there is none."""
    obstore = need("obstore", extra="remote", to="open remote addresses")
    if not at.key:
        return None
    if at.query:  # a signature is for reading alone
        with Object(at, name) as found:
            return found.seen
    try:
        return _seen(asked(at, name, lambda: obstore.head(at.store, at.path)))
    except FileNotFoundError:
        return None


def listing(at: Address, name: Path) -> dict[str, Seen | None]:
    """The names in a folder: of objects, each with what its store says, and of folders. Empty if it is no folder."""
    obstore = need("obstore", extra="remote", to="open remote addresses")
    if at.scheme.startswith("http"):
        return _probed(at, name)
    try:
        if at.scheme == "hf":
            return asked(at, name, lambda: _of_hub(obstore, at))
        found = asked(at, name, lambda: obstore.list_with_delimiter(at.store, at.key or None))
    except FileNotFoundError:
        return {}
    own = {Path(row["path"]).name: _seen(row) for row in found["objects"] if row["path"].rstrip("/") != at.key}
    return {**{Path(folder).name: None for folder in found["common_prefixes"]}, **own}


def delete(at: Address, name: Path) -> None:
    """Delete an object."""
    obstore = need("obstore", extra="remote", to="open remote addresses")
    asked(at, name, lambda: obstore.delete(at.store, at.path), CannotWrite)


def _of_hub(obstore: Any, at: Address) -> dict[str, Seen | None]:
    repository, _, revision = at.place.partition("/resolve/")
    tree = Address("hf", f"api/models/{repository}/tree/{revision}", at.key)
    rows = json.loads(bytes(obstore.get(tree.store, tree.key).bytes()))
    if not isinstance(rows, list):
        return {}
    seen = (_UNKNOWN._replace(size=row["size"]) if row["type"] == "file" else None for row in rows)
    return dict(zip((Path(row["path"]).name for row in rows), seen, strict=True))


def _probed(at: Address, name: Path) -> dict[str, Seen | None]:
    """The usual names of a model that a web server has in a folder, and the files that an index among them names."""
    asked = together(partial(look, at.inside(each), name / each) for each in _USUAL)
    found = {each: seen for each, seen in zip(_USUAL, asked, strict=True) if seen is not None}
    named: set[str] = set()
    for each in found:
        if each.endswith(".index.json"):
            with suppress(ValueError, AttributeError), Object(at.inside(each), name / each) as index:
                table = json.loads(index.read(0, index.seen.size))
                named |= {file for file in table.get("weight_map", {}).values() if isinstance(file, str)}
    return {**found, **dict.fromkeys(named, _UNKNOWN)} if found else {}


def _seen(row: Mapping[str, Any]) -> Seen:
    return Seen(row["size"], row["e_tag"] or "", row["last_modified"])


def status(at: Address, seen: Seen | None) -> os.stat_result:
    """A stat result for an object, or a folder: two of the same version are the same, and of others differ."""
    kind = 0o040755 if seen is None else 0o100644
    size, tag, when = seen or _UNKNOWN
    node = int.from_bytes(sha256(f"{at.scheme}://{at.place}/{at.key}".encode()).digest()[:7], "big")
    nanoseconds = int(when.timestamp() * 1_000_000) * 1000
    second, mark = nanoseconds // 10**9, zlib.crc32(tag.encode())
    fields = (kind, node, STORE, 1, os.getuid(), os.getgid(), size, second, second, mark)
    return os.stat_result(fields, {"st_mtime_ns": nanoseconds, "st_ctime_ns": mark, "st_atime_ns": nanoseconds})


# ---- reading --------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """Bytes that are being fetched."""

    start: int
    stop: int
    data: "Future[memoryview]"


class Object:
    """One version of an object, opened for reading: `CannotRead` if the store has another one meanwhile.

    The first request brings its size, its tag and its first bytes. Long reads are requests for parts, several at a
    time; reads that follow one another are fetched ahead, the more the longer they go on.
    """

    def __init__(self, at: Address, name: Path) -> None:
        self.at, self.name = at, name
        self._lock = threading.Lock()
        self._next = self._run = 0
        self._parts: deque[_Part] = deque()
        self.seen, data = self._asked(0, _HEAD, None)
        self._near = (0, data)

    @property
    def stat(self) -> os.stat_result:
        return status(self.at, self.seen)

    def __enter__(self) -> "Object":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            while self._parts:
                self._parts.popleft().data.cancel()

    def read(self, start: int, nbytes: int) -> bytes:
        data = bytearray(nbytes)
        self.read_into(memoryview(data), start)
        return bytes(data)

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill a view of bytes with those of the object from an offset; `CannotRead` if it is shorter."""
        view = view.cast("B")
        stop = start + len(view)
        if stop > self.seen.size:
            raise CannotRead(f"{self.name}: it has {self.seen.size:,} bytes, and byte {stop - 1:,} was asked for")
        with self._lock:
            low, near = self._near
            if low <= start and stop <= low + len(near):
                view[:] = near[start - low : stop - low]
            elif self._sequential(start, stop) or len(view) > PART:
                self._take_parts(view, start, stop)
            else:
                data = self._fetched(start, min(max(stop, start + _NEAR), self.seen.size))
                self._near = (start, data) if len(data) <= _NEAR else self._near
                view[:] = data[: len(view)]
            self._next = stop

    def _sequential(self, start: int, stop: int) -> bool:
        self._run = self._run + stop - start if start == self._next else 0
        return self._run >= _RUN

    def _take_parts(self, view: memoryview, start: int, stop: int) -> None:
        """Fill a view from parts that follow one another, of which the next ones are already being fetched."""
        parts, ahead = self._parts, min(stop + min(self._run, _AT_ONCE * PART), self.seen.size)
        while parts and not parts[0].start <= start < parts[0].stop:
            parts.popleft().data.cancel()
        at = start
        while at < stop:
            edge, last = parts[-1].stop if parts else at, ahead == self.seen.size
            while len(parts) < _AT_ONCE and edge < ahead and (edge < stop or edge + PART <= ahead or last):
                high = min(edge + PART, ahead)
                parts.append(_Part(edge, high, _pool(os.getpid()).submit(self._fetched, edge, high)))
                edge = high
            low, high, answer = parts[0]
            end = min(stop, high)
            view[at - start : end - start] = answer.result()[at - low : end - low]
            at = end
            if at == high:
                parts.popleft()

    def _fetched(self, start: int, stop: int) -> memoryview:
        return self._asked(start, stop, self.seen)[1]

    def _asked(self, start: int, stop: int, seen: Seen | None) -> tuple[Seen, memoryview]:
        """What the store sends of a range, tried again where a connection broke; nothing of an empty object."""
        obstore = need("obstore", extra="remote", to="open remote addresses")
        options: dict[str, Any] = {"range": (start, stop)}
        if seen is not None and seen.solid and self.at.scheme != "hf":  # the Hub sends readers elsewhere
            options["if_match"] = seen.tag
        began = time.monotonic()
        check_answers(self.at, self.name)
        while True:
            try:
                result = obstore.get(self.at.store, self.at.path, options=options)
                found, data = _seen(result.meta), memoryview(result.bytes())
            except Exception as caught:
                if seen is None and _code(caught) == 416:
                    return _UNKNOWN, memoryview(b"")
                error = caught
            else:
                if seen is not None and not found.same(seen):
                    raise _other(self.name)
                if len(data) == min(stop, found.size) - start:
                    return found, data
                error = CannotRead(f"{self.name}: the server sent {len(data):,} bytes of {stop - start:,}")
            if not _passes(error) or time.monotonic() - began > PATIENCE:
                raise failed(self.at, self.name, error, CannotRead, began) from None
            time.sleep(0.2)


def together(calls: Iterable[Callable[[], T]]) -> list[T]:
    """What functions return that ask a store, all of them at once."""
    return [answer.result() for answer in [_pool(os.getpid()).submit(call) for call in calls]]


@cache
def _pool(process: int) -> ThreadPoolExecutor:  # threads do not survive a fork
    return ThreadPoolExecutor(2 * _AT_ONCE, "paramend-remote")


# ---- what went wrong ------------------------------------------------------------------------------------------

_NO_ANSWER = f": the server does not answer, or breaks the connection; tried for {PATIENCE} seconds or longer"
_LOGIN = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "GOOGLE_SERVICE_ACCOUNT, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "hf": "HF_TOKEN",
}


# Stores that were silent → when. For some seconds they are not asked again: whoever tidies up after a failure need not
# wait as long as the first one did.
_SILENT: dict[Any, float] = {}
_REST = 10


def asked(at: Address, name: Path, call: Callable[[], T], kind: type[ParamendError] = CannotRead) -> T:
    """What a call of obstore returns. Its errors are raised in words of our own; `FileNotFoundError` stays one."""
    check_answers(at, name, kind)
    began = time.monotonic()
    try:
        return call()
    except Exception as error:
        if isinstance(error, FileNotFoundError) and kind is CannotRead:
            raise FileNotFoundError(ENOENT, "there is no such object", str(name)) from None
        raise failed(at, name, error, kind, began) from None


def check_answers(at: Address, name: Path, kind: type[ParamendError] = CannotRead) -> None:
    """Raise if a store did not answer a moment ago."""
    if time.monotonic() - _SILENT.get(at.home, -math.inf) < _REST:
        raise kind(f"{name}{_NO_ANSWER}")


def failed(at: Address, name: Path, error: Exception, kind: type[ParamendError], began: float) -> ParamendError:
    """The error to raise for one of obstore; that a store was silent all the time is kept in mind."""
    found = failure(name, error, kind)
    if _NO_ANSWER in str(found) and kind is CannotRead and time.monotonic() - began >= PATIENCE:
        _SILENT[at.home] = time.monotonic()
    return found


def failure(name: Path, error: Exception, kind: type[ParamendError] = CannotRead) -> ParamendError:
    """The error to raise for one of obstore, in words of our own."""
    if isinstance(error, ParamendError):
        return error
    text, code, sort = str(error), _code(error), type(error).__name__
    if sort == "PreconditionError" or code == 412:
        return _other(name)
    if isinstance(error, FileNotFoundError) or code == 404:
        return _told(kind(f"{name}: there is no such object, or no such bucket"), ENOENT)
    scheme = str(name).partition(":")[0]
    if sort in ("PermissionDeniedError", "UnauthenticatedError") or code in (401, 403):
        hint = f"set {_LOGIN[scheme]}" if scheme in _LOGIN else ""
        return _told(kind(f"{name}: the server refuses access", hint=hint), EACCES)
    if "InstanceCredential" in text or "169.254.169.254" in text or "metadata.google" in text:
        return kind(f"{name}: there are no credentials for it", hint=f"set {_LOGIN.get(scheme, 'them')}")
    if "on-partial" in text or "NotPartial" in text:
        return kind(f"{name}: the server ignores ranges, and sends whole files", hint="download the file first")
    if code in (429, 503):
        return kind(f"{name}: the server asks for fewer requests (status {code}); tried for {PATIENCE} seconds")
    if code:
        return kind(f"{name}: the server answers with status {code}")
    if "range" in text.lower():
        return kind(f"{name}: the server sent another range than it was asked for")
    return kind(f"{name}{_NO_ANSWER}")


def _told(error: ParamendError, number: int) -> ParamendError:
    error.__dict__["number"] = number
    return error


def _code(error: Exception) -> int:
    found = re.search(r"status(?: code)?: (\d{3})\b", str(error))
    return int(found[1]) if found else 0


def _passes(error: Exception) -> bool:
    """Whether it may pass: a connection that broke while a body was sent, which obstore does not try again."""
    text = str(error)
    spent = "RetryError" in text or "artial" in text
    return isinstance(error, CannotRead) or (type(error).__name__ == "GenericError" and not spent)


def _other(name: Path) -> CannotRead:
    reason = "the store has another version than when it was opened"
    return CannotRead(f"{name}: {reason}", hint="open the checkpoint again")
