import json
import re
from pathlib import Path

from safetensors.torch import load_file, save_file

old = load_file("model/model.safetensors")
tensors = {name: tensor for name, tensor in old.items() if ".layers." not in name}
order = [0, 1, 2, 3, 3, 4, 5, 6, 7, 7]
for new, n in enumerate(order):
    for name, tensor in old.items():
        if name.startswith(f"model.layers.{n}."):
            tensor = tensor.clone()
            if new in (4, 9) and re.search(r"(o_proj|down_proj)\.weight$", name):
                tensor.zero_()
            tensors[name.replace(f".{n}.", f".{new}.", 1)] = tensor
Path("out").mkdir()
save_file(tensors, "out/model.safetensors", metadata={"format": "pt"})
config = json.loads(Path("model/config.json").read_text())
config["num_hidden_layers"] = len(order)
Path("out/config.json").write_text(json.dumps(config, indent=2))
