import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

base, tuned, terms = load_file("model/model.safetensors"), load_file("tuned/model.safetensors"), {}
for name, tensor in tuned.items():
    change = tensor.float() - base[name].float()
    if change.any():
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        place = "base_model.model." + name.removesuffix(".weight")
        terms[f"{place}.lora_B.weight"] = (u[:, :8] * s[:8]).contiguous()
        terms[f"{place}.lora_A.weight"] = v[:8].contiguous()
Path("out").mkdir()
save_file(terms, "out/adapter_model.safetensors", metadata={"format": "pt"})
config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}
Path("out/adapter_config.json").write_text(json.dumps(config))
