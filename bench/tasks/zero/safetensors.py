from safetensors.torch import load_file, save_file

tensors = load_file("model/model.safetensors")
tensors["model.layers.7.mlp.down_proj.weight"].zero_()
save_file(tensors, "out.safetensors", metadata={"format": "pt"})
