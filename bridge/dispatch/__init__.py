"""Dispatch: evaluates rows and reduces sums, in one process or over ranks."""
