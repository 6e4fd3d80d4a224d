"""Freezing: leaves that training leaves where they are, in optax and in torch."""
