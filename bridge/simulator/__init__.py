"""What a simulator is: a black box and its parameters, what wraps it, which one it is, its name."""
