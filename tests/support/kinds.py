"""Kinds of checkpoints that change in place, each written and read by the library that defines its format."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

BFLOAT16 = ml_dtypes.bfloat16
LEAVES = {
    "embed.weight": ((4, 6), "float32"),
    "layers.0.weight": ((3, 4), "bfloat16"),
    "layers.0.bias": ((4,), "float16"),
    "layers.1.weight": ((3, 4), "bfloat16"),
    "layers.1.bias": ((4,), "float16"),
    "step": ((), "int64"),
    "empty": ((0, 3), "float32"),
}
SETTINGS = [{"n": 2}, {"n": 1}, {"a key": [1, 2]}, {"text": "long " * 40}]
CONFIG = {"n": 1, "list": [1, 2]}


def leaves(*, without=(), bfloat16="bfloat16"):
    """Small whole numbers, which stay exact."""
    rng = np.random.default_rng(0)
    kept = {name: spec for name, spec in LEAVES.items() if name not in without}
    return {
        name: rng.integers(-8, 9, shape).astype(bfloat16 if dtype == "bfloat16" else dtype)
        for name, (shape, dtype) in kept.items()
    }


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint: `make` writes one into a folder and says where; `read` returns (leaves, configuration)."""

    make: Callable[[Path], Path]
    read: Callable[[Path], tuple[dict[str, np.ndarray], dict]]
    settings: tuple[dict, ...] = ()  # of a configuration that changes in place
    inserts: bool = False  # whether leaves can come to it in place
    relabels: bool = False  # whether leaves can go, and get other names, in place


# ---- safetensors ---------------------------------------------------------------------------------------------------


def make_file(folder):
    import safetensors.numpy

    safetensors.numpy.save_file(leaves(), folder / "model.safetensors", metadata={"format": "np"})
    return folder / "model.safetensors"


def read_file(path):
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "np"}
        return {name: file.get_tensor(name) for name in file.keys()}, {}  # noqa: SIM118


def make_single(folder):
    (folder / "model").mkdir()
    make_file(folder / "model")
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    return folder / "model"


def make_shards(folder):
    import safetensors.numpy

    path, given, homes = folder / "model", leaves(), {}
    path.mkdir()
    for n, names in enumerate((list(given)[::2], list(given)[1::2])):
        file = f"model-0000{n + 1}-of-00002.safetensors"
        safetensors.numpy.save_file({name: given[name] for name in names}, path / file, metadata={"format": "np"})
        homes |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(leaf.nbytes for leaf in given.values())}, "weight_map": homes}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def read_shards(path):
    """As transformers finds files: a single one first, then those of the index. No other may be there."""
    config, index = json.loads((path / "config.json").read_text()), path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    table = None if single.exists() else json.loads(index.read_text())
    files = {single.name} if table is None else set(table["weight_map"].values())
    beside = {"config.json"} | ({index.name} if table else set())
    assert {file.name for file in path.iterdir() if file.is_file()} == files | beside
    found = {}
    for file in sorted(files):
        inside = read_file(path / file)[0]
        assert table is None or dict.fromkeys(inside, file).items() <= table["weight_map"].items()
        found |= inside
    assert table is None or table["metadata"]["total_size"] == sum(leaf.nbytes for leaf in found.values())
    return found, config


# ---- numpy, msgpack ------------------------------------------------------------------------------------------------


def make_npz(folder):
    np.savez(folder / "model.npz", **leaves(bfloat16="float32"))
    return folder / "model.npz"


def read_npz(path):
    with np.load(path) as file:
        return dict(file), {}


def nested(flat):
    found = {}
    for name, leaf in flat.items():
        *above, last = name.split(".")
        inner = found
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = leaf
    return found


def flattened(tree, above=""):
    if not isinstance(tree, dict):
        return {above[:-1]: np.asarray(tree)}
    return {name: leaf for key, inner in tree.items() for name, leaf in flattened(inner, f"{above}{key}.").items()}


