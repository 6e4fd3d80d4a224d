"""Where the values of a leaf come from: expressions over stored leaves."""
