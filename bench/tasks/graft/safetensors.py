from safetensors.torch import load_file, save_file

tensors = load_file("bigger/model.safetensors")
for name, tensor in load_file("model/model.safetensors").items():
    tensors[name][tuple(map(slice, tensor.shape))] = tensor
save_file(tensors, "out.safetensors", metadata={"format": "pt"})
