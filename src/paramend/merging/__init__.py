"""Models made of several: adapters folded into a base and taken out of a tuned model."""
