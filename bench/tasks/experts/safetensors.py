import json
import re
from pathlib import Path

from safetensors.torch import load_file, save_file

keep, tensors = [0, 2, 5, 7], {}
for name, tensor in load_file("moe/model.safetensors").items():
    found = re.match(r"(.*\.experts)\.(\d+)\.(.*)", name)
    if name.endswith(".mlp.gate.weight"):
        tensors[name] = tensor[keep]
    elif not found:
        tensors[name] = tensor
    elif int(found[2]) in keep:
        tensors[f"{found[1]}.{keep.index(int(found[2]))}.{found[3]}"] = tensor
Path("out").mkdir()
save_file(tensors, "out/model.safetensors", metadata={"format": "pt"})
config = json.loads(Path("moe/config.json").read_text())
config["num_experts"] = len(keep)
Path("out/config.json").write_text(json.dumps(config, indent=2))
