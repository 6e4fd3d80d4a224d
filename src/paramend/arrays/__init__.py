"""The same verbs over numpy, JAX and torch arrays."""
