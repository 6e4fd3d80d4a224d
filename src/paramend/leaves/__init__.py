"""Named arrays that can be described without being read."""
