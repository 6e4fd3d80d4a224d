"""A model, and its optimizer, that start from the leaves of another."""
