"""Measurements, one question a file; the results in `results/` say when, where and with what they were taken."""
