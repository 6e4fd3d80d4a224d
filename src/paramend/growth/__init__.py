"""More layers, fewer, or others, made of those there are."""
