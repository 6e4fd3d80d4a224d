paramend extract tuned model --rank 8 -o out
