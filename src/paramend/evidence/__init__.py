"""Differences between trees and statistics of their values: the work behind `diff`, `verify` and `stats`."""
