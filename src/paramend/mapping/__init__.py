"""Reversible maps between two ways to store a model."""
