import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("bigger", dtype="auto")
shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
tensors = {name: tensor for name, tensor in torch.load("model.pt").items() if tensor.shape == shapes[name]}
model.load_state_dict(tensors, strict=False)
torch.save(model.state_dict(), "out.pt")
