"""Directories of slime, made and read here as slime makes and reads them, with torch tensors as their bytes."""

import json
import zlib

import blake3
import numpy as np
import pytest
import safetensors.numpy
import torch
import xxhash
import zstandard

import paramend as pm
from paramend.errors import BadArgument, BadCheckpoint, MissingExtra, UnexpectedChange, Unsupported

CHECKSUMS = {
    "xxh3-128": lambda data: xxhash.xxh3_128_hexdigest(data),
    "blake3": lambda data: blake3.blake3(data).hexdigest(),
    "adler32": lambda data: f"{zlib.adler32(data):08x}",
}
INDEX = "model.safetensors.index.json"


def models():
    rng = np.random.default_rng(0)
    before = {f"layers.{n}.w": rng.normal(size=(30, 20)).astype("float32") for n in range(3)}
    before |= {"norm": np.ones(50, "float16"), "same": np.arange(9)}
    after = {name: array.copy() for name, array in before.items()}
    for name in ("layers.0.w", "layers.2.w", "norm"):
        after[name].reshape(-1)[::13] = rng.normal()
    after["norm"][3] = np.nan
    return before, after


def stream(old, new, encoding):
    """The bytes that slime compresses for a tensor."""
    old, new = (np.frombuffer(array.tobytes(), np.uint8) for array in (old, new))
    if encoding == "xor":
        return (old ^ new).tobytes()
    places = [place for place in range(len(old)) if old[place] != new[place]]
    numbers = b"".join(number.to_bytes(4, "little") for number in [len(places), *places])
    return numbers + bytes(new[place] for place in places)


def slime(folder, before, after, encoding="xor", checksum="adler32", version=7, **more):
    """A directory of slime; the leaves in two files, as two ranks write them."""
    folder.mkdir(parents=True)
    names = [name for name in before if before[name].tobytes() != after[name].tobytes()]
    weight_map = {}
    for n, some in enumerate((names[:1], names[1:])):
        file = f"model-{n:05d}-of-00002.safetensors"
        packed = {
            name: np.frombuffer(
                zstandard.ZstdCompressor(level=1).compress(stream(before[name], after[name], encoding)), np.uint8
            )
            for name in some
        }
        sums = {name: CHECKSUMS[checksum](after[name].tobytes()) for name in some}
        safetensors.numpy.save_file(packed, folder / file, sums)
        weight_map |= dict.fromkeys(some, file)
    metadata = {"version": f"{version:06d}", "base_version": f"{version - 1:06d}", "delta_encoding": encoding}
    metadata |= {"compression_format": "zstd", "checksum_format": checksum} | more
    (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))
    return folder


def pull(folder, before):
    """What an engine of slime makes of a base, and the checksums of that, which it compares."""
    table = json.loads((folder / INDEX).read_text())
    metadata, made = table["metadata"], {name: bytearray(array.tobytes()) for name, array in before.items()}
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, "np") as opened:
            names = opened.keys()
            for name in names:
                data = zstandard.ZstdDecompressor().stream_reader(opened.get_tensor(name).tobytes()).read()
                if metadata["delta_encoding"] == "xor":
                    assert len(data) == len(made[name])
                    made[name] = bytearray(a ^ b for a, b in zip(made[name], data, strict=True))
                else:
                    count, *places = np.frombuffer(data[: 4 + 4 * int.from_bytes(data[:4], "little")], "<u4").tolist()
                    for place, value in zip(places, data[4 + 4 * count :], strict=True):
                        made[name][place] = value
                assert CHECKSUMS[metadata["checksum_format"]](made[name]) == opened.metadata()[name]
    return metadata, {
        name: np.frombuffer(made[name], array.dtype).reshape(array.shape) for name, array in before.items()
    }