def make_msgpack(folder):
    from flax import serialization

    path = folder / "model.msgpack"
    path.write_bytes(serialization.msgpack_serialize(nested(leaves())))
    return path


def read_msgpack(path):
    from flax import serialization

    return flattened(serialization.msgpack_restore(path.read_bytes())), {}


def make_orbax(folder):
    import orbax.checkpoint as ocp

    ocp.PyTreeCheckpointer().save(folder / "model.orbax", nested(leaves(without=("empty",))))
    return folder / "model.orbax"


def read_orbax(path):
    import orbax.checkpoint as ocp

    return flattened(ocp.PyTreeCheckpointer().restore(path)), {}


# ---- torch, GGUF ---------------------------------------------------------------------------------------------------


def tensors():
    import torch

    return {
        name: torch.from_numpy(leaf.astype("float32")).bfloat16() if leaf.dtype == BFLOAT16 else torch.from_numpy(leaf)
        for name, leaf in leaves().items()
    }


def arrays(state):
    import torch

    return {
        name: leaf.view(torch.int16).numpy().view(BFLOAT16) if leaf.dtype == torch.bfloat16 else leaf.numpy()
        for name, leaf in state.items()
    }


def make_torch(folder):
    import torch

    torch.save({**tensors(), "epoch": 3}, folder / "model.pt")
    return folder / "model.pt"


def read_torch(path):
    import torch

    state = torch.load(path, weights_only=True)
    assert state.pop("epoch") == 3
    return arrays(state), {}


def make_distributed(folder):
    from support.distributed import write

    halves = [((0, 0), (2, 6)), ((2, 0), (2, 6))]
    parts = {name: (leaf, halves if name == "embed.weight" else None) for name, leaf in tensors().items()}
    return write(folder / "model.dcp", parts)


def read_distributed(path):
    import tempfile

    from support.distributed import OBJECTS, loaded

    with tempfile.TemporaryDirectory() as folder:
        state = loaded(path, Path(folder))
    found = {name: leaf for name, leaf in unrolled(state) if hasattr(leaf, "numpy")}
    assert len([name for name, leaf in unrolled(state) if not hasattr(leaf, "numpy")]) == len(OBJECTS)
    return arrays(found), {}


def unrolled(state, above=""):
    inside = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else None
    if inside is None:
        return [(above[:-1], state)]
    return [pair for key, inner in inside for pair in unrolled(inner, f"{above}{key}.")]


def make_gguf(folder):
    import gguf

    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_name("name")
    for name, leaf in leaves(without=("step", "empty")).items():
        coded = {"raw_dtype": gguf.GGMLQuantizationType.BF16} if leaf.dtype == BFLOAT16 else {}
        writer.add_tensor(name, leaf.view(np.uint8) if coded else leaf, **coded)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


def read_gguf(path):
    import gguf

    reader = gguf.GGUFReader(path)
    found = {}
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        found[tensor.name] = data.view(BFLOAT16) if tensor.tensor_type == gguf.GGMLQuantizationType.BF16 else data
    return found, {"general.name": reader.fields["general.name"].contents()}


NAMES = ({"general.name": "eman"}, {"general.name": "name"}, {"general.name": "a longer name " * 9})
KINDS = {
    "file": Kind(make_file, read_file),
    "single": Kind(make_single, read_shards, settings=tuple(SETTINGS), inserts=True),
    "shards": Kind(make_shards, read_shards, settings=tuple(SETTINGS), inserts=True),
    "npz": Kind(make_npz, read_npz),
    "msgpack": Kind(make_msgpack, read_msgpack),
    "torch": Kind(make_torch, read_torch),
    "gguf": Kind(make_gguf, read_gguf, settings=NAMES),
    "dcp": Kind(make_distributed, read_distributed, relabels=True),
    "orbax": Kind(make_orbax, read_orbax),
}
