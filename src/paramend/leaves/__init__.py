"""The one noun: named arrays that can be described without being read."""
