"""A live server: run one, prove that it answers as the bundle does, load it to its limit."""
