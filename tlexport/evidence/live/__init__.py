"""What the answers of a live server say about the model behind it."""
