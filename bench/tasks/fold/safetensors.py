import json
from pathlib import Path

from safetensors.torch import load_file, save_file

tensors, terms = load_file("model/model.safetensors"), load_file("adapter/adapter_model.safetensors")
config = json.loads(Path("adapter/adapter_config.json").read_text())
for name, up in terms.items():
    if name.endswith("lora_B.weight"):
        down = terms[name.replace("lora_B", "lora_A")]
        place = name.removeprefix("base_model.model.").replace(".lora_B", "")
        change = config["lora_alpha"] / config["r"] * up @ down
        tensors[place] = (tensors[place].float() + change).to(tensors[place].dtype)
save_file(tensors, "out.safetensors", metadata={"format": "pt"})
