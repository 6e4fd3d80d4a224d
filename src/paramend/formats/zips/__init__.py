"""Zip archives whose members are stored as they are: where each lies, and what is written before it."""
