paramend deepen model --blocks 2 -o out
