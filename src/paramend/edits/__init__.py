"""The table of edits, their plan, and `pm.at`."""
