"""Models made of several."""
