"""Changes of sound input: bytes, text, and structure with its lengths and checksums made true again."""

import copy
import hashlib
import io
import json
import pickletools
import struct
import warnings
import zipfile
from itertools import pairwise

import numpy as np
import yaml

NUMBERS = [0, 1, -1, 2, 7, 8, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30]
TEXTS = ["", "/", "..", "../x", "a/../b", "/etc/passwd", "\0", "\\", "x" * 300, "F32", "I4", "BF16", "ü", "\ud800"]
TEXTS += ["a." * 120, "__metadata__", "data_offsets", "shape", "model.safetensors", "con:", "\x1b[31m", "."]
PIECES = [b"", b"\0", b"\xff" * 4, bytes(8), b"{", b"}", b"[" * 200, b'"', b",", b"9" * 40, b"-", b"\n", b"PK\3\4"]


def of_bytes(rng, raw):
    """Bytes changed, cut out, put in, doubled or cut off."""
    raw = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        at = rng.randrange(len(raw) + 1)
        length = rng.choice([1, 1, 2, 4, 8, 64])
        match rng.randrange(8):
            case 0 | 1:
                raw[at : at + 1] = bytes([rng.randrange(256)])
            case 2:
                raw[at : at + length] = b""
            case 3:
                raw[at:at] = rng.choice([rng.randbytes(length), rng.choice(PIECES)])
            case 4:
                raw[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 2**31, 2**32 - 1, rng.randrange(2**32)]))
            case 5:
                raw[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**63, 2**64 - 1, len(raw), rng.randrange(999)]))
            case 6:
                raw[at:at] = raw[at : at + length * rng.choice([1, 8])]
            case 7:
                del raw[at if rng.random() < 0.3 else len(raw) :]
    return bytes(raw)


def of_json(rng, table):
    """A JSON value with some of its values, keys or entries replaced."""
    table = copy.deepcopy(table)
    for _ in range(rng.choice([1, 1, 2, 3])):
        places = [*walked(table)]
        node, key = rng.choice(places)
        value = rng.choice(
            [
                rng.choice(NUMBERS),
                rng.choice(TEXTS),
                rng.choice([None, True, False, 0.5, 1e308, -0.0, [], {}, [[]], {"a": {}}]),
                [rng.choice(NUMBERS) for _ in range(rng.choice([1, 2, 2, 3, 70]))],
                copy.deepcopy(rng.choice(places)[0]),
            ]
        )
        if isinstance(node, dict) and rng.random() < 0.3:
            new = rng.choice([*TEXTS, *(k for n, k in places if isinstance(n, dict))])
            node[new] = node.pop(key) if rng.random() < 0.7 else copy.deepcopy(node[key])
        elif rng.random() < 0.15:
            node.pop(key)
        elif isinstance(node[key], int) and rng.random() < 0.5:
            node[key] = node[key] + rng.choice([-8, -4, -1, 1, 4, 8])
        else:
            node[key] = value
        if not isinstance(table, dict) or not table:
            break
    text = json.dumps(table, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        text = text.replace(b"{", b'{"a": ' + b"[" * 2000 + b"]" * 2000 + b", ", 1)
    if rng.random() < 0.15:
        at = text.find(b'": ', rng.randrange(len(text)))
        start = text.rfind(b'"', 0, at)
        if start >= 0:
            text = text[:start] + text[start : at + 3] + b"1, " + text[start:]  # a duplicate key
    return of_bytes(rng, text) if rng.random() < 0.1 else text


def walked(node):
    for key, child in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(child, dict | list):
            yield from walked(child)


def of_zip(rng, raw):
    """A zip file with records changed, renamed, left out or packed, its own checksums true."""
    with zipfile.ZipFile(io.BytesIO(raw)) as old:
        records = [(name, old.read(name)) for name in old.namelist()]
    chosen = rng.randrange(len(records))
    if rng.random() < 0.7:  # what says how the rest is to be read
        chosen = next((i for i, (name, _) in enumerate(records) if name.endswith(".pkl")), chosen)
    name, data = records[chosen]
    match rng.randrange(10):
        case 0:
            records.pop(chosen)
        case 1:
            records[chosen] = (
                rng.choice(["x", "../x", "/x", "x/data.pkl", "x/data/0", "x/", "a" * 300, "w.npy"]),
                data,
            )
        case 2:
            records.append((rng.choice(["x/data/9", "x/code/a.py", "x/constants.pkl", "y/data.pkl", "z.npy"]), data))
        case _:
            pickled = name.endswith(".pkl") and rng.random() < 0.7
            records[chosen] = (name, (of_pickle if pickled else of_bytes)(rng, data))
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(out, "w", method) as new:
            for name, data in records:
                new.writestr(name, data)
    return out.getvalue()


def of_table(rng, raw):
    """JSON changed as JSON, if it is some."""
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError):
        table = None
    # Deep nesting is for the readers, not for the functions that change it.
    return of_json(rng, table) if table and isinstance(table, dict) and raw.count(b"[") < 500 else of_bytes(rng, raw)


