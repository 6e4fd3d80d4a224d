"""Containers in memory: how each kind is opened and closed."""
