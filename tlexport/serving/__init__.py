"""The Open Inference Protocol v2: a server for one box and tests, a client, and the protocol both speak."""
