"""From sums to tensors: simulators as PyTorch functions, their estimates, their surrogates."""
