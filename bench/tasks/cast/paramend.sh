paramend cast model '**' float16 -o out
