"""Orbax directories, read and written through tensorstore."""
