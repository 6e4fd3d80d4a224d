"""How results are told: tables, words, progress, and the base of every report."""
