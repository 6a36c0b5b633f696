"""From the rows of a design to outputs and their sums: what runs where, and what failed."""
