"""Servers on loopback: one that speaks S3, a proxy with faults before it, and a web server of imagined files."""

import contextlib
import http.client
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from urllib.parse import unquote

KEYS = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "hidden-key-of-the-test"}
_SIGNED = "AWS4-HMAC-SHA256 Credential=someone/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


class Server:
    """A server process that speaks S3, with one bucket."""

    bucket = "models"

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "moto.server", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while True:
            assert self.process.poll() is None
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
            except OSError:
                time.sleep(0.05)
            else:
                break
        self.ask("PUT", f"/{self.bucket}")

    def ask(self, method, path, body=None):
        headers = {"Authorization": _SIGNED, "Content-Type": "application/octet-stream"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, headers, method=method)
        with urllib.request.urlopen(request) as answer:
            return answer.read()

    def put(self, key, body):
        self.ask("PUT", f"/{self.bucket}/{key}", body)

    def get(self, key):
        return self.ask("GET", f"/{self.bucket}/{key}")

    def keys(self, prefix=""):
        found = self.ask("GET", f"/{self.bucket}?list-type=2&prefix={prefix}").decode()
        return sorted(unquote(each.partition("</Key>")[0]) for each in found.split("<Key>")[1:])

    def uploads(self):
        """How many uploads were begun, and neither finished nor aborted."""
        return self.ask("GET", f"/{self.bucket}?uploads").count(b"<UploadId>")

    def stop(self):
        self.process.kill()
        self.process.wait()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(OSError):  # a client that has seen enough
            super().handle()

    def finish(self):
        with contextlib.suppress(OSError):
            super().finish()

    def _do(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.server.owner.answer(self, body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _do  # noqa: N815

    def reply(self, status, headers, body, *, cut=None):
        """Send an answer; after `cut` bytes of it, break the connection."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.reset()

    def reset(self):
        self.close_connection = True
        self.wfile.flush()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


class _Web:
    """A server in a thread; `seen` lists the requests: (method, path, range)."""

    def __init__(self):
        self.seen = []
        self.sent = 0
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.daemon_threads = True
        self.server.owner = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class Proxy(_Web):
    """Hands requests on to another server. `fault(method, path, number)` says what happens to one instead: a status,
    "reset", "hang", ("cut", bytes), ("short", bytes) or "whole", which ignores its range; None: nothing."""

    def __init__(self, port):
        self.port, self.fault, self.count = port, lambda *_: None, 0
        super().__init__()

    def answer(self, asked, body):
        self.seen.append((asked.command, asked.path, asked.headers.get("range")))
        self.count += 1
        fault = self.fault(asked.command, asked.path, self.count)
        if isinstance(fault, int):
            asked.reply(fault, {"content-length": "0"}, b"")
            return
        if fault == "hang":
            time.sleep(300)
        if fault == "reset":
            asked.reset()
            return
        headers = dict(asked.headers)
        if fault == "whole":
            headers = {name: value for name, value in headers.items() if name.lower() != "range"}
        onward = http.client.HTTPConnection("127.0.0.1", self.port)
        onward.request(asked.command, asked.path, body, headers)
        answer = onward.getresponse()
        data = answer.read()
        drop = ("transfer-encoding", "connection", "date", "server")
        given = {name: value for name, value in answer.getheaders() if name.lower() not in drop}
        given = {"content-length": str(len(data)), **{name.lower(): value for name, value in given.items()}}
        cut = None
        if isinstance(fault, tuple):
            kind, count = fault
            data, cut = (data[:count], None) if kind == "short" else (data, count)
            given |= {"content-length": str(count)} if kind == "short" else {}
        asked.reply(answer.status, given, data, cut=cut)
        self.sent += len(data)


class Files(_Web):
    """A web server with ranges. A file is bytes, or (bytes, length): what follows them is zero."""

    def __init__(self, files, *, tags=True, login="", moved=None):
        self.files, self.tags, self.login, self.moved = dict(files), tags, login, moved
        self.headers = []
        super().__init__()

    def answer(self, asked, _):
        path, _, query = asked.path.partition("?")
        self.seen.append((asked.command, asked.path, asked.headers.get("range")))
        self.headers.append(dict(asked.headers))
        if self.login and self.login not in (asked.headers.get("authorization"), query):
            asked.reply(403, {"content-length": "0"}, b"")
            return
        if self.moved is not None and (to := self.moved(path)):
            asked.reply(302, {"location": to, "content-length": "0"}, b"")
            return
        held = self.files.get(unquote(path))
        if held is None:
            asked.reply(404, {"content-length": "0"}, b"")
            return
        head, size = (held, len(held)) if isinstance(held, bytes) else held
        tag = {"etag": f'"{size}-{hash(head)}"'} if self.tags else {}
        given = {"accept-ranges": "bytes", "last-modified": "Sat, 28 Nov 2026 08:00:00 GMT", **tag}
        if asked.headers.get("if-match", tag.get("etag")) != tag.get("etag"):
            asked.reply(412, {"content-length": "0"}, b"")
            return
        start, stop, status = 0, size, 200
        if said := asked.headers.get("range"):
            first, _, last = said.removeprefix("bytes=").partition("-")
            start, stop, status = int(first), min(int(last) + 1, size), 206
            if start >= size:
                asked.reply(416, {"content-length": "0"}, b"")
                return
            given["content-range"] = f"bytes {start}-{stop - 1}/{size}"
        given["content-length"] = str(stop - start)
        body = b"" if asked.command == "HEAD" else head[start:stop].ljust(stop - start, b"\0")
        self.sent += len(body)
        asked.reply(status, given, body)


def hub(files, revision="main", token=""):
    """A server that answers as the Hub does for a repository `owner/name`, and one it sends readers of weights to."""
    store = Files({f"/cdn/{name}": data for name, data in files.items()}, login="signature=of-the-hub")
    base = f"/owner/name/resolve/{revision}/"
    rows = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()]
    api = {f"/api/models/owner/name/tree/{revision}": json.dumps(rows).encode()}
    own = {base + name: data for name, data in files.items() if name.endswith(".json")}

    def moved(path):
        name = path.removeprefix(base)
        return f"{store.url}/cdn/{name}?signature=of-the-hub" if name in files and path not in own else None

    return Files(api | own, login=f"Bearer {token}" if token else "", moved=moved), store


def environment(url):
    return {**KEYS, "AWS_ENDPOINT_URL": url, "PATH": os.environ["PATH"]}
