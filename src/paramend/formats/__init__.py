"""One checkpoint format each, and how a file is told to be of it."""
