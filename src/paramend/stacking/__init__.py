"""Layers side by side, or stacked along one axis."""