def of_header(rng, raw):
    length = int.from_bytes(raw[:8], "little")
    if rng.random() < 0.3 or length > len(raw):
        return of_bytes(rng, raw)
    text = of_table(rng, raw[8 : 8 + length])
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def of_archive(rng, raw):
    try:
        return of_bytes(rng, raw) if rng.random() < 0.3 else of_zip(rng, raw)
    except Exception:  # what is no zip file any more, in one of many ways
        return of_bytes(rng, raw)


def framed(kind, payload):
    data = struct.pack("<4sQ", kind, len(payload)) + payload
    return data + hashlib.sha256(data).digest()


def of_frames(rng, raw):
    """An undo record with a frame changed, left out or doubled, its digests true."""
    frames, at = [], 8
    while at + 12 <= len(raw):
        kind, length = struct.unpack_from("<4sQ", raw, at)
        frames.append((kind, raw[at + 12 : at + 12 + length]))
        at += 12 + length + 32
    if not frames or rng.random() < 0.1:
        return of_bytes(rng, raw)
    chosen = rng.randrange(len(frames))
    kind, payload = frames[chosen]
    match rng.randrange(8):
        case 0:
            frames.pop(chosen)
        case 1:
            frames.insert(rng.randrange(len(frames) + 1), (kind, payload))
        case _:
            frames[chosen] = (kind, of_table(rng, payload))
    return raw[:8] + b"".join(framed(*frame) for frame in frames)


def of_sealed(rng, raw):
    """The manifest of a delta, with the digest that it begins with made true."""
    head = len(b'{\n"sha256":""') + 65
    return sealed(of_table(rng, b"{" + raw[head:])[1:])


def sealed(text):
    """The manifest of a delta: the digest of the text, which follows."""
    return b'{\n"sha256":"' + hashlib.sha256(text).hexdigest().encode() + b'",' + text


def of_words(*words):
    """Text with words of a language put in, left out and doubled."""

    def change(rng, raw):
        text = raw.decode("utf-8", "replace")
        for _ in range(rng.choice([1, 1, 2, 3, 8])):
            at = rng.randrange(len(text) + 1)
            stop = min(len(text), at + rng.choice([0, 1, 1, 2, 5, 20]))
            text = (
                text[:at]
                + rng.choice([rng.choice(words), text[at:stop] * 2, "", chr(rng.randrange(1, 300))])
                + text[stop:]
            )
        return text[:2000].encode()

    return change


def of_lines(rng, raw):
    """Lines of JSON, one of them changed, left out or doubled."""
    lines = raw.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at : at + 1] = rng.choice([[of_table(rng, lines[at])] * rng.choice([1, 1, 1, 2]), [], [rng.choice(lines)]])
    return b"\n".join(lines)


def of_steps(rng, raw):
    """YAML, changed as the data that it is; aliases and the like are for `of_words`."""
    try:
        table = yaml.safe_load(raw)
    except Exception:  # what is no YAML any more, in one of many ways
        table = None
    return of_json(rng, table) if table and isinstance(table, dict) and len(raw) < 20_000 else of_bytes(rng, raw)


# ---- of formats ----------------------------------------------------------------------------------------------------


def of_pickle(rng, raw):
    """A pickle with instructions changed, left out, doubled or moved."""
    try:
        starts = [at for *_, at in pickletools.genops(raw)]
    except Exception:  # what is no pickle any more, in one of many ways
        return of_bytes(rng, raw)
    steps = [raw[start:stop] for start, stop in pairwise([*starts, len(raw)])]
    values = [at for at, step in enumerate(steps) if step[:1] in b"NKMJGXB])}\x88\x89\x8a\x8c"]
    for _ in range(rng.choice([1, 1, 2, 3])):
        at, other = rng.randrange(len(steps)), rng.randrange(len(steps))
        if values and rng.random() < 0.6:  # which leaves the pickle one that can be read
            steps[rng.choice(values)] = rng.choice([rng.choice(VALUES), steps[rng.choice(values)]])
            continue
        match rng.randrange(5):
            case 0:
                steps[at : at + rng.choice([1, 1, 2, 5])] = [b""]
            case 1:
                steps.insert(at, steps[other])
            case 2:
                steps[at] = steps[other]
            case 3:
                steps[at], steps[other] = steps[other], steps[at]
            case 4:
                steps[at] = of_bytes(rng, steps[at])
    return b"".join(steps)


