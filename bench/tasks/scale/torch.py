import torch

tensors = torch.load("model.pt")
torch.save({name: tensor * 0.5 for name, tensor in tensors.items()}, "out.pt")
