import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("model", dtype="auto")
with torch.no_grad():
    model.model.layers[-1].mlp.down_proj.weight.zero_()
model.save_pretrained("out")
