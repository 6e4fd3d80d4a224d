import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("model", dtype="auto")
tuned = AutoModelForCausalLM.from_pretrained("tuned", dtype="auto")
with torch.no_grad():
    for mine, other in zip(model.parameters(), tuned.parameters(), strict=True):
        mine.copy_((mine.float() + other.float()) / 2)
model.save_pretrained("out")
