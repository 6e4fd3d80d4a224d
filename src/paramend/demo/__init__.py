"""The demo: five surgeries on a classifier of handwritten digits, each with the evidence that it did what it says."""
