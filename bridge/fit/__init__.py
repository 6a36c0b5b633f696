"""A run: optimiser, history, checkpoint, stop reason."""
