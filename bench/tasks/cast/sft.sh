sft cast model/model.safetensors --dtype float16 -o out.safetensors
