"""One checkpoint format each, and how it is recognised."""
