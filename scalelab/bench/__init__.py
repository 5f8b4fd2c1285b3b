"""Benchmarks that anyone can run; each prints ratios to a baseline of the same run."""
