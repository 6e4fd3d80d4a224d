import torch

tensors = torch.load("model.pt")
torch.save({name: tensor.half() for name, tensor in tensors.items()}, "out.pt")
