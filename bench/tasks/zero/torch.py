import torch

tensors = torch.load("model.pt", mmap=True)
name = "model.layers.7.mlp.down_proj.weight"
tensors[name] = torch.zeros_like(tensors[name])
torch.save(tensors, "out.pt")
