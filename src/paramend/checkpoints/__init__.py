"""`open`, `load`, `save` and `patch`: a model on disk as a tree."""
