from safetensors.torch import load_file, save_file

tensors, others = load_file("model/model.safetensors"), load_file("tuned/model.safetensors")
for name, tensor in tensors.items():
    tensors[name] = ((tensor.float() + others[name].float()) / 2).to(tensor.dtype)
save_file(tensors, "out.safetensors", metadata={"format": "pt"})
