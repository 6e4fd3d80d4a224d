"""Models and optimizers that start from the leaves of others."""
