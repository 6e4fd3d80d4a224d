from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained("bigger")
model = AutoModelForCausalLM.from_pretrained("model", config=config, ignore_mismatched_sizes=True, dtype="auto")
model.save_pretrained("out")
