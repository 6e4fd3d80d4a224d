paramend graft model --into bigger --mismatch overlap -o out
