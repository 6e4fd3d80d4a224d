"""Which leaves: selectors are parsed, matched, and what to say when nothing does."""
