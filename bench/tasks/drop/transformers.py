import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("model", dtype="auto")
layers = [layer for n, layer in enumerate(model.model.layers) if n not in (3, 4)]
model.model.layers = torch.nn.ModuleList(layers)
model.config.num_hidden_layers = len(layers)
model.save_pretrained("out")
