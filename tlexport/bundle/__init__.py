"""The deployable directory: what is in it, why it was chosen, and the hash of every byte."""
