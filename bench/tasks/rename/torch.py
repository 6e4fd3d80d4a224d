import re

import torch

tensors = torch.load("model.pt", mmap=True)
torch.save({re.sub(r"^model\.", "decoder.", name): tensor for name, tensor in tensors.items()}, "out.pt")
