"""What people write today to zero one tensor of a checkpoint; each makes its output durable.

`python bench/peers.py WAY SOURCE OUT NAME`
"""

import json
import os
import subprocess
import sys
from pathlib import Path


def by_safetensors(source, out, name):
    from safetensors.torch import load_file, save_file

    tensors = load_file(source)
    tensors[name].zero_()
    save_file(tensors, out, metadata={"format": "pt"})


def by_torch(source, out, name):
    import torch

    tensors = torch.load(source, mmap=True, weights_only=True)
    tensors[name] = torch.zeros_like(tensors[name])
    torch.save(tensors, out)


def to_torch(source, out, name):
    """Makes the file that `by_torch` reads; not measured."""
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(source), out)


def by_transformers(source, out, name):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    with torch.no_grad():
        model.get_parameter(name).zero_()
    model.save_pretrained(out)


def by_mergekit(source, out, name):
    layers = depth_of(source)
    scale = {"scale": [{"filter": "down_proj", "value": 0.0}, {"value": 1.0}]}
    merge(source, out, [*([(0, layers - 1, None)] if layers > 1 else []), (layers - 1, layers, scale)])


def deepened_by_mergekit(source, out, count):
    """So many identity layers more, spread evenly, as LLaMA-Pro puts them."""
    layers, count = depth_of(source), int(count)
    scale = {"scale": [{"filter": part, "value": 0.0} for part in ("o_proj", "down_proj")] + [{"value": 1.0}]}
    slices, start = [], 0
    for n in range(1, count + 1):
        stop = n * layers // count
        slices += [(start, stop, None), (stop - 1, stop, scale)]
        start = stop
    merge(source, out, slices)


def depth_of(source):
    return json.loads(Path(source, "config.json").read_text())["num_hidden_layers"]


def merge(source, out, slices):
    """Runs mergekit on slices of one model: (first layer, the one after the last, parameters)."""
    table = []
    for start, stop, parameters in slices:
        one = {"model": source, "layer_range": [start, stop]}
        table.append({"sources": [one | ({"parameters": parameters} if parameters else {})]})
    recipe = Path(f"{out}.yaml")
    recipe.write_text(json.dumps({"merge_method": "passthrough", "slices": table, "dtype": "bfloat16"}))
    tool = Path(sys.executable).with_name("mergekit-yaml")
    subprocess.run([tool, recipe, out, "--no-copy-tokenizer"], check=True, stdout=2)


WAYS = {
    "safetensors": by_safetensors,
    "torch": by_torch,
    "to-torch": to_torch,
    "transformers": by_transformers,
    "mergekit": by_mergekit,
    "mergekit-deepen": deepened_by_mergekit,
}

if __name__ == "__main__":
    way, source, out, name = sys.argv[1:]
    WAYS[way](source, out, name)
    files = [path for path in (Path(out), *Path(out).rglob("*")) if path.is_file()]
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
