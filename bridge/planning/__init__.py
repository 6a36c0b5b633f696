"""What a step costs on a number of ranks, before it is run there."""
