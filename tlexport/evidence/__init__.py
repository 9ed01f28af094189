"""Evidence: numbers about a model: how sure a drop is, parity, latency, the machine, and the report."""
