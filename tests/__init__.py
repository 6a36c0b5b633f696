"""Tests: a folder for each of those that are tested, `lab` for what tests share, `benchmarks`."""
