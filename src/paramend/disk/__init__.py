"""Bytes, locks, copies and renames that survive a crash."""
