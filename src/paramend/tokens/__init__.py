"""Models with more tokens, or fewer: the rows of their tables, their tokenizers and configurations together."""
