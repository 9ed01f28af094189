"""Evidence: numbers about a model: how sure a drop is, how long a call takes, whether a build is worse, the machine, the report."""
