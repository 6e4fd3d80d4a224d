"""Carrying out a plan into a new checkpoint."""
