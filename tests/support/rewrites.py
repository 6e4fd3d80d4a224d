"""Rewrites of every verb and format, small: what workers, resumed runs and other processes must write like one run."""

import hashlib
import json
from pathlib import Path

import numpy as np

import paramend as pm

WIDTH = 32


def tree(scale=1.0, *, layers=4):
    rng = np.random.default_rng(7)
    names = [f"layers.{n}.{name}.weight" for n in range(layers) for name in ("fc", "proj")]
    found = {name: (scale * rng.standard_normal((WIDTH, WIDTH))).astype("float32") for name in names}
    return found | {
        "head.bias": rng.standard_normal(5).astype("float16"),
        "step": np.int64(7),
        "empty": np.ones((0, 2)),
    }


def shards(path, scale=1.0):
    if path.exists():
        return path
    pm.save(tree(scale), path, max_shard_size=3 * WIDTH * WIDTH * 4)
    (path / "config.json").write_text(json.dumps({"model_type": "tiny", "num_hidden_layers": 4}))
    return path


def file(path, scale=1.0):
    if not path.exists():
        pm.save(tree(scale), path)
    return path


def model(folder, kind="shards"):
    """A checkpoint of a kind: a directory with shards, or a file with a suffix."""
    path = folder / ("model" if kind == "shards" else f"model{kind}")
    return (shards if kind == "shards" else file)(path)


def adapter(folder):
    """An adapter for one of the leaves."""
    path = folder / "adapter"
    path.mkdir(exist_ok=True)
    name = "base_model.model.layers.1.fc.lora_{}.weight"
    rng = np.random.default_rng(3)
    given = {name.format("A"): rng.standard_normal((2, WIDTH)), name.format("B"): rng.standard_normal((WIDTH, 2))}
    pm.save(
        {key: value.astype("float32") for key, value in given.items()}, path / "adapter_model.safetensors", force=True
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc"]}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


def edited(old):
    """A checkpoint with edits of all sorts, one of which overflows."""
    old = pm.at(old, "**.fc.weight").noise(0.1, seed=3)
    old = pm.at(old, "**.proj.weight").cast("float16")
    old = pm.at(old, "layers.0.proj.weight").multiply(6e4)
    old = pm.at(old, "layers.1.fc.weight")[2:5].fill(0.25)
    old = pm.at(old, "layers.2.fc.weight").zero()
    return pm.at(old, "layers.3.fc.weight").rename("last.weight")


def deepened(old):
    return pm.deepen(old, layers="layers[*]", order=[0, 1, 1, 2, 3, 3], identity=None)[0]


def quantized(old):
    return pm.quantize(old, "layers.*.fc.weight", scheme="int8")[0]


# Verb → what it makes of a folder: an edited checkpoint.
VERBS = {
    "edit": lambda folder: edited(pm.open(model(folder))),
    "delete": lambda folder: pm.at(pm.open(model(folder)), "layers.1.**").delete(),
    "copy": lambda folder: pm.open(model(folder)),
    "graft": lambda folder: pm.graft(
        pm.open(file(folder / "target.safetensors", 0)),
        pm.open(file(folder / "donor.npz", 2)),
        rename={"layers.<n>.fc.weight": "layers.<n>.proj.weight", "layers.<n>.proj.weight": "layers.<n>.fc.weight"},
    )[0],
    "graft of other shapes": lambda folder: pm.graft(
        pm.open(model(folder)), pm.open(wider(folder / "wider.npz")), mismatch="overlap", unused="ok"
    )[0],
    "graft from memory": lambda folder: pm.graft(pm.open(model(folder)), tree(3.0))[0],
    "merge": lambda folder: pm.merge(
        [pm.open(model(folder)), pm.open(shards_again(folder))], how="ties", base=pm.open(model(folder)), density=0.5
    )[0],
    "fold": lambda folder: pm.fold(pm.open(model(folder)), adapter(folder))[0],
    "quantize": lambda folder: quantized(pm.open(model(folder))),
    "dequantize": lambda folder: pm.dequantize(pm.open(coded(folder)), "**")[0],
    "an edit of codes": lambda folder: pm.at(pm.open(coded(folder)), "layers.*.fc.weight").add(0.5),
    "deepen": lambda folder: deepened(pm.open(model(folder))),
    "concat": lambda folder: pm.concat(
        pm.open(model(folder)), ["layers.<n>.fc.weight", "layers.<n>.proj.weight"], into="layers.<n>.both.weight"
    ),
}


def wider(path):
    rng = np.random.default_rng(1)
    return file_of(path, {"layers.0.fc.weight": rng.standard_normal((WIDTH + 3, WIDTH - 2)).astype("float32")})


def file_of(path, given):
    if not path.exists():  # another file would be another donor
        pm.save(given, path)
    return path


def shards_again(folder):
    return shards(folder / "other", 1.5)


def coded(folder):
    path = folder / "coded"
    if path.exists():
        return path
    quantized(pm.open(model(folder))).save(f"{path}/", max_shard_size=3000)
    return path


def content(path):
    """What is there: the name, permissions and digest of each file."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    return [
        (each.name if path.is_dir() else "", each.stat().st_mode, hashlib.sha256(each.read_bytes()).hexdigest())
        for each in files
    ]


def left(folder):
    """What writers left beside their outputs."""
    return [path.name for path in Path(folder).iterdir() if path.name.startswith(".paramend-")]
