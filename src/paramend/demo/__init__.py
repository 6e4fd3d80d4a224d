"""The demo: five surgeries on a classifier of handwritten digits, each with evidence that it did what it claims."""
