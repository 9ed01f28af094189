"""The stages: one file each. Each reads the run or the bundle and adds to it; none imports another (flow joins them)."""
