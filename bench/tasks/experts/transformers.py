import torch
from transformers import AutoModelForCausalLM

model, keep = AutoModelForCausalLM.from_pretrained("moe", dtype="auto"), [0, 2, 5, 7]
for layer in model.model.layers:
    experts, gate = layer.mlp.experts, layer.mlp.gate
    experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj[keep])
    experts.down_proj = torch.nn.Parameter(experts.down_proj[keep])
    gate.weight = torch.nn.Parameter(gate.weight[keep])
model.config.num_experts = len(keep)
model.save_pretrained("out")
