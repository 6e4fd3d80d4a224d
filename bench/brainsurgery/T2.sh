paramend apply T2.yaml inputs/base -o out
