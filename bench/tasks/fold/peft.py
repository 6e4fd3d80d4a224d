from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("model", dtype="auto")
PeftModel.from_pretrained(model, "adapter").merge_and_unload().save_pretrained("out")
