paramend fold model adapter -o out
