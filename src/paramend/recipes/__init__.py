"""Edits as text."""
