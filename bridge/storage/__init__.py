"""What outlives a process: evaluations, the state of a run, files that are whole or not there."""
