import copy

import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("model", dtype="auto")
layers = []
for n, layer in enumerate(model.model.layers):
    layers.append(layer)
    if n in (3, 7):
        block = copy.deepcopy(layer)
        with torch.no_grad():
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        layers.append(block)
model.model.layers = torch.nn.ModuleList(layers)
model.config.num_hidden_layers = len(layers)
model.save_pretrained("out")
