paramend experts moe --keep 0,2,5,7 -o out
