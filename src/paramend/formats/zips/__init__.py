"""Zip archives whose members are uncompressed: where each is, and the headers around it."""
