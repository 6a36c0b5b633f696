"""Self-contained simulators with known answers."""
