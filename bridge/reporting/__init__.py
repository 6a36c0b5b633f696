"""What a fit says, while it runs and at its end, to people and to programs."""
