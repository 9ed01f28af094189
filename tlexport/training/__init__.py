"""Fitting a backbone to a task: one loop, three strategies, exact repeats and exact resumes."""
