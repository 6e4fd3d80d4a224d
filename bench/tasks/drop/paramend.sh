paramend deepen model --drop 3,4 -o out
