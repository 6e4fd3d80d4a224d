"""Optimizer states that follow a model into its new shape."""
