"""What is different in one model, as files that make it of another."""
