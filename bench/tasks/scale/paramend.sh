paramend scale model '**' 0.5 -o out
