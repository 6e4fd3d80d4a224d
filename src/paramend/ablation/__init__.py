"""What a model scores without each of its parts."""
