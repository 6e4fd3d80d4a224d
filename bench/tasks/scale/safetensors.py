from safetensors.torch import load_file, save_file

tensors = load_file("model/model.safetensors")
for tensor in tensors.values():
    tensor.mul_(0.5)
save_file(tensors, "out.safetensors", metadata={"format": "pt"})
