import re

from safetensors.torch import load_file, save_file

tensors = load_file("model/model.safetensors")
renamed = {re.sub(r"^model\.", "decoder.", name): tensor for name, tensor in tensors.items()}
save_file(renamed, "out.safetensors", metadata={"format": "pt"})
