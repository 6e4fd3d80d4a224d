"""What a file held before it was patched, and putting it back."""
