"""What a configuration says of a model: its layers and their kinds, and what is known of each family."""
