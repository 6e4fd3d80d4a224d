paramend merge model tuned -o out
