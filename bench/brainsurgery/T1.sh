paramend deepen inputs/base --drop 2,5,8 -o out
