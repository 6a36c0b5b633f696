"""From a target to parameters: the problem, its misfit, and how well the answer is known."""
