"""Distributed checkpoints of torch (DCP): tensors in chunks over several files, and `.metadata` that says where."""