VALUES = [b"N", b"\x88", b"K\0", b"K\xff", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"]", b"}", b")"]
VALUES += [
    b"(K\1K\2t",
    b"G" + b"\x7f\xf0" + bytes(6),
    *(b"X" + struct.pack("<I", len(t)) + t for t in (b"", b"../x", b"a.b")),
]


def of_gguf(rng, raw):
    """A GGUF file with a key or a tensor changed, left out or doubled, the counts and what follows true."""
    try:
        keys, infos, data = parts_of_gguf(raw)
    except (struct.error, IndexError, OverflowError):
        return of_bytes(rng, raw)
    if rng.random() < 0.1 or not (keys and infos):
        return of_bytes(rng, raw)
    some = rng.choice([keys, infos])
    at = rng.randrange(len(some))
    match rng.randrange(8):
        case 0:
            some.pop(at)
        case 1:
            some.insert(at, rng.choice(some))
        case 2:
            text = rng.choice([*TEXTS, "general.alignment", "split.count", "llama.block_count", "general", "." * 2000])
            data_of = text.encode("utf-8", "surrogatepass")
            some[at] = (
                struct.pack("<Q", len(data_of)) + data_of + some[at][8 + int.from_bytes(some[at][:8], "little") :]
            )
        case _:
            some[at] = of_numbers(rng, some[at])
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(infos), len(keys)) + b"".join(keys + infos)
    return head + bytes(-len(head) % 32) + data


def of_numbers(rng, piece):
    """A key or tensor of a GGUF file with a number in it replaced."""
    first = 8 + int.from_bytes(piece[:8], "little")
    at, width = rng.choice([0, *range(first, len(piece), 4)]), rng.choice([4, 4, 8])
    value = rng.choice([*NUMBERS, rng.randrange(40), rng.randrange(1 << 20)]) % (1 << 8 * width)
    return piece[:at] + value.to_bytes(width, "little") + piece[at + width :]


def parts_of_gguf(raw):
    """The keys and tensors of a GGUF file, each as its bytes, and all that follows."""
    tensors, count = struct.unpack_from("<QQ", raw, 8)
    at, keys, infos = 24, [], []
    for _ in range(count):
        start = at
        at += 8 + struct.unpack_from("<Q", raw, at)[0]
        at = after_value(raw, at + 4, struct.unpack_from("<I", raw, at)[0])
        keys.append(raw[start:at])
    for _ in range(tensors):
        start = at
        at += 8 + struct.unpack_from("<Q", raw, at)[0]
        at += 4 + 8 * struct.unpack_from("<I", raw, at)[0] + 12
        raw[at - 1]
        infos.append(raw[start:at])
    return keys, infos, raw[at + -at % 32 :]


def after_value(raw, at, kind):
    """Where a value ends."""
    if kind == 8:
        return at + 8 + struct.unpack_from("<Q", raw, at)[0]
    if kind != 9:
        return at + {0: 1, 1: 1, 2: 2, 3: 2, 7: 1, 10: 8, 11: 8, 12: 8}.get(kind, 4)
    inner, count = struct.unpack_from("<IQ", raw, at)
    at += 12
    if inner not in (8, 9):
        return at + count * (after_value(raw, 0, inner))
    for _ in range(count):
        at = after_value(raw, at, inner)
    return at


def of_sharding(rng, raw):
    """A safetensors file of a sharded checkpoint, with what it says of the places of its tensors changed."""
    try:
        length = int.from_bytes(raw[:8], "little")
        table = json.loads(raw[8 : 8 + length])
        said = table["__metadata__"]
        said["DCP_SHARDING_INFO"] = of_table(rng, said["DCP_SHARDING_INFO"].encode()).decode("utf-8", "replace")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return of_header(rng, raw)
    if rng.random() < 0.2:
        return of_header(rng, raw)
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def of_streams(rng, raw):
    """The file of a delta of slime, with what its streams hold changed, or the file itself."""
    import safetensors
    import safetensors.numpy
    import zstandard

    try:
        streams = safetensors.numpy.load(raw)
        length = int.from_bytes(raw[:8], "little")
        metadata = json.loads(raw[8 : 8 + length]).get("__metadata__")
        name = rng.choice(sorted(streams))
        held = zstandard.ZstdDecompressor().decompressobj().decompress(streams[name].tobytes())
        packed = zstandard.ZstdCompressor(level=1).compress(of_bytes(rng, held))
    except (ValueError, IndexError, safetensors.SafetensorError, zstandard.ZstdError):
        return of_header(rng, raw)
    if rng.random() < 0.4:
        return of_header(rng, raw)
    return safetensors.numpy.save(streams | {name: np.frombuffer(packed, np.uint8)}, metadata)
