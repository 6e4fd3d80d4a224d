"""The presentation of results: tables, words, progress, and the base of every report."""
