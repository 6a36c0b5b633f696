"""All that is known before a run: densities, points, scales, designs, covariates."""
