"""Grafts of optimizer states, which follow those of their models."""
