paramend zero large.safetensors lm_head.weight --in-place
