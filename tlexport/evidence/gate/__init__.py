"""Is a new build slower or less accurate than an old one? Rules whose false alarms were measured, and where baselines are kept."""
