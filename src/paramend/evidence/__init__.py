"""What differs between trees, and what their values are like: the work behind `diff`, `verify` and `stats`."""