def same(one, two):
    assert {n: np.asarray(a).tobytes() for n, a in one.items()} == {n: np.asarray(a).tobytes() for n, a in two.items()}


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
@pytest.mark.parametrize("checksum", CHECKSUMS)
def test_what_slime_wrote_is_applied(encoding, checksum, tmp_path):
    before, after = models()
    folder = slime(tmp_path / "weight_v000007", before, after, encoding, checksum)
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(before, path)
    found = pm.Delta.load(folder)
    assert found and len(found.of_kind("changed")) == 3
    with pm.open(path) as base:
        found.apply(base).save(tmp_path / "out.safetensors")
    same(safetensors.numpy.load_file(tmp_path / "out.safetensors"), after)
    pm.patch(path, found.apply)
    same(safetensors.numpy.load_file(path), after)
    assert pm.patch(path, found.apply).record is None  # a second time, xor would take it back
    same(safetensors.numpy.load_file(path), after)
    pm.undo(path)
    same(safetensors.numpy.load_file(path), before)
    torch.save({name: torch.from_numpy(array) for name, array in before.items()}, tmp_path / "a.pt")
    pm.patch(tmp_path / "a.pt", found.apply)
    same(torch.load(tmp_path / "a.pt"), after)


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_what_slime_applied_in_part_is_completed(encoding, tmp_path):
    before, after = models()
    found = pm.Delta.load(slime(tmp_path / "weight_v000007", before, after, encoding))
    same(found.apply(before | {"norm": after["norm"]}), after)


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_another_base_is_refused(encoding, tmp_path):
    before, after = models()
    found = pm.Delta.load(slime(tmp_path / "weight_v000007", before, after, encoding))
    other = before | {"norm": before["norm"] * np.float16(2)}
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(other, path)
    with pytest.raises(UnexpectedChange, match="norm: its bytes differ"):
        pm.patch(path, found.apply)
    same(safetensors.numpy.load_file(path), other)
    with pytest.raises((UnexpectedChange, BadCheckpoint)):
        found.apply(before | {"norm": np.ones(60, "float16")})
    with pytest.raises(UnexpectedChange, match=r"layers\.0\.w: there is none"):
        found.apply({name: before[name] for name in before if name != "layers.0.w"})


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
@pytest.mark.parametrize("checksum", CHECKSUMS)
def test_slime_reads_what_is_written(encoding, checksum, tmp_path):
    before, after = models()
    found = pm.delta(before, after, encoding=encoding, checksum=checksum)
    folder = found.save(tmp_path / "weight_v000012", slime=True)
    metadata, made = pull(folder, before)
    same(made, after)
    assert metadata == {
        "version": "000012",
        "base_version": "000011",
        "delta_encoding": encoding,
        "compression_format": "zstd",
        "checksum_format": checksum,
    }
    assert sorted(file.name for file in folder.iterdir()) == ["model-00000-of-00001.safetensors", INDEX]
    same(pm.Delta.load(folder).apply(before), after)


def test_what_slime_cannot_express_is_refused(tmp_path):
    before, after = models()
    for bad in (pm.delta(before, after), pm.delta(before, after | {"new": np.ones(1)}, checksum="adler32")):
        with pytest.raises(Unsupported, match="slime"):
            bad.save(tmp_path / "D", slime=True)
        assert not (tmp_path / "D").exists()
    slimed = pm.Delta.load(slime(tmp_path / "weight_v000007", before, after))
    for wrong in (lambda: slimed.then(slimed), lambda: slimed.save(tmp_path / "D")):
        with pytest.raises(Unsupported):
            wrong()
    assert not (tmp_path / "D").exists()


@pytest.mark.parametrize(
    "more",
    [{"delta_encoding": "add"}, {"compression_format": "lz4"}, {"checksum_format": "md5"}, {"checksum_format": 3}],
)
def test_unknown_forms_are_refused(more, tmp_path):
    before, after = models()
    folder = slime(tmp_path / "weight_v000007", before, after)
    table = json.loads((folder / INDEX).read_text())
    table["metadata"] |= more
    (folder / INDEX).write_text(json.dumps(table))
    with pytest.raises((Unsupported, BadArgument)):
        pm.Delta.load(folder)


def packed(data):
    return np.frombuffer(zstandard.ZstdCompressor().compress(data), np.uint8)


@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        ("xor", packed(bytes(99))),
        ("xor", packed(bytes(101))),
        ("xor", packed(bytes(1 << 26))),
        ("xor", packed(bytes(100))[:-3]),
        ("xor", np.zeros(9, "uint8")),
        ("overwrite", packed(b"")),
        ("overwrite", packed(b"\xff\xff\xff\xff" + bytes(50))),
        ("overwrite", packed(b"\1\0\0\0" + (100).to_bytes(4, "little") + b"x")),
        ("overwrite", packed(b"\2\0\0\0\5\0\0\0\3\0\0\0xy")),
        ("overwrite", packed(b"\1\0\0\0\5\0\0\0")),
        ("overwrite", packed(b"\1\0\0\0\5\0\0\0xyz")),
    ],
)
def test_hostile_streams_are_refused_and_nothing_is_written(encoding, data, tmp_path):
    before, after = models()
    folder = slime(tmp_path / "weight_v000007", {"norm": before["norm"]}, {"norm": after["norm"]}, encoding)
    file = folder / "model-00000-of-00002.safetensors"
    with safetensors.safe_open(file, "np") as opened:
        metadata = opened.metadata()
    safetensors.numpy.save_file({"norm": data}, file, metadata)
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(before, path)
    old = path.read_bytes()
    with pytest.raises((BadCheckpoint, UnexpectedChange)):
        pm.patch(path, pm.Delta.load(folder).apply)
    assert path.read_bytes() == old


def test_the_package_that_is_missing_is_named(monkeypatch, tmp_path):
    import sys

    before, after = models()
    folder = slime(tmp_path / "weight_v000007", before, after)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingExtra, match=r"zstandard is needed.*pip install 'paramend\[deltas\]'(?s:.*)"):
        try:
            pm.Delta.load(folder).apply(before)
        except MissingExtra as error:
            raise MissingExtra(str(error).replace("\n", " ")) from None
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(MissingExtra, match="xxhash is needed to compute xxh3-128"):
        pm.delta(before, after, checksum="xxh3-128")
