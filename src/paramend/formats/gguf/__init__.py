"""GGUF, the files of llama.cpp: keys with values, and tensors of floats or of quantised blocks."""
