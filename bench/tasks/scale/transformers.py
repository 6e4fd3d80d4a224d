import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("model", dtype="auto")
with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(0.5)
model.save_pretrained("out")
