"""Containers in memory: how each kind opens and closes."""
