import json
import re
from pathlib import Path

from safetensors.torch import load_file, save_file

places = {old: new for new, old in enumerate([0, 1, 2, 5, 6, 7])}
tensors = {}
for name, tensor in load_file("model/model.safetensors").items():
    found = re.match(r"model\.layers\.(\d+)\.(.*)", name)
    if not found:
        tensors[name] = tensor
    elif int(found[1]) in places:
        tensors[f"model.layers.{places[int(found[1])]}.{found[2]}"] = tensor
Path("out").mkdir()
save_file(tensors, "out/model.safetensors", metadata={"format": "pt"})
config = json.loads(Path("model/config.json").read_text())
config["num_hidden_layers"] = len(places)
Path("out/config.json").write_text(json.dumps(config, indent=2))
