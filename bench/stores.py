"""Obstore and fsspec against one S3 server on loopback: `python bench/stores.py`, with the extra `far` and s3fs."""

import importlib.metadata
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.stores import Files, Server, environment

SHARDS, HEAD, PART, PARTS = 64, 1 << 17, 8 << 20, 24


def obstore():
    import obstore as library
    from obstore.store import S3Store

    store = S3Store(Server.bucket, client_options={"allow_http": True})

    def ranges(asked):
        def one(it):
            return bytes(library.get_range(store, it[0], start=it[1], end=it[2]))

        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(one, asked))

    def write(key, pieces):
        library.put(store, key, pieces, use_multipart=True, chunk_size=5 << 20, max_concurrency=4)

    return ranges, write


def s3fs():
    import s3fs as library

    system = library.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"])

    def ranges(asked):
        keys, starts, stops = zip(*asked, strict=True)
        return system.cat_ranges([f"{Server.bucket}/{key}" for key in keys], list(starts), list(stops))

    def write(key, pieces):
        with system.open(f"{Server.bucket}/{key}", "wb", block_size=5 << 20) as file:
            for piece in pieces:
                file.write(piece)

    return ranges, write


def size_of(*names):
    """How many distributions a library needs, and how many bytes they take."""
    found, left = set(), list(names)
    while left:
        name = left.pop()
        if name in found:
            continue
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        left += [re.split(r"[^\w.-]", each)[0].lower() for each in needs if "extra ==" not in each]
    files = [file for name in found for file in importlib.metadata.files(name) or []]
    return len(found), sum(path.stat().st_size for file in files if (path := Path(file.locate())).is_file())


def peak():
    """The most memory that this process has taken, in MB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def measure(name):
    libraries = {"obstore": obstore, "s3fs": s3fs}
    began = time.perf_counter()
    ranges, write = libraries[name]()
    said = {"import and client, s": time.perf_counter() - began}
    for what, asked in (
        (f"{SHARDS} headers, s", [(f"shard-{n}", 0, HEAD) for n in range(SHARDS)]),
        (f"{PARTS} ranges of 8 MiB, MB/s", [("long", n * PART, n * PART + PART) for n in range(PARTS)]),
    ):
        times = []
        for _ in range(3):
            began = time.perf_counter()
            assert sum(map(len, ranges(asked))) == sum(stop - start for _, start, stop in asked)
            times.append(time.perf_counter() - began)
        said[what] = min(times) if "header" in what else PARTS * PART / min(times) / 1e6
    os.environ["AWS_ENDPOINT_URL"] = os.environ["SINK"]  # the other one only reads
    _, write = libraries[name]()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    began = time.perf_counter()
    write("written", (bytes(1 << 20) for _ in range(192)))
    said["192 MiB written, MB/s"] = (192 << 20) / (time.perf_counter() - began) / 1e6
    said["peak of memory meanwhile, MB"] = peak() - before
    return said


def main():
    if len(sys.argv) > 1:
        for what, value in measure(sys.argv[1]).items():
            print(f"{sys.argv[1]:8} {what:34} {value:10.3g}")
        return
    server = Server()
    source = Files(
        {f"/models/shard-{number}": bytes(HEAD) for number in range(SHARDS)} | {"/models/long": bytes(PART * PARTS)}
    )
    settings = {**environment(source.url), "SINK": f"http://127.0.0.1:{server.port}"}
    try:
        for name, needs in (("obstore", ["obstore"]), ("s3fs", ["s3fs", "gcsfs", "adlfs"])):
            count, nbytes = size_of(*needs)
            print(f"{name:8} {'distributions, and MB of files':34} {count:6} {nbytes / 1e6:.0f}")
            subprocess.run([sys.executable, __file__, name], env={**os.environ, **settings}, check=True)
    finally:
        server.stop()


if __name__ == "__main__":
    main()
