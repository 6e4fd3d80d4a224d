"""A plan carried out into a new checkpoint."""
