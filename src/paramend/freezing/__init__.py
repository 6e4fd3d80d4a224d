"""Freezing: leaves that training does not move, in optax and in torch."""
