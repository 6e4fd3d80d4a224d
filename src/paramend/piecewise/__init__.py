"""Edits of a leaf in bounded memory."""
