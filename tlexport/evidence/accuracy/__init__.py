"""Answers held against the reference's on the same samples: drops with intervals, tests, slices, calibration."""
