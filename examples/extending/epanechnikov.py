"""A density of one's own: Epanechnikov's parabola, p(e) = 3/4 (1 - e^2) on [-1, 1], with a name.

    python examples/extending/epanechnikov.py

Its support is compact: no run of the simulator leaves the box x ± scale, as may matter where a program crashes outside
its domain. Two methods make a density, `icdf` and `log_prob`; the others are here because closed forms keep digits that
differences lose. tests/examples/extending/test_epanechnikov.py inherits all that is asked of a density.

Reference: V. A. Epanechnikov, Theory Probab. Appl. 14 (1969) 153.
"""

from typing import final

import numpy as np
import torch

import bridge


@bridge.register("epanechnikov")
@final
class Epanechnikov(bridge.Distribution):
    """p = 3/4 (1 - e^2) for |e| < 1; s = 2 e / (1 - e^2).

    The score's variance is infinite (it grows like the logarithm), which points="auto" answers by midpoints.
    """

    symmetric = True
    fisher_information = float("inf")
    atoms = ((-1.0, 1.5), (1.0, 1.5))  # p' jumps from 0 to 3/2 at -1, and from -3/2 to 0 at 1

    def icdf(self, u):
        # The root of 2 + 3 e - e^3 = 4 u.
        return np.where(u < 0.5, -1 + _to_the_edge(u), 1 - _to_the_edge(1 - u))

    def log_prob(self, e):
        inside = np.abs(e) < 1
        return np.where(inside, np.log(0.75) + np.log1p(-(np.where(inside, e, 0.0) ** 2)), -np.inf)

    def score(self, e):
        inside = np.abs(e) < 1
        return np.where(inside, 2 * e / np.where(inside, 1 - e * e, 1.0), 0.0)

    def score_from_uniform(self, u):
        gap = _to_the_edge(np.minimum(u, 1 - u))  # 1 - |e|, of which 1 - e^2 loses the last digits
        return np.sign(u - 0.5) * 2 * (1 - gap) / (gap * (2 - gap))

    def second_score(self, e):
        inside = np.abs(e) < 1
        return np.where(inside, -2 / np.where(inside, 1 - e * e, 1.0), 0.0)


def _to_the_edge(tail):
    """1 - |e| where the tail beyond e has this mass, at most 1/2: with cos(3 a) = 1 - 2 tail, |e| = 2 cos(a + pi/3)."""
    a = 2 / 3 * np.arcsin(np.sqrt(tail))
    return np.sqrt(3) * np.sin(a) + 2 * np.sin(a / 2) ** 2


def main():
    asked = []

    def step(theta):
        """1 right of 0, else 0: there is no derivative to be had."""
        asked.append(theta[0])
        return np.array([float(theta[0] > 0)])

    x, scale = torch.tensor([0.2], dtype=torch.float64), 0.5
    smoothed = bridge.smooth(step, seed=0, num_samples=1024, scale=scale, distribution="epanechnikov")
    estimate = smoothed.estimate(x)
    at = float(x) / scale
    print(f"value {float(estimate.value):.3f}, exactly {(2 + 3 * at - at**3) / 4:.3f}")
    print(f"slope {float(estimate.jacobian()):.3f}, exactly {0.75 * (1 - at**2) / scale:.3f}")
    print(f"all runs lie within {min(asked):.3f} and {max(asked):.3f}")


if __name__ == "__main__":
    main()
