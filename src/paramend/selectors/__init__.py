"""Selectors: their grammar, how they match, renames, and near misses when nothing matches."""
