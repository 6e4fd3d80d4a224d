"""Zip files of `torch.save`: the pickle in them is read without running it."""
