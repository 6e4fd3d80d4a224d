import torch
from safetensors.torch import load_file, save_file

tensors = load_file("model/model.safetensors")
tensors = {name: tensor.to(torch.float16) for name, tensor in tensors.items()}
save_file(tensors, "out.safetensors", metadata={"format": "pt"})
